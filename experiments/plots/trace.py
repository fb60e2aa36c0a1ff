"""A picture of some steps of a trace (runtime.timeline): what Perfetto shows, for paper and notebooks."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .common import subplots

_COLOURS = {"experts": "#0072B2", "other compute": "#56B4E9", "wait": "#D55E00", "load": "#009E73", "step": "#999999"}
# Share of the picture's width from which on a span has room for the number of its layer.
_ROOM = 0.011


def draw_trace(trace: dict[str, Any], first: int, last: int, until: float = 1.0) -> Figure:
    """Steps `first` to `last` of a Chrome trace, or so large a share of them: a row a track, below it bytes in flight
    and KV blocks. ValueError where there are no such steps."""
    events = trace["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    spans = [e for e in events if e["ph"] == "X"]
    steps = [s for s in spans if s["cat"] == "step" and first <= s["args"]["step"] <= last]
    if not steps:
        raise ValueError(f"the trace has no steps {first} to {last}")
    begin, end = min(s["ts"] for s in steps), max(s["ts"] + s["dur"] for s in steps)
    end = begin + until * (end - begin)
    scale, unit = (1e3, "ms") if end - begin > 2e3 else (1.0, "µs")
    seen = [s for s in spans if s["ts"] < end and s["ts"] + s["dur"] > begin]
    tracks = [tid for tid in names if any(s["tid"] == tid for s in seen)]
    figure, (rows, below) = subplots(
        2, 1, figsize=(10, 1.5 + 0.42 * len(tracks)), sharex=True, height_ratios=(0.42 * len(tracks), 0.7)
    )
    for span in seen:
        left, right = max(span["ts"], begin), min(span["ts"] + span["dur"], end)
        row, width = tracks.index(span["tid"]), (right - left) / scale
        rows.barh(row, width, left=(left - begin) / scale, height=0.8, color=_COLOURS[_sort_of(span)],
                  edgecolor="white", linewidth=0.3)  # fmt: skip
        label = span["name"] if span["cat"] == "step" else span["args"].get("layer")
        if label is not None and right - left > _ROOM * (end - begin):
            middle = ((left + right) / 2 - begin) / scale
            rows.text(middle, row, label, ha="center", va="center", fontsize=6, color="white", clip_on=True)
    rows.set_yticks(range(len(tracks)), [names[tid] for tid in tracks], fontsize=8)
    rows.invert_yaxis()
    title = next(e["args"]["name"] for e in events if e["name"] == "process_name")
    which = f"step {first}" if first == last else f"steps {first} to {last}"
    rows.set_title(f"{title}: {which}; numbers are layers", fontsize=9)
    flight = _steps_of(events, "bytes in flight", "bytes", begin, end)
    blocks = _steps_of(events, "KV blocks", "used", begin, end)
    below.fill_between(
        [(t - begin) / scale for t, _ in flight], [v / 1e6 for _, v in flight], step="post", alpha=0.5,
        color=_COLOURS["load"], linewidth=0,
    )  # fmt: skip
    below.set_ylabel("MB in flight", fontsize=7)
    right_axis = below.twinx()
    right_axis.step([(t - begin) / scale for t, _ in blocks], [v for _, v in blocks], where="post", color="0.3")
    right_axis.set_ylabel("KV blocks", fontsize=7)
    for axis in (below, right_axis):
        axis.set_ylim(0, 1.15 * axis.get_ylim()[1])
        axis.tick_params(labelsize=7)
        axis.spines["top"].set_visible(False)
    below.set_xlabel(unit, fontsize=8)
    below.set_xlim(0, (end - begin) / scale)
    rows.legend(
        handles=[Patch(color=_COLOURS[sort], label=sort) for sort in _COLOURS if sort != "step"],
        loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=7, frameon=False,
    )  # fmt: skip
    return figure


def _sort_of(span: dict[str, Any]) -> str:
    if span["cat"] != "compute":
        return span["cat"]
    return "experts" if span["name"].startswith("experts") else "other compute"


def _steps_of(
    events: list[dict[str, Any]], counter: str, value: str, begin: float, end: float
) -> list[tuple[float, float]]:
    """A counter from `begin` to `end`: (time, value) where it changes, and at both ends."""
    changes = [(e["ts"], e["args"][value]) for e in events if e["ph"] == "C" and e["name"] == counter]
    before = [after for at, after in changes if at <= begin]
    seen = [(begin, before[-1] if before else 0), *(change for change in changes if begin < change[0] < end)]
    return [*seen, (end, seen[-1][1])]
