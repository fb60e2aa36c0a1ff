"""Mixtral-8x7B on 4 x L40, weights resident: throughput against the memory that the KV cache has (Fig. 2).

    python -m fluxmoe.experiments.fig2_kv_capacity --out results/simulated-4xL40/fig2_kv_capacity

Simulated. The panel is the KV cache of all devices together, GiB.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fluxmoe.models.published import published_config
from fluxmoe.runtime.hardware import HardwareProfile
from fluxmoe.runtime.simulator import SimEngine

from .common import cli_main
from .paper_plots import plot_kv_capacity
from .paper_sweep import PROFILE, parser, print_ratios, speed, sweep
from .paper_systems import Run, settings_of

KV_GIB = (20, 30, 40, 50, 60)
CONTEXTS = (1024, 2048, 4096)
BATCH = 128


def runs() -> list[tuple[str, Run]]:
    model, profile = published_config("mixtral-8x7b"), HardwareProfile.load(PROFILE)
    found = []
    for context in CONTEXTS:
        run = Run("vllm", model, 4, BATCH, context)
        settings, parameters = settings_of(run)
        lines = SimEngine(model, profile, settings, parameters, 4).budget.lines()
        fixed = sum(nbytes for line, nbytes in lines.items() if line != "kv_cache")
        found += [(f"{kv} GiB", replace(run, budget=fixed + (kv << 30) // 4)) for kv in KV_GIB]
    return found


def ratios(rows: list[dict]) -> dict[str, tuple[float | None, float]]:
    """Figure → (the paper's, ours)."""

    def at(kv: int, context: int) -> float:
        return speed(rows, f"{kv} GiB", "vllm", BATCH, context)

    return {
        "KV 20 to 60 GiB, context 4096": (0.588, at(60, 4096) / at(20, 4096) - 1),
        "context 1024 to 4096 with 20 GiB of KV": (-0.667, at(20, 4096) / at(20, 1024) - 1),
        "context 1024 to 4096 with 60 GiB of KV": (-0.132, at(60, 4096) / at(60, 1024) - 1),
    }


def main(argv: list[str] | None = None) -> None:
    args = parser("fig2_kv_capacity", __doc__.splitlines()[0]).parse_args(argv)
    rows = sweep(runs(), Path(args.out), Path(args.calibration))
    print_ratios(ratios(rows))
    print(f"figure: {plot_kv_capacity(Path(args.out))}")


if __name__ == "__main__":
    cli_main(main)
