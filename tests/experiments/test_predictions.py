"""Predictions of kernels on a GPU: from bytes, machine code, and what the nearest layer took where one was measured."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fluxmoe.experiments.bench import predict, predict_layer
from fluxmoe.experiments.bench.predict_layer import expected_blocks
from fluxmoe.experiments.bench.shapes import SHAPES
from fluxmoe.experiments.bench.timing import Roofs
from fluxmoe.experiments.lib.results import UsageError, write_csv, write_json
from fluxmoe.kernels.audit import Report
from fluxmoe.kernels.sass import Loop
from fluxmoe.kernels.triton.tiles import Tile, fused_tile
from fluxmoe.kernels.work import Work

from ..compiling import run_script


def test_expected_blocks_is_the_binomial_mean():
    draws = torch.distributions.Binomial(100, torch.tensor(0.25)).sample((20_000,))
    assert expected_blocks(100, 0.25, 16) == pytest.approx((draws / 16).ceil().mean().item(), rel=0.01)
    assert expected_blocks(20, 1.0, 16) == 2
    assert expected_blocks(1, 0.5, 16) == pytest.approx(0.5)


AUDIT = Path(__file__).parents[2] / "results/predicted/h100/audit.json"


def test_predictions_are_made_from_the_machine_code_of_todays_tiles(tmp_path):
    codes = predict_layer.audited(AUDIT)
    loops = {name: codes.gemms["gate_up", name, fused_tile((64, 128), 16, 90)] for name in ("planar12", "planar8")}
    assert loops["planar8"].decode_loop["integer"] < loops["planar12"].decode_loop["integer"]
    rows = json.loads(AUDIT.read_text())
    for row in rows:
        if row["name"] == "grouped_gemm down, 16 rows":
            row["constexprs"]["TILE"]["num_stages"] += 1
    write_json(tmp_path / "older.json", rows)
    with pytest.raises(UsageError, match=r"older\.json has no grouped_gemm down, 16 rows as it is now"):
        predict_layer.audited(tmp_path / "older.json")


def coded(integers: float) -> predict_layer.Codes:
    """Machine code of a tile loop with so many integer operations a weight."""
    code = Report("gate_up", "sm_90", integer_per_weight=integers)
    return predict_layer.Codes({("gate_up", "planar12", Tile(64, 64, 64, 4, 3)): code}, {})


def test_floors_of_packed_prefill_are_bytes_and_integer_operations():
    weights = 128 * 3 * 2048 * 768
    once = weights * 2.0 / (132 * 64 * 1.755e9)
    roofs, dense_s = Roofs(4e12, 1e15), 1e-3
    found = predict_layer.floors(SHAPES["qwen3_30b"], 8192, coded(2.0), roofs, dense_s, integers=0.1, l2=0.5)
    then, beside, again, riding, under = found
    assert then.least_s == pytest.approx(weights * 12.006 / 8 / 4e12)
    assert (then.likely_s, beside.least_s, beside.likely_s) == pytest.approx((10 * once, once, 10 * once))
    assert again.least_s == pytest.approx(expected_blocks(8192, 8 / 128, 256) * once)
    read = weights * 12.006 / 8 / predict_layer.L2_BYTES_PER_S
    assert riding.least_s == pytest.approx(read)
    assert riding.likely_s == pytest.approx(2 * read * (12.006 + 16) / 12.006)
    assert under.least_s == 0
    assert under.likely_s == pytest.approx(10 * expected_blocks(8192, 8 / 128, 128) * once - dense_s)


def test_bounds_are_calibrated_by_what_the_nearest_layer_took(tmp_path, monkeypatch):
    def row(tokens: int, provider: str, time_us: float) -> dict:
        return {"shape": "qwen3_30b", "tokens": tokens, "provider": provider, "status": "ok", "time_us": time_us}

    bound = predict_layer.Bound(50e-6, "hbm/hbm", Work(0, 0), "dense")
    ways = {"fluxmoe": "dense", "fluxmoe planar12": "decoded first", "fluxmoe planar12 in place": "in place"}
    monkeypatch.setattr(predict_layer, "predict_layer", lambda *layer: bound._replace(way=ways[layer[-1]]))
    few = [row(16, "fluxmoe", 50), row(16, "torch", 1)]
    many = [row(8192, "fluxmoe", 100), row(8192, "fluxmoe planar12", 200), row(8192, "fluxmoe planar12 in place", 1100)]
    for name, rows in (("few", few), ("many", [*many, row(8192, "fluxmoe planar12 by 24 MiB", 1)])):
        write_csv(tmp_path / name / "rows.csv", rows)
        write_json(tmp_path / name / "provenance.json", {"roofs": {"bytes_per_s": 1.0, "flops_per_s": 1.0}})
    measured = predict_layer.Measured([tmp_path / "few", tmp_path / "many"], coded(2.0))
    shape = SHAPES["qwen3_30b"]
    assert [measured.calibrated(bound, shape, tokens) for tokens in (1, 4096)] == pytest.approx([50e-6, 100e-6])
    assert measured.calibrated(bound._replace(way="in place"), shape, 1) == pytest.approx(1100e-6)
    assert measured.calibrated(bound._replace(way="decoded first"), shape, 1) == pytest.approx(200e-6)
    ideal = expected_blocks(8192, 8 / 128, 64) * 128 * 3 * 2048 * 768 * 2.0 / (132 * 64 * 1.755e9)
    assert measured.integer_rate == pytest.approx(ideal / 1e-3)
    assert math.isnan(predict_layer.Measured([tmp_path / "nothing"], coded(2.0)).calibrated(bound, shape, 1))


COMMITTED = """
from pathlib import Path
from fluxmoe.experiments.bench.predict import Arguments
from fluxmoe.experiments.bench.predict_layer import Measured, audited
measured = Measured([ROOT / folder for folder in Arguments(what="moe", out=ROOT).measured], audited(AUDIT))
for way, ratios in measured._ratios.items():
    print(way, min(ratio for _, _, ratio in ratios), max(ratio for _, _, ratio in ratios))
print("integers", measured.integer_rate, measured.integer_rate)
"""


def test_all_ways_are_calibrated_by_committed_results(tmp_path):
    """A layer took longer than its bound, and no more than a few times as long."""
    pytest.importorskip("triton.backends.nvidia")
    paths = f"from pathlib import Path\nAUDIT, ROOT = Path({str(AUDIT)!r}), Path({str(AUDIT.parents[3])!r})\n"
    ratios = {}
    for line in run_script(paths + COMMITTED, tmp_path):
        *way, least, most = line.split()
        ratios[" ".join(way)] = float(least), float(most)
    assert ratios.keys() == {"dense", "in place", "decoded first", "integers"}
    assert 0 < ratios.pop("integers")[0] < 1
    assert all(0.9 < least <= most < 4 for least, most in ratios.values()), ratios


def test_predictions_of_other_kernels_are_their_slowest_limit():
    norm = Report("rms_norm/x", "sm_90", "_rms_norm_kernel", num_warps=4, programs=32, nbytes=1e5, instructions=100)
    few, many = (predict.predict_kernel(replace(norm, programs=n, nbytes=8192 * n), f"{n} tokens") for n in (32, 4096))
    assert (few["limit"], many["limit"]) == ("launch", "hbm")
    assert many["predicted_us"] == pytest.approx(1e6 * (4 * 4096 * 2048 / (0.9 * 3.35e12) + 4e-6))
    assert predict.predict_kernel(replace(norm, programs=4096, instructions=10_000), "")["limit"] == "issue"
    assert predict.predict_kernel(replace(norm, nbytes=0.0), "")["issue_us"] == 0, "every program leaves at once"


def test_instructions_of_a_loop_are_as_many_as_flops_ask_for():
    sizes: dict[str, object] = {"group": 8, "head_dim": 128, "block_q": 2, "block_kv": 64}
    flops = 4.0 * 3 * 4096 * 32 * 128  # three sequences' 32 heads at 4096 positions
    loop = Loop(all=400, matrix=0, loads=0, integer=0, arrives=0, waits=0)
    code = Report("attention/x", "sm_90", "_decode_kernel", sizes, num_warps=4, nbytes=1.0, flops=flops, loops=[loop])
    assert predict.issued(code) == 3 * (32 // 8) * (4096 // 64) * 4 * 400
