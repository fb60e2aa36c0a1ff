"""Redraw every figure from the committed results alone: no model, no GPU, no measurement.

Each folder of results says in its provenance.json which experiment made it, and so what draws it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..lib.args import option
from ..lib.results import UsageError
from ..plots.bench import plot_cache, plot_layer
from ..plots.paper import plot_fig7, plot_fig8, plot_knee, plot_kv_capacity, plot_memory_split, plot_sensitivity
from ..plots.serving import (
    plot_adaptation,
    plot_at_a_glance,
    plot_exponents,
    plot_memory_budget,
    plot_overhead,
    plot_versus,
    plot_vllm_plugin,
)
from ..plots.walls import plot_walls

# Whose results the first page shows, as a figure of their own.
_FIRST_PAGE = "memory_budget"

# A function draws the figure of a folder; None: it has too little for one.
DRAW: dict[str, Callable[[Path], Path | None]] = {
    "memory-budget": plot_memory_budget,
    "bench cache": plot_cache,
    "bench moe": plot_layer,
    "sensitivity": plot_sensitivity,
    "versus": plot_versus,
    "versus vllm-plugin": plot_vllm_plugin,
    "versus walls": plot_walls,
    "paper fig1": plot_memory_split,
    "paper fig2": plot_kv_capacity,
    "paper fig5": plot_exponents,
    "paper fig6": plot_knee,
    "paper fig7": plot_fig7,
    "paper fig8": plot_fig8,
    "paper fig9": plot_adaptation,
    "paper fig10": plot_overhead,
}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    results: Path = option("all folders below", Path("results"), metavar="DIR")


def draw_all(results: Path) -> list[Path]:
    """All figures under `results`, drawn again; returns their paths."""
    drawn = []
    for path in sorted(results.rglob("provenance.json")):
        experiment = json.loads(path.read_text()).get("experiment", "")
        if experiment in DRAW and (figure := DRAW[experiment](path.parent)):
            drawn.append(figure)
        if path.parent.name == _FIRST_PAGE and (glance := plot_at_a_glance(path.parent)):
            drawn.append(glance)
    return drawn


def run(args: Arguments) -> None:
    try:
        drawn = draw_all(args.results)
    except (KeyError, json.JSONDecodeError) as error:
        raise UsageError(f"a result in {args.results} is not what its figure is drawn from: {error}") from None
    if not drawn:
        raise UsageError(f"{args.results} holds no result that has a figure")
    for path in drawn:
        print(path)
