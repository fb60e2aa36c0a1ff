"""Mixtral-8x7B on 4 x L40, weights resident: throughput against the memory that the KV cache has (Fig. 2).

    python -m fluxmoe.experiments.paper.fig2_kv_capacity --out results/simulated-4xL40/fig2_kv_capacity
    python -m fluxmoe.experiments.paper.fig2_kv_capacity --device cpu --out results/<hardware>/fig2_kv_capacity

The panel is the KV cache of all devices together: as the paper has it, or the same share of what the batch needs.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..lib.presets import published_source
from ..lib.results import cli_main
from ..plots.paper import plot_kv_capacity
from .sweep import bench_of, demand, fixed_bytes, parser, print_ratios, scaled, speed, sweep
from .systems import Bench, Run

MODEL, DEVICES, PRESET = "mixtral-8x7b", 4, "deep-mixtral"
KV_GIB = (20, 30, 40, 50, 60)
CONTEXTS = (1024, 2048, 4096)
BATCH = 128


def panel_of(bench: Bench, kv_gib: int) -> tuple[str, int]:
    """Name and bytes of the KV cache of all devices that stands for the paper's."""
    if bench.machine.simulated:
        return f"{kv_gib} GiB", kv_gib << 30
    largest = Run("vllm", BATCH, max(CONTEXTS))
    share = (kv_gib << 30) / demand(published_source(MODEL), largest)
    mib = round(share * demand(bench.source, scaled(bench, largest)) / (1 << 20), 2)
    return f"{mib:g} MiB", int(mib * (1 << 20))


def runs(bench: Bench) -> list[tuple[str, Run]]:
    found, devices = [], bench.machine.devices or 1
    for context in CONTEXTS:
        run = scaled(bench, Run("vllm", BATCH, context))
        fixed = fixed_bytes(bench, run)
        for kv_gib in KV_GIB:
            panel, nbytes = panel_of(bench, kv_gib)
            found.append((panel, replace(run, budget=fixed + nbytes // devices)))
    return found


def ratios(rows: list[dict], bench: Bench) -> dict[str, tuple[float | None, float]]:
    """Figure → (the paper's, ours)."""

    def at(kv_gib: int, context: int) -> float:
        return speed(rows, panel_of(bench, kv_gib)[0], "vllm", scaled(bench, Run("vllm", BATCH, context)))

    return {
        "KV 20 to 60 GiB, context 4096": (0.588, at(60, 4096) / at(20, 4096) - 1),
        "context 1024 to 4096 with 20 GiB of KV": (-0.667, at(20, 4096) / at(20, 1024) - 1),
        "context 1024 to 4096 with 60 GiB of KV": (-0.132, at(60, 4096) / at(60, 1024) - 1),
    }


def main(argv: list[str] | None = None) -> None:
    args = parser("fig2_kv_capacity", __doc__.splitlines()[0]).parse_args(argv)
    bench = bench_of(args, MODEL, DEVICES, PRESET)
    rows = sweep(bench, runs(bench), Path(args.out))
    print_ratios(ratios(rows, bench), args.device)
    print(f"figure: {plot_kv_capacity(Path(args.out))}")


if __name__ == "__main__":
    cli_main(main)
