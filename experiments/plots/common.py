"""What figures share: how a line looks, what a title says, axes, legends, files.

What was measured is drawn solid, what was simulated dashed; nothing else is told by the style of a line. Nothing here
knows pyplot, whose backend is a notebook's to choose.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pandas.core.groupby import SeriesGroupBy

MIB = 1 << 20
# Okabe-Ito: told apart with any colour vision, and by marker.
STYLE = {
    "resident": ("#000000", "o", "resident (all experts on the device)"),
    "packed": ("#D55E00", "P", "packed (all experts on the device, compressed)"),
    "hybrid": ("#F0E442", "X", "hybrid (last layers in host, the rest compressed)"),
    "offload": ("#E69F00", "s", "offload (last layers in host, vLLM-O)"),
    "balanced": ("#0072B2", "D", "balanced (same share of each layer streamed)"),
    "balanced+": ("#56B4E9", "d", "balanced"),
    "three_tiers": ("#56B4E9", "h", "three tiers (same shares of each layer in host memory and files)"),
    "host": ("#009E73", "^", "host (all experts streamed)"),
    "host+": ("#CC79A7", "v", "host"),
    "disk": ("#999999", "<", "disk (all experts streamed)"),
}


def style_of(placement: str) -> tuple[str, str, str]:
    """Colour, marker and label of a placement as scripts take it, NAME[:ALPHA][+FORMAT]."""
    where, _, expert_format = placement.partition("+")
    name = where.partition(":")[0]
    key = f"{name}+" if expert_format and f"{name}+" in STYLE else name
    return STYLE.get(key, ("#F0E442", "x", name))


def line_of(about: dict) -> str:
    """The style of a result's lines, by its provenance."""
    return "--" if about.get("simulated") else "-"


def where_of(about: dict) -> str:
    """What made a result, for a title."""
    if about.get("simulated"):
        return f"simulated on {about['simulated']}"
    kind = f", {about['instructions']}" if about.get("instructions") else ""
    return f"measured on {about['hardware']} ({about['cpus']} cores{kind})"


def size_of(nbytes: int | None) -> str:
    """A budget, for a title."""
    return "all" if nbytes is None else f"{nbytes / MIB:g} MiB"


def link_of(about: dict) -> str:
    """What a CPU's copies were held to, for a title."""
    return f", link held to {about['link_bandwidth'] / 1e9:g} GB/s" if about.get("link_bandwidth") else ""


def axis_label(quantity: str, about: dict) -> str:
    return f"{quantity}, simulated" if about.get("simulated") else quantity


def subplots(rows: int = 1, columns: int = 1, *, figsize: tuple[float, float], **settings: Any) -> tuple[Figure, Any]:
    """A figure and its axes, as pyplot gives them, with no window and no backend behind it, open above and right."""
    figure = Figure(figsize=figsize, layout="constrained")
    axes = figure.subplots(rows, columns, **settings)
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def read(directory: Path, table: str = "points.csv", **how: Any) -> tuple[pd.DataFrame, dict]:
    """A result's rows and its provenance."""
    return pd.read_csv(directory / table, **how), json.loads((directory / "provenance.json").read_text())


def log_ticks(axis: Axes, ticks: Sequence[float], labels: Sequence[str], base: int = 10, **style: Any) -> None:
    """A logarithmic axis with these ticks alone."""
    axis.set_xscale("log", base=base)
    axis.set_xticks(ticks, labels, fontsize=8, **style)
    axis.minorticks_off()


def legend_below(figure: Figure, axis: Axes, columns: int) -> None:
    """What `axis` shows, under all axes."""
    handles = axis.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=columns, fontsize=7.5, frameon=False)


def draw_runs(axis: Axes, groups: SeriesGroupBy, unit: float = 1, **style: Any) -> None:
    """Medians over the runs of each x as a line, and the range of several as a bar: a single run has none."""
    middle, several = groups.median(), groups.count() > 1
    line = axis.plot(middle.index / unit, middle, **style)[0]
    if several.any():
        spread = [(middle - groups.min())[several], (groups.max() - middle)[several]]
        axis.errorbar(
            middle.index[several] / unit, middle[several], yerr=spread, fmt="none", capsize=2, color=line.get_color()
        )


def runs_of(rows: pd.DataFrame, about: dict, by: list[str]) -> str:
    """That points are single runs, for a title; simulated ones are the same in every run."""
    return "" if about.get("simulated") or rows.groupby(by).size().max() > 1 else ", one run each"


def save(figure: Figure, path: Path) -> Path:
    """Write `path`, a PNG, and the same as PDF for print; returns `path`."""
    figure.savefig(path, dpi=160)
    # Without a date, so that the same figure is the same file.
    figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})
    return path
