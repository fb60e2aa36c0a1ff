"""Timeline: when what was loaded and computed, as a Chrome trace (chrome://tracing, ui.perfetto.dev)."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

_NOTHING = nullcontext()


class Interval(NamedTuple):
    """[start_ns, end_ns) of time.perf_counter_ns on one track."""

    track: str
    name: str
    start_ns: int
    end_ns: int


class Timeline:
    """Collects intervals from several threads (an append is atomic); disabled it records nothing."""

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.intervals: list[Interval] = []

    def add(self, track: str, name: str, start_ns: int, end_ns: int) -> None:
        if self.enabled:
            self.intervals.append(Interval(track, name, start_ns, end_ns))

    def span(self, track: str, name: str) -> AbstractContextManager[None]:
        """Record the time spent inside the context."""
        return self._timed(track, name) if self.enabled else _NOTHING

    @contextmanager
    def _timed(self, track: str, name: str) -> Iterator[None]:
        start = time.perf_counter_ns()
        try:
            yield
        finally:
            self.add(track, name, start, time.perf_counter_ns())

    def overlap(self) -> float:
        """Share of load time during which something was computed: 1 when all loads are hidden, 0 without loads."""
        loads = [i for i in self.intervals if i.track.startswith("load")]
        compute = _union([i for i in self.intervals if i.track == "compute"])
        total = sum(i.end_ns - i.start_ns for i in loads)
        covered, first = 0, 0
        for load in sorted(loads, key=lambda i: i.start_ns):
            while first < len(compute) and compute[first][1] <= load.start_ns:
                first += 1
            for start, end in compute[first:]:
                if start >= load.end_ns:
                    break
                covered += min(end, load.end_ns) - max(start, load.start_ns)
        return covered / total if total else 0.0

    def save(self, path: Path | str) -> None:
        """Write the Chrome trace JSON, whole or not at all; a track is a named thread, times in µs from the first."""
        tracks = sorted({i.track for i in self.intervals})
        origin = min((i.start_ns for i in self.intervals), default=0)
        events: list[dict] = [
            {"ph": "M", "name": "thread_name", "pid": 0, "tid": tid, "args": {"name": track}}
            for tid, track in enumerate(tracks)
        ]
        for i in self.intervals:
            start, duration = (i.start_ns - origin) / 1e3, (i.end_ns - i.start_ns) / 1e3
            tid = tracks.index(i.track)
            events.append({"ph": "X", "name": i.name, "pid": 0, "tid": tid, "ts": start, "dur": duration})
        path = Path(path)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w") as file:
                json.dump({"traceEvents": events, "displayTimeUnit": "ms"}, file)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def _union(intervals: list[Interval]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for _, _, start, end in sorted(intervals, key=lambda i: i.start_ns):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged
