"""fig9_adaptation: KV grows where it may, tokens agree, and the figure is drawn."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from fluxmoe.experiments.commands.main import call
from fluxmoe.experiments.lib.checkpoints import make_checkpoint
from fluxmoe.experiments.lib.results import UsageError
from fluxmoe.experiments.paper import fig9_adaptation
from fluxmoe.runtime.experts.placement import Tier, place


def test_steps_are_spread_or_not():
    tiers = place("packed", 4, 6).tiers
    spread = fig9_adaptation.moves_of_step(tiers, spread=True)
    assert sorted((m.layer, m.expert) for m in spread) == [(layer, 5) for layer in range(4)]
    unspread = fig9_adaptation.moves_of_step(tiers, spread=False)
    assert [(m.layer, m.expert) for m in unspread] == [(3, 5), (3, 4), (3, 3), (3, 2)]
    empty = np.full((2, 3), Tier.HOST, dtype=np.int8)
    assert fig9_adaptation.moves_of_step(empty, spread=True) == []


def test_kv_takes_what_experts_leave(tmp_path, capsys):
    model = make_checkpoint(
        "olmoe", tmp_path / "m", layers=3, experts=8, top_k=2, hidden=128, moe_intermediate=120, heads=4, vocab=512,
        max_positions=128,
    )  # fmt: skip
    small = "--device cpu --max-batch 16 --budget 5800KiB --prompt-tokens 8 --output-tokens 40 --requests 16 --start 10"
    given = ["--model", str(model), *small.split(), "--every", "8", "--times", "4"]
    call(["paper", "fig9", *given, "--out", str(tmp_path / "out")])
    rows = list(csv.DictReader((tmp_path / "out" / "steps.csv").open()))
    kv = {v: [int(r["kv_bytes"]) for r in rows if r["variant"] == v] for v in fig9_adaptation.VARIANTS}
    assert len(set(kv["static"])) == len(set(kv["hold"])) == 1
    assert max(kv["grow"]) > kv["grow"][0]
    left = {v: int([r for r in rows if r["variant"] == v][-1]["device_experts"]) for v in fig9_adaptation.VARIANTS}
    assert 12 <= left.pop("planned") <= 24
    assert left == {"static": 24, "hold": 12, "grow": 12, "unspread": 12}
    assert "tokens: identical" in capsys.readouterr().out
    assert (tmp_path / "out" / "adaptation.png").stat().st_size > 5000
    with pytest.raises(UsageError, match="would leave no"):
        call(["paper", "fig9", *given, "--times", "8", "--out", str(tmp_path / "none")])
