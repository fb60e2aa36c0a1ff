"""bench_cpu_moe: a row for each number of rows an expert, and which limit it is held against."""

from __future__ import annotations

import pytest
import torch
from fluxmoe.experiments.bench import cpu_moe as bench_cpu_moe


@pytest.mark.parametrize("peers", [pytest.param(False, marks=pytest.mark.thorough), True])
def test_row_for_each_number_of_rows(monkeypatch, peers):
    monkeypatch.setattr(bench_cpu_moe, "SHAPES", {"tiny": (64, 128, 3)})
    monkeypatch.setattr(bench_cpu_moe, "_COLD_BYTES", 1)
    monkeypatch.setattr(bench_cpu_moe, "_SECONDS", 0.0)
    torch.manual_seed(0)

    rows = bench_cpu_moe.bench("tiny", (1, 5), bandwidth=1e9, flops_rate=1e9, peers=peers)

    assert [row["rows_per_expert"] for row in rows] == [1, 5]
    # 6·64·128·3 bytes at 1 GB/s against 1 and 5 times as many operations at 1 GFLOP/s.
    assert [row["floor"] for row in rows] == ["bandwidth", "flops"]
    assert all(("over_torch_bf16" in row) == peers for row in rows)
