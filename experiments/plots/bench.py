"""Figures of benchmarks: hit rates of cache policies, and what MoE layers take on a GPU; from rows alone."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from .common import legend_below, line_of, read, save, subplots, where_of

# Colours of Okabe and Ito, and what a legend says.
_POLICIES = {
    "belady": ("#999999", "Belady: knows the future, the best of caches"),
    "next_use": ("#D55E00", "next_use"),
    "learned": ("#F0E442", "learned"),
    "least_stale": ("#CC79A7", "least_stale"),
    "lirs": ("#009E73", "lirs"),
    "lfu": ("#E69F00", "lfu"),
    "lru": ("#56B4E9", "lru"),
    "static": ("#0072B2", "static: most popular before"),
    "fixed": ("#000000", "fixed: same share of each layer, by id"),
}
# Ours first.
_PROVIDERS = {
    "fluxmoe": ("#000000", "o", "FluxMoE, dense experts"),
    "fluxmoe planar12": ("#D55E00", "P", "FluxMoE, experts at 12 bits"),
    "fluxmoe planar12 in place": ("#D55E00", "X", "FluxMoE, 12 bits, decoded in the GEMM"),
    "fluxmoe planar12 decoded first": ("#CC79A7", "P", "FluxMoE, 12 bits, decoded before it"),
    "fluxmoe planar12 by 1024 MiB": ("#E69F00", "v", "FluxMoE, 12 bits, all decoded before it"),
    "fluxmoe planar8": ("#56B4E9", "P", "FluxMoE, experts that were FP8, at 8 bits"),
    "vllm": ("#0072B2", "D", "vLLM's fused MoE, tuned; its top-k not counted"),
    "triton_kernels": ("#009E73", "^", "OpenAI's triton_kernels"),
    "torch": ("#999999", "s", "torch's grouped_mm; top-k not counted"),
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
            for policy, (colour, label) in _POLICIES.items():
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


def plot_layer(directory: Path) -> Path | None:
    """layer.png beside rows.csv of bench moe: time of a MoE layer over that of the floor which bytes and flops set for
    dense experts, against tokens, a panel for each shape with more than one point; None where there is none."""
    rows, about = read(directory, "rows.csv")
    rows = rows[rows.status == "ok"]
    shapes = [shape for shape, points in rows.groupby("shape", sort=False) if points.tokens.nunique() > 1]
    if not shapes:
        return None
    figure, axes = subplots(1, len(shapes), figsize=(1.4 + 3.4 * len(shapes), 3.9), sharey=True, squeeze=False)
    for axis, shape in zip(axes[0], shapes, strict=True):
        points = rows[rows["shape"] == shape].sort_values("tokens", kind="stable")
        floor = points[points.provider == "fluxmoe"].set_index("tokens").floor_us
        for provider, (colour, marker, label) in _PROVIDERS.items():
            times = points[points.provider == provider].set_index("tokens").time_us
            if len(times):
                axis.plot(times / floor.loc[times.index], line_of(about), color=colour, marker=marker, label=label)
        axis.axhline(1.0, color="0.4", linewidth=0.8, linestyle=":")
        axis.set_xscale("log", base=2)
        axis.set_xticks(floor.index, [str(tokens) for tokens in floor.index])
        axis.set_title(shape, fontsize=9)
        axis.set_xlabel("tokens in the batch")
    axes[0][0].set_yscale("log", base=2)
    axes[0][0].set_yticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    axes[0][0].set_ylabel("time over the floor of dense experts")
    axes[0][-1].legend(fontsize=7, frameon=False)
    figure.suptitle(f"one MoE layer, weights cold; {where_of(about)}", fontsize=9)
    return save(figure, directory / "layer.png")
