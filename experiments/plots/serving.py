"""Figures of our own sweeps, drawn from files in results/ alone: no model, no GPU, no measurement."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from fluxmoe.runtime.memory.budget import parse_bytes
from matplotlib.axes import Axes

from ..paper import stated
from .common import (
    MIB,
    axis_label,
    draw_runs,
    legend_below,
    line_of,
    link_of,
    log_ticks,
    read,
    runs_of,
    save,
    size_of,
    style_of,
    subplots,
    where_of,
)


def plot_memory_budget(directory: Path) -> Path:
    """throughput_vs_budget.png beside points.csv: medians over repeats, with the range of several; returns its path.

    Hollow marks: requests were preempted (the KV cache thrashed). Crosses below the axis: the budget cannot hold
    that placement. Of one budget alone, bars.
    """
    points, about = read(directory)
    ran = points[points.status == "ok"]
    if points.budget_bytes.nunique() == 1 and len(ran):
        return _plot_one_budget(directory, points, about)
    figure, axis = subplots(figsize=(7.2, 5.2))
    unit, name_of_unit = (MIB << 10, "GiB") if points.budget_bytes.max() >= 16 << 30 else (MIB, "MiB")
    top = ran.tokens_per_s.max() if len(ran) else 1.0
    taken: set[str] = set()
    for index, (placement, rows) in enumerate(points.groupby("placement", sort=False)):
        where, _, expert_format = placement.partition("+")
        share = where.partition(":")[2]
        colour, marker, label = style_of(placement)
        if colour in taken:  # the same placement at another α
            colour = next(c for c in ("#999999", "#F0E442", "#009E73", "#56B4E9") if c not in taken)
        taken.add(colour)
        label += f", α = {share}" if share else ""
        label += f", {expert_format}" if expert_format else ""
        ok = rows[rows.status == "ok"]
        grouped = ok.groupby("budget_bytes")
        speed = grouped.tokens_per_s.median()
        x = speed.index / unit
        draw_runs(
            axis, grouped.tokens_per_s, unit, color=colour, linewidth=1.6, label=label, zorder=2,
            linestyle=line_of(about),
        )  # fmt: skip
        thrashed = grouped.preemptions.max() > 0
        for hollow in (False, True):
            chosen = thrashed.to_numpy() == hollow
            axis.plot(
                x[chosen], speed[chosen], marker, color=colour, markersize=6,
                markerfacecolor="white" if hollow else colour, zorder=3,
            )  # fmt: skip
        failed = sorted(set(rows[rows.status != "ok"].budget_bytes))
        axis.plot(
            [b / unit for b in failed], [-0.035 * top * (index + 1)] * len(failed), "x", color=colour, markersize=5
        )
    ticks = sorted({round(b / unit) for b in points.budget_bytes})
    log_ticks(axis, ticks, [str(t) for t in ticks], rotation=45)
    axis.axhline(0, color="0.6", linewidth=0.6)
    axis.set_ylim(-0.045 * top * (points.placement.nunique() + 0.5), 1.08 * top)
    axis.set_yticks([t for t in axis.get_yticks() if 0 <= t <= 1.08 * top])
    axis.set_xlabel(f"memory budget ({name_of_unit}): weights + slots + workspace + KV cache")
    axis.set_ylabel(axis_label("output tokens/s", about))
    runs = runs_of(ran, about, ["placement", "budget_bytes"])
    axis.set_title(f"{_served(about)}{runs};\n{where_of(about)}", fontsize=9)
    axis.plot([], [], "o", color="0.4", markerfacecolor="white", label="hollow: requests were preempted")
    axis.plot([], [], "x", color="0.4", label="budget too small for this placement")
    legend_below(figure, axis, 2)
    return save(figure, directory / "throughput_vs_budget.png")


def _served(about: dict) -> str:
    """The model and what is asked of it, for a title."""
    model = about["model"]
    layers = model["num_layers"] - len(model.get("dense_layers", ()))
    requests = about["workload"]["requests"]
    return f"{model['arch']}, {layers} layers × {model['num_experts']} experts, {requests} requests"


def _plot_one_budget(directory: Path, points: pd.DataFrame, about: dict) -> Path:
    """A bar a placement, the median, with a dot a run; and what lies in host memory and files."""
    names = list(dict.fromkeys(points.placement))[::-1]
    figure, axis = subplots(figsize=(7.2, 1.4 + 0.55 * len(names)))
    for place, name in enumerate(names):
        rows = points[(points.placement == name) & (points.status == "ok")]
        if rows.empty:
            axis.annotate(" budget too small", (0, place), va="center", fontsize=8)
            continue
        middle, first = rows.tokens_per_s.median(), rows.iloc[0]
        axis.barh(place, middle, height=0.6, color=style_of(name.partition("@")[0])[0], zorder=2)
        axis.plot(rows.tokens_per_s, [place] * len(rows), "o", color="black", markersize=3, zorder=3)
        far = (("host memory", first.host_bytes), ("files", first.disk_bytes))
        beside = ", ".join(f"{nbytes / 1e6:.0f} MB in {where}" for where, nbytes in far if nbytes)
        axis.annotate(f"{middle:.0f}" + (f"; {beside}" if beside else ""), (middle, place), (6, 0),
                      textcoords="offset points", va="center", fontsize=8)  # fmt: skip
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_xlim(0, 2 * points.tokens_per_s.max())
    axis.set_xlabel(axis_label("output tokens/s", about))
    budget = f"a device of {size_of(int(points.budget_bytes.iloc[0]))}{link_of(about)}"
    axis.set_title(f"{_served(about)}, {budget};\n{where_of(about)}", fontsize=9)
    return save(figure, directory / "throughput_vs_budget.png")


# Placements of the figure on the first page: what each line says of itself, beside which point, and where from there.
GLANCE = {
    "resident": ("resident: all\nexperts as they are", 0, (12, -6), "left"),
    "packed": ("packed: all experts,\ncompressed, decoded\ninside the GEMM", 1, (-14, 6), "right"),
    "host+planar12": ("streamed: every expert\ncomes from host memory,\ncompressed", 0, (0, 86), "left"),
}


def plot_at_a_glance(directory: Path) -> Path | None:
    """at_a_glance.png: three lines of the same points, with where each of them stops; None where one is missing."""
    points, about = read(directory)
    ran = points[points.status == "ok"].groupby("placement").budget_bytes.nunique()
    if any(ran.get(placement, 0) < 2 for placement in GLANCE):
        return None
    figure, axis = subplots(figsize=(7.2, 3.8))
    for placement, (text, beside, offset, side) in GLANCE.items():
        colour, marker, _ = style_of(placement)
        rows = points[points.placement == placement]
        speed = rows[rows.status == "ok"].groupby("budget_bytes").tokens_per_s.median()
        x = speed.index / MIB
        axis.plot(x, speed, line_of(about), marker=marker, color=colour, linewidth=1.8, markersize=6)
        point = (x[beside], speed.iloc[beside])
        axis.annotate(text, point, offset, textcoords="offset points", fontsize=8.5, color=colour, ha=side)
        least = rows.least_budget.dropna()
        if len(least):
            edge = least.min() / MIB
            axis.plot([edge, edge], [0, speed.iloc[0]], ":", color=colour, linewidth=1)
            said = f" nothing below {edge:.0f} MiB"
            axis.text(edge, 0.01 * speed.max(), said, color=colour, fontsize=7.5, rotation=90,
                      va="bottom", ha="right")  # fmt: skip
    ticks = sorted({round(b / MIB) for b in points.budget_bytes})
    log_ticks(axis, ticks, [str(t) for t in ticks])
    axis.set_ylim(bottom=0)
    axis.set_xlabel("memory for weights, slots, workspace and KV cache (MiB)")
    axis.set_ylabel(axis_label("output tokens/s", about))
    experts = 2 * about["model"]["num_layers"] * about["model"]["num_experts"] * 3
    experts *= about["model"]["hidden_size"] * about["model"]["moe_intermediate_size"]
    axis.set_title(
        f"{experts / 1e6:.0f} MB of experts, {about['workload']['requests']} requests; {where_of(about)}", fontsize=9
    )
    return save(figure, directory / "at_a_glance.png")


def _read_turns(directory: Path) -> tuple[pd.DataFrame, dict, bool]:
    """Rows and provenance of `versus` or its kin; whether x is the budget, in MiB: where there are several. Else it is
    the requests at once."""
    rows, about = read(directory, "rows.csv", dtype={"budget": str})
    by_budget = rows.budget.nunique() > 1
    return rows.assign(x=rows.budget.map(parse_bytes) / MIB if by_budget else rows.sequences), about, by_budget


def _draw_refused(axis: Axes, x: Sequence[float], index: int, top: float, colour: str) -> None:
    """Crosses below the axis, a line of them for each index."""
    axis.plot(x, [-0.03 * top * (index + 1)] * len(x), "x", color=colour, markersize=5)


def _finish_turns(axis: Axes, rows: pd.DataFrame, label: str) -> None:
    ticks = sorted(rows.x.dropna().unique())
    log_ticks(axis, ticks, [f"{tick:.0f}" for tick in ticks], 2)
    axis.axhline(0, color="0.6", linewidth=0.6)
    axis.set_xlabel(label)


def plot_versus(directory: Path) -> Path:
    """versus.png beside rows.csv of versus: throughput against budget, or against sequences where there is one
    budget; median of rounds, with the range of several. Crosses below the axis: does not start, or stopped."""
    rows, about, by_budget = _read_turns(directory)
    figure, axis = subplots(figsize=(7.2, 4.6))
    ok = rows[rows.status == "ok"]
    # Ours as in the other figures, and first.
    names = sorted(rows.provider.unique(), key=lambda name: (not name.startswith("fluxmoe"), name))
    others = iter(("#0072B2", "#009E73", "#E69F00", "#F0E442", "#56B4E9", "#999999"))
    for index, provider in enumerate(names):
        mine, ours = rows[rows.provider == provider], provider.startswith("fluxmoe")
        colour = style_of(provider.removeprefix("fluxmoe "))[0] if ours else next(others)
        draw_runs(
            axis, mine[mine.status == "ok"].groupby("x").tokens_per_s, color=colour, label=provider, linewidth=1.5,
            marker="D" if ours else "o", markersize=5, linestyle=line_of(about),
        )  # fmt: skip
        if by_budget:
            _draw_refused(axis, mine[mine.status != "ok"].x.unique(), index, ok.tokens_per_s.max(), colour)
    _finish_turns(axis, rows, "memory budget (MiB)" if by_budget else "requests at once")
    axis.set_ylabel(axis_label("output tokens/s", about))
    at_once = f", {max(about['sequences'])} requests" if by_budget else ""
    single = runs_of(ok, about, ["provider", "x"])
    axis.set_title(f"model of preset {about['model']}{at_once}{single}; {where_of(about)}", fontsize=9)
    legend_below(figure, axis, 2)
    return save(figure, directory / "versus.png")


def plot_vllm_plugin(directory: Path) -> Path:
    """vllm_plugin.png beside rows.csv of `versus vllm-plugin`: throughput, times to the first token and between tokens,
    and tokens of KV, over the budget, or over requests at once where there is one budget; medians of rounds, ranges as
    bars. Over budgets with the most requests. Crosses below the axis: does not start, or stopped. Hollow marks, where
    servers were asked: 99th percentiles. Our own engine makes no more KV cache than so many requests can use, so that
    panel is without it."""
    rows, about, by_budget = _read_turns(directory)
    ok, most = rows[rows.status == "ok"], max(about["sequences"])
    if by_budget:
        ok = ok[ok.sequences == most]
    panels = (("tokens_per_s", "output tokens/s", 1), ("ttft_s", "time to the first token (s)", 1),
              ("tpot_s", "time between tokens (ms)", 1000), ("kv_tokens", "tokens of KV cache", 1))  # fmt: skip
    figure, axes = subplots(2, 2, figsize=(8.4, 6.4))
    for axis, (column, label, scale) in zip(axes.flat, panels, strict=True):
        for index, provider in enumerate(rows.provider.unique()):
            if column == "kv_tokens" and provider.startswith("fluxmoe"):
                continue
            inside, placement = "vllm" in provider, provider.rpartition("fluxmoe ")[2]
            colour = "#000000" if provider == "vllm" else style_of(placement)[0]
            mine = ok[ok.provider == provider]
            draw_runs(
                axis, (scale * mine[column]).groupby(mine.x), color=colour, label=provider, linewidth=1.5, markersize=6,
                linestyle=line_of(about), marker="o" if provider == "vllm" else "D" if inside else "*",
            )  # fmt: skip
            if (tail := f"{column.removesuffix('_s')}_p99_s") in mine:
                slowest = (scale * mine[tail]).groupby(mine.x).median()
                axis.plot(slowest.index, slowest, "o", color=colour, markerfacecolor="white", markersize=6)
            if by_budget and len(ok):
                refused = rows[(rows.provider == provider) & (rows.status != "ok")].x.dropna().unique()
                _draw_refused(axis, refused, index, scale * ok[column].max(), colour)
        _finish_turns(axis, rows, "memory of the process (MiB)" if by_budget else "requests at once")
        axis.set_ylabel(axis_label(label, about))
    if served := about.get("served"):
        axes.flat[0].plot([], [], "o", color="0.4", markerfacecolor="white", label="hollow: 99th percentile")
    over = f", {served} requests over HTTP" if served else ""
    which = f"{most} requests" if by_budget else f"{rows.budget.iloc[0]} in all"
    title = f"vLLM {about['vllm']}{over}, model {Path(about['model']).name}, {which}; {where_of(about)}"
    figure.suptitle(title, fontsize=9)
    legend_below(figure, axes.flat[0], 3)
    return save(figure, directory / "vllm_plugin.png")


def plot_exponents(directory: Path) -> Path:
    """exponents.png beside histogram.csv and summary.json: shares of exponents and of mantissas; returns its path."""
    counts, (low, high) = pd.read_csv(directory / "histogram.csv"), stated.TRAINED_EXPONENT_BITS
    about = json.loads((directory / "summary.json").read_text())
    figure, axes = subplots(1, 2, figsize=(7.2, 2.9))
    for axis, field, entropy in zip(
        axes, ("exponent", "mantissa"), ("exponent_entropy_bits", "mantissa_entropy_bits"), strict=True
    ):
        rows = counts[counts.field == field]
        axis.bar(rows.value, rows["count"] / rows["count"].sum(), color="#0072B2", width=0.9)
        published = f" (published, trained: {low:.2f} to {high:.2f})" if field == "exponent" else ""
        axis.set_title(f"{field}: {about[entropy]:.2f} bits{published}", fontsize=9)
        axis.set_xlabel(f"{field} value")
    common = counts[(counts.field == "exponent") & (counts["count"] > 1e-6 * about["weights"])].value
    axes[0].set_xlim(common.min() - 1, common.max() + 1)
    axes[0].set_ylabel("share of weights")
    made = "generated with the statistics of trained ones" if about["generated"] else "of a checkpoint"
    figure.suptitle(
        f"{about['weights'] / 1e6:.0f} million bf16 expert weights, {made}, {about['model']['arch']}:\n"
        f"at least {about['bits_per_weight_bound']:.2f} bits each",
        fontsize=9,
    )
    return save(figure, directory / "exponents.png")


def plot_overhead(directory: Path) -> Path:
    """overhead.png beside rows.csv of fig10: overhead against batch, 5th to 95th percentile as a bar."""
    rows, about = read(directory, "rows.csv")
    rows = rows[rows.memory != "stacked"]
    figure, axis = subplots(figsize=(6.0, 3.4))
    styles = {
        ("table", "apart"): ("#000000", "o", "our kernel, a table over separate tensors"),
        ("table", "paged"): ("#0072B2", "D", "our kernel, a table over paged memory"),
        ("torch", "paged"): ("#D55E00", "s", "torch, PagedTensor's views (no table)"),
    }
    for index, ((kernel, memory), (colour, marker, label)) in enumerate(styles.items()):
        chosen = rows[(rows.kernel == kernel) & (rows.memory == memory)]
        x = [i + 0.14 * (index - 1) for i in range(len(chosen))]
        spread = [chosen.overhead_percent - chosen.overhead_p5, chosen.overhead_p95 - chosen.overhead_percent]
        axis.errorbar(x, chosen.overhead_percent, yerr=spread, color=colour, fmt=marker, capsize=2, label=label)
    batches = sorted(rows.batch.unique())
    axis.axhline(0, color="0.6", linewidth=0.6)
    most = stated.FIG10_PERCENT
    axis.axhline(most, color="0.4", linewidth=0.8, linestyle=":", label=f"the paper's largest, {most:.1f} %")
    axis.set_xticks(range(len(batches)), [str(b) for b in batches])
    axis.set_xlabel("tokens in the batch")
    axis.set_ylabel("time over one stacked tensor (%)")
    axis.set_title(f"paging, everything resident; {where_of(about)}", fontsize=9)
    axis.legend(fontsize=7.5, frameon=False)
    return save(figure, directory / "overhead.png")


def plot_adaptation(directory: Path, window: int = 40) -> Path:
    """adaptation.png beside steps.csv of fig9: tokens/s in windows of iterations, and bytes by owner."""
    steps, about = read(directory, "steps.csv")
    figure, (top, bottom) = subplots(2, 1, figsize=(7.0, 5.0), sharex=True, height_ratios=(3, 2))
    styles = {
        "static": ("#000000", "static: nothing moves"),
        "hold": ("#E69F00", "experts leave, nobody takes the memory"),
        "grow": ("#0072B2", "experts leave, KV grows"),
        "unspread": ("#D55E00", "not spread over layers, KV grows"),
        "planned": ("#CC79A7", "the planner decides, KV grows"),
    }
    line = line_of(about)
    for variant, (colour, label) in styles.items():
        rows = steps[steps.variant == variant]
        if not len(rows):
            continue
        groups = rows.groupby(rows.iteration // window)
        rate = groups.decode_tokens.sum() / groups.duration_s.sum()
        top.plot(rate.index * window, rate, line, color=colour, label=label, linewidth=1.5)
        bottom.plot(rows.iteration, rows.kv_bytes / 1e6, line, color=colour, linewidth=1.5)
    top.set_ylabel(axis_label("decoded tokens/s", about))
    top.set_ylim(bottom=0)
    top.legend(fontsize=7.5, frameon=False)
    top.set_title(f"{where_of(about)}, budget {size_of(about['budget'])}{link_of(about)}", fontsize=9)
    bottom.set_ylabel("KV cache (MB)")
    bottom.set_xlabel("iteration")
    for axis in (top, bottom):
        for k in range(about["times"]):
            axis.axvline(about["start"] + k * about["every"], color="0.8", linewidth=0.6, zorder=0)
    return save(figure, directory / "adaptation.png")
