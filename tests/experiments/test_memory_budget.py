"""The sweep: rows, reasons, resume, figure."""

from __future__ import annotations

import csv
from typing import Any

import pytest
from fluxmoe.experiments.commands.main import call
from fluxmoe.experiments.commands.pack_checkpoint import pack_checkpoint
from fluxmoe.experiments.lib import wall
from fluxmoe.experiments.lib.checkpoints import make_checkpoint
from fluxmoe.experiments.lib.results import UsageError
from fluxmoe.experiments.lib.workloads import drawn_lengths, make_requests, trace_lengths
from fluxmoe.experiments.serving import memory_budget
from fluxmoe.runtime.memory import machine


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    out = tmp_path_factory.mktemp("models") / "moe"
    make_checkpoint(
        arch="mixtral", out=out, layers=4, experts=12, top_k=2, hidden=64, moe_intermediate=64, heads=2, kv_heads=2,
        vocab=512, seed=0, max_positions=256,
    )  # fmt: skip
    return out


def sweep(model_dir, out, *more):
    call(
        [
            "memory-budget", "--model", str(model_dir),
            *(more if "--budgets" in more else ("--budgets", "1200KiB", "4MiB", "--placements", "resident", "host",
                                               *more)),
            "--requests", "4", "--context", "64", "--output-tokens", "8", "--max-batch", "4", "--device", "cpu",
            "--max-batched-tokens", "32", "--out", str(out),
        ]
    )  # fmt: skip
    with (out / "points.csv").open() as file:
        return list(csv.DictReader(file))


def test_sweep_resumes_and_explains(model_dir, tmp_path, capsys, monkeypatch):
    rows = sweep(model_dir, tmp_path)
    by_point = {(row["placement"], row["budget_bytes"]): row for row in rows}
    assert len(rows) == 4
    small, large = str(1200 << 10), str(4 << 20)
    assert by_point["resident", small]["status"] == "too_small"
    assert "least" in by_point["resident", small]["reason"]
    for key in (("host", small), ("host", large), ("resident", large)):
        assert by_point[key]["status"] == "ok"
        assert float(by_point[key]["tokens_per_s"]) > 0
        assert int(by_point[key]["generated_tokens"]) == 32
    assert len({row["tokens_sha256"] for row in rows if row["status"] == "ok"}) == 1
    assert int(by_point["host", large]["streamed_bytes"]) > 0
    assert int(by_point["resident", large]["streamed_bytes"]) == 0
    assert (tmp_path / "throughput_vs_budget.png").stat().st_size > 10_000
    assert "identical" in capsys.readouterr().out

    # Without its last row the sweep makes that row again and no other.
    with (tmp_path / "points.csv").open() as file:
        lines = file.readlines()
    (tmp_path / "points.csv").write_text("".join(lines[:-1]))
    row, ran = memory_budget.row, []

    def noted(*arguments):
        ran.append(arguments[2].placement)
        return row(*arguments)

    monkeypatch.setattr(memory_budget, "row", noted)
    assert len(sweep(model_dir, tmp_path)) == 4
    assert ran == ["host"]

    # Other requests: all rows are made anew, the old ones kept.
    assert len(sweep(model_dir, tmp_path, "--seed", "1")) == 4
    assert len(ran) == 5
    assert "4 rows of" in capsys.readouterr().out
    with (tmp_path / "old_points.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 4


def test_budgets_that_are_all_too_small_end_with_the_least_that_works(model_dir, tmp_path, capsys):
    small = ["--requests", "2", "--context", "64", "--output-tokens", "8", "--device", "cpu", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as ended:
        call(["memory-budget", "--model", str(model_dir), "--budgets", "100KiB", "--placements", "host", *small])
    assert ended.value.code == 1
    assert "no budget is large enough; the least that works is" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("text", ["nowhere", "balanced:x", "balanced:2", "resident:0.5"])
def test_bad_placements_are_refused_before_anything_runs(text, tmp_path):
    with pytest.raises(ValueError, match=r"placement|alpha"):
        call(["memory-budget", "--preset", "demo", "--placements", text, "--out", str(tmp_path / "out")])
    assert list(tmp_path.iterdir()) == []


def test_drawn_lengths_are_documented():
    lengths = drawn_lengths(200, 64, 16, seed=0)
    assert {shape.output for shape in lengths} == {16}
    assert min(s.prompt + s.output for s in lengths) >= 32
    assert max(s.prompt + s.output for s in lengths) == 64
    assert lengths == drawn_lengths(200, 64, 16, seed=0)


def test_requests_are_reproducible_and_never_stop_early():
    lengths = drawn_lengths(5, 40, 10, seed=0)
    first, second = (make_requests(lengths, 100, seed=3) for _ in range(2))
    assert first == second
    assert all(r.params.ignore_eos and len(r.prompt_ids) == s.prompt for r, s in zip(first, lengths, strict=True))


def test_traces(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0.5,100,7\n2.0,10,500\n")
    cut = trace_lengths(path, None, context=64)
    assert [(s.arrived_at, s.prompt, s.output) for s in cut] == [(0.0, 57, 7), (0.0, 1, 63)]
    assert trace_lengths(path, 1, 128, at_once=False)[0].arrived_at == 0.5
    for text, match in (
        ("a,b\n1,2\n", "columns"),
        ("arrived_at,num_prefill_tokens,num_decode_tokens\n1,x,2\n", "line 2"),
    ):
        path.write_text(text)
        with pytest.raises(UsageError, match=match):
            trace_lengths(path, None, 64)


def test_behind_a_wall_each_point_is_measured_or_refused(model_dir, tmp_path, capsys):
    try:
        wall.check()
    except wall.WallError as error:
        pytest.skip(str(error))
    walls = ["--wall", "cgroup", "--budgets", "16MiB", "900MiB", "--placements", "host"]
    refused, served = sorted(sweep(model_dir, tmp_path, *walls), key=lambda row: int(row["budget_bytes"]))
    assert refused["status"] == "too_small"
    assert "interpreter" in refused["reason"]
    assert served["status"] == "ok", served["reason"]
    base, held, peak, ledger = (
        int(served[name]) for name in ("base_bytes", "rss_bytes", "wall_peak_bytes", "ledger_bytes")
    )
    assert base < held
    assert peak < 900 << 20
    assert held - base < ledger * 1.02 + 400e6
    assert "wall" not in capsys.readouterr().err


def test_experts_that_are_mapped_are_counted_behind_the_wall(tmp_path):
    try:
        wall.check()
    except wall.WallError as error:
        pytest.skip(str(error))
    if machine.lies_in_memory(tmp_path):
        pytest.skip("on a tmpfs files are always in memory, and refused")
    wide = dict[str, Any](
        layers=2, experts=8, top_k=2, hidden=512, moe_intermediate=512, heads=2, vocab=512, max_positions=256
    )
    packed = tmp_path / "packed"
    pack_checkpoint(make_checkpoint("olmoe", tmp_path / "model", **wide), "planar12", packed)
    for path in packed.iterdir():  # others have read it
        path.read_bytes()
    [row] = sweep(packed, tmp_path / "out", "--wall", "cgroup", "--budgets", "900MiB", "--placements", "packed")
    assert row["status"] == "ok", row["reason"]
    experts = sum(path.stat().st_size for path in packed.glob("*.flux"))
    assert 0.9 * experts < int(row["mapped_experts"]) == int(row["packed_experts"]) < experts
    assert int(row["mapped_experts"]) <= int(row["wall_mapped_bytes"])
    held = int(row["base_bytes"]) + int(row["mapped_experts"])
    assert held < min(int(row["rss_bytes"]), int(row["wall_peak_bytes"]))


def test_a_wall_is_for_the_cpu(tmp_path):
    with pytest.raises(UsageError, match="--wall limits host memory"):
        call(["memory-budget", "--device", "sim", "--profile", "H100-SXM", "--config", "mixtral-8x7b",
              "--wall", "cgroup", "--out", str(tmp_path)])  # fmt: skip
