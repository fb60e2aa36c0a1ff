"""How far the simulator is from what the paper states, and from what we measured: a table of relative errors.

    fluxmoe paper validate --out results/simulated/4xL40/validation

paper       three parameters are fitted to three of the paper's figures (`systems.calibrate`), the rest are
            predictions; runs that results/ has already are taken from there
measured    our own runs of fig7, fig8, fig2 and memory_budget on a CPU, simulated with that machine's measured profile
            and with what bench cpu-moe says that kernels reach; nothing is fitted
ratios      of any two measured runs of a sweep: which is faster, and by how much
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
from fluxmoe.runtime.hardware import HardwareProfile
from fluxmoe.runtime.memory.budget import BudgetError
from fluxmoe.runtime.serving.config import EngineConfig
from fluxmoe.runtime.sim.cost_model import CostParameters
from tqdm import tqdm

from ..lib.args import group, option
from ..lib.machines import SIMULATED, Machine
from ..lib.models import PRESETS, Source, simulated_preset
from ..lib.results import UsageError, read_csv, write_result
from ..lib.serve import placed, serve
from ..lib.workloads import drawn_lengths, make_requests
from . import fig2_kv_capacity, fig7_performance_bound, fig8_capacity_bound, stated
from .sweep import Arguments as SweepArguments
from .sweep import Figure, sweep
from .systems import Bench, Run, serve_run

FIGURES = {
    "fig7_performance_bound": fig7_performance_bound.FIGURE,
    "fig8_capacity_bound": fig8_capacity_bound.FIGURE,
    "fig2_kv_capacity": fig2_kv_capacity.FIGURE,
}
# What bench cpu-moe measured at these models' widths, 1 to 8 rows an expert: 0.65 of either floor.
CPU_COSTS = CostParameters(
    attention_share=0.65, expert_share=0.65, moe_flops_share=0.65, packed_share=0.65, packed_flops_share=0.65,
    decode_rows=math.inf,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Arguments:
    sweeps: SweepArguments = group()
    measured: Path = option(
        "what was measured on one machine", Path("results/measured/cpu-epyc-zen3-2core"), metavar="DIR"
    )

    def __post_init__(self) -> None:
        if not self.sweeps.where.simulated:
            raise UsageError("the simulator is what is validated: --device sim")


class Measured(NamedTuple):
    """A measured run: where it is from, tokens/s, and how to simulate it."""

    source: str
    figure: str
    stated: float
    simulate: Callable[[], float]


def paper_rows(args: SweepArguments) -> list[dict]:
    """One row a figure that the paper states."""
    rows = []
    for name, figure in FIGURES.items():
        bench = figure.bench(args)
        points = sweep(figure.experiment, bench, figure.runs(bench, None), args.where.out.parent / name)
        for what, (paper, ours) in figure.ratios(points, bench).items():
            if paper is not None:
                kind = "calibrated" if what in stated.CALIBRATED else "predicted"
                rows.append({"source": name, "figure": what, "kind": kind, "stated": paper, "simulated": ours})
    return rows


def measured_rows(results: Path) -> list[dict]:
    """One row a measured run of the sweeps in `results`."""
    if not (results / "profile.json").exists():
        raise UsageError(f"{results} holds no profile.json: run fluxmoe profile there first")
    machine = Machine(SIMULATED, HardwareProfile.load(results / "profile.json"))
    rows, found = [], [*_swept(results, machine), *_budgets(results, machine)]
    for each in tqdm(found, "measured runs", unit="run", leave=False, disable=None):
        try:
            simulated = each.simulate()
        except BudgetError:
            continue
        about = {"source": each.source, "figure": each.figure, "kind": "measured"}
        rows.append(about | {"stated": each.stated, "simulated": simulated})
    return rows


def _swept(results: Path, machine: Machine) -> Iterator[Measured]:
    """Runs of Figures 7, 8 and 2."""

    def simulate(row: Mapping[str, str], figure: Figure) -> float:
        costs = replace(CPU_COSTS, workspace_bytes=int(row["workspace"]))
        bench = Bench(machine, simulated_preset(figure.preset), costs, costs)
        return serve_run(_run_of(row), bench)["tokens_per_s"]

    for name, figure in FIGURES.items():
        for row in read_csv(results / name / "points.csv"):
            if row["status"] == "ok":
                what = (
                    f"{row['system']}, {row['panel']} panel, batch {row['batch']}, context {row['context']}, tokens/s"
                )
                yield Measured(name, what, float(row["tokens_per_s"]), partial(simulate, row, figure))


def _run_of(row: Mapping[str, str]) -> Run:
    return Run(
        row["system"], int(row["batch"]), int(row["context"]), float(row["alpha"]),
        budget=int(row["budget"]) if row["budget"] else None, buffer_format=row["buffer_format"],
        max_batched_tokens=int(row["max_batched_tokens"]),
        link_bandwidth=float(row["link_bandwidth"]) if row["link_bandwidth"] else None,
    )  # fmt: skip


def _budgets(results: Path, machine: Machine) -> Iterator[Measured]:
    """Runs of memory-budget --preset small."""
    spec = PRESETS["small"]
    lengths = drawn_lengths(spec.requests, spec.context, spec.output_tokens, 0)

    def simulate(row: Mapping[str, str], source: Source) -> float:
        settings = EngineConfig(
            max_batch=spec.max_batch, max_context=max(s.prompt + s.output for s in lengths),
            budget_bytes=int(row["budget_bytes"]), **placed(row["placement"]),
        )  # fmt: skip
        costs = replace(CPU_COSTS, workspace_bytes=int(row["workspace"]))
        requests = make_requests(lengths, source.config.vocab_size, 0)
        return serve(machine, source, settings, requests, costs).row["tokens_per_s"]

    for row in read_csv(results / "memory_budget" / "points.csv"):
        if row["status"] == "ok":
            what = f"{row['placement']} at {int(row['budget_bytes']) >> 20} MiB, tokens/s"
            source = simulated_preset("small")
            yield Measured("memory_budget", what, float(row["tokens_per_s"]), partial(simulate, row, source))


def ratio_errors(rows: list[dict]) -> np.ndarray:
    """Of every two measured runs of a sweep: error of the simulated ratio of their speeds, larger over smaller."""
    errors = []
    for source in {row["source"] for row in rows}:
        logs = [np.log(row["simulated"] / row["stated"]) for row in rows if row["source"] == source]
        errors += [abs(one - other) for one, other in combinations(logs, 2)]
    return np.exp(errors) - 1


def run(args: Arguments) -> None:
    where = args.sweeps.where
    rows = paper_rows(args.sweeps) + measured_rows(args.measured)
    for row in rows:
        row["relative_error"] = row["simulated"] / row["stated"] - 1
        print(
            f"{row['kind']:<11} {row['source']:<24} {row['figure']:<62} stated {row['stated']:9.3f}  "
            f"simulated {row['simulated']:9.3f}  error {100 * row['relative_error']:+.0f} %"
        )
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
    facts = {"device": SIMULATED, "simulated": True, "summary": summary}
    write_result(where.out, "paper validate", {"table.csv": rows}, facts, 0)
