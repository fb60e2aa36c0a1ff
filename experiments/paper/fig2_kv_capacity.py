"""Mixtral-8x7B on 4 x L40, weights resident: throughput against the memory that the KV cache has (Fig. 2).

    fluxmoe paper fig2 --out results/simulated/4xL40/fig2_kv_capacity
    fluxmoe paper fig2 --device cpu --out results/measured/<hardware>/fig2_kv_capacity

The panel is the KV cache of all devices together: as the paper has it, or the same share of what the batch needs.
"""

from __future__ import annotations

from dataclasses import replace

from ..lib.models import published_source
from ..plots.paper import plot_kv_capacity
from . import stated
from .sweep import Arguments, Figure, Ratios, beside, demand, fixed_bytes, scaled, speed
from .systems import Bench, Run

__all__ = ["FIGURE", "Arguments", "run"]
KV_GIB = (20, 30, 40, 50, 60)
CONTEXTS = (1024, 2048, 4096)
BATCH = 128


def panel_of(bench: Bench, kv_gib: int) -> tuple[str, int]:
    """Name and bytes of the KV cache of all devices that stands for the paper's."""
    if bench.machine.simulated:
        return f"{kv_gib} GiB", kv_gib << 30
    largest = Run("vllm", BATCH, max(CONTEXTS))
    share = (kv_gib << 30) / demand(published_source(FIGURE.model), largest)
    mib = round(share * demand(bench.source, scaled(bench, largest)) / (1 << 20), 2)
    return f"{mib:g} MiB", int(mib * (1 << 20))


def runs(bench: Bench, link_bandwidth: float | None = None) -> list[tuple[str, Run]]:
    found, devices = [], bench.machine.devices or 1
    for context in CONTEXTS:
        run = scaled(bench, Run("vllm", BATCH, context), link_bandwidth)
        fixed = fixed_bytes(bench, run)
        for kv_gib in KV_GIB:
            panel, nbytes = panel_of(bench, kv_gib)
            found.append((panel, replace(run, budget=fixed + nbytes // devices)))
    return found


def ratios(rows: list[dict], bench: Bench) -> Ratios:
    """KV and contexts are the paper's."""

    def at(kv_gib: int, context: int) -> float:
        return speed(rows, panel_of(bench, kv_gib)[0], "vllm", scaled(bench, Run("vllm", BATCH, context)))

    found = {"KV 20 to 60 GiB, context 4096": at(60, 4096) / at(20, 4096) - 1}
    for kv in (20, 60):
        found[f"context 1024 to 4096 with {kv} GiB of KV"] = at(kv, 4096) / at(kv, 1024) - 1
    return beside(stated.FIG2, found)


FIGURE = Figure("paper fig2", "mixtral-8x7b", 4, "deep-mixtral", runs, ratios, plot_kv_capacity)
run = FIGURE.run
