"""The figure of `versus walls`: tokens/s against real memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from fluxmoe.runtime.memory.budget import parse_bytes
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .common import axis_label, legend_below, read, runs_of, save, subplots, where_of

# Okabe-Ito; of ours whatever runs is one line, with a mark for each placement.
_STYLE = {"fluxmoe": ("#D55E00", "FluxMoE"), "llama.cpp": ("#0072B2", "llama.cpp"), "vllm": ("#009E73", "vLLM")}
_MARKS = {"resident": "o", "packed": "P", "disk": "D"}


def plot_walls(directory: Path) -> Path:
    """walls.png beside rows.csv of `versus walls`: a panel a number of sequences; medians of rounds, ranges as bars.

    Of ours the best placement at each wall. Crosses: does not start, or was stopped. Dotted: what the disk allows for
    our format where routing is uniform. Without any wall, all that ran side by side.
    """
    rows, about = read(directory, "rows.csv", dtype={"wall": str}, keep_default_na=False, na_values=[""])
    ok = rows[rows.status == "ok"].copy()
    if set(rows.wall) == {"none"}:
        figure, axes = _side_by_side(ok)
    else:
        figure, axes = _against_memory(rows, ok)
        legend_below(figure, axes[0], 4)
    axes[0].set_ylabel(axis_label("tokens/s in decode", about))
    single = runs_of(ok, about, ["wall", "provider", "sequences"])
    size = f"{about['weights_bytes'] / 1e9:.3g} GB of bf16 weights"
    figure.suptitle(f"{about['arch']}, {size}{single}; {where_of(about)}", fontsize=9)
    return save(figure, directory / "walls.png")


def _side_by_side(ok: pd.DataFrame) -> tuple[Figure, Sequence[Axes]]:
    """A panel a number of sequences: bars of medians, the fastest first, with their ranges."""
    batches = sorted(ok.sequences.unique())
    figure, axes = subplots(1, len(batches), figsize=(2.4 * len(batches) + 0.6, 3.4), squeeze=False)
    for axis, batch in zip(axes[0], batches, strict=True):
        speed = ok[ok.sequences == batch].groupby("provider").decode_tokens_per_s.agg(["median", "min", "max"])
        speed = speed.sort_values("median", ascending=False)
        engines = [next(engine for engine in _STYLE if name.startswith(engine)) for name in speed.index]
        spread = [speed["median"] - speed["min"], speed["max"] - speed["median"]]
        axis.bar(range(len(speed)), speed["median"], yerr=spread, capsize=3, color=[_STYLE[e][0] for e in engines])
        names = [name.replace(e, _STYLE[e][1]).replace(" ", "\n") for name, e in zip(speed.index, engines, strict=True)]
        axis.set_xticks(range(len(speed)), names, fontsize=7)
        _say_sequences(axis, batch)
    return figure, axes[0]


def _say_sequences(axis: Axes, batch: int) -> None:
    axis.set_title(f"{batch} sequence{'s' if batch > 1 else ''}", fontsize=9)


def _against_memory(rows: pd.DataFrame, ok: pd.DataFrame) -> tuple[Figure, Sequence[Axes]]:
    """A panel a number of sequences that ran behind walls."""
    walls = sorted(
        rows.wall.unique(), key=lambda name: float("inf") if name == "none" else float(parse_bytes(name) or 0)
    )
    at = {name: index for index, name in enumerate(walls)}
    batches = sorted(rows[rows.wall != "none"].sequences.unique())
    figure, axes = subplots(1, len(batches), figsize=(3.0 * len(batches) + 0.6, 3.8), squeeze=False, sharey=True)
    for axis, batch in zip(axes[0], batches, strict=True):
        mine = ok[ok.sequences == batch]
        for engine, (colour, label) in _STYLE.items():
            of_engine = mine[mine.provider.str.startswith(engine)]
            middle = of_engine.groupby(["wall", "provider"]).decode_tokens_per_s.agg(["median", "min", "max"])
            best = middle.reset_index().sort_values("median").groupby("wall").tail(1)
            best = best.assign(x=best.wall.map(at)).sort_values("x")
            spread = [best["median"] - best["min"], best["max"] - best["median"]]
            axis.errorbar(best.x, best["median"], yerr=spread, color=colour, capsize=2, linewidth=1.5,
                          label=label if len(rows[rows.provider.str.startswith(engine)]) else None)  # fmt: skip
            for point in best.itertuples():
                placement = point.provider.removeprefix("fluxmoe ").partition("+")[0].partition(":")[0]
                axis.plot(point.x, point.median, _MARKS.get(placement, "o"), color=colour, markersize=6)
            asked = set(rows[(rows.sequences == batch) & rows.provider.str.startswith(engine)].wall)
            for name in sorted(asked - set(best.wall)):
                axis.plot(at[name], 0.02, "x", color=colour, transform=axis.get_xaxis_transform(), clip_on=False)
        bound = mine[mine.provider.str.contains("disk")].groupby("wall").uniform_bound_tokens_per_s.median().dropna()
        bound = bound.rename(index=at).sort_index()
        axis.plot(bound.index, bound, ":", color="0.4", label="the disk's bound, uniform routing")
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.yaxis.set_minor_formatter(lambda *_: "")
        axis.set_xticks(range(len(walls)), ["no wall" if name == "none" else name for name in walls], fontsize=8)
        axis.set_xlim(-0.4, len(walls) - 0.6)
        _say_sequences(axis, batch)
        axis.set_xlabel("memory of the process")
    for placement, mark in _MARKS.items():
        if ok.provider.str.startswith(f"fluxmoe {placement}").any():
            axes[0][0].plot([], [], mark, color=_STYLE["fluxmoe"][0], label=f"FluxMoE {placement}")
    return figure, axes[0]
