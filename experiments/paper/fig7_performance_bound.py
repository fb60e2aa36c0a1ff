"""Qwen3-Next on 4 x L40, all experts compressed on the GPUs: throughput against batch and context (Fig. 7).

    fluxmoe paper fig7 --out results/simulated/4xL40/fig7_performance_bound
    fluxmoe paper fig7 --device cpu --link-bandwidth 1GB --out DIR

Simulated, or measured at a 16th of the paper's batches and contexts; see `sweep`. `ours` is what this project adds:
experts of 12 bits decoded inside the GEMM.
"""

from __future__ import annotations

from ..plots.paper import plot_fig7
from . import stated
from .sweep import Arguments, Figure, Ratios, batches_and_contexts, beside, scaled, speed
from .systems import Bench, Run

__all__ = ["FIGURE", "Arguments", "run"]
SYSTEMS = ("vllm", "vllm-best", "vllm-o", "vllm-o-best", "fluxmoe", "ours-eager", "ours")
MEASURED = ("vllm", "vllm-best", "vllm-o", "fluxmoe", "ours")


def runs(bench: Bench, link_bandwidth: float | None = None) -> list[tuple[str, Run]]:
    systems = SYSTEMS if bench.machine.simulated else MEASURED
    most = Run("vllm", 256, 4096)
    budget = FIGURE.equal_room(bench, most)
    return batches_and_contexts(bench, systems, Run("vllm", 256, 4096, budget=budget), link_bandwidth)


def ratios(rows: list[dict], bench: Bench) -> Ratios:
    """Batches and contexts are the paper's."""

    def at(system: str, batch: int, context: int = 4096, panel: str = "batch") -> float:
        return speed(rows, panel, system, scaled(bench, Run(system, batch, context)))

    def over(one: str, other: str, batch: int) -> float:
        return at(one, batch) / at(other, batch)

    def loss(system: str) -> float:
        return at(system, 256, 4096, "context") / at(system, 256, 1024, "context") - 1

    found = {"vllm-o at batch 32, tokens/s": at("vllm-o", 32)} if bench.machine.simulated else {}
    found |= {f"{a} / {b} at batch 32": over(a, b, 32) for a, b in (("vllm", "vllm-o"), ("fluxmoe", "vllm"))}
    found["vllm, batch 128 to 256"] = at("vllm", 256) / at("vllm", 128) - 1
    stated_pairs = (("fluxmoe", "vllm"), ("fluxmoe", "vllm-o"), ("vllm", "vllm-o"))
    found |= {f"{a} / {b} at batch 256": over(a, b, 256) for a, b in stated_pairs}
    found |= {f"{system}, context 1024 to 4096": loss(system) for system in ("vllm", "fluxmoe")}
    pairs = (("vllm-best", "vllm"), ("fluxmoe", "vllm-best"), ("ours", "vllm"), ("ours", "vllm-best"))
    found |= {f"{a} / {b} at batch 256": over(a, b, 256) for a, b in pairs}
    found["ours / vllm at batch 32"] = over("ours", "vllm", 32)
    if bench.machine.simulated:
        for batch in (32, 256):
            found[f"ours, launched as theirs / vllm at batch {batch}"] = over("ours-eager", "vllm", batch)
    return beside(stated.FIG7, found)


FIGURE = Figure("paper fig7", "qwen3-next-80b-a3b", 4, "deep-next", runs, ratios, plot_fig7)
run = FIGURE.run
