"""Hit rates of cache policies, drawn from a folder of bench cache."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from .common import legend_below, line_of, read, save, subplots, where_of

# Okabe-Ito, and what a legend says.
_STYLE = {
    "belady": ("#999999", "Belady: knows the future, the best of caches"),
    "next_use": ("#D55E00", "next_use"),
    "least_stale": ("#CC79A7", "least_stale"),
    "lirs": ("#009E73", "lirs"),
    "lfu": ("#E69F00", "lfu"),
    "lru": ("#56B4E9", "lru"),
    "static": ("#0072B2", "static: most popular before"),
    "fixed": ("#000000", "fixed: same share of each layer, by id"),
}


def plot_cache(directory: Path) -> Path:
    """cache.png beside rows.csv: hit rate against the share of experts that the cache holds; a row of panels a source
    and skew, a column a batch."""
    rows, about = read(directory, "rows.csv")
    ok = rows[rows.status == "ok"]
    groups = list(ok.groupby(["source", "skew"], sort=False, dropna=False))
    batches = sorted(ok.batch.unique())
    size = (2.3 * len(batches) + 0.8, 2.0 * len(groups) + 1.3)
    figure, axes = subplots(len(groups), len(batches), figsize=size, squeeze=False, sharex=True, sharey=True)
    for line, ((source, skew), found) in zip(axes, groups, strict=True):
        for axis, batch in zip(line, batches, strict=True):
            here = found[found.batch == batch]
            for policy, (colour, label) in _STYLE.items():
                curve = here[here.policy == policy].sort_values("share")
                axis.plot(
                    curve.share, curve.hit_rate, line_of(about), marker="o", markersize=2.5, linewidth=1.3,
                    color=colour, label=label,
                )  # fmt: skip
            used = here.used_per_layer.mean()
            axis.set_title(f"batch {batch}: {used:.0f} experts a layer", fontsize=8)
            axis.set_ylim(-0.03, 1.03)
            axis.grid(color="0.92", linewidth=0.6)
            axis.tick_params(labelsize=7)
        skewed = "" if pd.isna(skew) else f", router skew {skew:g}"
        line[0].set_ylabel(f"hit rate\n{source}{skewed}", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("share of experts in the cache", fontsize=8)
    kind = "synthetic routing, replayed" if about.get("simulated") else f"recorded routing, replayed; {where_of(about)}"
    if about.get("correlation"):
        kind += f", a sequence's hidden states correlated by {about['correlation']:g}"
    figure.suptitle(f"Which experts a cache keeps: {kind}", fontsize=9)
    legend_below(figure, axes[0][0], 4)
    return save(figure, directory / "cache.png")
