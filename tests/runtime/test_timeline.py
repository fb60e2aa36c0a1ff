"""Chrome trace and overlap."""

import json

import pytest
from fluxmoe.runtime.timeline import Timeline


def test_overlap_is_the_hidden_share():
    timeline = Timeline()
    timeline.add("load down", "a", 0, 100)
    timeline.add("load gate_up", "b", 200, 300)
    timeline.add("compute", "x", 50, 80)
    timeline.add("compute", "y", 70, 120)
    timeline.add("compute", "z", 190, 310)
    assert timeline.overlap() == pytest.approx((50 + 100) / 200)


def test_disabled_records_nothing():
    timeline = Timeline(enabled=False)
    with timeline.span("compute", "x"):
        pass
    timeline.add("load", "y", 0, 1)
    assert timeline.intervals == []
    assert timeline.overlap() == 0


def test_chrome_trace(tmp_path):
    timeline = Timeline()
    timeline.add("compute", "layer 0", 5_000, 9_000)
    timeline.add("load down", "layer 1", 6_000, 7_000)
    path = tmp_path / "trace.json"
    timeline.save(path)
    events = json.loads(path.read_text())["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    spans = {names[e["tid"]]: (e["name"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"}
    assert spans == {"compute": ("layer 0", 0.0, 4.0), "load down": ("layer 1", 1.0, 1.0)}
    with pytest.raises(OSError):
        timeline.save(tmp_path / "missing" / "trace.json")
    assert [p.name for p in tmp_path.iterdir()] == ["trace.json"]
