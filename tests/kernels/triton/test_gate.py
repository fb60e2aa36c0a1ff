"""The gate in one launch: norm, router, top-k and sort against float64 and against the kernels one by one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fluxmoe.kernels import formats
from fluxmoe.kernels.expert_table import ExpertTable, Pair
from fluxmoe.kernels.formats import DENSE
from fluxmoe.kernels.ops import DenseMlp, ExpertDims, KernelError, LayerDims, Limits, Linear, MoeBlock
from fluxmoe.kernels.reference import ops as reference
from fluxmoe.kernels.triton import tiles
from fluxmoe.kernels.triton.experts import TritonExperts
from fluxmoe.kernels.triton.gate import GateWeights, norm_and_route
from fluxmoe.kernels.triton.grouped_gemm import combine, combine_and_norm
from fluxmoe.kernels.triton.norm import rms_norm
from fluxmoe.kernels.triton.ops import TritonOps
from fluxmoe.kernels.triton.routing import Router, routing_torch

from .test_routing import assert_routing_equal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16


def gated(tokens, experts, top_k, hidden, dtype, shared=False, real=None):
    """(router, inputs, x, routing)"""
    x = torch.randn(tokens, hidden).to(dtype).to(DEVICE)
    matrices = [torch.randn(n, hidden).to(dtype).to(DEVICE) / hidden**0.5 for n in (experts, 1)]
    weights = GateWeights(torch.rand(hidden, device=DEVICE) + 0.5, matrices[0], matrices[1] if shared else None)
    router, out = Router(40, experts, top_k, True, DEVICE), torch.full_like(x, float("nan"))
    pair = (matrices[0], matrices[0]) if shared else None
    count = None if real is None else torch.tensor([real], dtype=torch.int32, device=DEVICE)
    routing = norm_and_route(x, weights, 1e-6, router, out, 16, count, pair)
    return router, (x, weights), out, routing


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "hidden"),
    [
        pytest.param(1, 1, 1, 16, id="one-expert"),
        pytest.param(3, 5, 5, 40, id="all-experts-ragged-sizes"),
        pytest.param(32, 128, 8, 72, id="as-many-tokens-as-one-program-sorts"),
        pytest.param(7, 40, 3, 600, id="several-steps-over-the-row"),
    ],
)
def test_equals_its_parts(tokens, experts, top_k, hidden, dtype):
    router, (x, weights), normed, routing = gated(tokens, experts, top_k, hidden, dtype)
    expected = reference.rms_norm(x.cpu().double(), weights.norm.cpu().double(), 1e-6)
    scale = expected.abs().max()
    assert (normed.cpu().double() - expected).abs().max() <= scale * (2**-8 if dtype == BF16 else 1e-6)
    logits = router.logits.view(-1)[: tokens * experts].view(tokens, experts).cpu()
    exact = normed.cpu().double() @ weights.router.cpu().double().T
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)
    assert_routing_equal(routing, routing_torch(logits, top_k, True, 16), tokens)
    assert router.arrived.item() == 0, "the next launch counts from 0"


def test_no_tokens_need_no_blocks():
    _, _, _, routing = gated(0, 5, 2, 16, BF16)
    assert routing.num_blocks.item() == 0
    assert not routing.expert_start.any()


@pytest.mark.parametrize(("tokens", "real"), [(1, None), (8, None), (20, None), (20, 17), (5, 0)])
def test_a_shared_expert_is_every_tokens_last_choice(tokens, real):
    experts, top_k = 24, 3
    router, (_, weights), normed, routing = gated(tokens, experts, top_k, 48, BF16, shared=True, real=real)
    count = tokens if real is None else real
    logits = router.logits.view(-1)[: tokens * (experts + 1)].view(tokens, experts + 1).cpu()
    alone = routing_torch(logits[:count, :experts], top_k, True, 16)
    assert torch.equal(routing.experts[:count, :top_k].cpu(), alone.experts)
    assert torch.equal(routing.expert_start.cpu(), alone.expert_start)
    exact = (normed.cpu().double() @ weights.score.cpu().double().T).sigmoid()
    torch.testing.assert_close(routing.weights[:count, top_k:].cpu().double(), exact[:count], rtol=1e-5, atol=1e-5)
    rows = torch.arange(count, dtype=torch.int32) * (top_k + 1) + top_k
    first = count * top_k
    assert torch.equal(routing.order[first : first + count].cpu(), rows)
    blocks = routing.block_map[: routing.num_blocks].cpu().tolist()
    last = [(experts, first + at, first + min(at + 16, count), 1) for at in range(0, count, 16)]
    assert [tuple(block) for block in blocks if block[0] == experts] == last
    assert [block[:3] for block in blocks if block[0] < experts] == alone.block_map[: alone.num_blocks, :3].tolist()
    assert not any(block[3] for block in blocks if block[0] < experts)
    assert (routing.block_map[routing.num_blocks :, 0] == -1).all()


def test_more_tokens_than_one_program_sorts_are_refused():
    with pytest.raises(KernelError, match="one program sorts at most 8 tokens, got 9"):
        gated(9, 512, 2, 16, BF16)


def test_combining_and_the_norm_in_one_launch_have_the_bits_of_two():
    y, residual, weight = torch.randn(15, 40).bfloat16(), torch.randn(5, 40).bfloat16(), torch.rand(40)
    y, residual, weight = (t.to(DEVICE) for t in (y, residual, weight))
    routing = Router(5, 4, 3, True, DEVICE)(torch.randn(5, 4, device=DEVICE), 16)
    hidden, normed = residual.clone(), torch.empty_like(residual)
    combine_and_norm(y, routing, hidden, weight, 1e-6, normed)
    expected = combine(y, routing, residual)
    assert torch.equal(hidden, expected)
    assert torch.equal(normed, rms_norm(expected, weight, 1e-6))


@pytest.mark.parametrize(
    ("tokens", "sizes_of", "shared_size"),
    [
        pytest.param(1, (48, 32), 32, id="routed beside the others, a token"),
        pytest.param(6, (48, 32), 32, id="routed beside the others"),
        pytest.param(6, (48, 32), 48, id="an MLP of its own"),
        pytest.param(6, (128, 128), 128, id="packed experts decoded first, a shared one behind them"),
    ],
)
def test_a_layer_in_few_launches_equals_one_operation_after_another(tokens, sizes_of, shared_size, monkeypatch):
    """`batch_invariant` is the way of separate launches."""
    (hidden, inter), experts = sizes_of, 6
    expert_format = "planar12" if hidden == 128 else DENSE
    monkeypatch.setattr(tiles, "DECODE_ROWS", 0)
    monkeypatch.setattr(formats, "DECODE_BYTES", 4 << 16)  # of gate_up's four
    dims = LayerDims(hidden, 2, 1, 16, experts, 64, BF16, mlp=shared_size)
    sizes = ExpertDims(hidden, inter, experts, 2, BF16)
    draw = lambda *shape: torch.randn(shape) / shape[-1] ** 0.5  # noqa: E731
    start, norms = draw(tokens, hidden).bfloat16() * 4, torch.rand(2, hidden) + 0.5
    matrices = [draw(n, k).bfloat16() for n, k in ((experts, hidden), (2 * shared_size, hidden), (hidden, shared_size))]
    score, weights = draw(1, hidden).bfloat16(), [tuple(draw(*s).bfloat16() for s in sizes.shapes) for _ in range(6)]
    results = []
    for invariant in (False, True):
        ops = TritonOps(dims, Limits(16, 4, 64, 16), DEVICE, batch_invariant=invariant)
        expert_ops = TritonExperts(sizes, 16, DEVICE, batch_invariant=invariant, formats=(expert_format,))
        assert (expert_ops._decoded is not None) == (not invariant and expert_format != DENSE)

        def linear(weight, arrange=ops.arrange):
            n, k = weight.shape
            arranged = torch.empty(weight.nbytes, dtype=torch.uint8)
            arrange(weight, arranged)
            return Linear(arranged.to(DEVICE), n, k, BF16)

        pairs: list[Pair] = []
        for gate_up, down in weights:
            first, second = (torch.empty(n, dtype=torch.uint8) for n in expert_ops.expert_bytes(expert_format))
            expert_ops.encode_expert(gate_up, down, (first, second), expert_format)
            pairs.append((first.to(DEVICE), second.to(DEVICE)))
        table = ExpertTable.from_blocks(pairs, DEVICE, expert_format)
        page: Any = SimpleNamespace(table=table, wait=lambda tensor_type: None)
        mlp = DenseMlp(linear(matrices[1], ops.arrange_mlp), linear(matrices[2]), linear(score))
        block = MoeBlock(ops, norms[0].to(DEVICE), linear(matrices[0]), norms[1].to(DEVICE), mlp)
        gate = expert_ops.gate(start.clone().to(DEVICE), block)
        assert (gate.routing.shared is not None) == (not invariant and shared_size == inter)
        results.append([part.cpu().float() for part in expert_ops.mix(gate, block, page)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=2**-6, atol=2**-6)
