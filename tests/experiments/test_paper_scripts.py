"""The paper's figures on the simulator, and `plan`: small runs of each, and what they do with what cannot be."""

from __future__ import annotations

import csv
import json
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fluxmoe.experiments.commands import plan
from fluxmoe.experiments.commands.main import call
from fluxmoe.experiments.lib import models
from fluxmoe.experiments.lib.machines import FigureMachine, Machine
from fluxmoe.experiments.lib.models import PRESETS, published_source
from fluxmoe.experiments.lib.results import UsageError
from fluxmoe.experiments.paper import (
    fig2_kv_capacity,
    fig6_knee,
    fig7_performance_bound,
    fig8_capacity_bound,
    table1_models,
    validate_simulator,
)
from fluxmoe.experiments.paper import sweep as paper_sweep
from fluxmoe.experiments.paper.sweep import calibrated, scaled, speed, sweep
from fluxmoe.experiments.paper.systems import SYSTEMS, Calibration, Run, calibrate, serve_run, settings_of
from fluxmoe.experiments.plots.paper import plot_fig7
from fluxmoe.experiments.serving import sensitivity
from fluxmoe.runtime.hardware import HardwareProfile

CALIBRATION = {"launch_s": 8e-5, "host_link_shared": 34e9, "huffman_bandwidth": 260e9}
OLMOE = published_source("olmoe-1b-7b")
L40 = HardwareProfile.load("4xL40")
BENCH = Calibration(**CALIBRATION).bench(L40, OLMOE, 1)
FIGURES = [module.FIGURE for module in (fig7_performance_bound, fig8_capacity_bound, fig2_kv_capacity)]


@pytest.fixture
def calibration(tmp_path):
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps({"calibration": CALIBRATION}))
    return path


def shrink(patch: pytest.MonkeyPatch) -> None:
    """Makes every preset that a script serves on a CPU small enough for a test."""
    tiny = dict[str, Any](
        experts=4, top_k=2, hidden=64, moe_intermediate=32, heads=2, kv_heads=2, head_dim=32, vocab=512
    )
    for name in ("small", "next", "deep-next", "deep-mixtral"):
        model = replace(PRESETS[name].model, **tiny, layers=8)
        if name == "deep-mixtral":  # so large that compressing it leaves room for a request
            model = replace(model, moe_intermediate=256)
        patch.setitem(models.PRESETS, name, replace(PRESETS[name], model=model))
    patch.setattr(paper_sweep, "MEASURED_SCALE", 32)


@pytest.fixture
def tiny_presets(monkeypatch):
    shrink(monkeypatch)


@pytest.fixture(scope="module")
def measured_fig2(tmp_path_factory):
    """A folder with `models` and `results/cpu/fig2_kv_capacity`, measured here once; `said`: what was printed."""
    folder = tmp_path_factory.mktemp("fig2")
    out = folder / "results" / "cpu" / "fig2_kv_capacity"
    with pytest.MonkeyPatch.context() as patch, (folder / "said").open("w") as said, redirect_stdout(said):
        shrink(patch)
        call(["paper", "fig2", "--device", "cpu", "--checkpoints", str(folder / "models"), "--out", str(out)])
    return folder


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.thorough
def test_a_sweep_keeps_what_cannot_start_and_resumes(tmp_path, monkeypatch):
    runs = [("batch", Run(system, 4, 256, alpha=0.875)) for system in SYSTEMS]
    runs += [("context", Run(system, 4, context)) for system in SYSTEMS for context in (64, 256)]
    runs += [("batch", Run("vllm", 8, 256, budget=1 << 30))]
    rows = sweep("paper fig7", BENCH, runs, tmp_path / "out")
    assert [row["status"] for row in rows] == ["ok"] * 24 + ["too_small"]
    assert "the least that works" in rows[-1]["reason"]
    assert speed(rows, "batch", "ours", Run("ours", 4, 256)) > speed(rows, "batch", "fluxmoe", Run("", 4, 256)) > 0
    assert plot_fig7(tmp_path / "out").stat().st_size > 5000
    about = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert about["simulated"] == "4xL40"
    assert about["machine"]["decode_bandwidth"]["huffman"] == 260e9

    lines = (tmp_path / "out" / "points.csv").read_text().splitlines(keepends=True)
    (tmp_path / "out" / "points.csv").write_text("".join(lines[:-2]))
    served: list = []

    def noted(run, bench):
        served.append(run)
        return serve_run(run, bench)

    monkeypatch.setattr(paper_sweep, "serve_run", noted)
    again = sweep("paper fig7", BENCH, runs, tmp_path / "out")
    assert [(r["system"], r["tokens_per_s"]) for r in again] == [(r["system"], r["tokens_per_s"]) for r in rows]
    assert len(served) == 2
    # A slower link: what was made with the other one is never taken for it.
    slower = replace(BENCH, machine=replace(BENCH.machine, profile=replace(L40, host_bandwidth=1e9)))
    assert len(sweep("paper fig7", slower, runs[:2], tmp_path / "out")) == 2
    assert served[2:] == [run for _, run in runs[:2]]


@pytest.mark.thorough
def test_a_baseline_at_its_best_is_no_slower():
    model = published_source("qwen3-next-80b-a3b")
    bench = Calibration(**CALIBRATION).bench(L40, model, 4)
    tight = Run("vllm", 256, 1024, budget=42 << 30)
    as_run, best = serve_run(tight, bench), serve_run(replace(tight, system="vllm-best"), bench)
    assert as_run["max_sequences"] == 256 > best["max_sequences"]
    assert best["tokens_per_s"] > 2 * as_run["tokens_per_s"]
    assert {s.preemption for s in settings_of(replace(tight, system="vllm-best"))} == {"swap", "recompute"}
    with pytest.raises(ValueError, match="unknown system"):
        list(settings_of(replace(tight, system="none")))


@pytest.mark.thorough
def test_calibration_meets_its_three_figures():
    model = published_source("qwen3-30b-a3b")
    found = calibrate(L40, model, halvings=9)

    def at(system):
        return serve_run(Run(system, 32, 4096), found.bench(L40, model, 4))["tokens_per_s"]

    assert at("vllm") == pytest.approx(6 * 54.6, rel=0.1)
    assert at("vllm-o") == pytest.approx(54.6, rel=0.1)
    assert at("fluxmoe") == pytest.approx(0.639 * 6 * 54.6, rel=0.1)


def test_a_calibration_is_kept(calibration):
    found = calibrated(calibration)
    profile = found.profile(L40)
    assert profile.decode_bandwidth["huffman"] == 260e9
    assert profile.host_bandwidth_each == 8.5e9
    theirs = found.bench(L40, OLMOE, 2).theirs
    assert theirs is not None
    assert theirs.eager_launch_s == 8e-5


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.experiment)
def test_all_figures_are_taken_from_runs_that_are_made(figure):
    bench = replace(BENCH, machine=Machine("sim", L40, 4))
    rows = [
        {"panel": panel, "system": run.system, "batch": run.batch, "context": run.context, "tokens_per_s": 2.0}
        for panel, run in figure.runs(bench)
    ]
    for name, (_, ours) in figure.ratios(rows, bench).items():
        assert ours in (2.0, 1.0, 0.0), name


def check_measured(out: Path, said: str) -> None:
    assert "measured" in said
    assert "simulated" not in said
    rows = read(out / "points.csv")
    assert {row["status"] for row in rows} <= {"ok", "too_small"}
    ok = [row for row in rows if row["status"] == "ok"]
    assert len(ok) >= len(rows) / 5
    assert all(float(row["tokens_per_s"]) > 0 for row in ok)
    assert json.loads((out / "provenance.json").read_text())["simulated"] is None


def test_a_sweep_for_real(measured_fig2):
    check_measured(measured_fig2 / "results" / "cpu" / "fig2_kv_capacity", (measured_fig2 / "said").read_text())


def test_validation_compares_what_was_measured(measured_fig2, tiny_presets, tmp_path):
    results = measured_fig2 / "results" / "cpu"
    with pytest.raises(UsageError, match=r"holds no profile\.json"):
        validate_simulator.measured_rows(results)
    profile = replace(HardwareProfile.load("laptop"), name="mine", copy_overlap=0.5)
    (results / "profile.json").write_text(json.dumps(profile.to_json()))
    rows = validate_simulator.measured_rows(results)
    measured = [r for r in read(results / "fig2_kv_capacity" / "points.csv") if r["status"] == "ok"]
    assert [row["stated"] for row in rows] == [float(row["tokens_per_s"]) for row in measured][: len(rows)]
    assert len(rows) > len(measured) / 2
    assert all(row["simulated"] > 0 for row in rows)
    two = [{"source": "a", "stated": 1.0, "simulated": 3.0}, {"source": "a", "stated": 2.0, "simulated": 3.0}]
    assert validate_simulator.ratio_errors(two) == pytest.approx([1.0])
    with pytest.raises(UsageError, match="the simulator is what is validated"):
        call(["paper", "validate", "--device", "cpu", "--out", str(tmp_path)])


@pytest.mark.thorough
def test_a_sweep_of_all_systems_for_real(tiny_presets, tmp_path, capsys):
    where = ["--device", "cpu", "--checkpoints", str(tmp_path / "models"), "--out", str(tmp_path / "out")]
    call(["paper", "fig8", *where, "--link-bandwidth", "1GB"])
    check_measured(tmp_path / "out", capsys.readouterr().out)


def test_the_budget_leaves_the_share_that_the_papers_machine_leaves(tiny_presets, tmp_path):
    figure = fig7_performance_bound.FIGURE
    where = FigureMachine(device="cpu", checkpoints=tmp_path, out=tmp_path / "out")
    bench = figure.bench(paper_sweep.Arguments(where=where))
    largest = Run("vllm", 256, 4096)
    assert figure.equal_room(BENCH, largest) is None
    here = scaled(bench, largest)
    budget = figure.equal_room(bench, largest)
    assert budget is not None
    left = budget - paper_sweep.fixed_bytes(bench, here)
    paper = published_source("qwen3-next-80b-a3b").config
    room = 0.9 * 4 * 48 * 2**30 - paper.expert_bytes_total - paper.non_expert_bytes
    needed = 256 * (4096 * paper.kv_bytes_per_token + paper.state_bytes_per_sequence)
    assert left / paper_sweep.demand(bench.source, here) == pytest.approx(room / needed, rel=1e-3)


def test_what_memory_holds(tiny_presets, tmp_path, capsys):
    call(["paper", "fig1", "--out", str(tmp_path / "fig1")])
    rows = read(tmp_path / "fig1" / "points.csv")
    at_256 = next(row for row in rows if (row["batch"], row["context"]) == ("256", "4096"))
    assert int(at_256["kv_cache"]) == 256 * 4096 * 12 * 2 * 2 * 256 * 2
    models = ["--checkpoints", str(tmp_path / "models")]
    call(["paper", "fig1", "--device", "cpu", *models, "--out", str(tmp_path / "held")])
    held = read(tmp_path / "held" / "points.csv")
    assert len(held) == len(rows)
    # 8 layers of 4 experts: 3 · 64 · 32 weights of 2 bytes.
    assert {int(row["experts"]) for row in held} == {8 * 4 * 3 * 64 * 32 * 2}
    kv = [int(row["kv_cache"]) for row in held if row["panel"] == "context"]
    assert kv == sorted(kv)
    assert kv[-1] > kv[0]

    call(["paper", "table1", "--out", str(tmp_path / "table")])
    call(["paper", "table1", "--device", "cpu", *models, "--out", str(tmp_path / "mine")])
    assert "| qwen3-next-80b-a3b | 48 | 512 | 10 | 79.673 |" in capsys.readouterr().out
    mine = read(tmp_path / "mine" / "table.csv")
    assert {row["model"] for row in mine} == set(table1_models.MEASURED)


@pytest.mark.parametrize("device", ["sim", "cpu"])
def test_knee(device, tiny_presets, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fig6_knee, "ALPHAS", [0.5, 0.75, 1.0])
    where = ["--device", "sim", "--profile", "H100-SXM", "--config", "olmoe-1b-7b"]
    if device == "cpu":
        where = ["--device", "cpu", "--preset", "small", "--checkpoints", str(tmp_path / "models")]
        where += ["--link-bandwidth", "10MB"]
    call(["paper", "fig6", *where, "--batches", "1", "4", "--prompt-tokens", "16", "--out", str(tmp_path / "fig6")])
    assert capsys.readouterr().out.count("loads hide down to") == 4
    rows = read(tmp_path / "fig6" / "points.csv")
    dense = [float(r["load_s"]) for r in rows if r["host_format"] == "dense" and r["batch"] == "1"]
    packed = [float(r["load_s"]) for r in rows if r["host_format"] == "planar12" and r["batch"] == "1"]
    assert dense == sorted(dense, reverse=True)
    assert dense[-1] == 0
    if device == "sim":
        assert packed[0] == pytest.approx(0.75 * dense[0], rel=0.02)


def test_plan_says_what_fits_and_what_helps(tmp_path, capsys):
    small = ["--config", "olmoe-1b-7b", "--gpu", "H100-SXM", "--batch", "4", "--context", "256"]
    call(["plan", *small, "--json", str(tmp_path / "plan.json")])
    out = capsys.readouterr().out
    assert "Simulated." in out
    assert "best: --placement" in out
    saved = json.loads((tmp_path / "plan.json").read_text())
    assert len(saved["rows"]) == len(plan.CANDIDATES)
    assert saved["rows"][0]["tokens_per_s"] == max(row["tokens_per_s"] for row in saved["rows"])
    call(["plan", *small, "--budget", "4GiB", "--trace", str(tmp_path / "trace.json")])
    spans = [each for each in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if each["ph"] == "X"]
    assert {"compute", "load", "wait"} <= {span["cat"] for span in spans}
    out = capsys.readouterr().out
    assert "resident                 does not fit: needs" in out
    call(["plan", *small, "--budget", "100MiB"])
    assert "nothing fits; the least is" in capsys.readouterr().out
    with pytest.raises(UsageError, match="--batch must be at least 1"):
        call(["plan", *small, "--batch", "0"])


def test_plan_takes_several_of_a_gpu(capsys):
    call(["plan", "--config", "olmoe-1b-7b", "--gpu", "H100-SXM×2", "--batch", "4", "--context", "256"])
    assert "experts; H100-SXM×2; 4 requests" in capsys.readouterr().out


def test_sensitivity(tmp_path, monkeypatch, capsys):
    def point(panel, x, profile, context, budget=None):
        settings = sensitivity.settings(2, context, 4096, budget)
        return sensitivity.Point(panel, x, Machine("sim", profile, 1), OLMOE, 512, settings)

    points = [point("context", x, L40, x) for x in (1024, 2048)]
    points += [point("link", x, replace(L40, host_bandwidth=x * 1e9), 1024, 3 << 30) for x in (5, 50)]
    points += [point("gpu", name, HardwareProfile.load(name), 1024) for name in ("A100-80GB", "H100-SXM")]
    monkeypatch.setattr(sensitivity, "simulated_points", lambda: iter(points))
    call(["sensitivity", "--out", str(tmp_path)])
    assert "figure:" in capsys.readouterr().out
    rows = read(tmp_path / "points.csv")
    assert len(rows) == 6 * len(sensitivity.PLACEMENTS)
    speed = {(r["panel"], r["x"], r["placement"]): float(r["tokens_per_s"] or 0) for r in rows}
    assert speed["link", "50", "host+planar12"] > 2 * speed["link", "5", "host+planar12"]
    assert speed["context", "1024", "packed"] > speed["context", "2048", "packed"]
    assert speed["gpu", "H100-SXM", "packed"] > speed["gpu", "A100-80GB", "packed"]


@pytest.mark.thorough
def test_sensitivity_for_real(tiny_presets, tmp_path, monkeypatch):
    monkeypatch.setattr(sensitivity, "MEASURED_CONTEXTS", (64,))
    monkeypatch.setattr(sensitivity, "MEASURED_LINKS", (2e7, 1e9))
    call(["sensitivity", "--device", "cpu", "--checkpoints", str(tmp_path / "models"), "--out", str(tmp_path / "out")])
    rows = read(tmp_path / "out" / "points.csv")
    speed = {(r["panel"], float(r["x"]), r["placement"]): float(r["tokens_per_s"] or 0) for r in rows}
    assert speed["link", 2e7, "host+planar12"] < speed["link", 1e9, "host+planar12"]
