"""Figures of what a GPU's benchmarks measured, drawn from their rows alone."""

from __future__ import annotations

from pathlib import Path

from .common import line_of, read, save, subplots, where_of

# Ours first; colours of Okabe and Ito.
_PROVIDERS = {
    "fluxmoe": ("#000000", "o", "FluxMoE, dense experts"),
    "fluxmoe planar12": ("#D55E00", "P", "FluxMoE, experts at 12 bits, decoded in the GEMM"),
    "vllm": ("#0072B2", "D", "vLLM's fused MoE, tuned; its top-k not counted"),
    "triton_kernels": ("#009E73", "^", "OpenAI's triton_kernels"),
    "torch": ("#999999", "s", "torch's grouped_mm; top-k not counted"),
}


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
        points = rows[rows["shape"] == shape]
        floor = points[points.provider == "fluxmoe"].set_index("tokens").floor_us
        for provider, (colour, marker, label) in _PROVIDERS.items():
            times = points[points.provider == provider].set_index("tokens").time_us
            if len(times):
                axis.plot((times / floor.loc[times.index]), line_of(about), color=colour, marker=marker, label=label)
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
