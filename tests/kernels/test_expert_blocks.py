"""Blocks of experts in every format, on every backend: what is packed comes back, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from fluxmoe.kernels.cpu.experts import CpuExperts
from fluxmoe.kernels.formats import compressed_formats, fitting
from fluxmoe.kernels.ops import ExpertDims, KernelError
from fluxmoe.kernels.reference.experts import TorchExperts
from fluxmoe.kernels.triton.experts import TritonExperts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu
DIMS = ExpertDims(hidden=128, intermediate=248, experts=4, top_k=2, dtype=torch.bfloat16)
TOKENS = 8
BACKENDS: dict[str, Callable[[ExpertDims, int], Any]] = {
    "cpu": CpuExperts,
    "torch": TorchExperts,
    "triton": lambda dims, tokens: TritonExperts(dims, tokens, DEVICE),
}


def expert(dims: ExpertDims, expert_format: str = "dense") -> tuple[torch.Tensor, torch.Tensor]:
    gate_up = torch.randn(2 * dims.intermediate, dims.hidden) * 0.02
    down = torch.randn(dims.hidden, dims.intermediate) * 0.02
    gate_up[3, 5], down[7, 11], down[0, 0] = 1e-30, float("nan"), -0.0
    return fitting(expert_format, gate_up.to(dims.dtype)), fitting(expert_format, down.to(dims.dtype))


def empty_blocks(ops, expert_format: str) -> tuple[torch.Tensor, torch.Tensor]:
    gate_up, down = (torch.full((n,), 0xAB, dtype=torch.uint8) for n in ops.expert_bytes(expert_format))
    return gate_up, down


def assert_same_bits(got, expected) -> None:
    bits = torch.int16 if expected.dtype == torch.bfloat16 else torch.int32
    assert torch.equal(got.contiguous().view(bits), expected.contiguous().view(bits))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("backend", BACKENDS)
def test_dense_blocks(backend, dtype):
    dims = replace(DIMS, dtype=dtype, intermediate=40)
    ops, weights = BACKENDS[backend](dims, TOKENS), expert(dims)
    blocks = empty_blocks(ops, "dense")
    assert ops.encode_expert(*weights, blocks) == (None, None)
    for got, expected in zip(ops.restore_expert(blocks), weights, strict=True):
        assert_same_bits(got, expected)


@pytest.mark.parametrize("expert_format", compressed_formats())
@pytest.mark.parametrize("backend", BACKENDS)
def test_compressed_blocks_are_smaller_and_decode_to_dense_ones(backend, expert_format):
    """The sizes leave lanes of the CPU's last panel, and columns of the formats' last tile, unused."""
    ops, weights = BACKENDS[backend](DIMS, TOKENS), expert(DIMS, expert_format)
    blocks, dense = empty_blocks(ops, expert_format), empty_blocks(ops, "dense")
    recipes = ops.encode_expert(*weights, blocks, expert_format)
    if expert_format != "planar12":  # whose room for raw tiles outweighs what so small a block saves
        assert sum(ops.expert_bytes(expert_format)) < sum(ops.expert_bytes())
    elsewhere = [block.clone().to(ops.device) for block in blocks]
    outs = [block.to(ops.device) for block in dense]
    for d in (0, 1):
        ops.decode_expert(expert_format, d, elsewhere[d], outs[d], recipes[d])
    for got, expected in zip(ops.restore_expert(tuple(out.cpu() for out in outs)), weights, strict=True):
        assert_same_bits(got, expected)


@pytest.mark.parametrize(
    ("expert_format", "bits"), [("planar12", 12.1), ("planar8", 8.1), ("tiered", 11.25), ("huffman", 11.1)]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_room_of_a_large_block(backend, expert_format, bits):
    """Qwen3-30B-A3B's experts: what the ledger is charged for a weight."""
    ops = BACKENDS[backend](replace(DIMS, hidden=2048, intermediate=768), TOKENS)
    assert sum(ops.expert_bytes(expert_format)) * 8 / (3 * 2048 * 768) < bits


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_cannot_be_compressed_is_refused(backend):
    with pytest.raises(KernelError, match="bfloat16"):
        BACKENDS[backend](replace(DIMS, dtype=torch.float32), TOKENS).expert_bytes("huffman")
    ops = BACKENDS[backend](DIMS, TOKENS)
    with pytest.raises(KernelError, match="choose dense, planar12, planar8, tiered, huffman"):
        ops.expert_bytes("zip")
    noise = [torch.randint(-(2**15), 2**15, w.shape, dtype=torch.int16).view(torch.bfloat16) for w in expert(DIMS)]
    for name in compressed_formats():
        with pytest.raises(KernelError, match="use the dense format"):
            ops.encode_expert(*noise, empty_blocks(ops, name), name)


def test_the_cpu_needs_even_sizes_for_planar12():
    with pytest.raises(KernelError, match="even"):
        CpuExperts(replace(DIMS, intermediate=41), TOKENS).expert_bytes("planar12")
