"""How far the simulator is from what the paper states, and from what we measured: a table of relative errors.

    python -m fluxmoe.experiments.validate_simulator --out results/simulated-4xL40/validation

Three parameters are fitted to three of the paper's figures (`paper_systems.calibrate`); the rest are predictions. Our
own measurements: the sweep of memory_budget on a CPU, simulated with that machine's measured profile, nothing fitted.
"""

from __future__ import annotations

import argparse
import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from fluxmoe.models.config import load_config
from fluxmoe.runtime.budget import BudgetError
from fluxmoe.runtime.config import EngineConfig
from fluxmoe.runtime.cost_model import CostParameters
from fluxmoe.runtime.hardware import HardwareProfile
from fluxmoe.runtime.metrics import summarise
from fluxmoe.runtime.simulator import SimEngine

from . import exp1_performance_bound, exp2_capacity_bound, fig2_kv_capacity
from .common import cli_main, provenance, write_csv, write_json
from .memory_budget import split_placement
from .paper_sweep import parser as sweep_parser
from .paper_sweep import sweep
from .presets import PRESETS, preset_model
from .workloads import drawn_lengths, make_requests

_CALIBRATED = ("vllm-o at batch 32, tokens/s", "vllm / vllm-o at batch 32", "fluxmoe / vllm at batch 32")
# What bench_cpu_moe measured at this model's width, 1 to 8 rows an expert: 0.65 of either floor.
CPU_COSTS = CostParameters(attention_share=0.65, expert_share=0.65, moe_flops_share=0.65)


def paper_rows(out: Path, calibration: Path) -> list[dict]:
    """One row a figure that the paper states."""
    rows = []
    for module in (exp1_performance_bound, exp2_capacity_bound, fig2_kv_capacity):
        name = module.__name__.rsplit(".", 1)[1]
        for figure, (paper, ours) in module.ratios(sweep(module.runs(), out.parent / name, calibration)).items():
            if paper is not None:
                kind = "calibrated" if figure in _CALIBRATED else "predicted"
                rows.append({"source": name, "figure": figure, "kind": kind, "stated": paper, "simulated": ours})
    return rows


def measured_rows(results: Path, checkpoints: Path) -> list[dict]:
    """One row a measured point of memory_budget --preset small."""
    spec = PRESETS["small"]
    profile = HardwareProfile.load(results / "profile.json")
    model = load_config(preset_model("small", checkpoints))
    requests = make_requests(drawn_lengths(spec.requests, spec.context, spec.output_tokens, 0), model.vocab_size, 0)
    longest = max(len(r.prompt_ids) + r.params.max_new_tokens for r in requests)
    rows = []
    for point in csv.DictReader((results / "memory_budget" / "points.csv").open()):
        if point["status"] != "ok":
            continue
        name, alpha, expert_format = split_placement(point["placement"])
        config = EngineConfig(
            device="cpu", placement=name, alpha=alpha, expert_format=expert_format, max_batch=spec.max_batch,
            max_batched_tokens=256, max_context=longest, budget_bytes=int(point["budget_bytes"]),
        )  # fmt: skip
        costs = replace(CPU_COSTS, workspace_bytes=int(point["workspace"]))
        try:
            totals = summarise(list(SimEngine(model, profile, config, costs).steps(requests)))
        except BudgetError:
            continue
        speed = sum(r.params.max_new_tokens for r in requests) / totals["wall_s"]
        figure = f"{point['placement']} at {int(point['budget_bytes']) >> 20} MiB, tokens/s"
        stated = float(point["tokens_per_s"])
        rows.append(
            {"source": results.name, "figure": figure, "kind": "measured", "stated": stated, "simulated": speed}
        )
    return rows


def parser() -> argparse.ArgumentParser:
    p = sweep_parser("validate_simulator", __doc__.splitlines()[0])
    p.add_argument("--measured", metavar="DIR", default="results/cpu-epyc-zen3-2core", help="(default: %(default)s)")
    p.add_argument("--checkpoints", default="checkpoints", metavar="DIR", help="where presets keep their model")
    return p


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    out = Path(args.out)
    rows = paper_rows(out, Path(args.calibration)) + measured_rows(Path(args.measured), Path(args.checkpoints))
    for row in rows:
        row["relative_error"] = row["simulated"] / row["stated"] - 1
        print(
            f"{row['kind']:<11} {row['figure']:<48} stated {row['stated']:9.3f}  simulated {row['simulated']:9.3f}  "
            f"error {100 * row['relative_error']:+.0f} %"
        )
    write_csv(out / "table.csv", rows)
    summary = {}
    for kind in ("predicted", "measured"):
        errors = np.abs([row["relative_error"] for row in rows if row["kind"] == kind])
        summary[kind] = {"median_error": float(np.median(errors)), "largest_error": float(errors.max())}
        print(f"{kind}: median error {100 * np.median(errors):.0f} %, largest {100 * errors.max():.0f} %")
    write_json(out / "provenance.json", {**provenance("sim", 0), "summary": summary})
    print(json.dumps(summary))


if __name__ == "__main__":
    cli_main(main)
