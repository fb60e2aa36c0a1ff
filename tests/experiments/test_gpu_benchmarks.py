"""GPU benchmarks where there is no GPU: their arithmetic, peers and errors; and the suite's bookkeeping."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from fluxmoe.experiments import (
    bench_attention,
    bench_grouped_gemm,
    check_engine,
    gpu_suite,
    predict_other_kernels,
    tune_grouped_gemm,
)
from fluxmoe.experiments.common import UsageError
from fluxmoe.experiments.gpu import Roofs, Timing
from fluxmoe.experiments.gpu_suite import Step, run_suite
from fluxmoe.experiments.moe_peers import PEERS, PeerMissingError
from fluxmoe.experiments.moe_shapes import SHAPES, Shape
from fluxmoe.experiments.predict_kernels import expected_blocks
from fluxmoe.kernels.audit import Report
from fluxmoe.kernels.routing import routing_torch
from fluxmoe.kernels.tiles import Tile, Tiles

CPU = torch.device("cpu")
SMALL = Shape(hidden=32, intermediate=16, experts=6, top_k=2)


def test_bytes_and_flops_of_one_token():
    nbytes, flops = SMALL.work(1, touched=2)
    assert nbytes == 2 * 6 * 32 * 16 + 2 * (3 * 32 + 2 * 2 * 16 + 2 * 2 * 32)
    assert flops == 6 * 2 * 32 * 16
    assert SMALL.touched(1) == pytest.approx(2)
    assert SMALL.touched(10_000) == pytest.approx(6)


def test_floor_is_the_slower_roof():
    roofs = Roofs(100.0, 10.0)
    assert roofs.floor_s(200, 5) == 2.0
    assert roofs.floor_s(200, 50) == 5.0


@pytest.mark.parametrize("tokens", [1, 9])
def test_ours_and_torchs_layer_agree_with_the_reference(tokens):
    layer = bench_grouped_gemm.Layer(SMALL, CPU)
    x = torch.randn(tokens, 32).bfloat16()
    logits = bench_grouped_gemm.router_logits(SMALL, tokens, "zipf:1.5", 0, CPU)
    routing = routing_torch(logits, 2, True, 16)
    expected = bench_grouped_gemm.reference(layer, x, routing.weights, routing.experts)
    peer = PEERS["torch"](layer.gate_up, layer.down)
    bench_grouped_gemm.check("torch", peer(x, logits, routing.weights, routing.experts), expected)
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here, and this layer lies on the CPU")
    tile = Tile(16, 16, 16, 4, 2)
    ours = bench_grouped_gemm.Ours(SMALL, tokens, CPU, Tiles(tile, tile))
    bench_grouped_gemm.check("fluxmoe", ours.run(layer, x, logits), expected)
    with pytest.raises(AssertionError, match="is wrong"):
        bench_grouped_gemm.check("fluxmoe", expected * 1.1, expected)


def test_missing_peers_say_so():
    for name in ("vllm", "triton_kernels"):
        with pytest.raises(PeerMissingError, match="cannot be imported"):
            PEERS[name](torch.zeros(1, 4, 2), torch.zeros(1, 2, 2))


def test_zipf_routing_prefers_the_first_experts():
    logits = bench_grouped_gemm.router_logits(SHAPES["olmoe"], 500, "zipf:1.2", 0, CPU)
    counts = torch.bincount(logits.topk(8).indices.flatten(), minlength=64)
    assert counts[:8].sum() > 4 * counts[-8:].sum()
    with pytest.raises(UsageError, match="uniform or zipf"):
        bench_grouped_gemm.router_logits(SMALL, 1, "even", 0, CPU)


def test_rows_carry_shares_and_ratios(capsys):
    rows: list[dict] = []
    results = type("Rows", (), {"add": lambda self, row: rows.append(row)})()
    timings = {"fluxmoe": Timing(1e-6, 2e-6, 3e-6, "graph"), "torch": Timing(4e-6, 5e-6, 6e-6, "eager")}
    bench_grouped_gemm.report("small", SMALL, 1, 2, "uniform", timings, Roofs(1e10, 1e12), results)
    assert rows[1]["time_over_ours"] == pytest.approx(2.5)
    assert rows[0]["share_of_copy_bandwidth"] == pytest.approx(rows[0]["bytes"] / 2e-6 / 1e10)
    assert "2.50x our time" in capsys.readouterr().out


def test_expected_blocks_is_the_binomial_mean():
    draws = torch.distributions.Binomial(100, torch.tensor(0.25)).sample((20_000,))
    assert expected_blocks(100, 0.25, 16) == pytest.approx((draws / 16).ceil().mean().item(), rel=0.01)
    assert expected_blocks(20, 1.0, 16) == 2
    assert expected_blocks(1, 0.5, 16) == pytest.approx(0.5)


def test_paged_and_contiguous_inputs_hold_the_same_numbers():
    case = bench_attention.make_case((4, 2, 16), 3, 1, 40, CPU)
    expected = bench_attention.as_tokens(bench_attention.torch_attention(*case.contiguous()))
    assert expected.shape == case.q.shape
    if not torch.cuda.is_available():
        torch.testing.assert_close(case.ours(), expected, rtol=0.02, atol=0.02)
    assert bench_attention.work((4, 2, 16), 1, 3, 3)[1] == 4 * 4 * 16 * 6


def test_tuning_candidates_fit_and_contain_the_rule():
    from fluxmoe.kernels.tiles import default_tile, shared_limit

    for rows in tune_grouped_gemm.BOUNDS:
        tiles = tune_grouped_gemm.candidates(rows, 90)
        assert default_tile(rows, 90, 2) in tiles
        assert len(tiles) == len(set(tiles)) < 60
        assert all(tile.shared_bytes(2) <= shared_limit(90) for tile in tiles)
    assert tune_grouped_gemm.tokens_for(SHAPES["qwen3_30b"], 4) == 64


@pytest.mark.parametrize("module", [bench_grouped_gemm, bench_attention, tune_grouped_gemm, gpu_suite])
def test_no_gpu_is_a_clear_error(module, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    arguments = [] if module is tune_grouped_gemm else ["--out", str(tmp_path / "out")]
    with pytest.raises(UsageError, match="no CUDA device"):
        module.main(arguments)
    assert not (tmp_path / "out").exists()


def test_suite_goes_on_after_failures_and_records_them(tmp_path):
    steps = (
        Step("fine", ("-c", "print('result')"), 1),
        Step("broken", ("-c", "raise SystemExit('it broke')"), 1),
        Step("endless", ("-c", "import time; time.sleep(60)"), 0.02),
        Step("absent", ("-c", "pass"), 1, needs=("no_such_package",)),
    )
    records = run_suite(steps, tmp_path, 5, {})
    assert [r["status"] for r in records] == ["ok", "failed", "out of time", "left out"]
    assert "it broke" in records[1]["reason"]
    assert "no_such_package" in records[3]["reason"]
    assert json.loads((tmp_path / "suite.json").read_text())["steps"] == records
    assert "result" in (tmp_path / "logs" / "fine.txt").read_text()
    assert run_suite(steps[:1], tmp_path, 0.01, {})[0]["reason"] == "no time left"


def test_suite_names_scripts_that_exist():
    for step in gpu_suite.STEPS:
        module = step.arguments[1]
        if module.startswith("fluxmoe.experiments."):
            name = module.rpartition(".")[2]
            assert (gpu_suite.ROOT / "experiments" / f"{name}.py").exists(), step
        for argument in step.arguments:
            if argument.startswith("tests/"):
                assert (gpu_suite.ROOT / argument).exists(), argument


def test_engine_check_sees_differences_and_forgives_ties():
    logits = torch.tensor([[0.0, 5.0, 1.0], [4.0, 0.0, 3.9999]])
    assert check_engine.first_difference([1, 0], logits, [1, 0], logits, 1e-4) is None
    assert check_engine.first_difference([1, 2], logits, [1, 0], logits, 1e-4) is None
    assert "token 0 is 2" in check_engine.first_difference([2, 0], logits, [1, 0], logits, 1e-4)
    assert "logits of token 0" in check_engine.first_difference([1, 0], logits + 1, [1, 0], logits, 1e-4)


def test_predictions_of_other_kernels_are_their_slowest_limit():
    pytest.importorskip("triton.backends.nvidia")
    norm = Report("rms_norm/x", "sm_90", "_rms_norm_kernel", {"HIDDEN": 2048}, num_warps=4, instructions=100)
    few, many = predict_other_kernels.predict(norm)[1::2]
    assert (few["limit"], many["limit"]) == ("launch", "hbm")
    assert many["predicted_us"] == pytest.approx(1e6 * (4 * 4096 * 2048 / (0.9 * 3.35e12) + 4e-6))
    busy = predict_other_kernels.predict(replace(norm, instructions=10_000))[-1]
    assert busy["limit"] == "issue"
    shape = {"KV_HEADS": 4, "GROUP": 8, "HEAD_DIM": 128, "BLOCK_ROWS": 16, "BLOCK_KV": 64}
    decode = Report("attention_decode/x", "sm_90", "_decode_kernel", shape, num_warps=4, loops=[{"all": 400}])
    rows = predict_other_kernels.predict(decode)
    assert [row["bytes"] // 4096 // 2048 for row in rows] == [1, 32, 128]  # K and V of 4 heads of 128, bf16
    assert predict_other_kernels.predict(Report("grouped_gemm", "sm_90", "_grouped_gemm_kernel")) == []
