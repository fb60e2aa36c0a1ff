"""Timeline: what was computed, loaded and waited for, and when, as a Chrome trace (ui.perfetto.dev, chrome://tracing).

    steps      a span an iteration of the serving loop: batch, tokens
    compute    the thread or stream that runs passes: kernels of a layer, and waits for its experts
    copy …     a worker or stream that loads experts: loads, and waits for a free slot
    decode     the decoder of a simulated device
    disk n     a reader of single experts that come on demand
    moves      experts that change place

A span has a kind: step, compute, wait or load. Spans of a track never overlap: one that begins inside another cuts it
in two, so a kernel's span ends where its wait begins. Loads say layer, experts and bytes; all but steps say during
which step they began. Layers of experts, loads and waits count the layers with experts alone, as the pager does.
Counters: KV blocks, and bytes of loads in flight.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

STEPS, COMPUTE, COPY, DECODE, DISK, MOVES = "steps", "compute", "copy", "decode", "disk", "moves"
_ORDER = (STEPS, COMPUTE, COPY, DECODE, DISK, MOVES)
_NOTHING = nullcontext()


class Span(NamedTuple):
    """[start_ns, end_ns) on one track."""

    track: str
    kind: str
    name: str
    start_ns: int
    end_ns: int
    args: dict[str, int]


class Count(NamedTuple):
    """What a counter shows from `at_ns` on."""

    counter: str
    at_ns: int
    values: dict[str, int]


class HostClock:
    """Marks are nanoseconds of the host."""

    def start(self) -> None:
        """What is recorded begins now."""
        self.start_ns = self.ns(self.mark())

    def mark(self) -> Any:
        """Now, for `ns`."""
        return time.perf_counter_ns()

    def ns(self, mark: Any) -> int:
        """time.perf_counter_ns of a mark."""
        return mark


class CudaClock(HostClock):
    """Marks are events in the order of the current stream: what is enqueued is timed where it runs.

    cuda: torch.cuda, or a recorder with the same Event, current_stream and synchronize in tests.
    """

    def __init__(self, cuda=torch.cuda) -> None:
        self._cuda = cuda

    def start(self) -> None:
        self._cuda.synchronize()
        self._base = self.mark()
        self._base.synchronize()
        self.start_ns = time.perf_counter_ns()

    def mark(self) -> Any:
        event = self._cuda.Event(enable_timing=True)
        event.record(self._cuda.current_stream())
        return event

    def ns(self, mark: Any) -> int:
        if isinstance(mark, int):
            return mark
        mark.synchronize()
        return self.start_ns + round(self._base.elapsed_time(mark) * 1e6)


class _Span:
    def __init__(self, timeline: Timeline, track: str, name: str, kind: str, args: dict[str, int]) -> None:
        self._timeline, self.track, self._what = timeline, track, (name, kind, args)

    def __enter__(self) -> None:
        timeline, now = self._timeline, self._timeline.clock.mark()
        self._outer = timeline.open.get(self.track)
        if self._outer is not None:
            self._outer.cut(now, now)
        timeline.open[self.track], self._begin = self, now

    def __exit__(self, *exception: object) -> None:
        now = self._timeline.clock.mark()
        self.cut(now, now)
        if self._outer is None:
            del self._timeline.open[self.track]
        else:
            self._outer._begin = now
            self._timeline.open[self.track] = self._outer

    def cut(self, end: Any, begin: Any) -> None:
        """What was open until `end` is recorded; the rest begins at `begin`."""
        name, kind, args = self._what
        self._timeline.record(self.track, name, kind, self._begin, end, args)
        self._begin = begin


class Timeline:
    """Collects spans from several threads, each of which has tracks of its own; disabled it records nothing.

    title: what the trace is of.
    """

    def __init__(self, enabled: bool = True, clock: HostClock | None = None, title: str = "FluxMoE") -> None:
        self.enabled, self.clock, self.title = enabled, clock or HostClock(), title
        # The iteration that runs; and the span that is open on each track.
        self.step = 0
        self.open: dict[str, _Span] = {}
        self.counts: list[Count] = []
        self._recorded: list[tuple[str, str, str, Any, Any, dict[str, int]]] = []
        if enabled:
            self.clock.start()

    def begin(self) -> None:
        """Forget all so far: a trace begins here, after a warm-up."""
        self._recorded, self.counts = [], []
        if self.enabled:
            self.clock.start()

    def record(self, track: str, name: str, kind: str, start: Any, end: Any, args: dict[str, int]) -> None:
        """A span between two marks of the clock, or two times in ns."""
        if self.enabled:
            self._recorded.append((track, name, kind, start, end, args))

    def add(self, track: str, name: str, kind: str, start: Any, end: Any, **args: int) -> None:
        """`record`, cutting the span that is open on the track."""
        if self.enabled:
            outer = self.open.get(track)
            if outer is not None:
                outer.cut(start, end)
            self.record(track, name, kind, start, end, {"step": self.step} | args)

    def span(self, track: str, name: str, kind: str = "compute", **args: int) -> AbstractContextManager[None]:
        """Record the time spent inside the context."""
        return _Span(self, track, name, kind, {"step": self.step} | args) if self.enabled else _NOTHING

    def count(self, counter: str, at_ns: int, **values: int) -> None:
        if self.enabled:
            self.counts.append(Count(counter, at_ns, values))

    @property
    def spans(self) -> list[Span]:
        """All spans, none of them empty, in the order of their starts; what began before the trace begins with it. On
        CUDA, waits for the device."""
        resolved = (
            Span(track, kind, name, max(self.clock.ns(start), self.clock.start_ns), self.clock.ns(end), args)
            for track, name, kind, start, end, args in list(self._recorded)
        )
        return sorted((s for s in resolved if s.end_ns > s.start_ns), key=lambda s: s.start_ns)

    def trace(self) -> dict[str, Any]:
        """The Chrome trace: a track is a named thread, times in µs from its beginning."""
        spans = self.spans
        tracks = sorted({s.track for s in spans}, key=lambda track: (_ORDER.index(track.split()[0]), track))
        origin = self.clock.start_ns if self.enabled else 0
        events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "args": {"name": self.title}}]
        for tid, track in enumerate(tracks, start=1):
            events.append({"ph": "M", "name": "thread_name", "tid": tid, "args": {"name": track}})
            events.append({"ph": "M", "name": "thread_sort_index", "tid": tid, "args": {"sort_index": tid}})
        for s in spans:
            span = {"ph": "X", "name": s.name, "cat": s.kind, "tid": 1 + tracks.index(s.track), "args": s.args}
            events.append(span | {"ts": (s.start_ns - origin) / 1e3, "dur": (s.end_ns - s.start_ns) / 1e3})
        for counter, at_ns, values in (*self.counts, *_in_flight(spans)):
            events.append({"ph": "C", "name": counter, "ts": (at_ns - origin) / 1e3, "args": values})
        # Perfetto takes process and thread 0 for the idle ones.
        return {"traceEvents": [event | {"pid": 1} for event in events], "displayTimeUnit": "ms"}

    def save(self, path: Path | str) -> None:
        """Write `trace` as JSON, whole or not at all."""
        path = Path(path)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(self.trace(), file)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def _in_flight(spans: Sequence[Span]) -> Iterator[Count]:
    loads = [s for s in spans if s.kind == "load"]
    changes = sorted(
        [(s.start_ns, s.args.get("bytes", 0)) for s in loads] + [(s.end_ns, -s.args.get("bytes", 0)) for s in loads]
    )
    total = 0
    for at_ns, change in changes:
        total += change
        yield Count("bytes in flight", at_ns, {"bytes": total})
