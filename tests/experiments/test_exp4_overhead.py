"""exp4_overhead: rows, map costs and a figure from a small layer."""

from __future__ import annotations

import csv

import pytest
from fluxmoe.experiments.lib.results import UsageError
from fluxmoe.experiments.paper import fig10_overhead as exp4_overhead

SMALL = [
    "--device",
    "cpu",
    "--layers",
    "2",
    "--experts",
    "4",
    "--top-k",
    "2",
    "--hidden",
    "64",
    "--moe-intermediate",
    "48",
]


def test_measures_both_kernels_on_all_memories(tmp_path, capsys):
    exp4_overhead.main([*SMALL, "--batches", "1", "5", "--repeats", "4", "--out", str(tmp_path)])
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert {(r["kernel"], r["memory"]) for r in rows} == {
        ("table", "stacked"), ("table", "apart"), ("table", "paged"), ("torch", "stacked"), ("torch", "paged")
    }  # fmt: skip
    assert all(float(r["time_us"]) > 0 for r in rows)
    assert {float(r["overhead_percent"]) for r in rows if r["memory"] == "stacked"} == {0}
    costs = {r["call"]: float(r["time_us"]) for r in csv.DictReader((tmp_path / "map_costs.csv").open())}
    assert costs.keys() == {"map", "unmap", "remap"}
    assert (tmp_path / "overhead.png").stat().st_size > 5000
    assert "overhead" in capsys.readouterr().out


def test_senseless_sizes_are_refused(tmp_path):
    with pytest.raises(UsageError, match="at least 1"):
        exp4_overhead.main([*SMALL, "--batches", "0", "--out", str(tmp_path)])
