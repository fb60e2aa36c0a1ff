"""bench_attention on a CPU: rows of both layouts, and no option that does nothing."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from fluxmoe.experiments import bench_attention
from fluxmoe.experiments.common import UsageError

TINY = [
    "--device",
    "cpu",
    "--shapes",
    "tiny",
    "--sequences",
    "2",
    "--contexts",
    "33",
    "--prompts",
    "17",
    "--turns",
    "5",
]


def test_a_row_for_each_point(tmp_path):
    bench_attention.main([*TINY, "--out", str(tmp_path)])
    rows = pd.read_csv(tmp_path / "rows.csv")
    assert rows[["sequences", "queries", "context"]].values.tolist() == [[2, 1, 33], [1, 17, 17]]
    assert (rows.ratio_p25 <= rows.slabs_over_contiguous).all()
    # Blocks of 16 tokens, 3 layers, K and V of 2 heads of 16 in bf16.
    assert rows.kv_bytes.tolist() == [6 * 16 * 3 * 2 * 2 * 16 * 2, 2 * 16 * 3 * 2 * 2 * 16 * 2]
    assert json.loads((tmp_path / "provenance.json").read_text())["device"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([*TINY, "--shapes", "mixtral"], "no memory for mixtral; choose qwen3_30b"),
        ([*TINY, "--turns", "4"], "--turns must be at least 5, got 4"),
        ([*TINY, "--rehearse"], "with --device cpu all is measured"),
        (["--turns", "5"], "--turns is for --device cpu"),
    ],
)
def test_options_that_would_do_nothing(tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        bench_attention.main([*options, "--out", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()
