"""The timeline's rules: spans of a track never overlap, a trace begins clean, events are timed on their own clock."""

import json
from contextlib import suppress
from types import SimpleNamespace

import pytest
from fluxmoe.runtime.timeline import CudaClock, HostClock, Timeline


class Manual(HostClock):
    """Says what it is set to."""

    now = 0

    def mark(self):
        return self.now


def timeline_at(*spans, clock: HostClock | None = None) -> Timeline:
    timeline = Timeline(clock=clock or Manual())
    for track, kind, start, end in spans:
        timeline.add(track, kind, kind, start, end)
    return timeline


def pieces(timeline):
    return [(s.track, s.name, s.start_ns, s.end_ns) for s in timeline.spans]


def test_disabled_records_nothing():
    timeline = Timeline(enabled=False)
    with timeline.span("compute", "x"):
        timeline.add("copy", "y", "load", 0, 1)
    timeline.count("KV blocks", 0, used=1)
    timeline.begin()
    assert (timeline.spans, timeline.counts) == ([], [])
    assert [event["ph"] for event in timeline.trace()["traceEvents"]] == ["M"]


def test_what_begins_inside_a_span_cuts_it():
    clock = Manual()
    timeline = Timeline(clock=clock)
    with timeline.span("compute", "outer"):
        clock.now = 10
        with timeline.span("compute", "inner"), timeline.span("copy", "elsewhere"):
            clock.now = 30
            timeline.add("compute", "wait", "wait", 15, 25)
        clock.now = 40
        timeline.add("compute", "wait", "wait", 35, 40)
    assert pieces(timeline) == [
        ("compute", "outer", 0, 10), ("compute", "inner", 10, 15), ("copy", "elsewhere", 10, 30),
        ("compute", "wait", 15, 25), ("compute", "inner", 25, 30), ("compute", "outer", 30, 35),
        ("compute", "wait", 35, 40),
    ]  # fmt: skip


def test_a_span_that_fails_ends_there():
    clock = Manual()
    timeline = Timeline(clock=clock)
    with suppress(ZeroDivisionError), timeline.span("compute", "outer"):
        clock.now = 5
        with timeline.span("compute", "inner"):
            clock.now = 7
            raise ZeroDivisionError
    assert pieces(timeline) == [("compute", "outer", 0, 5), ("compute", "inner", 5, 7)]
    assert not timeline.open


def test_a_trace_begins_where_it_is_told_to():
    clock = Manual()
    timeline = timeline_at(("copy", "load", 0, 10), clock=clock)
    timeline.count("KV blocks", 5, used=1)
    clock.now = 20
    timeline.begin()
    timeline.add("copy", "late", "load", 15, 30, bytes=7)
    assert pieces(timeline) == [("copy", "late", 20, 30)]
    spans = [event for event in timeline.trace()["traceEvents"] if event["ph"] == "X"]
    assert [(span["ts"], span["dur"], span["args"]) for span in spans] == [(0, 0.01, {"step": 0, "bytes": 7})]
    assert timeline.counts == []


def test_chrome_trace(tmp_path):
    timeline = timeline_at(("disk 0", "load", 0, 1_000), ("copy down", "load", 6_000, 7_000))
    timeline.add("steps", "step 4", "step", 0, 9_000, batch=3)
    timeline.step = 4
    timeline.add("compute", "experts 2", "compute", 5_000, 9_000, layer=2)
    timeline.count("KV blocks", 500, used=3, free=1)
    path = tmp_path / "trace.json"
    timeline.save(path)
    events = json.loads(path.read_text())["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    order = [e["args"]["sort_index"] for e in events if e["name"] == "thread_sort_index"]
    assert [names[tid] for tid in order] == ["steps", "compute", "copy down", "disk 0"]
    spans = {names[e["tid"]]: (e["name"], e["cat"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"}
    assert spans["compute"] == ("experts 2", "compute", 5.0, 4.0)
    assert next(e["args"] for e in events if e.get("cat") == "compute") == {"step": 4, "layer": 2}
    assert [(e["ts"], e["args"]) for e in events if e["name"] == "KV blocks"] == [(0.5, {"used": 3, "free": 1})]
    with pytest.raises(OSError):
        timeline.save(tmp_path / "missing" / "trace.json")
    assert [p.name for p in tmp_path.iterdir()] == ["trace.json"]


def test_what_is_in_flight_is_the_sum_of_loads():
    timeline = Timeline(clock=Manual())
    for start, end, nbytes in [(0, 20, 100), (10, 30, 50), (30, 40, 7)]:
        timeline.add(f"disk {nbytes}", "load", "load", start, end, bytes=nbytes)
    shown = [(e["ts"] * 1e3, e["args"]["bytes"]) for e in timeline.trace()["traceEvents"] if e["ph"] == "C"]
    assert shown == [(0, 100), (10, 150), (20, 50), (30, 0), (30, 7), (40, 0)]


class FakeCuda:
    """A device whose time is `ms`; events show it where they are recorded."""

    def __init__(self):
        self.ms = 1000.0

    def Event(self, enable_timing):
        assert enable_timing
        event = SimpleNamespace(at=None, synchronize=lambda: None)
        event.record = lambda stream: setattr(event, "at", self.ms)
        event.elapsed_time = lambda other: other.at - event.at
        return event

    def current_stream(self):
        return "compute"

    def synchronize(self):
        self.ms += 1


def test_on_cuda_the_device_says_when():
    cuda = FakeCuda()
    timeline = Timeline(clock=CudaClock(cuda))
    timeline.begin()
    start_ns = timeline.clock.start_ns
    with timeline.span("compute", "outer"):
        cuda.ms += 2
        with timeline.span("compute", "wait", "wait"):
            cuda.ms += 0.5
    timeline.add("steps", "step 0", "step", start_ns, start_ns + 9)
    found = [(name, start - start_ns, end - start_ns) for _, name, start, end in pieces(timeline)]
    assert sorted(found) == [("outer", 0, 2_000_000), ("step 0", 0, 9), ("wait", 2_000_000, 2_500_000)]
