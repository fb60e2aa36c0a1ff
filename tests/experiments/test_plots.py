"""Drawing: nothing of a notebook's is changed, and no bar stands for a single run."""

from __future__ import annotations

import subprocess
import sys

import pandas as pd
import pytest
from fluxmoe.experiments.plots.serving import draw_runs, runs_of
from matplotlib.figure import Figure


def test_plots_leave_the_backend_to_others():
    code = "import sys, fluxmoe.experiments.commands.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("speeds", "bars"), [([5.0], []), ([5.0, 7.0, 6.5], [(5.0, 7.0)]), ([5.0, 5.0], [(5.0, 5.0)])])
def test_only_several_runs_have_a_bar(speeds, bars):
    rows = pd.DataFrame({"x": [1] + [2] * len(speeds), "speed": [4.0, *speeds]})
    axis = Figure().subplots()
    draw_runs(axis, rows.groupby("x").speed)
    drawn = [tuple(y for _, y in path.vertices) for lines in axis.collections for path in lines.get_paths()]
    assert drawn == bars
    assert list(axis.lines[0].get_ydata())[1] == pd.Series(speeds).median()


@pytest.mark.parametrize(
    ("xs", "simulated", "said"), [([1, 2], None, ", one run each"), ([1, 1, 2], None, ""), ([1, 2], "H100-SXM", "")]
)
def test_titles_name_single_runs(xs, simulated, said):
    assert runs_of(pd.DataFrame({"x": xs}), {"simulated": simulated}, ["x"]) == said
