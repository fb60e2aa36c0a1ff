"""Qwen3-Next on 4 x L40, all experts compressed on the GPUs: throughput against batch and context (Fig. 7).

    python -m fluxmoe.experiments.paper.fig7_performance_bound --out results/simulated-4xL40/exp1_performance_bound
    python -m fluxmoe.experiments.paper.fig7_performance_bound --device cpu --link-bandwidth 1GB --out DIR

Simulated, or measured at a 16th of the paper's batches and contexts; see `paper_sweep`. `ours` is what this project
adds: experts of 12 bits decoded inside the GEMM.
"""

from __future__ import annotations

from pathlib import Path

from ..lib.results import cli_main
from ..plots.paper import plot_exp1
from .sweep import bench_of, equal_room, parser, print_ratios, scaled, speed, sweep
from .systems import Bench, Run

MODEL, DEVICES, PRESET = "qwen3-next-80b-a3b", 4, "deep-next"
SYSTEMS = ("vllm", "vllm-best", "vllm-o", "vllm-o-best", "fluxmoe", "ours-eager", "ours")
MEASURED = ("vllm", "vllm-best", "vllm-o", "fluxmoe", "ours")


def runs(bench: Bench, link_bandwidth: str | None = None) -> list[tuple[str, Run]]:
    budget = equal_room(bench, MODEL, DEVICES, Run("vllm", 256, 4096))
    points = [("batch", batch, 4096) for batch in (32, 64, 128, 256)]
    points += [("context", 256, context) for context in (1024, 2048, 4096)]
    return [
        (panel, scaled(bench, Run(system, batch, context, budget=budget), link_bandwidth))
        for panel, batch, context in points
        for system in (SYSTEMS if bench.machine.simulated else MEASURED)
    ]


def ratios(rows: list[dict], bench: Bench) -> dict[str, tuple[float | None, float]]:
    """Figure → (the paper's, ours); batches and contexts are the paper's."""

    def at(system: str, batch: int, context: int = 4096, panel: str = "batch") -> float:
        return speed(rows, panel, system, scaled(bench, Run(system, batch, context)))

    def loss(system: str) -> float:
        return at(system, 256, 4096, "context") / at(system, 256, 1024, "context") - 1

    found = {
        "vllm-o at batch 32, tokens/s": (54.6, at("vllm-o", 32)),
        "vllm / vllm-o at batch 32": (6.0, at("vllm", 32) / at("vllm-o", 32)),
        "fluxmoe / vllm at batch 32": (0.639, at("fluxmoe", 32) / at("vllm", 32)),
        "vllm, batch 128 to 256": (-0.322, at("vllm", 256) / at("vllm", 128) - 1),
        "fluxmoe / vllm at batch 256": (3.0, at("fluxmoe", 256) / at("vllm", 256)),
        "fluxmoe / vllm-o at batch 256": (3.7, at("fluxmoe", 256) / at("vllm-o", 256)),
        "vllm / vllm-o at batch 256": (1.22, at("vllm", 256) / at("vllm-o", 256)),
        "vllm, context 1024 to 4096": (-0.453, loss("vllm")),
        "fluxmoe, context 1024 to 4096": (-0.205, loss("fluxmoe")),
        "vllm-best / vllm at batch 256": (None, at("vllm-best", 256) / at("vllm", 256)),
        "fluxmoe / vllm-best at batch 256": (None, at("fluxmoe", 256) / at("vllm-best", 256)),
        "ours / vllm at batch 32": (None, at("ours", 32) / at("vllm", 32)),
        "ours / vllm at batch 256": (None, at("ours", 256) / at("vllm", 256)),
        "ours / vllm-best at batch 256": (None, at("ours", 256) / at("vllm-best", 256)),
    }
    if bench.machine.simulated:
        for batch in (32, 256):
            found[f"ours, launched as theirs / vllm at batch {batch}"] = (
                None, at("ours-eager", batch) / at("vllm", batch)
            )  # fmt: skip
    else:
        del found["vllm-o at batch 32, tokens/s"]
    return found


def main(argv: list[str] | None = None) -> None:
    args = parser("exp1_performance_bound", __doc__.splitlines()[0]).parse_args(argv)
    bench = bench_of(args, MODEL, DEVICES, PRESET)
    rows = sweep(bench, runs(bench, args.link_bandwidth), Path(args.out))
    print_ratios(ratios(rows, bench), args.device)
    print(f"figure: {plot_exp1(Path(args.out))}")


if __name__ == "__main__":
    cli_main(main)
