"""reproduce says what came true; figures draws from results alone; workloads; the ablation."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fluxmoe.experiments.commands import figures, reproduce
from fluxmoe.experiments.commands.gpu_suite import STEPS
from fluxmoe.experiments.commands.main import COMMANDS, arguments, call
from fluxmoe.experiments.lib.args import parse
from fluxmoe.experiments.lib.models import published_source as load_published
from fluxmoe.experiments.lib.results import UsageError, write_csv, write_json
from fluxmoe.experiments.lib.workloads import (
    Lengths,
    Workload,
    drawn_lengths,
    poisson_arrivals,
    sharegpt_lengths,
)
from fluxmoe.experiments.serving import ablation
from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parents[2] / "results"


def test_every_run_and_step_is_a_command_line_that_is_taken(tmp_path):
    runs, gone = reproduce.read_runs(), tomllib.loads(reproduce.RUNS.read_text())["gone"]
    for run in runs.values():
        arguments(run.argv(tmp_path, RESULTS, "cpu-epyc-zen3-2core", {"vllm": "python", "llama": "python"}))
    assert len({run.out for run in runs.values() if run.name not in ("profile", "gpu_suite")}) == len(runs) - 2
    for folder in (path.parent.relative_to(RESULTS) for path in RESULTS.rglob("provenance.json")):
        here = folder.parts[1]
        of_the_gpu_suite = {f"measured/{here}/{step.name}" for step in STEPS}
        assert folder.as_posix() in {run.folder(here) for run in runs.values()} | of_the_gpu_suite | gone.keys()
    assert set(gone.values()) <= COMMANDS.keys()


@pytest.fixture
def runs(monkeypatch):
    made = {
        "table": reproduce.Run("table", "paper fig1 --out {out}", "simulated/a/fig1_memory"),
        "broken": reproduce.Run("broken", "paper fig1 --model none --out {out}", "simulated/a/broken"),
        "gpu": reproduce.Run("gpu", "gpu-suite --out {out}", "measured/{here}", ("gpu",)),
        "peer": reproduce.Run("peer", "versus --vllm-python {vllm} --out {out}", "measured/{here}/peer", ("vllm",)),
    }
    monkeypatch.setattr(reproduce, "read_runs", lambda: made)
    return made


@pytest.mark.parametrize(
    ("profiles", "expected"),
    [
        ({}, "cpu-x-avx-512-25-17"),
        ({"a": ("CPU X", "AVX2"), "b": ("CPU X", "AVX-512"), "c": ("CPU Y", "AVX-512")}, "b"),
        ({"a": ("CPU X", None)}, "cpu-x-avx-512-25-17"),
    ],
    ids=["no results yet", "one of each kind", "a profile of before instructions were noted"],
)
def test_a_machines_folder_is_that_of_its_processor_and_instructions(profiles, expected, monkeypatch, tmp_path):
    monkeypatch.setattr(reproduce, "device_name", lambda device: "CPU X")
    monkeypatch.setattr(reproduce, "instructions", lambda: "AVX-512")
    monkeypatch.setattr(reproduce, "family", lambda: "25/17")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for folder, (name, kind) in profiles.items():
        made = {} if kind is None else {"instructions": kind}
        write_json(tmp_path / "measured" / folder / "profile.json", {"name": name, "provenance": made})
    assert reproduce.hardware_folder(tmp_path) == expected


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        ({"hardware": "CPU X", "instructions": "AVX-512", "cpus": 2}, "a"),
        ({"hardware": "CPU X", "instructions": "AVX-512", "cpus": 64}, "cpu-x-avx-512-25-17"),
        ({"hardware": "CPU Y", "instructions": "AVX-512", "cpus": 2}, "cpu-x-avx-512-25-17"),
        ({"hardware": "CPU X", "instructions": None, "cpus": 2}, "cpu-x-avx-512-25-17"),
        ({"hardware": "CPU X", "instructions": "AVX-512", "cpus": 2, "family": "25/17"}, "a"),
        ({"hardware": "CPU X", "instructions": "AVX-512", "cpus": 2, "family": "26/2"}, "cpu-x-avx-512-25-17"),
    ],
    ids=["its own", "more cores", "another", "AVX2", "its own family", "another family"],
)
def test_a_machine_without_a_profile_is_known_by_any_of_its_results(made, expected, monkeypatch, tmp_path):
    monkeypatch.setattr(reproduce, "device_name", lambda device: "CPU X")
    monkeypatch.setattr(reproduce, "instructions", lambda: "AVX-512")
    monkeypatch.setattr(reproduce, "family", lambda: "25/17")
    monkeypatch.setattr(reproduce, "cores", lambda: 2)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    write_json(tmp_path / "measured" / "a" / "versus" / "provenance.json", made)
    assert reproduce.hardware_folder(tmp_path) == expected


def test_a_folder_of_its_family_goes_before_one_that_does_not_say(monkeypatch, tmp_path):
    monkeypatch.setattr(reproduce, "device_name", lambda device: "CPU X")
    monkeypatch.setattr(reproduce, "instructions", lambda: "AVX-512")
    monkeypatch.setattr(reproduce, "family", lambda: "25/17")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    made = {"hardware": "CPU X", "instructions": "AVX-512"}
    write_json(tmp_path / "measured" / "a" / "versus" / "provenance.json", made)
    write_json(tmp_path / "measured" / "b" / "versus" / "provenance.json", {**made, "family": "25/17"})
    assert reproduce.hardware_folder(tmp_path) == "b"


def test_runs_are_chosen_by_kind_and_by_name(capsys):
    assert {run.kind for run in reproduce.read_runs().values()} == set(reproduce.KINDS)
    call(["reproduce", "--list", "--only", "predicted", "profile"])
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} == {
        "predict_moe", "predict_prefill", "predict_others", "profile"
    }  # fmt: skip


def test_results_are_made_again_and_compared(runs, tmp_path, capfd):
    where = dict[str, Any](results=tmp_path / "results", scratch=tmp_path / "scratch")
    call(["paper", "fig1", "--out", str(tmp_path / "results" / "simulated" / "a" / "fig1_memory")])
    with pytest.raises(SystemExit):
        reproduce.run(reproduce.Arguments(**where))
    said = capfd.readouterr()
    words = {line.split()[0]: line.split(maxsplit=1)[1] for line in said.out.splitlines() if line.split()[0] in runs}
    assert words["table"] == "reproduced"
    assert words["broken"].startswith("failed with exit status 2")
    assert words["gpu"] == "not possible here: needs a GPU" or torch.cuda.is_available()
    assert words["peer"] == "not possible here: needs --vllm-python"
    assert "error: " in said.err

    points = tmp_path / "results" / "simulated" / "a" / "fig1_memory" / "points.csv"
    text = points.read_text()
    first = text.splitlines()[1].split(",")[-1]
    points.write_text(text.replace(f",{first}\n", f",{2 * int(first)}\n", 1))
    with pytest.raises(SystemExit):
        reproduce.run(reproduce.Arguments(**where, only=("table",)))
    assert "differs: kv_cache" in capfd.readouterr().out
    reproduce.run(reproduce.Arguments(**where, only=("table",), dry_run=True))
    assert "fluxmoe paper fig1 --out" in capfd.readouterr().out
    reproduce.run(reproduce.Arguments(**where, list=True))
    assert "needs --vllm-python" in capfd.readouterr().out


def test_two_folders_side_by_side(tmp_path, capsys, error_of):
    for name, speed in (("a", 10.0), ("b", 20.0)):
        rows = [{"placement": p, "repeat": r, "tokens_per_s": speed * (r + 1)} for p in ("x", "y") for r in range(3)]
        write_csv(tmp_path / name / "points.csv", rows)
    call(["compare", str(tmp_path / "a"), str(tmp_path / "b")])
    assert "tokens_per_s 2.000x (2.000 … 2.000, 2 points)" in capsys.readouterr().out
    call(["compare", str(tmp_path / "a"), str(tmp_path / "a")])
    assert "the same in all numbers" in capsys.readouterr().out
    assert "holds no table" in error_of("compare", tmp_path, tmp_path / "a")


@pytest.mark.parametrize(
    ("tables", "speed", "said"),
    [
        ({"x.csv", "y.csv"}, 3.0, "reproduced"),
        ({"x.csv"}, 3.0, "differs: 1 points are in one alone"),
        ({"x.csv", "y.csv"}, 6.0, "differs: tokens_per_s 2.000x (2.000 … 2.000, 1 points)"),
        ({"z.csv"}, 3.0, "differs: 3 points are in one alone"),
        (set(), 3.0, "differs: 2 points are in one alone"),
    ],
)
def test_a_table_that_only_one_has_is_a_difference(tables, speed, said, tmp_path):
    for folder, names, value in (("made", tables, speed), ("committed", {"x.csv", "y.csv"}, 3.0)):
        for name in names:
            write_csv(tmp_path / folder / name, [{"placement": "host", "tokens_per_s": value}])
    run = reproduce.Run("r", "", "simulated/a")
    assert reproduce.verdict(run, tmp_path / "made", tmp_path / "committed") == said


@pytest.mark.parametrize("rendered", ["one of a kind", pytest.param("all", marks=pytest.mark.thorough)])
def test_figures_are_drawn_from_results_alone(rendered, tmp_path, monkeypatch):
    """Each is made; to render it takes ten times as long."""
    files: dict[Any, Path] = {}

    def savefig(figure: Figure, path: Path, **how: Any) -> None:
        made_by = json.loads((path.parent / "provenance.json").read_text())["experiment"]
        kind = path if rendered == "all" else (made_by, path.name)
        if files.setdefault(kind, path) == path:
            write(figure, path, **how)

    write = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", savefig)
    shutil.copytree(RESULTS, tmp_path / "results")
    before = {path.with_suffix("") for path in (tmp_path / "results").glob("*/*/*/*.png")}
    for path in (tmp_path / "results").glob("*/*/*/*.p[nd][gf]"):
        path.unlink()
    drawn = figures.draw_all(tmp_path / "results")
    assert {path.with_suffix("") for path in drawn} == before
    assert len(files) == 2 * len(drawn) or rendered == "one of a kind"
    assert {json.loads((path.parent / "provenance.json").read_text())["experiment"] for path in files.values()} == set(
        figures.DRAW
    )
    assert all(path.stat().st_size > {".png": 5000, ".pdf": 3000}[path.suffix] for path in files.values())
    with pytest.raises(UsageError, match="holds no result"):
        call(["figures", "--results", str(tmp_path / "empty")])


def test_a_result_with_too_little_for_its_figure_has_none(tmp_path):
    write_json(tmp_path / "moe" / "provenance.json", {"experiment": "bench moe", "hardware": "a GPU", "cpus": 1})
    row = {"shape": "tiny", "tokens": 1, "provider": "fluxmoe", "status": "ok", "time_us": 1.0, "floor_us": 1.0}
    write_csv(tmp_path / "moe" / "rows.csv", [row])
    assert figures.draw_all(tmp_path) == []
    write_csv(tmp_path / "moe" / "rows.csv", [row, row | {"tokens": 8}])
    assert [path.name for path in figures.draw_all(tmp_path)] == ["layer.png"]


def test_sharegpt_lengths_have_its_means():
    lengths = sharegpt_lengths(20_000, 100_000, 0)
    assert np.mean([s.prompt for s in lengths]) == pytest.approx(161, rel=0.05)
    assert np.mean([s.output for s in lengths]) == pytest.approx(338, rel=0.05)
    assert all(s.prompt >= 1 and s.output >= 1 and s.prompt + s.output <= 64 for s in sharegpt_lengths(500, 64, 1))
    with pytest.raises(UsageError, match="context of at least 2"):
        sharegpt_lengths(4, 1, 0)


def test_poisson_arrivals():
    shapes = poisson_arrivals(drawn_lengths(4000, 32, 8, 0), rate=5.0, seed=1)
    times = np.array([shape.arrived_at for shape in shapes])
    gaps = np.diff(times)
    assert (gaps > 0).all()
    assert gaps.mean() == pytest.approx(0.2, rel=0.05)
    assert gaps.std() == pytest.approx(0.2, rel=0.1)
    with pytest.raises(UsageError, match="positive requests"):
        poisson_arrivals(shapes, 0.0, 1)


def test_workloads_by_argument(tmp_path):
    model = load_published("mixtral-8x7b").config

    def lengths(*arguments):
        return parse(Workload, ["--context", "100", "--seed", "3", *arguments], "test").lengths(None, model)

    assert lengths() == drawn_lengths(64, 100, 64, 3)
    few = ("--requests", "5", "--output-tokens", "10")
    assert lengths("--workload", "fixed", *few) == [Lengths(0.0, 90, 10)] * 5
    assert lengths("--workload", "sharegpt", "--requests", "5") == sharegpt_lengths(5, 100, 3)
    assert lengths("--arrivals", "2.5", *few) == poisson_arrivals(drawn_lengths(5, 100, 10, 3), 2.5, 3)
    trace = tmp_path / "trace.csv"
    trace.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n1.5,20,4\n2.0,30,200\n")
    assert lengths("--workload", str(trace)) == [Lengths(0.0, 20, 4), Lengths(0.0, 1, 99)]
    assert [s.arrived_at for s in lengths("--workload", str(trace), "--arrivals", "trace")] == [1.5, 2.0]
    for wrong, match in (("trace", "needs a trace"), ("soon", "at_once, trace or a number"), ("-1", "positive")):
        with pytest.raises(UsageError, match=match):
            lengths(f"--arrivals={wrong}")
    with pytest.raises(OSError, match="nowhere"):
        lengths("--workload", "nowhere")


def test_ablation_on_the_simulator(tmp_path, capsys):
    small = ["--device", "sim", "--profile", "H100-SXM", "--config", "olmoe-1b-7b", "--budget", "12GiB"]
    small += ["--requests", "8", "--context", "128", "--output-tokens", "16", "--max-batch", "8"]
    small += ["--out", str(tmp_path)]
    call(["ablation", *small])
    out = capsys.readouterr().out
    assert "tokens: identical" in out
    assert out.count("of full") == len(ablation.VARIANTS)
    assert json.loads((tmp_path / "provenance.json").read_text())["simulated"] == "H100-SXM"
    with pytest.raises(UsageError, match="needs --profile"):
        call(["ablation", "--device", "sim", "--config", "olmoe-1b-7b", "--budget", "1GiB", "--out", str(tmp_path)])
