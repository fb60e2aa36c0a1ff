"""Experts' operations on every backend: the layer against the reference, from logits and from given experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fluxmoe.kernels.cpu import tile
from fluxmoe.kernels.cpu.experts import CpuExperts
from fluxmoe.kernels.expert_table import ExpertTable, Pair
from fluxmoe.kernels.formats import DECODE_ROWS
from fluxmoe.kernels.ops import ExpertDims, KernelError
from fluxmoe.kernels.reference.experts import TorchExperts
from fluxmoe.kernels.triton.experts import TritonExperts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DIMS = ExpertDims(hidden=48, intermediate=40, experts=5, top_k=2, dtype=torch.float32)
TOKENS = 64
BACKENDS: dict[str, Callable[[ExpertDims, int], Any]] = {
    "cpu": CpuExperts,
    "torch": TorchExperts,
    "triton": lambda dims, tokens: TritonExperts(dims, tokens, DEVICE),
}
# Sums in another order; Triton's activations are rounded to the weights' dtype, here fp32.
TOLERANCE = dict[str, Any](rtol=1e-4, atol=1e-4)


def random_experts(dims: ExpertDims) -> list[tuple[torch.Tensor, torch.Tensor]]:
    def one() -> tuple[torch.Tensor, torch.Tensor]:
        gate_up, down = (torch.randn(shape).to(dims.dtype) / 4 for shape in dims.shapes)
        return gate_up, down

    return [one() for _ in range(dims.experts)]


def page_of(ops, weights) -> SimpleNamespace:
    blocks: list[Pair] = []
    for weight in weights:
        first, second = (torch.zeros(n, dtype=torch.uint8) for n in ops.expert_bytes())
        ops.encode_expert(*weight, (first, second))
        blocks.append((first.to(ops.device), second.to(ops.device)))
    return SimpleNamespace(
        table=ExpertTable.from_blocks(blocks, ops.device), wait=lambda tensor_type: None, need=lambda experts: None,
        ready=lambda tensor_type: (None,), in_place=True,
    )  # fmt: skip


def run(ops, x, weights, residual, *, logits=None, ids=None, ids_weights=None) -> torch.Tensor:
    """The layer's output; from logits, or from ids."""
    to = ops.device
    routing = ops.route(logits.to(to)) if ids is None else ops.route_to(ids.to(to), ids_weights.to(to))
    return ops.moe_add(x.to(to), routing, page_of(ops, weights), residual.clone().to(to)).cpu()


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [(torch.float32, tile.FP32), (torch.bfloat16, tile.BF16)] + [(torch.bfloat16, tile.BF16_DOT)] * tile.HAS_DOT,
    ids=["fp32", "bf16", "bf16 dots"][: 2 + tile.HAS_DOT],
)
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "hidden", "intermediate", "renormalise"),
    [
        pytest.param(1, 1, 1, 16, 16, True, id="one expert"),
        pytest.param(1, 5, 5, 33, 17, False, id="every expert chosen, no size a multiple of 16"),
        pytest.param(2, 64, 3, 48, 40, True, id="most experts get no token"),
        pytest.param(64, 3, 1, 64, 32, False, id="more rows an expert than one chunk of SwiGLU"),
        pytest.param(37, 7, 4, 20, 70, True, id="odd sizes"),
        pytest.param(64, 2, 2, 48, 16, True, id="all tokens to all experts"),
    ],
)
def test_the_cpus_layer_matches_the_reference(
    tokens, experts, top_k, hidden, intermediate, renormalise, dtype, kind, monkeypatch
):
    """Dot products of bf16 round x and what comes out of SwiGLU: 2^-9 of each term."""
    monkeypatch.setattr(tile, "BF16_KIND", kind)
    dims = ExpertDims(hidden, intermediate, experts, top_k, dtype, renormalise)
    weights, logits = random_experts(dims), torch.randn(tokens, experts)
    x, residual = torch.randn(tokens, hidden), torch.randn(tokens, hidden)
    fast, slow = (run(ops(dims, TOKENS), x, weights, residual, logits=logits) for ops in (CpuExperts, TorchExperts))
    tolerance = TOLERANCE if kind != tile.BF16_DOT else {"rtol": 0, "atol": 1e-2 * slow.abs().max().item()}
    torch.testing.assert_close(fast, slow, **tolerance)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_one_hot_expert_gets_every_token(backend):
    """All rows to one expert: several tiles and chunks of one expert, the others empty."""
    dims = replace(DIMS, top_k=1)
    weights, logits = random_experts(dims), torch.zeros(64, 5)
    logits[:, 3] = 9.0
    x, none = torch.rand(64, 48), torch.zeros(64, 48)
    got = run(BACKENDS[backend](dims, TOKENS), x, weights, none, logits=logits)
    torch.testing.assert_close(got, run(TorchExperts(dims, TOKENS), x, weights, none, logits=logits), **TOLERANCE)


def test_nan_in_an_expert_reaches_the_output():
    """Poison must show: a slot read too early holds NaN."""
    dims = replace(DIMS, top_k=5)
    weights = [tuple(torch.full(shape, float("nan")) for shape in dims.shapes)] * 5
    out = run(CpuExperts(dims, TOKENS), torch.randn(3, 48), weights, torch.zeros(3, 48), logits=torch.randn(3, 5))
    assert out.isnan().all()


def test_packed_experts_with_many_rows_have_the_bits_of_dense_ones():
    dims, tokens = ExpertDims(128, 128, 2, 2, torch.bfloat16), DECODE_ROWS + 1
    ops = TritonExperts(dims, tokens, DEVICE, formats=("planar12",))
    weights, x, logits = random_experts(dims), torch.randn(tokens, 128).bfloat16().to(DEVICE), torch.randn(tokens, 2)
    outputs = []
    for name in ("dense", "planar12"):
        pairs: list[Pair] = []
        for gate_up, down in weights:
            first, second = (torch.zeros(n, dtype=torch.uint8) for n in ops.expert_bytes(name))
            ops.encode_expert(gate_up, down, (first, second), name)
            pairs.append((first.to(DEVICE), second.to(DEVICE)))
        page: Any = SimpleNamespace(table=ExpertTable.from_blocks(pairs, DEVICE, name), wait=lambda tensor_type: None)
        outputs.append(ops.moe_add(x, ops.route(logits.to(DEVICE)), page, torch.zeros_like(x)))
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    ("more", "options", "weights"),
    [
        pytest.param(1, {"formats": ("planar12",)}, 256 * 128, id="many rows"),
        pytest.param(0, {"formats": ("planar12",)}, 0, id="few rows"),
        pytest.param(1, {"formats": ("tiered",)}, 0, id="no format that the GEMM reads"),
        pytest.param(1, {"formats": ("planar12",), "batch_invariant": True}, 0, id="batch-invariant"),
    ],
)
def test_a_buffer_for_decoded_experts_is_in_the_ledger_where_one_is_needed(more, options, weights):
    """weights: of an expert, that it holds at once; no larger than a layer's gate_up."""
    dims = ExpertDims(128, 128, 2, 2, torch.bfloat16)
    mine, without = (TritonExperts(dims, DECODE_ROWS + more, DEVICE, **each) for each in (options, dict[str, Any]()))
    assert mine.workspace_bytes - without.workspace_bytes == pytest.approx(2 * weights * 2, abs=1024)


# Experts that a host has chosen.


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "kind"),
    [
        pytest.param(0, 4, 2, torch.int64, id="no tokens"),
        pytest.param(1, 1, 1, torch.int32, id="one expert"),
        pytest.param(20, 512, 3, torch.int64, id="more tokens than one program routes"),
        pytest.param(33, 5, 2, torch.int32, id="odd sizes, int32"),
        pytest.param(33, 5, 2, torch.int64, id="odd sizes, int64"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_given_experts_are_as_good_as_chosen_ones(backend, tokens, experts, top_k, kind):
    dims = replace(DIMS, experts=experts, top_k=top_k)
    ops, weights, logits = BACKENDS[backend](dims, TOKENS), random_experts(dims), torch.randn(tokens, experts)
    ids = logits.topk(top_k, dim=-1).indices
    chances = logits.softmax(dim=-1).gather(1, ids)
    chances /= chances.sum(dim=-1, keepdim=True)
    x, residual = torch.randn(tokens, 48), torch.randn(tokens, 48)
    given = run(ops, x, weights, residual, ids=ids.to(kind), ids_weights=chances)
    torch.testing.assert_close(given, run(ops, x, weights, residual, logits=logits), **TOLERANCE)


@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("elsewhere", [-1, -7, 6, 1000], ids=lambda n: f"elsewhere {n}")
@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_that_hold_parts_of_the_experts_add_up(backend, elsewhere, tokens):
    """Two ranks, each with an id that is none of its own for the other's experts: their sum is the whole layer."""
    dims = replace(DIMS, experts=6, top_k=3)
    ops, weights = BACKENDS[backend](dims, TOKENS), random_experts(dims)
    ids = torch.stack([torch.randperm(6)[:3] for _ in range(tokens)])
    ids[0] = torch.tensor([0, 1, 2])  # a token of the first rank alone
    chances, x, none = torch.rand(tokens, 3), torch.randn(tokens, 48), torch.zeros(tokens, 48)
    whole = run(ops, x, weights, none, ids=ids, ids_weights=chances)
    parts = [
        run(ops, x, weights, none, ids=torch.where(mine, ids, elsewhere), ids_weights=chances)
        for mine in (ids < 3, ids >= 3)
    ]
    assert (parts[1][0] == 0).all()
    torch.testing.assert_close(parts[0] + parts[1], whole, **TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_elsewhere_leaves_the_residual_and_counts_nothing(backend):
    ops, weights = BACKENDS[backend](DIMS, TOKENS), random_experts(DIMS)
    residual, counts = torch.randn(4, 48), torch.zeros(5, device=ops.device)
    ids, chances = torch.full((4, 2), -1), torch.rand(4, 2)
    assert torch.equal(run(ops, torch.randn(4, 48), weights, residual, ids=ids, ids_weights=chances), residual)
    ids[1, 0] = 3
    ops.count_routed(ops.route_to(ids.to(ops.device), chances.to(ops.device)), counts)
    assert counts.tolist() == [0, 0, 0, 1, 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_choices_of_a_routing_can_be_read(backend):
    ops, logits = BACKENDS[backend](DIMS, TOKENS), torch.randn(7, 5)
    chosen = ops.chosen(ops.route(logits.to(ops.device))).cpu()
    assert chosen.sort(dim=1).values.tolist() == logits.topk(2).indices.sort(dim=1).values.tolist()


def test_buffers_keep_their_dtype_and_device_whatever_the_defaults_are():
    """Hosts such as vLLM set a default dtype of bf16."""
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        torch.set_default_device("meta")
        ops = CpuExperts(DIMS, TOKENS)
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)
    buffers = vars(ops._buffers)
    assert {str(buffer.device) for buffer in buffers.values()} == {"cpu"}
    dtypes = {name: str(buffer.dtype).removeprefix("torch.") for name, buffer in buffers.items()}
    assert {name for name, dtype in dtypes.items() if dtype != "int32"} == {
        "topk_weights", "rounded", "activation", "expert_out", "tiles", "rooms", "all",
    }  # fmt: skip
    assert dtypes["activation"] == "float32"


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_given_experts_of_another_shape_are_refused(backend):
    ops = BACKENDS[backend](DIMS, TOKENS)
    with pytest.raises(KernelError, match="topk_ids"):
        ops.route_to(torch.zeros(4, 3, dtype=torch.int64, device=ops.device), torch.rand(4, 3, device=ops.device))


def test_workspace_is_what_is_held():
    ops = CpuExperts(DIMS, TOKENS)
    arrays = [ops._scratch.counter, ops._scratch.row_table]
    assert ops.workspace_bytes == sum(t.nbytes for t in vars(ops._buffers).values()) + sum(a.nbytes for a in arrays)
