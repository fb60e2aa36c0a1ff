"""The paper's figures on the simulator, and `plan`: small runs of each, and what they do with what cannot be."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import pytest
from fluxmoe.experiments import (
    exp1_performance_bound,
    exp2_capacity_bound,
    fig1_memory,
    fig2_kv_capacity,
    fig6_knee,
    plan,
    sensitivity,
)
from fluxmoe.experiments.common import UsageError
from fluxmoe.experiments.paper_plots import plot_exp1
from fluxmoe.experiments.paper_sweep import calibrated, speed, sweep
from fluxmoe.experiments.paper_systems import SYSTEMS, Calibration, Run, calibrate, simulate
from fluxmoe.models.published import published_config
from fluxmoe.runtime.hardware import HardwareProfile

CALIBRATION = {"launch_s": 8e-5, "host_link_shared": 34e9, "huffman_bandwidth": 260e9}
OLMOE = published_config("olmoe-1b-7b")


@pytest.fixture
def calibration(tmp_path):
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps({"calibration": CALIBRATION}))
    return path


def test_a_sweep_keeps_what_cannot_start(tmp_path, calibration):
    runs = [("batch", Run(system, OLMOE, 1, 4, 256, alpha=0.875)) for system in SYSTEMS]
    runs += [("context", Run(system, OLMOE, 1, 4, context)) for system in SYSTEMS for context in (64, 256)]
    runs += [("batch", Run("vllm", OLMOE, 1, 8, 256, budget=1 << 30))]
    rows = sweep(runs, tmp_path / "out", calibration)
    assert [row["status"] for row in rows] == ["ok"] * 18 + ["too_small"]
    assert "the least that works" in rows[-1]["reason"]
    assert speed(rows, "batch", "ours", 4, 256) > speed(rows, "batch", "fluxmoe", 4, 256) > 0
    assert len(list(csv.DictReader((tmp_path / "out" / "points.csv").open()))) == 19
    assert plot_exp1(tmp_path / "out").stat().st_size > 5000
    about = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert about["simulated"]
    assert about["calibration"] == CALIBRATION


def test_calibration_meets_its_three_figures():
    base = HardwareProfile.load("4xL40")
    model = published_config("qwen3-30b-a3b")
    found = calibrate(base, model, halvings=12)
    assert isinstance(found, Calibration)

    def at(system):
        return simulate(Run(system, model, 4, 32, 4096), found.profile(base), found.parameters)["tokens_per_s"]

    assert at("vllm") == pytest.approx(6 * 54.6, rel=0.05)
    assert at("vllm-o") == pytest.approx(54.6, rel=0.05)
    assert at("fluxmoe") == pytest.approx(0.639 * 6 * 54.6, rel=0.05)


def test_a_calibration_is_kept(tmp_path, calibration):
    profile, found = calibrated(calibration)
    assert profile.decode_bandwidth["huffman"] == 260e9
    assert profile.host_bandwidth_each == 8.5e9
    assert found.parameters.eager_launch_s == 8e-5


@pytest.mark.parametrize("module", [exp1_performance_bound, exp2_capacity_bound, fig2_kv_capacity])
def test_all_figures_are_taken_from_runs_that_are_made(module):
    rows = [
        {"panel": panel, "system": run.system, "batch": run.batch, "context": run.context, "tokens_per_s": 2.0}
        for panel, run in module.runs()
    ]
    for name, (_, ours) in module.ratios(rows).items():
        assert ours in (2.0, 1.0, 0.0), name


def test_memory_and_knee(tmp_path, capsys):
    fig1_memory.main(["--out", str(tmp_path / "fig1")])
    rows = list(csv.DictReader((tmp_path / "fig1" / "points.csv").open()))
    at_256 = next(row for row in rows if (row["batch"], row["context"]) == ("256", "4096"))
    assert int(at_256["kv_cache"]) == 256 * 4096 * 12 * 2 * 2 * 256 * 2
    fig6_knee.main(
        ["--model", "olmoe-1b-7b", "--profile", "H100-SXM", "--batches", "1", "4", "--out", str(tmp_path / "fig6")]
    )
    assert capsys.readouterr().out.count("loads hide down to") == 4
    rows = list(csv.DictReader((tmp_path / "fig6" / "points.csv").open()))
    dense = [float(r["load_s"]) for r in rows if r["host_format"] == "dense" and r["batch"] == "1"]
    packed = [float(r["load_s"]) for r in rows if r["host_format"] == "planar12" and r["batch"] == "1"]
    assert dense == sorted(dense, reverse=True)
    assert dense[-1] == 0
    assert packed[0] == pytest.approx(0.75 * dense[0], rel=0.02)


def test_plan_says_what_fits_and_what_helps(tmp_path, capsys):
    small = ["--config", "olmoe-1b-7b", "--gpu", "H100-SXM", "--batch", "4", "--context", "256"]
    plan.main([*small, "--json", str(tmp_path / "plan.json")])
    out = capsys.readouterr().out
    assert "Simulated." in out
    assert "best: --placement" in out
    saved = json.loads((tmp_path / "plan.json").read_text())
    assert len(saved["rows"]) == len(plan.CANDIDATES)
    assert saved["rows"][0]["tokens_per_s"] == max(row["tokens_per_s"] for row in saved["rows"])
    plan.main([*small, "--budget", "4GiB"])
    out = capsys.readouterr().out
    assert "resident                 does not fit: needs" in out
    plan.main([*small, "--budget", "100MiB"])
    assert "nothing fits; the least is" in capsys.readouterr().out
    with pytest.raises(UsageError, match="--batch must be positive"):
        plan.main([*small, "--batch", "0"])


def test_sensitivity(tmp_path, monkeypatch, capsys):
    four = HardwareProfile.load("4xL40")
    points = [("context", x, OLMOE, four, 2, x, None) for x in (1024, 2048)]
    points += [("link", x, OLMOE, replace(four, host_bandwidth=x * 1e9), 2, 1024, 3 << 30) for x in (5, 50)]
    monkeypatch.setattr(sensitivity, "points", lambda: iter(points))
    sensitivity.main(["--out", str(tmp_path)])
    assert "figure:" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "points.csv").open()))
    assert len(rows) == 4 * len(sensitivity.PLACEMENTS)
    speed = {(r["panel"], float(r["x"]), r["placement"]): float(r["tokens_per_s"] or 0) for r in rows}
    assert speed["link", 50, "host+planar12"] > 2 * speed["link", 5, "host+planar12"]
    assert speed["context", 1024, "packed"] > speed["context", 2048, "packed"]
