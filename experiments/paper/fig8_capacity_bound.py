"""Mixtral-8x7B on 2 x L40, which cannot hold it: an eighth of the experts in host memory (Fig. 8).

    fluxmoe paper fig8 --out results/simulated/4xL40/fig8_capacity_bound
    fluxmoe paper fig8 --device cpu --link-bandwidth 1GB --out DIR

Simulated, or measured at a 16th of the paper's batches and contexts; see `sweep`.
"""

from __future__ import annotations

from ..plots.paper import plot_fig8
from . import stated
from .sweep import Arguments, Figure, Ratios, batches_and_contexts, beside, scaled, speed
from .systems import Bench, Run

__all__ = ["FIGURE", "Arguments", "run"]
SYSTEMS = ("vllm", "vllm-o", "vllm-o-best", "fluxmoe-h", "fluxmoe", "ours-eager", "ours")
MEASURED = ("vllm", "vllm-o", "fluxmoe-h", "fluxmoe", "ours")


def runs(bench: Bench, link_bandwidth: float | None = None) -> list[tuple[str, Run]]:
    systems = SYSTEMS if bench.machine.simulated else MEASURED
    budget = FIGURE.equal_room(bench, Run("vllm", 256, 4096))
    return batches_and_contexts(bench, systems, Run("vllm", 256, 4096, alpha=0.875, budget=budget), link_bandwidth)


def ratios(rows: list[dict], bench: Bench) -> Ratios:
    """Contexts are the paper's."""

    def at(system: str, context: int = 4096) -> float:
        return speed(rows, "context", system, scaled(bench, Run(system, 256, context)))

    found = {"vllm-o at batch 256, context 4096, tokens/s": at("vllm-o")} if bench.machine.simulated else {}
    found |= {f"fluxmoe / fluxmoe-h, context {n}": at("fluxmoe", n) / at("fluxmoe-h", n) for n in (1024, 4096)}
    found |= {f"ours / {other}, context 4096": at("ours") / at(other) for other in ("fluxmoe", "vllm-o")}
    if bench.machine.simulated:
        found["ours / vllm-o-best, context 4096"] = at("ours") / at("vllm-o-best")
        found["ours, launched as theirs / fluxmoe, context 4096"] = at("ours-eager") / at("fluxmoe")
    return beside(stated.FIG8, found)


FIGURE = Figure("paper fig8", "mixtral-8x7b", 2, "deep-mixtral", runs, ratios, plot_fig8)
run = FIGURE.run
