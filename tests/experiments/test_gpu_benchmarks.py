"""GPU benchmarks where there is no GPU: their arithmetic, peers and errors, and rows that outlive a kill."""

from __future__ import annotations

import csv
import os
import pickle
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from fluxmoe.experiments.bench import attention as bench_attention
from fluxmoe.experiments.bench import compile_kernels, gpu_tests, gpu_tools
from fluxmoe.experiments.bench import delta_net as bench_delta_net
from fluxmoe.experiments.bench import moe as bench_grouped_gemm
from fluxmoe.experiments.bench import tune as tune_grouped_gemm
from fluxmoe.experiments.bench.peers import PEERS
from fluxmoe.experiments.bench.shapes import SHAPES, Shape
from fluxmoe.experiments.bench.timing import Roofs, Timing
from fluxmoe.experiments.commands.main import arguments, call
from fluxmoe.experiments.lib import sweep
from fluxmoe.experiments.lib.results import UsageError, write_csv
from fluxmoe.experiments.lib.sweep import EXIT_AGAIN, AbsentError, Sweep, WrongError
from fluxmoe.kernels.triton.tiles import Tile, read_tuned, tuned_tiles
from fluxmoe.kernels.work import Work

from ..compiling import run_script

CPU = torch.device("cpu")
SMALL = Shape(hidden=32, intermediate=16, experts=6, top_k=2)


def test_uniform_routing_touches_so_many_experts():
    assert SMALL.touched(1) == pytest.approx(2)
    assert SMALL.touched(10_000) == pytest.approx(6)


def test_floor_is_the_slower_roof():
    roofs = Roofs(100.0, 10.0)
    assert roofs.floor_s(200, 5) == 2.0
    assert roofs.floor_s(200, 50) == 5.0


INTERPRETED = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are compiled here, and the layer is on a CPU"
)


@pytest.mark.parametrize("tokens", [1, 9])
def test_peers_agree_with_the_reference(tokens):
    layer = bench_grouped_gemm.Layer(SMALL, CPU)
    point = bench_grouped_gemm.Point([layer], tokens, "zipf:1.5", None)
    run = PEERS["torch"].make(layer.gate_up, layer.down)
    bench_grouped_gemm.check(run(point.x, point.logits, point.weights, point.chosen), point.expected())
    for wrong in (point.expected() * 1.1, torch.full_like(point.expected(), torch.nan)):
        with pytest.raises(WrongError, match="differs by"):
            bench_grouped_gemm.check(wrong, point.expected())


@INTERPRETED
@pytest.mark.parametrize(
    ("provider", "bits"),
    [
        ("fluxmoe", 16),
        ("fluxmoe planar12", 12.0),
        ("fluxmoe planar12 decoded first", 12.0),
        ("fluxmoe planar12 by 24 MiB", 12.0),
        ("fluxmoe planar8", 8.0),
        ("fluxmoe planar8 in place", 8.0),
        ("fluxmoe invariant", 16),
    ],
)
def test_ours_agree_with_the_reference(provider, bits):
    point = bench_grouped_gemm.Point([bench_grouped_gemm.Layer(SHAPES["tiny"], CPU)], 3, "uniform", None)
    assert point.time(provider).method == "rehearsal"
    found = point.layers[0].bits(bench_grouped_gemm.format_of(provider))
    assert found == pytest.approx(bits, abs=0.1)


def test_a_layer_repeats_few_weights_at_addresses_of_their_own():
    layer = bench_grouped_gemm.Layer(Shape(32, 16, 19, 2), CPU)
    assert torch.equal(layer.gate_up[0], layer.gate_up[16])
    assert not torch.equal(layer.gate_up[0], layer.gate_up[1])
    assert len(set(layer.table().addresses.flatten().tolist())) == 2 * 19


def test_missing_peers_say_so():
    for name in ("liger", "vllm", "triton_kernels"):
        with pytest.raises(AbsentError, match="cannot be imported"):
            PEERS[name].make(torch.zeros(1, 4, 2), torch.zeros(1, 2, 2))


def test_zipf_routing_prefers_the_first_experts():
    logits = bench_grouped_gemm.router_logits(SHAPES["olmoe"], 500, "zipf:1.2", 0, CPU)
    counts = torch.bincount(logits.topk(8).indices.flatten(), minlength=64)
    assert counts[:8].sum() > 4 * counts[-8:].sum()
    with pytest.raises(UsageError, match="uniform or zipf"):
        bench_grouped_gemm.router_logits(SMALL, 1, "even", 0, CPU)


def test_rows_carry_shares_and_ratios():
    roofs, timing = Roofs(1e10, 1e12), Timing(4e-6, 5e-6, 6e-6, "graph")
    dense = bench_grouped_gemm.layer_columns(Work(6144, 6144), 2, timing, 2e-6, roofs)
    assert dense["time_over_ours"] == pytest.approx(2.5)
    assert dense["share_of_copy_bandwidth"] == pytest.approx(dense["bytes"] / 5e-6 / 1e10)
    assert dense["floor_us"] == pytest.approx(6144 / 1e10 * 1e6)
    assert dense["share_of_floor"] == pytest.approx(dense["floor_us"] / 5)


@INTERPRETED
@pytest.mark.parametrize(
    ("provider", "bits"), [("fluxmoe", 16), ("fluxmoe planar12", 12.006), ("fluxmoe planar8", 8.006)]
)
def test_the_floor_of_a_row_is_what_our_launches_declare(provider, bits):
    """Logits, rows and places of routing; weights of the experts with tokens; h and y written and read; the sum."""
    shape, tokens = SHAPES["tiny"], 3
    point = bench_grouped_gemm.Point([bench_grouped_gemm.Layer(shape, CPU)], tokens, "uniform", None)
    columns = point.columns(provider, point.time(provider), Roofs(1.0, 1.0))
    hidden, intermediate, rows = shape.hidden, shape.intermediate, tokens * shape.top_k
    routing = 4 * tokens * shape.experts + 12 * rows
    weights = int(point.touched * 2 * intermediate * hidden * bits / 8 + 2 * tokens * hidden + 2 * rows * intermediate)
    weights += int(point.touched * intermediate * hidden * bits / 8 + 2 * rows * intermediate + 2 * rows * hidden)
    assert columns["bytes"] == routing + weights + 2 * rows * hidden + 2 * 2 * tokens * hidden
    assert columns["flops"] == 6 * rows * hidden * intermediate


def read(folder) -> list[dict[str, str]]:
    with (folder / "rows.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def opened(folder) -> Sweep:
    return Sweep(folder, "test", "rows.csv")


def fail(error: BaseException):
    raise error


def test_what_a_point_raises_is_a_row_and_costs_no_other(tmp_path):
    rows = opened(tmp_path)
    rows.measure(lambda: fail(WrongError("off by one")), point=1)
    rows.measure(lambda: fail(AbsentError("no such peer")), point=2)
    rows.measure(lambda: fail(KeyError("a bug")), point=3)
    rows.measure(lambda: {"time_us": 5.0}, point=4)
    assert [(r["point"], r["status"], r["reason"], r["time_us"]) for r in read(tmp_path)] == [
        ("1", "wrong", "off by one", ""), ("2", "absent", "no such peer", ""),
        ("3", "failed", "KeyError: 'a bug'", ""), ("4", "ok", "", "5.0"),
    ]  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        rows.finish()
    assert ended.value.code == 1


def test_rows_are_measured_once_but_for_those_of_other_code(tmp_path, monkeypatch):
    def measured(*points: int) -> list[int]:
        seen: list[int] = []

        def work(point: int) -> dict[str, int]:
            seen.append(point)
            return {"x": 1}

        with opened(tmp_path) as rows:
            for point in points:
                rows.measure(partial(work, point), point=point)
        return seen

    with opened(tmp_path) as first:
        first.measure(lambda: {"x": 1}, point=1)
        first.measure(lambda: fail(WrongError("off")), point=2)
        first.measure(lambda: fail(AbsentError("not there")), point=3)
    assert measured(1, 2, 3) == [3]
    monkeypatch.setattr(sweep, "code_digest", lambda: "other")
    assert measured(1, 2, 3, 4) == [1, 2, 3, 4]
    assert [row["point"] for row in read(tmp_path)] == ["1", "2", "3", "4"]
    assert len((tmp_path / "old_rows.csv").read_text().splitlines()) == 1 + 4  # of 3, both


def test_a_point_at_which_the_process_ends_twice_becomes_a_row(tmp_path):
    for attempt in range(2):
        with opened(tmp_path) as rows:
            assert not rows.has(point=7), attempt
            with pytest.raises(SystemExit):  # stands for a kill: nothing after it runs
                rows.measure(lambda: fail(SystemExit()), point=7)
    with opened(tmp_path) as rows:
        rows.measure(lambda: {"x": 1}, point=7)
        rows.measure(lambda: {"x": 1}, point=8)
    assert [row["status"] for row in read(tmp_path)] == ["failed", "ok"]
    assert "hung, crashed or was ended" in read(tmp_path)[0]["reason"]


def test_who_stops_a_sweep_by_hand_may_go_on_as_often(tmp_path):
    for _ in range(4):
        with opened(tmp_path) as rows, pytest.raises(KeyboardInterrupt):
            rows.measure(lambda: fail(KeyboardInterrupt()), point=7)
    with opened(tmp_path) as rows:
        rows.measure(lambda: {"x": 1}, point=7)
    assert [row["status"] for row in read(tmp_path)] == ["ok"]


def test_a_lost_device_ends_the_process_with_its_row_written(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "_device_is_lost", lambda: True)
    rows = opened(tmp_path)
    with pytest.raises(SystemExit) as ended:
        rows.measure(lambda: fail(RuntimeError("CUDA error: an illegal memory access")), point=1)
    assert ended.value.code == EXIT_AGAIN
    assert read(tmp_path)[0]["status"] == "failed"
    assert not (tmp_path / "attempt.json").exists()


@INTERPRETED
def test_a_wrong_layer_is_a_row_and_never_a_timing(tmp_path, monkeypatch):
    run = bench_grouped_gemm.Ours.run
    monkeypatch.setattr(bench_grouped_gemm.Ours, "run", lambda self, *a: run(self, *a) * 1.05)
    layer = ["--rehearse", "--shapes", "tiny", "--tokens", "1", "--providers", "fluxmoe", "torch"]
    with pytest.raises(SystemExit):
        call(["bench", "moe", *layer, "--out", str(tmp_path)])
    ours, torchs = read(tmp_path)
    assert (ours["status"], ours["time_us"]) == ("wrong", "")
    # A ratio needs ours: torch's row has a time, and no ratio.
    assert torchs["status"] == "ok"
    assert (float(torchs["time_us"]) > 0, torchs["time_over_ours"]) == (True, "")
    assert "differs by" in ours["reason"]


def test_a_tuned_table_is_of_use_before_it_is_finished(tmp_path):
    def row(bound: int, block_n: int, status: str = "ok") -> dict:
        tile = tune_grouped_gemm.tile_fields(Tile(16, block_n, 128, 4, 4, swap_ab=True))
        tiles = tune_grouped_gemm.json.dumps({"gate_up": tile, "down": tile})
        return {"shape": "olmoe", "rows": bound, "status": status, "tiles": tiles}

    def width(hidden: int, intermediate: int, rows: float) -> int | None:
        tiles = tuned_tiles(read_tuned(path), hidden, intermediate, rows)
        return tiles and tiles.gate_up.block_n

    path = tmp_path / "tuned.json"
    tune_grouped_gemm.write_table(path, [row(4, 32), row(16, 64), row(32, 128, "wrong")], "cpu")
    assert width(2048, 1024, 4) == 32
    assert width(2048, 1024, 5) == 64
    assert width(2048, 1024, 17) is None  # the rule's
    assert width(2048, 512, 4) is None
    tune_grouped_gemm.write_table(path, [row(512, 128)], "cpu")  # later, another run
    assert width(2048, 1024, 1e6) == 128
    assert width(2048, 1024, 4) == 32


@INTERPRETED
def test_tuning_takes_only_tiles_that_are_right(monkeypatch):
    search = tune_grouped_gemm.Search(SMALL, 1, [bench_grouped_gemm.Layer(SMALL, CPU)])
    good, bad = Tile(16, 32, 64, 4, 2, swap_ab=True), Tile(16, 32, 32, 4, 2)
    calls = search.calls

    def spoilt(tile: Tile) -> dict:
        return {n: (lambda la, c=c: c(la) * 2) if tile == bad else c for n, c in calls(tile).items()}

    monkeypatch.setattr(search, "calls", spoilt)
    columns = search.best([bad, good])
    assert columns["left_out"] == 2
    assert "WrongError" in str(columns["first_left_out"])
    assert '"block_k": 64' in str(columns["tiles"])
    assert "gate_up_rule_us" not in columns
    with pytest.raises(WrongError, match="no candidate is right"):
        search.best([bad])


@INTERPRETED
@pytest.mark.parametrize(("faster", "block_n"), [(0.99, 32), (0.9, 64)], ids=["by chance", "clearly"])
def test_tuning_keeps_the_rules_tiles_where_others_are_hardly_faster(faster, block_n, monkeypatch):
    search = tune_grouped_gemm.Search(SMALL, 1, [bench_grouped_gemm.Layer(SMALL, CPU)])
    rule, other = Tile(16, 32, 64, 4, 2, swap_ab=True), Tile(16, 64, 64, 4, 2, swap_ab=True)
    times = iter((1.0, 1.0, faster, faster))
    monkeypatch.setattr(tune_grouped_gemm, "time_calls", lambda *_: SimpleNamespace(p50=next(times)))
    columns = search.best([rule, other])
    found = tune_grouped_gemm.json.loads(str(columns["tiles"]))
    assert {tile["block_n"] for tile in found.values()} == {block_n}
    assert (columns["down_rule_us"], columns["down_us"]) == (1e6, 1e6 * (faster if block_n == 64 else 1))


@INTERPRETED
@pytest.mark.parametrize(("sequences", "tokens"), [(2, 1), (1, 3)], ids=["decode", "prefill"])
def test_delta_net_is_checked_and_its_states_stay(sequences, tokens, monkeypatch):
    point = bench_delta_net.Point(bench_delta_net._TINY, sequences, tokens, CPU)
    before = point.cases[0].state.clone()
    for provider in ("fluxmoe", bench_delta_net.TOKEN_BY_TOKEN):
        point.time(provider)
        assert torch.equal(point.cases[0].state, before)
    monkeypatch.setattr(point.cases[0], "ours", lambda token_by_token: torch.full((sequences * tokens, 32), torch.nan))
    with pytest.raises(WrongError, match="differs"):
        point.time("fluxmoe")
    with pytest.raises(AbsentError, match="fla cannot be imported"):
        point.time("fla")


def test_jobs_to_compile_have_names_of_their_own_and_functions():
    jobs = list(compile_kernels.jobs(None, rehearse=False))
    assert len({job.name for job in jobs}) == len(jobs)
    assert all(pickle.loads(pickle.dumps(job)).name == job.name for job in jobs)


LAUNCHES = """
from types import SimpleNamespace
from triton.runtime.jit import JITFunction
from fluxmoe.experiments.bench.compile_kernels import Target, jobs, run_job

stub = SimpleNamespace(hash="", src=SimpleNamespace(constants={}), metadata=SimpleNamespace(num_warps=1, name=""))
JITFunction._do_compile = lambda self, *a, **k: stub
for job in {job.name.split()[0]: job for job in jobs(None, rehearse=False)}.values():
    print(job.name.split()[0], run_job(job, Target(90, 132))["launches"])
"""


def test_jobs_of_every_kind_launch_on_the_meta_device(tmp_path):
    """Their kernels are not compiled here."""
    launches = dict(line.split() for line in run_script(LAUNCHES, tmp_path))
    assert set(launches) == {"prefill", "layer", "engine", "tiles", "attention", "delta", "decode"}
    assert all(int(count) > 0 for count in launches.values())


@pytest.mark.parametrize(
    ("one", "other", "both"),
    [
        ([], [(0, 9)], 0),
        ([(0, 4)], [(4, 8)], 0),
        ([(0, 4)], [(1, 2), (1.5, 3)], 2),
        ([(5, 9), (0, 4)], [(3, 6)], 2),
        ([(0, 10)], [(0, 10)], 10),
    ],
)
def test_overlap_is_the_time_that_both_run(one, other, both):
    assert gpu_tools.overlap(one, other) == both == gpu_tools.overlap(other, one)


def test_overlap_of_a_trace_counts_copies_from_the_host_alone():
    def event(cat: str, name: str, begin: float, length: float) -> dict:
        return {"ph": "X", "cat": cat, "name": name, "ts": begin, "dur": length}

    columns = gpu_tools.overlap_columns([
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 0, 10), event("kernel", "gemm", 6, 10),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 6, 10), {"ph": "M", "name": "process_name"},
    ])  # fmt: skip
    assert (columns["copy_us"], columns["compute_us"], columns["both_us"]) == (10, 10, 4)
    assert columns["share_of_copies_under_compute"] == 0.4


def test_metrics_of_ncu_are_read_from_behind_its_chatter():
    lines = [
        "==PROF== Connected", '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"',
        '"0","k","dram__throughput.avg.pct_of_peak_sustained_elapsed","%","81.5"', '"0","k","other","",""',
    ]  # fmt: skip
    assert gpu_tools.parse_ncu("\n".join(lines)) == {"dram_percent": "81.5 %"}
    assert gpu_tools.parse_ncu("==ERROR== ERR_NVGPUCTRPERM") == {}


def test_tests_on_a_gpu_are_rows_and_go_on(tmp_path):
    """In a process of its own: pytest inside pytest shares plugins."""
    tests = tmp_path / "test_it.py"
    tests.write_text(
        "import pytest\npytestmark = pytest.mark.gpu\n"
        "def test_good(): pass\ndef test_bad(): assert 1 == 2\ndef test_skipped(): pytest.skip('no')\n"
    )
    command = [sys.executable, "-m", "fluxmoe", "bench", "tests", "--tests", str(tests), "--workers", "1", "--rehearse"]
    out = tmp_path / "out"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)  # of the pytest that runs this test
    earlier = {"test": "test_it.py::test_good", "status": "ok", "reason": "of an earlier run"}
    write_csv(out / "rows.csv", [earlier], gpu_tests.COLUMNS)
    done = subprocess.run([*command, "--out", out], capture_output=True, text=True, cwd=tmp_path,
                          env=environment)  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    rows = {row["test"].rpartition("::")[2]: row for row in read(out)}
    assert {name: row["status"] for name, row in rows.items()} == {
        "test_good": "ok", "test_bad": "failed", "test_skipped": "absent",
    }  # fmt: skip
    assert rows["test_good"]["reason"] == "of an earlier run"
    assert "1 == 2" in rows["test_bad"]["reason"]
    assert rows["test_skipped"]["reason"] == "Skipped: no"
    assert len(read(out)) == 3


def test_paged_and_contiguous_inputs_hold_the_same_numbers():
    case = bench_attention.make_case((4, 2, 16), 3, 1, 40, CPU)
    expected = bench_attention.as_tokens(bench_attention.torch_attention(*case.contiguous()))
    assert expected.shape == case.q.shape
    if not torch.cuda.is_available():
        torch.testing.assert_close(case.ours(), expected, rtol=0.02, atol=0.02)


def test_tuning_candidates_fit_and_contain_the_rule():
    from fluxmoe.kernels.triton.tiles import default_tile, shared_limit

    for rows in tune_grouped_gemm.BOUNDS:
        tiles = tune_grouped_gemm.candidates(rows, 90)
        assert default_tile(rows, 90, 2) in tiles
        assert len(tiles) == len(set(tiles)) < 60
        assert all(tile.shared_bytes(2) <= shared_limit(90) for tile in tiles)
    assert tune_grouped_gemm.tokens_for(SHAPES["qwen3_30b"], 4) == 64


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
@pytest.mark.parametrize(
    "command",
    ["bench moe", "bench attention", "bench delta-net", "bench compile", "bench tune",
     "bench tests", "gpu-suite"],
)  # fmt: skip
def test_no_gpu_is_a_clear_error_that_names_a_flag_which_exists(command, tmp_path):
    with pytest.raises(UsageError, match=r"no CUDA device.*--rehearse"):
        call([*command.split(), "--out", str(tmp_path / "out")])
    arguments([*command.split(), "--out", "x", "--rehearse"])
    assert not (tmp_path / "out").exists()
