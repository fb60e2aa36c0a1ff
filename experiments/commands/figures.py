"""Redraw every figure from the committed results alone: no model, no GPU, no measurement.

    python -m fluxmoe.experiments.commands.figures [--results DIR]

A folder of results is drawn by the kind of experiment that its name begins with.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from ..lib.results import Parser, UsageError, cli_main
from ..plots.paper import plot_exp1, plot_exp2, plot_knee, plot_kv_capacity, plot_memory_split, plot_sensitivity
from ..plots.serving import plot_adaptation, plot_exponents, plot_memory_budget, plot_overhead, plot_versus

DRAW: dict[str, Callable[[Path], Path]] = {
    "memory_budget": plot_memory_budget,
    "fig1_memory": plot_memory_split,
    "fig2_kv_capacity": plot_kv_capacity,
    "fig5_exponents": plot_exponents,
    "fig6_knee": plot_knee,
    "exp1_performance_bound": plot_exp1,
    "exp2_capacity_bound": plot_exp2,
    "exp3_adaptation": plot_adaptation,
    "exp4_overhead": plot_overhead,
    "sensitivity": plot_sensitivity,
    "versus": plot_versus,
}


def draw_all(results: Path) -> list[Path]:
    """All figures under `results`, drawn again; returns their paths."""
    drawn = []
    for directory in sorted(path for path in results.glob("*/*") if path.is_dir()):
        draw = next((draw for kind, draw in DRAW.items() if directory.name.startswith(kind)), None)
        if draw is not None:
            drawn.append(draw(directory))
    return drawn


def main(argv: list[str] | None = None) -> None:
    p = Parser(prog="fluxmoe.experiments.commands.figures", description=__doc__.splitlines()[0])
    p.add_argument("--results", default="results", metavar="DIR", help="(default: %(default)s)")
    results = Path(p.parse_args(argv).results)
    try:
        drawn = draw_all(results)
    except (KeyError, json.JSONDecodeError) as error:
        raise UsageError(f"a result in {results} is not what its figure is drawn from: {error}") from None
    if not drawn:
        raise UsageError(f"{results} holds no result that has a figure")
    for path in drawn:
        print(path)


if __name__ == "__main__":
    cli_main(main)
