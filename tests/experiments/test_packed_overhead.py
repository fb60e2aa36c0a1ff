"""packed_overhead: ratios to resident, with tokens that agree."""

from __future__ import annotations

import csv

import pytest
from fluxmoe.experiments.lib.checkpoints import make_checkpoint
from fluxmoe.experiments.lib.results import UsageError
from fluxmoe.experiments.serving import packed_overhead


def test_every_way_of_holding_experts_is_compared_with_resident(tmp_path):
    model = make_checkpoint(
        "olmoe", tmp_path / "m", layers=2, experts=4, hidden=128, moe_intermediate=128, heads=2, vocab=512,
        max_positions=64,
    )  # fmt: skip
    small = ["--model", str(model), "--device", "cpu", "--prompt-tokens", "5", "--output-tokens", "4", "--repeats", "2"]
    packed_overhead.main(
        [*small, "--batches", "1", "3", "--placements", "packed", "packed+tiered", "--out", str(tmp_path / "out")]
    )
    rows = list(csv.DictReader((tmp_path / "out" / "rows.csv").open()))
    assert [(r["placement"], r["batch"]) for r in rows] == [
        (placement, batch) for batch in ("1", "3") for placement in ("resident", "packed", "packed+tiered")
    ]
    assert all(float(r["over_resident"]) == 1 for r in rows if r["placement"] == "resident")
    assert all(float(r["decode_tokens_per_s"]) > 0 for r in rows)
    with pytest.raises(UsageError, match="at least 1"):
        packed_overhead.main([*small, "--batches", "0", "--out", str(tmp_path / "none")])
