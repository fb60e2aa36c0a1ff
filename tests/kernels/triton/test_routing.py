"""Routing kernels: equal to the reference row by row, whatever the number of tokens, experts and ties."""

from __future__ import annotations

import pytest
import torch
from fluxmoe.kernels.ops import KernelError
from fluxmoe.kernels.triton.routing import Router, block_t, max_blocks, routing_torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu
# E and top_k of OLMoE, Mixtral, Qwen3-Next, and odd ones; tokens below, at and beyond one chunk.
CASES = [
    pytest.param(0, 8, 2, id="no-tokens"),
    pytest.param(1, 1, 1, id="one-expert"),
    pytest.param(1, 8, 8, id="one-token-all-experts"),
    pytest.param(5, 7, 3, id="prime-experts"),
    pytest.param(33, 64, 8, id="olmoe"),
    pytest.param(128, 8, 2, id="mixtral-one-chunk"),
    pytest.param(130, 8, 2, id="mixtral-two-chunks"),
    pytest.param(70, 128, 8, id="qwen3-part-of-a-chunk"),
    pytest.param(17, 512, 10, id="qwen3-next-two-chunks"),
]


def assert_routing_equal(got, expected, tokens):
    assert torch.equal(got.experts.cpu(), expected.experts)
    torch.testing.assert_close(got.weights.cpu(), expected.weights, rtol=2e-6, atol=1e-7)
    assert torch.equal(got.order.cpu(), expected.order)
    assert torch.equal(got.expert_start.cpu(), expected.expert_start)
    assert torch.equal(got.num_blocks.cpu(), expected.num_blocks)
    if tokens:
        assert torch.equal(got.block_map.cpu(), expected.block_map)


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), CASES)
def test_equals_the_reference(tokens, experts, top_k, renormalise):
    logits = torch.randn(tokens, experts)
    router = Router(max(tokens, 1), experts, top_k, renormalise, DEVICE)
    got = router(logits.to(DEVICE), 16)
    assert_routing_equal(got, routing_torch(logits, top_k, renormalise, 16), tokens)


@pytest.mark.parametrize("tokens", [9, 40])
def test_ties_go_to_the_lower_id(tokens):
    logits = torch.zeros(tokens, 6)
    got = Router(tokens, 6, 3, True, DEVICE)(logits.to(DEVICE), 16)
    assert got.experts.tolist() == [[0, 1, 2]] * tokens
    assert_routing_equal(got, routing_torch(logits, 3, True, 16), tokens)


def test_one_hot_expert_fills_many_blocks():
    logits = torch.zeros(200, 8)
    logits[:, 5] = 9.0
    got = Router(200, 8, 1, True, DEVICE)(logits.to(DEVICE), 16)
    assert got.num_blocks.item() == 13
    assert_routing_equal(got, routing_torch(logits, 1, True, 16), 200)


def test_infinite_and_nan_logits_still_give_valid_distinct_experts():
    logits = torch.full((4, 5), float("-inf"))
    logits[1] = float("nan")
    logits[2, 3] = float("inf")
    logits[3, 1] = float("nan")
    got = Router(4, 5, 4, True, DEVICE)(logits.to(DEVICE), 16)
    for row in got.experts.tolist():
        assert len(set(row)) == 4
        assert all(0 <= expert < 5 for expert in row)
    assert got.experts[2, 0] == 3


@pytest.mark.parametrize("tokens", [6, 150])
@pytest.mark.parametrize("real", [0, 1, 5])
def test_padding_reaches_no_expert(tokens, real):
    logits = torch.randn(tokens, 8)
    count = torch.tensor([real], dtype=torch.int32, device=DEVICE)
    got = Router(tokens, 8, 2, True, DEVICE)(logits.to(DEVICE), 16, count)
    expected = routing_torch(logits[:real], 2, True, 16)
    assert torch.equal(got.experts[:real].cpu(), expected.experts)
    assert torch.equal(got.order[: 2 * real].cpu(), expected.order)
    assert torch.equal(got.expert_start.cpu(), expected.expert_start)
    blocks = expected.num_blocks.item()
    assert got.num_blocks.item() == blocks
    assert torch.equal(got.block_map[:blocks].cpu(), expected.block_map[:blocks])
    assert (got.block_map[blocks:, 0] == -1).all()


def test_a_router_is_reused_without_traces_of_the_last_batch():
    router = Router(40, 8, 2, True, DEVICE)
    router(torch.randn(40, 8, device=DEVICE), 16)
    logits = torch.randn(3, 8)
    assert_routing_equal(router(logits.to(DEVICE), 16), routing_torch(logits, 2, True, 16), 3)


def test_block_bound_is_reached_and_never_passed():
    assert max_blocks(3, 8, 16) == 3
    assert max_blocks(40, 8, 16) == 10
    for experts in (1, 8, 60, 128, 512):
        assert block_t(experts) >= 8


@pytest.mark.parametrize(("experts", "top_k"), [(4, 5), (4, 0), (64, 33)])
def test_impossible_top_k_is_refused(experts, top_k):
    with pytest.raises(KernelError, match="top_k"):
        Router(4, experts, top_k, True, DEVICE)(torch.zeros(4, experts, device=DEVICE), 16)


def test_wrong_logits_are_refused():
    router = Router(4, 8, 2, True, DEVICE)
    with pytest.raises(KernelError, match="logits must be fp32"):
        router(torch.zeros(4, 7, device=DEVICE), 16)
    with pytest.raises(KernelError, match="exceed"):
        router(torch.zeros(5, 8, device=DEVICE), 16)
