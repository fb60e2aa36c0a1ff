"""How far the simulator is from what the paper states, and from what we measured: a table of relative errors.

    python -m fluxmoe.experiments.paper.validate_simulator --out results/simulated-4xL40/validation

paper       three parameters are fitted to three of the paper's figures (`paper_systems.calibrate`), the rest are
            predictions; runs that results/ has already are taken from there
measured    our own runs of exp1, exp2, fig2 and memory_budget on a CPU, simulated with that machine's measured profile
            and with what bench_cpu_moe says that kernels reach; nothing is fitted
ratios      of any two measured runs of a sweep: which is faster, and by how much
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from fluxmoe.runtime.hardware import HardwareProfile
from fluxmoe.runtime.memory.budget import BudgetError
from fluxmoe.runtime.serving.config import EngineConfig
from fluxmoe.runtime.serving.metrics import summarise
from fluxmoe.runtime.sim.cost_model import CostParameters
from tqdm import tqdm

from ..lib.machines import SIMULATED, Machine
from ..lib.presets import PRESETS, Source, preset_source
from ..lib.results import UsageError, cli_main, provenance, read_csv, write_csv, write_json
from ..lib.workloads import drawn_lengths, make_requests
from ..serving.memory_budget import split_placement
from . import fig2_kv_capacity
from . import fig7_performance_bound as exp1_performance_bound
from . import fig8_capacity_bound as exp2_capacity_bound
from .sweep import bench_of, sweep
from .sweep import parser as sweep_parser
from .systems import Bench, Run, serve

_CALIBRATED = ("vllm-o at batch 32, tokens/s", "vllm / vllm-o at batch 32", "fluxmoe / vllm at batch 32")
_SWEEPS = (exp1_performance_bound, exp2_capacity_bound, fig2_kv_capacity)
# What bench_cpu_moe measured at these models' widths, 1 to 8 rows an expert: 0.65 of either floor.
CPU_COSTS = CostParameters(attention_share=0.65, expert_share=0.65, moe_flops_share=0.65)


def paper_rows(args: argparse.Namespace) -> list[dict]:
    """One row a figure that the paper states."""
    rows = []
    for module in _SWEEPS:
        name, bench = _name(module), bench_of(args, module.MODEL, module.DEVICES, module.PRESET)
        points = sweep(bench, module.runs(bench), Path(args.out).parent / name)
        for figure, (paper, ours) in module.ratios(points, bench).items():
            if paper is not None:
                kind = "calibrated" if figure in _CALIBRATED else "predicted"
                rows.append({"source": name, "figure": figure, "kind": kind, "stated": paper, "simulated": ours})
    return rows


def measured_rows(results: Path, checkpoints: Path) -> list[dict]:
    """One row a measured run of the sweeps in `results`."""
    if not (results / "profile.json").exists():
        raise UsageError(f"{results} holds no profile.json: run profile_hardware there first")
    machine = Machine(SIMULATED, HardwareProfile.load(results / "profile.json"))
    found = [*_swept(results, machine, checkpoints), *_budgets(results, machine, checkpoints)]
    rows = []
    for source, figure, stated, run in tqdm(found, "measured runs", unit="run", leave=False):
        try:
            rows.append({"source": source, "figure": figure, "kind": "measured", "stated": stated, "simulated": run()})
        except BudgetError:
            continue
    return rows


def _swept(results: Path, machine: Machine, checkpoints: Path) -> Iterator[tuple]:
    """(sweep, name, tokens/s, how to simulate it) of exp1, exp2 and fig2."""
    for module in _SWEEPS:
        for row in read_csv(results / _name(module) / "points.csv"):
            if row["status"] != "ok":
                continue
            run = _run_of(row)
            costs = replace(CPU_COSTS, workspace_bytes=int(row["workspace"]))
            bench = Bench(machine, preset_source(module.PRESET, checkpoints), costs, costs)
            figure = f"{row['system']}, {row['panel']} panel, batch {run.batch}, context {run.context}, tokens/s"
            yield (_name(module), figure, float(row["tokens_per_s"]),
                   lambda run=run, bench=bench: serve(run, bench)["tokens_per_s"])  # fmt: skip


def _run_of(row: Mapping[str, str]) -> Run:
    return Run(
        row["system"], int(row["batch"]), int(row["context"]), float(row["alpha"]),
        budget=int(row["budget"]) if row["budget"] else None, buffer_format=row["buffer_format"],
        max_batched_tokens=int(row["max_batched_tokens"]),
        link_bandwidth=float(row["link_bandwidth"]) if row["link_bandwidth"] else None,
    )  # fmt: skip


def _budgets(results: Path, machine: Machine, checkpoints: Path) -> Iterator[tuple]:
    """Likewise of memory_budget --preset small."""
    spec = PRESETS["small"]
    for row in read_csv(results / "memory_budget" / "points.csv"):
        if row["status"] == "ok":
            source = preset_source("small", checkpoints)
            figure = f"{row['placement']} at {int(row['budget_bytes']) >> 20} MiB, tokens/s"
            yield ("memory_budget", figure, float(row["tokens_per_s"]),
                   lambda row=row, source=source: _budget(row, source, machine, spec))  # fmt: skip


def _budget(row: dict, source: Source, machine: Machine, spec) -> float:
    lengths = drawn_lengths(spec.requests, spec.context, spec.output_tokens, 0)
    requests = make_requests(lengths, source.config.vocab_size, 0)
    name, alpha, expert_format = split_placement(row["placement"])
    config = EngineConfig(
        placement=name, alpha=alpha, expert_format=expert_format, max_batch=spec.max_batch, max_batched_tokens=256,
        max_context=max(s.prompt + s.output for s in lengths), budget_bytes=int(row["budget_bytes"]),
    )  # fmt: skip
    costs = replace(CPU_COSTS, workspace_bytes=int(row["workspace"]))
    with machine.open(source, config, costs) as engine:
        for request in requests:
            engine.add(request)
        wall = summarise(list(engine.steps()))["wall_s"]
    return sum(shape.output for shape in lengths) / wall


def ratio_errors(rows: list[dict]) -> np.ndarray:
    """Of every two measured runs of a sweep: error of the simulated ratio of their speeds, larger over smaller."""
    errors = []
    for source in {row["source"] for row in rows}:
        pairs = [(row["stated"], row["simulated"]) for row in rows if row["source"] == source]
        for i, (stated, simulated) in enumerate(pairs):
            errors += [abs(np.log(simulated / other_simulated * other_stated / stated))
                       for other_stated, other_simulated in pairs[:i]]  # fmt: skip
    return np.exp(errors) - 1


def _name(module) -> str:
    return module.__name__.rsplit(".", 1)[1]


def parser() -> argparse.ArgumentParser:
    p = sweep_parser("validate_simulator", __doc__.splitlines()[0])
    p.add_argument("--measured", metavar="DIR", default="results/cpu-epyc-zen3-2core", help="(default: %(default)s)")
    return p


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if args.device != SIMULATED:
        raise UsageError("the simulator is what is validated: --device sim")
    out = Path(args.out)
    rows = paper_rows(args) + measured_rows(Path(args.measured), Path(args.checkpoints))
    for row in rows:
        row["relative_error"] = row["simulated"] / row["stated"] - 1
        print(
            f"{row['kind']:<11} {row['source']:<24} {row['figure']:<62} stated {row['stated']:9.3f}  "
            f"simulated {row['simulated']:9.3f}  error {100 * row['relative_error']:+.0f} %"
        )
    write_csv(out / "table.csv", rows)
    summary = {}
    groups = [("predicted", "")] + [("measured", name) for name in dict.fromkeys(
        row["source"] for row in rows if row["kind"] == "measured")]  # fmt: skip
    for kind, source in groups:
        chosen = [row for row in rows if row["kind"] == kind and source in ("", row["source"])]
        errors = np.abs([row["relative_error"] for row in chosen])
        said = {"median_error": float(np.median(errors)), "largest_error": float(errors.max()), "runs": len(errors)}
        if source:
            said["median_error_of_ratios"] = float(np.median(ratio_errors(chosen)))
        summary[source or "the paper's figures"] = said
        print(f"{source or 'the paper, predicted'}: " + ", ".join(f"{k} {v:.2f}" for k, v in said.items()))
    write_json(out / "provenance.json", {**provenance("sim", 0), "simulated": True, "summary": summary})


if __name__ == "__main__":
    cli_main(main)
