"""Drawing: nothing of a notebook's is changed, and no bar stands for a single run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
import pytest
from fluxmoe.experiments.plots import serving
from fluxmoe.experiments.plots.common import draw_runs, runs_of
from fluxmoe.experiments.plots.trace import draw_trace
from fluxmoe.runtime.timeline import Timeline
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle


def test_plots_leave_the_backend_to_others():
    code = "import sys, fluxmoe.experiments.commands.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("speeds", "bars"), [([5.0], []), ([5.0, 7.0, 6.5], [(5.0, 7.0)]), ([5.0, 5.0], [(5.0, 5.0)])])
def test_only_several_runs_have_a_bar(speeds, bars):
    rows = pd.DataFrame({"x": [1] + [2] * len(speeds), "speed": [4.0, *speeds]})
    axis = Figure().subplots()
    draw_runs(axis, rows.groupby("x").speed)
    paths = [path for lines in axis.collections for path in lines.get_paths()]
    drawn = [tuple(np.asarray(path.vertices)[:, 1].tolist()) for path in paths]
    assert drawn == bars
    assert np.asarray(axis.lines[0].get_ydata())[1] == pd.Series(speeds).median()


@pytest.mark.parametrize(
    ("xs", "simulated", "said"), [([1, 2], None, ", one run each"), ([1, 1, 2], None, ""), ([1, 2], "H100-SXM", "")]
)
def test_titles_name_single_runs(xs, simulated, said):
    assert runs_of(pd.DataFrame({"x": xs}), {"simulated": simulated}, ["x"]) == said


def a_trace() -> dict:
    timeline = Timeline(title="a run")
    start = timeline.clock.start_ns
    for step in range(3):
        timeline.step, begin = step, start + 1000 * step
        timeline.count("KV blocks", begin, used=step, free=3 - step)
        timeline.add("copy", "gate_up 0", "load", begin, begin + 500, layer=0, experts=2, bytes=8_000_000)
        timeline.add("compute", "wait gate_up 0", "wait", begin, begin + 500, layer=0)
        timeline.add("compute", "experts 0", "compute", begin + 500, begin + 900, layer=0)
        timeline.add("steps", f"step {step}", "step", begin, begin + 1000)
    return timeline.trace()


@pytest.mark.parametrize(("until", "bars"), [(1.0, 8), (0.4, 4)])
def test_a_picture_shows_the_steps_that_are_asked_for(until, bars):
    rows, below, blocks = draw_trace(a_trace(), 1, 2, until).axes
    assert [label.get_text() for label in rows.get_yticklabels()] == ["steps", "compute", "copy"]
    assert rows.get_title() == "a run: steps 1 to 2; numbers are layers"
    assert len(rows.patches) == bars
    assert below.get_xlim() == pytest.approx((0, 2 * until))
    assert np.asarray(blocks.lines[0].get_ydata()).tolist() == [1, 2, 2] or until < 1


def test_steps_that_are_not_there_are_named():
    with pytest.raises(ValueError, match="no steps 5 to 6"):
        draw_trace(a_trace(), 5, 6)


def test_one_budget_alone_is_bars(tmp_path):
    """A sweep of one budget has no line to draw; a placement that did not fit it says so."""
    columns = "placement,budget_bytes,status,tokens_per_s,host_bytes,disk_bytes,preemptions"
    rows = ("disk,1048576,ok,3,0,5,0", "disk,1048576,ok,4,0,5,0", "resident,1048576,too_small,,,,")
    (tmp_path / "points.csv").write_text("\n".join((columns, *rows)))
    about = {
        "model": {"arch": "olmoe", "num_layers": 2, "num_experts": 4}, "workload": {"requests": 1}, "hardware": "a CPU",
        "cpus": 2, "link_bandwidth": 2e9,
    }  # fmt: skip
    (tmp_path / "provenance.json").write_text(json.dumps(about))
    axis = Figure().subplots()
    drawn: list[Path] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving, "subplots", lambda **settings: (axis.figure, axis))
        patch.setattr(serving, "save", lambda figure, path: drawn.append(path))
        serving.plot_memory_budget(tmp_path)
    assert drawn == [tmp_path / "throughput_vs_budget.png"]
    assert [cast(Rectangle, bar).get_width() for bar in axis.patches] == [3.5]
    said = [text.get_text().strip() for text in axis.texts]
    assert said == ["budget too small", "4; 0 MB in files"]
    assert "link held to 2 GB/s" in axis.get_title()
