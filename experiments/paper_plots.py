"""Figures of the paper's evaluation, drawn from files in results/ alone. Simulated lines are dashed, always."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from .plots import plt, save

# Okabe-Ito: told apart with any colour vision, and by marker.
SYSTEMS = {
    "vllm": ("#000000", "o", "vLLM, experts resident"),
    "vllm-o": ("#E69F00", "s", "vLLM-O, last layers in the host"),
    "fluxmoe-h": ("#CC79A7", "X", "FluxMoE-H, no balance inside a layer"),
    "fluxmoe": ("#0072B2", "D", "FluxMoE of the paper, decoding to a buffer"),
    "ours-eager": ("#D55E00", "v", "ours, decoding in the GEMM, launched as theirs"),
    "ours": ("#D55E00", "P", "ours, decoding in the GEMM, decode steps as graphs"),
}


def _line(axis, rows: pd.DataFrame, x: str, system: str) -> None:
    colour, marker, label = SYSTEMS[system]
    chosen = rows[(rows.system == system) & (rows.status == "ok")].sort_values(x)
    if len(chosen):
        axis.plot(
            chosen[x], chosen.tokens_per_s, marker, color=colour, label=label, linestyle="--", linewidth=1.4,
            markersize=5,
        )  # fmt: skip


def _finish(axis, x: str) -> None:
    axis.set_xlabel(x)
    axis.set_ylim(bottom=0)
    axis.spines[["top", "right"]].set_visible(False)


def plot_exp1(directory: Path) -> Path:
    """throughput.png beside points.csv of exp1_performance_bound; returns its path."""
    at_32 = {"vllm-o": 54.6, "vllm": 6.0 * 54.6, "fluxmoe": 0.639 * 6.0 * 54.6}
    return _plot_sweep(directory, "Qwen3-Next-80B-A3B, 4 x L40", [("batch", 32, s, y) for s, y in at_32.items()])


def plot_exp2(directory: Path) -> Path:
    """throughput.png beside points.csv of exp2_capacity_bound; returns its path."""
    stated = [("batch", 256, "vllm-o", 3.7), ("context", 4096, "vllm-o", 3.7)]
    return _plot_sweep(directory, "Mixtral-8x7B, 2 x L40, 12.5 % of experts in the host", stated)


def _plot_sweep(directory: Path, title: str, stated: list[tuple[str, int, str, float]]) -> Path:
    """Throughput against batch, and against context. stated: (panel, x, system, tokens/s) that the paper gives."""
    points = pd.read_csv(directory / "points.csv")
    figure, axes = plt.subplots(1, 2, figsize=(8.0, 3.9), layout="constrained", sharey=True)
    for axis, panel in zip(axes, ("batch", "context"), strict=True):
        rows = points[points.panel == panel]
        for system in SYSTEMS:
            _line(axis, rows, panel, system)
        for where, x, system, y in stated:
            if where == panel:
                axis.plot(x, y, "*", color=SYSTEMS[system][0], markersize=13, markeredgecolor="white", zorder=5)
        other = "context" if panel == "batch" else "batch"
        axis.set_title(f"{other} {rows[other].max()}", fontsize=9)
        _finish(axis, f"{panel} ({'requests' if panel == 'batch' else 'tokens'})")
    axes[0].plot([], [], "*", color="0.3", markersize=10, linestyle="none", label="stated by the paper")
    axes[0].set_ylim(0, 1.06 * points.tokens_per_s.max())
    axes[0].set_ylabel("output tokens/s, simulated")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, fontsize=7.5, frameon=False)
    figure.suptitle(title, fontsize=10)
    return save(figure, directory / "throughput.png")


def plot_sensitivity(directory: Path) -> Path:
    """sensitivity.png beside points.csv of sensitivity: against context, and against the link; returns its path."""
    points = pd.read_csv(directory / "points.csv")
    figure, axes = plt.subplots(1, 2, figsize=(8.0, 3.9), layout="constrained")
    colours = ("#000000", "#D55E00", "#0072B2", "#56B4E9", "#009E73")
    titles = {"context": "Qwen3-Next, 4 x L40, 32 requests", "link": "Qwen3-30B-A3B, H100 with 40 GiB, 64 requests"}
    labels = {"context": "context (tokens)", "link": "bandwidth of the link over that of memory"}
    for axis, panel in zip(axes, titles, strict=True):
        ok = points[(points.panel == panel) & (points.status == "ok")]
        for colour, placement in zip(colours, points.placement.unique(), strict=True):
            rows = ok[ok.placement == placement].sort_values("x")
            axis.plot(rows.x, rows.tokens_per_s, "o--", color=colour, label=placement, linewidth=1.4, markersize=4)
        axis.set_xscale("log", base=2 if panel == "context" else 10)
        axis.set_title(titles[panel], fontsize=9)
        _finish(axis, labels[panel])
    axes[0].set_ylabel("output tokens/s, simulated")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, fontsize=7.5, frameon=False)
    return save(figure, directory / "sensitivity.png")


def plot_kv_capacity(directory: Path) -> Path:
    """kv_capacity.png beside points.csv of fig2_kv_capacity; returns its path."""
    points = pd.read_csv(directory / "points.csv")
    points["kv_gib"] = points.panel.str.removesuffix(" GiB").astype(int)
    figure, axis = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
    colours = ("#009E73", "#0072B2", "#D55E00")
    for (context, rows), colour in zip(points[points.status == "ok"].groupby("context"), colours, strict=False):
        ordered = rows.sort_values("kv_gib")
        axis.plot(ordered.kv_gib, ordered.tokens_per_s, "o--", color=colour, label=f"context {context}", linewidth=1.4)
    axis.set_ylabel("output tokens/s, simulated")
    axis.legend(fontsize=8, frameon=False)
    axis.set_title(f"Mixtral-8x7B, 4 x L40, batch {points.batch.max()}", fontsize=9)
    _finish(axis, "KV cache of all devices (GiB)")
    path = directory / "kv_capacity.png"
    return save(figure, path)


def plot_memory_split(directory: Path) -> Path:
    """memory.png beside points.csv of fig1_memory: bytes by use against batch and context; returns its path."""
    points = pd.read_csv(directory / "points.csv")
    figure, axes = plt.subplots(1, 2, figsize=(7.6, 3.4), layout="constrained", sharey=True)
    parts = {"experts": "#0072B2", "other_weights": "#56B4E9", "states": "#E69F00", "kv_cache": "#D55E00"}
    for axis, panel in zip(axes, ("batch", "context"), strict=True):
        rows = points[points.panel == panel]
        bottom = pd.Series(0.0, index=rows.index)
        for part, colour in parts.items():
            height = rows[part] / 1e9
            axis.bar(rows[panel].astype(str), height, bottom=bottom, color=colour, label=part.replace("_", " "))
            bottom += height
        axis.axhline(4 * 48 * 1.073741824, color="0.4", linestyle=":", linewidth=0.9, label="4 x L40")
        _finish(axis, panel)
    axes[0].set_ylabel("GB")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=5, fontsize=7.5, frameon=False)
    figure.suptitle(f"{points.model.iloc[0]}: what memory holds", fontsize=9)
    path = directory / "memory.png"
    return save(figure, path)


def plot_knee(directory: Path) -> Path:
    """knee.png beside points.csv of fig6_knee: time of compute and of loads against α; returns its path."""
    points = pd.read_csv(directory / "points.csv")
    figure, axis = plt.subplots(figsize=(5.4, 3.6), layout="constrained")
    colours = {"dense": "#000000", "planar12": "#D55E00"}
    for (host, batch), rows in points.groupby(["host_format", "batch"]):
        width = 1.0 if batch == points.batch.min() else 2.0
        axis.plot(rows.alpha, rows.load_s * 1e3, "--", color=colours[host], linewidth=width, alpha=0.9,
                  label=f"loads, host {host}" if width == 1.0 else None)  # fmt: skip
        axis.plot(rows.alpha, rows.compute_s * 1e3, ":", color="#0072B2", linewidth=width,
                  label=f"compute, batch {batch}" if host == "dense" else None)  # fmt: skip
    axis.set_ylabel("ms an iteration, simulated")
    axis.legend(fontsize=7.5, frameon=False)
    axis.set_title(f"{points.model.iloc[0]} on {points.profile.iloc[0]}", fontsize=9)
    _finish(axis, "α, share of experts on the device")
    path = directory / "knee.png"
    return save(figure, path)
