"""KV in slabs beside one contiguous cache, on a CPU: a row for each point."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from fluxmoe.experiments.commands.main import call
from fluxmoe.experiments.lib.results import UsageError

TINY = ["--shapes", "tiny", "--sequences", "2", "--contexts", "33", "--prompts", "17", "--turns", "5"]


def test_a_row_for_each_point(tmp_path):
    call(["bench", "attention-cpu", *TINY, "--out", str(tmp_path)])
    rows = pd.read_csv(tmp_path / "rows.csv")
    assert rows[["sequences", "queries", "context"]].values.tolist() == [[2, 1, 33], [1, 17, 17]]
    assert (rows.ratio_p25 <= rows.slabs_over_contiguous).all()
    # Blocks of 32 tokens, 3 layers, K and V of 2 heads of 16 in bf16.
    assert rows.kv_bytes.tolist() == [4 * 32 * 3 * 2 * 2 * 16 * 2, 32 * 3 * 2 * 2 * 16 * 2]
    assert json.loads((tmp_path / "provenance.json").read_text())["device"]


def test_too_few_turns_are_refused(tmp_path):
    with pytest.raises(UsageError, match="turns must be at least 5, got 4"):
        call(["bench", "attention-cpu", *TINY[:-1], "4", "--out", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()
