"""bench_step_cpu: the parts of a step add up to it."""

from __future__ import annotations

import csv

import pytest
from fluxmoe.experiments.bench.step_cpu import PARTS, Stopwatch
from fluxmoe.experiments.commands.main import call


def test_parts_add_up_to_the_step(tmp_path):
    """Prompts longer than a pass holds: the first request waits for the last, and decodes meanwhile."""
    sizes = ["--sequences", "1", "3", "--contexts", "20", "--steps", "4", "--max-batched-tokens", "16"]
    out = tmp_path / "out"
    call(["bench", "step-cpu", "--preset", "tiny", "--checkpoints", str(tmp_path), *sizes, "--out", str(out)])
    rows = list(csv.DictReader((out / "rows.csv").open()))
    assert [(r["placement"], r["sequences"], r["status"]) for r in rows] == [
        (placement, sequences, "ok") for placement in ("resident", "packed") for sequences in ("1", "3")
    ]
    for row in rows:
        assert all(float(row[f"{part}_ms"]) > 0 for part in (*PARTS, "around"))
        assert float(row["tokens_per_s"]) == pytest.approx(1e3 * int(row["sequences"]) / float(row["step_ms"]))


def test_the_outermost_of_nested_methods_is_timed_alone():
    class Both:
        def outer(self) -> int:
            return self.inner()

        def inner(self) -> int:
            return 1

    watch, both = Stopwatch(), Both()
    watch.watch(both, {"a": ("outer", "absent"), "b": ("inner",)})
    assert both.outer() == 1
    assert set(watch.seconds) == {"a"}
