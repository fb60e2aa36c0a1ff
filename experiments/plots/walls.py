"""The figure of `versus walls`: tokens/s against real memory."""

from __future__ import annotations

from pathlib import Path

from fluxmoe.runtime.memory.budget import parse_bytes

from .common import axis_label, legend_below, read, runs_of, save, subplots, where_of

# Okabe-Ito; of ours whatever runs is one line, with a mark for each placement.
_STYLE = {"fluxmoe": ("#D55E00", "FluxMoE"), "llama.cpp": ("#0072B2", "llama.cpp"), "vllm": ("#009E73", "vLLM")}
_MARKS = {"resident": "o", "packed": "P", "disk": "D"}


def plot_walls(directory: Path) -> Path:
    """walls.png beside rows.csv of `versus walls`: a panel a number of sequences; medians of rounds, ranges as bars.

    Of ours the best placement at each wall. Crosses: does not start, or was stopped. Dotted: what the disk allows for
    our format where routing is uniform.
    """
    rows, about = read(directory, "rows.csv", dtype={"wall": str}, keep_default_na=False, na_values=[""])
    walls = sorted(
        rows.wall.unique(), key=lambda name: float("inf") if name == "none" else float(parse_bytes(name) or 0)
    )
    at = {name: index for index, name in enumerate(walls)}
    ok = rows[rows.status == "ok"].copy()
    batches = sorted(rows[rows.wall != "none"].sequences.unique()) or sorted(rows.sequences.unique())
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
        axis.set_title(f"{batch} sequence{'s' if batch > 1 else ''}", fontsize=9)
        axis.set_xlabel("memory of the process")
    axes[0][0].set_ylabel(axis_label("tokens/s in decode", about))
    for placement, mark in _MARKS.items():
        if ok.provider.str.startswith(f"fluxmoe {placement}").any():
            axes[0][0].plot([], [], mark, color=_STYLE["fluxmoe"][0], label=f"FluxMoE {placement}")
    single = runs_of(ok, about, ["wall", "provider", "sequences"])
    size = f"{about['weights_bytes'] / 1e9:.3g} GB of bf16 weights"
    figure.suptitle(f"{about['arch']}, {size}{single}; {where_of(about)}", fontsize=9)
    legend_below(figure, axes[0][0], 4)
    return save(figure, directory / "walls.png")
