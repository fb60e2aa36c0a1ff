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
    "ours": ("#D55E00", "P", "ours, decoding in the GEMM"),
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


def plot_paper_sweep(directory: Path, title: str) -> Path:
    """throughput.png beside points.csv of exp1 or exp2: against batch, and against context; returns its path."""
    points = pd.read_csv(directory / "points.csv")
    figure, axes = plt.subplots(1, 2, figsize=(8.0, 3.9), layout="constrained", sharey=True)
    for axis, panel in zip(axes, ("batch", "context"), strict=True):
        rows = points[points.panel == panel]
        for system in SYSTEMS:
            _line(axis, rows, panel, system)
        other = "context" if panel == "batch" else "batch"
        axis.set_title(f"{other} {rows[other].max()}", fontsize=9)
        _finish(axis, f"{panel} ({'requests' if panel == 'batch' else 'tokens'})")
    axes[0].set_ylim(0, 1.06 * points.tokens_per_s.max())
    axes[0].set_ylabel("output tokens/s, simulated")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, fontsize=7.5, frameon=False)
    figure.suptitle(title, fontsize=10)
    path = directory / "throughput.png"
    return save(figure, path)


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
