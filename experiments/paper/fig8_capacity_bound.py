"""Mixtral-8x7B on 2 x L40, which cannot hold it: an eighth of the experts in host memory (Fig. 8).

    python -m fluxmoe.experiments.paper.fig8_capacity_bound --out results/simulated-4xL40/exp2_capacity_bound
    python -m fluxmoe.experiments.paper.fig8_capacity_bound --device cpu --link-bandwidth 1GB --out DIR

Simulated, or measured at a 16th of the paper's batches and contexts; see `paper_sweep`.
"""

from __future__ import annotations

from pathlib import Path

from ..lib.results import cli_main
from ..plots.paper import plot_exp2
from .sweep import bench_of, equal_room, parser, print_ratios, scaled, speed, sweep
from .systems import Bench, Run

MODEL, DEVICES, PRESET = "mixtral-8x7b", 2, "deep-mixtral"
SYSTEMS = ("vllm", "vllm-o", "vllm-o-best", "fluxmoe-h", "fluxmoe", "ours-eager", "ours")
MEASURED = ("vllm", "vllm-o", "fluxmoe-h", "fluxmoe", "ours")


def runs(bench: Bench, link_bandwidth: str | None = None) -> list[tuple[str, Run]]:
    budget = equal_room(bench, MODEL, DEVICES, Run("vllm", 256, 4096))
    points = [("batch", batch, 4096) for batch in (32, 64, 128, 256)]
    points += [("context", 256, context) for context in (1024, 2048, 4096)]
    return [
        (panel, scaled(bench, Run(system, batch, context, alpha=0.875, budget=budget), link_bandwidth))
        for panel, batch, context in points
        for system in (SYSTEMS if bench.machine.simulated else MEASURED)
    ]


def ratios(rows: list[dict], bench: Bench) -> dict[str, tuple[float | None, float]]:
    """Figure → (the paper's, ours); contexts are the paper's."""

    def at(system: str, context: int) -> float:
        return speed(rows, "context", system, scaled(bench, Run(system, 256, context)))

    found = {
        "vllm-o at batch 256, context 4096, tokens/s": (3.7, at("vllm-o", 4096)),
        "fluxmoe / fluxmoe-h, context 1024": (1.285, at("fluxmoe", 1024) / at("fluxmoe-h", 1024)),
        "fluxmoe / fluxmoe-h, context 4096": (1.229, at("fluxmoe", 4096) / at("fluxmoe-h", 4096)),
        "ours / fluxmoe, context 4096": (None, at("ours", 4096) / at("fluxmoe", 4096)),
        "ours / vllm-o, context 4096": (None, at("ours", 4096) / at("vllm-o", 4096)),
    }
    if bench.machine.simulated:
        found["ours / vllm-o-best, context 4096"] = (None, at("ours", 4096) / at("vllm-o-best", 4096))
        found["ours, launched as theirs / fluxmoe, context 4096"] = (None, at("ours-eager", 4096) / at("fluxmoe", 4096))
    else:
        del found["vllm-o at batch 256, context 4096, tokens/s"]
    return found


def main(argv: list[str] | None = None) -> None:
    args = parser("exp2_capacity_bound", __doc__.splitlines()[0]).parse_args(argv)
    bench = bench_of(args, MODEL, DEVICES, PRESET)
    rows = sweep(bench, runs(bench, args.link_bandwidth), Path(args.out))
    print_ratios(ratios(rows, bench), args.device)
    print(f"figure: {plot_exp2(Path(args.out))}")


if __name__ == "__main__":
    cli_main(main)
