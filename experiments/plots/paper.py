"""Figures of the paper's evaluation, drawn from files in results/ alone."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from ..paper import stated
from .common import axis_label, legend_below, line_of, link_of, log_ticks, read, save, subplots, where_of

# Okabe-Ito: told apart with any colour vision, and by marker.
SYSTEMS = {
    "vllm": ("#000000", "o", "vLLM as the paper ran it, experts resident"),
    "vllm-best": ("#999999", "o", "vLLM at its best setting"),
    "vllm-o": ("#E69F00", "s", "vLLM-O, last layers in the host"),
    "vllm-o-best": ("#F0E442", "s", "vLLM-O at its best setting"),
    "fluxmoe-h": ("#CC79A7", "X", "FluxMoE-H, no balance inside a layer"),
    "fluxmoe": ("#0072B2", "D", "FluxMoE of the paper, decoding to a buffer"),
    "ours-eager": ("#56B4E9", "v", "ours, decoding in the GEMM, launched as theirs"),
    "ours": ("#D55E00", "P", "ours, decoding in the GEMM"),
}


def _finish(axis, x: str) -> None:
    axis.set_xlabel(x)
    axis.set_ylim(bottom=0)


def plot_fig7(directory: Path) -> Path:
    """throughput.png beside points.csv of fig7; returns its path."""
    vllm_o, over_vllm_o, over_vllm = (stated.FIG7[name] for name in stated.CALIBRATED)
    at_32 = {"vllm-o": vllm_o, "vllm": over_vllm_o * vllm_o, "fluxmoe": over_vllm * over_vllm_o * vllm_o}
    return _plot_sweep(directory, "all experts on the device", [("batch", 32, s, y) for s, y in at_32.items()])


def plot_fig8(directory: Path) -> Path:
    """throughput.png beside points.csv of fig8; returns its path."""
    speed = stated.FIG8["vllm-o at batch 256, context 4096, tokens/s"]
    points = [("batch", 256, "vllm-o", speed), ("context", 4096, "vllm-o", speed)]
    return _plot_sweep(directory, "12.5 % of experts in the host", points)


def _plot_sweep(directory: Path, what: str, said: list[tuple[str, int, str, float]]) -> Path:
    """Throughput against batch, and against context. said: (panel, x, system, tokens/s) of the paper's machine."""
    points, about = read(directory)
    figure, axes = subplots(1, 2, figsize=(8.0, 4.4), sharey=True)
    for axis, panel in zip(axes, ("batch", "context"), strict=True):
        rows = points[points.panel == panel]
        for system, (colour, marker, label) in SYSTEMS.items():
            chosen = rows[(rows.system == system) & (rows.status == "ok")].sort_values(panel)
            if len(chosen):
                axis.plot(
                    chosen[panel], chosen.tokens_per_s, marker, color=colour, label=label, linestyle=line_of(about),
                    linewidth=1.4, markersize=5,
                )  # fmt: skip
        for where, x, system, y in said if about.get("simulated") else ():
            if where == panel:
                axis.plot(x, y, "*", color=SYSTEMS[system][0], markersize=13, markeredgecolor="white", zorder=5)
        other = "context" if panel == "batch" else "batch"
        axis.set_title(f"{other} {rows[other].max()}", fontsize=9)
        _finish(axis, f"{panel} ({'requests' if panel == 'batch' else 'tokens'})")
    if about.get("simulated"):
        axes[0].plot([], [], "*", color="0.3", markersize=10, linestyle="none", label="stated by the paper")
    axes[0].set_ylim(0, 1.06 * points.tokens_per_s.max())
    axes[0].set_ylabel(axis_label("output tokens/s", about))
    legend_below(figure, axes[0], 2)
    link = points.link_bandwidth.max()
    held = f", link held to {link / 1e9:g} GB/s" if link == link else ""
    figure.suptitle(f"{about['model']}, {what}; {where_of(about)}{held}", fontsize=9)
    return save(figure, directory / "throughput.png")


def plot_sensitivity(directory: Path) -> Path:
    """sensitivity.png beside points.csv of sensitivity: a panel each of context, link and GPU; returns its path."""
    points, about = read(directory)
    labels = {
        "context": "context (tokens)",
        "link": "bandwidth of the link over that of memory" if about.get("simulated") else "link held to (GB/s)",
        "gpu": "GPU, 90 % of its memory",
    }
    panels = [panel for panel in labels if (points.panel == panel).any()]
    figure, axes = subplots(1, len(panels), figsize=(4.0 * len(panels), 3.9), squeeze=False)
    colours = ("#000000", "#D55E00", "#0072B2", "#56B4E9", "#CC79A7")
    for axis, panel in zip(axes[0], panels, strict=True):
        ok = points[(points.panel == panel) & (points.status == "ok")]
        for index, (colour, placement) in enumerate(zip(colours, points.placement.unique(), strict=True)):
            rows = ok[ok.placement == placement]
            if panel == "gpu":
                names = list(dict.fromkeys(points[points.panel == panel].x))
                x = [names.index(name) + 0.15 * (index - 2) for name in rows.x]
                # Simulated: bars without a fill, as lines are dashed.
                axis.bar(
                    x, rows.tokens_per_s, 0.13, facecolor="white", edgecolor=colour, linestyle="--", label=placement
                )
                axis.set_xticks(range(len(names)), names, fontsize=8)
                continue
            unit = 1e9 if panel == "link" and not about.get("simulated") else 1
            rows = rows.assign(x=rows.x.astype(float) / unit).sort_values("x")
            style = "o" + line_of(about)
            axis.plot(rows.x, rows.tokens_per_s, style, color=colour, label=placement, linewidth=1.4, markersize=4)
            ticks = sorted(float(x) / unit for x in points[points.panel == panel].x.unique())
            log_ticks(axis, ticks, [f"{tick:.3g}" if tick < 1000 else f"{tick:.0f}" for tick in ticks], 2)
        at = points[points.panel == panel].iloc[0]
        size = f"{at.batch} requests" + ("" if panel == "context" else f" of {at.context}")
        axis.set_title(f"{about['models'][panel]}, {size}", fontsize=9)
        _finish(axis, labels[panel])
    axes[0][0].set_ylabel(axis_label("output tokens/s", about))
    legend_below(figure, axes[0][0], 5)
    return save(figure, directory / "sensitivity.png")


def plot_kv_capacity(directory: Path) -> Path:
    """kv_capacity.png beside points.csv of fig2_kv_capacity; returns its path."""
    points, about = read(directory)
    points[["kv", "unit"]] = points.panel.str.split(" ", expand=True)
    points["kv"] = points.kv.astype(float)
    figure, axis = subplots(figsize=(5.2, 3.6))
    colours = ("#009E73", "#0072B2", "#D55E00")
    for (context, rows), colour in zip(points[points.status == "ok"].groupby("context"), colours, strict=False):
        ordered = rows.sort_values("kv")
        axis.plot(
            ordered.kv, ordered.tokens_per_s, "o" + line_of(about), color=colour, label=f"context {context}",
            linewidth=1.4,
        )  # fmt: skip
    axis.set_ylabel(axis_label("output tokens/s", about))
    axis.legend(fontsize=8, frameon=False)
    axis.set_title(f"{about['model']}, batch {points.batch.max()}; {where_of(about)}", fontsize=9)
    _finish(axis, f"KV cache of all devices ({points.unit.iloc[0]})")
    return save(figure, directory / "kv_capacity.png")


def plot_memory_split(directory: Path) -> Path:
    """memory.png beside points.csv of fig1_memory: bytes by use against batch and context; returns its path."""
    points, about = read(directory)
    figure, axes = subplots(1, 2, figsize=(7.6, 3.4), sharey=True)
    parts = {"experts": "#0072B2", "other_weights": "#56B4E9", "states": "#E69F00", "kv_cache": "#D55E00"}
    measured = not about.get("simulated")
    unit, name = (1e6, "MB") if measured else (1e9, "GB")
    for axis, panel in zip(axes, ("batch", "context"), strict=True):
        rows = points[points.panel == panel]
        bottom = pd.Series(0.0, index=rows.index)
        for part, colour in parts.items():
            height = rows[part] / unit
            axis.bar(rows[panel].astype(str), height, bottom=bottom, color=colour, label=part.replace("_", " "))
            bottom += height
        if not measured:
            axis.axhline(4 * 48 * 1.073741824, color="0.4", linestyle=":", linewidth=0.9, label="4 x L40")
        _finish(axis, panel)
    axes[0].set_ylabel(f"{name} held" if measured else name)
    legend_below(figure, axes[0], 5)
    where = where_of(about) if measured else "computed"
    figure.suptitle(f"{points.model.iloc[0]}: what memory holds; {where}", fontsize=9)
    return save(figure, directory / "memory.png")


def plot_knee(directory: Path) -> Path:
    """knee.png beside points.csv of fig6_knee: time of compute and of loads against α, a panel a batch."""
    points, about = read(directory)
    batches = sorted(points.batch.unique())
    figure, axes = subplots(1, len(batches), figsize=(4.0 * len(batches), 3.6), squeeze=False)
    for axis, batch in zip(axes[0], batches, strict=True):
        for host, rows in points[points.batch == batch].groupby("host_format"):
            colour = "#000000" if host == "dense" else "#D55E00"
            axis.plot(rows.alpha, rows.load_s * 1e3, "s" + line_of(about), color=colour, markersize=4,
                      label=f"loads, host experts {host}")  # fmt: skip
            axis.plot(rows.alpha, rows.compute_s * 1e3, "o" + line_of(about), color=colour, markersize=4,
                      markerfacecolor="white", label=f"compute, host experts {host}")  # fmt: skip
        axis.set_title(f"batch {batch}", fontsize=9)
        _finish(axis, "α, share of experts on the device")
    axes[0][0].set_ylabel(axis_label("ms an iteration", about))
    legend_below(figure, axes[0][0], 2)
    figure.suptitle(f"{about['model']}; {where_of(about)}{link_of(about)}", fontsize=9)
    return save(figure, directory / "knee.png")
