"""make reproduce leaves alone what is there; make figures draws from results alone; workloads; the ablation."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from fluxmoe.experiments.commands import figures, reproduce
from fluxmoe.experiments.lib.results import Parser, UsageError
from fluxmoe.experiments.lib.workloads import (
    Lengths,
    add_workload_arguments,
    drawn_lengths,
    poisson_arrivals,
    sharegpt_lengths,
    workload_of,
)
from fluxmoe.experiments.serving import ablation

RESULTS = Path(__file__).resolve().parents[2] / "results"


def test_every_experiment_takes_its_arguments():
    for experiment in reproduce.EXPERIMENTS:
        module, *arguments = (part.format(out="x", vllm="y") for part in experiment.arguments)
        script = importlib.import_module(f"fluxmoe.experiments.{module}")
        if hasattr(script, "parser") and script.parser.__module__ == script.__name__:
            script.parser().parse_args(arguments)
    assert len({experiment.name for experiment in reproduce.EXPERIMENTS}) == len(reproduce.EXPERIMENTS)


def test_what_is_there_is_not_made_again(tmp_path, capfd):
    out = tmp_path / "machine"
    one = reproduce.script("fig1_memory", out=f"{out}/fig1_memory", result="memory.png")
    broken = reproduce.Experiment("broken", ("fig1_memory", "--model", "none", "--out", "{out}/b"), "{out}/b/none")
    gpu = reproduce.Experiment("gpu", ("gpu_suite",), "{out}/suite.json", needs_gpu=True)
    peer = reproduce.script("versus_vllm", "--vllm-python", "{vllm}", result="versus.png")
    assert reproduce.run_all((gpu, peer, one, broken, one), str(out), gpu=False) == ["broken"]
    said = capfd.readouterr().out
    assert "versus_vllm: needs --vllm-python" in said
    assert "gpu: needs a GPU" in said
    assert said.count("fig1_memory …") == 1
    assert "fig1_memory: there already" in said
    assert reproduce.hardware_folder().startswith("results/")


def test_figures_are_drawn_from_results_alone(tmp_path):
    shutil.copytree(RESULTS, tmp_path / "results")
    before = {path.with_suffix("") for path in (tmp_path / "results").glob("*/*/*.png")}
    for path in (tmp_path / "results").glob("*/*/*.p[nd][gf]"):
        path.unlink()
    drawn = figures.draw_all(tmp_path / "results")
    assert {path.with_suffix("") for path in drawn} == before
    assert all(path.stat().st_size > 5000 and path.with_suffix(".pdf").stat().st_size > 3000 for path in drawn)
    with pytest.raises(UsageError, match="holds no result"):
        figures.main(["--results", str(tmp_path / "empty")])


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
    parser = Parser()
    add_workload_arguments(parser)
    parser.add_argument("--seed", default=3)

    def lengths(*arguments):
        return workload_of(parser.parse_args(arguments), 100)

    assert lengths() == drawn_lengths(64, 100, 64, 3)
    few = ("--requests", "5", "--output-tokens", "10")
    assert lengths("--workload", "fixed", *few) == [Lengths(0.0, 90, 10)] * 5
    assert lengths("--workload", "sharegpt", *few) == sharegpt_lengths(5, 100, 3)
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
    ablation.main(small)
    out = capsys.readouterr().out
    assert "tokens: identical" in out
    assert out.count("of full") == len(ablation.VARIANTS)
    assert json.loads((tmp_path / "provenance.json").read_text())["simulated"] == "H100-SXM"
    with pytest.raises(UsageError, match="needs --profile"):
        ablation.main(["--device", "sim", "--config", "olmoe-1b-7b", "--budget", "1GiB", "--out", str(tmp_path)])
