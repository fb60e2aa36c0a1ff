"""bench_packing and fig5_exponents: what they write for a small checkpoint, and their errors."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from fluxmoe.experiments.commands.main import call
from fluxmoe.experiments.lib.checkpoints import make_checkpoint
from fluxmoe.experiments.lib.results import UsageError
from fluxmoe.experiments.paper import fig5_exponents
from fluxmoe.kernels.formats import codec_of, compressed_formats


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    out = tmp_path_factory.mktemp("models") / "moe"
    return make_checkpoint(
        arch="olmoe", out=out, layers=2, experts=4, top_k=2, hidden=128, moe_intermediate=128, heads=2, vocab=512,
        dtype="bfloat16", seed=0,
    )  # fmt: skip


def test_entropy_of_known_histograms():
    assert fig5_exponents.entropy(np.array([4, 4, 4, 4, 0])) == pytest.approx(2)
    assert fig5_exponents.entropy(np.array([7])) == 0


def test_exponents_are_those_of_trained_weights(model_dir, tmp_path, capsys):
    call(["paper", "fig5", "--model", str(model_dir), "--out", str(tmp_path)])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["experts"] == 8
    assert summary["weights"] == 8 * 3 * 128 * 128
    assert 2.3 < summary["exponent_entropy_bits"] < 3
    assert summary["mantissa_entropy_bits"] > 6.9
    rows = list(csv.DictReader((tmp_path / "histogram.csv").open()))
    assert sum(int(row["count"]) for row in rows if row["field"] == "exponent") == summary["weights"]
    assert (tmp_path / "exponents.png").stat().st_size > 10_000
    assert "bits a weight" in capsys.readouterr().out


def test_formats_are_between_the_bound_and_16_bits(model_dir, tmp_path):
    call(["bench", "packing", "--model", str(model_dir), "--experts", "3", "--out", str(tmp_path)])
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert {(row["format"], row["tensor"]) for row in rows} == {
        (name, tensor) for name in compressed_formats() for tensor in ("gate_up", "down")
    }
    for row in rows:
        assert int(row["weights"]) == 3 * 128 * 128 * (2 if row["tensor"] == "gate_up" else 1)
        # All mantissa bits are in use, so that one format stores weights as they are.
        most = 16.01 if codec_of(row["format"]).lost_bits else 12.2
        assert float(row["bound_bits"]) < float(row["bits_per_weight"]) < most
        assert row["zero_mantissa_bits"] == "0"


@pytest.mark.parametrize("command", ["bench packing", "paper fig5"])
def test_fp32_checkpoints_are_refused(command, tmp_path):
    model = make_checkpoint(
        arch="mixtral", out=tmp_path / "m", layers=1, experts=2, hidden=32, moe_intermediate=32, heads=2, vocab=300,
        dtype="float32",
    )  # fmt: skip
    with pytest.raises(UsageError, match="bfloat16"):
        call([*command.split(), "--model", str(model), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
