"""Attention over blocks in scattered slabs, all else poisoned, has the bits of attention over one contiguous cache."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from fluxmoe.kernels.cpu.ops import CpuOps
from fluxmoe.kernels.ops import Limits, RopeTable
from fluxmoe.kernels.reference.ops import TorchOps
from fluxmoe.kernels.triton.ops import TritonOps
from fluxmoe.runtime.devices import device_of
from fluxmoe.runtime.serving.kv_cache import KVLayout, PagedKVCache

from ...kernels.cpu.test_cpu_ops import DIMS, metadata_for

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK_SIZE, BLOCKS, LAYERS = 16, 12, 2
BACKENDS = {
    "cpu": lambda dims, limits: CpuOps(dims, limits),
    "reference": lambda dims, limits: TorchOps(dims, limits),
    "triton": lambda dims, limits: TritonOps(dims, limits, DEVICE),
}


def cache_in(layout: KVLayout, device: str, slabs: int, blocks: int) -> PagedKVCache:
    """A cache of BLOCKS blocks; of more slabs than one, it has every other, and the rest is NaN."""
    size = BLOCKS * layout.block_bytes if slabs == 1 else layout.slab_bytes(blocks * layout.block_bytes)
    pool = device_of(device).make_slabs(slabs, size)
    cache, experts = PagedKVCache(layout, pool), []
    while cache.num_blocks < BLOCKS:
        cache.grow()
        if pool.num_free:
            experts.append(pool.take("experts"))
    pool.memory[experts] = 0xFF
    return cache


# A prompt in two parts beside a decode, then decodes alone; interpreted kernels get the least with two blocks.
PASSES = [[(0, 40), (0, 3)], [(40, 15), (3, 1)], [(55, 1), (4, 1)]]
FEW = [[(0, 17)], [(17, 1)]]


@pytest.mark.parametrize(
    ("backend", "window", "blocks", "passes"),
    [*itertools.product(("cpu", "reference"), (0, 21), (1, 3), [PASSES]), ("triton", 7, 3, FEW)],
    ids=lambda value: None if isinstance(value, list) else str(value),
)
def test_bits_do_not_depend_on_where_slabs_lie(backend, window, blocks, passes):
    dims = replace(DIMS, dtype=torch.bfloat16, window=window)
    limits = Limits(tokens=64, sequences=4, context=64, block_size=BLOCK_SIZE)
    ops: Any = BACKENDS[backend](dims, limits)
    device = str(ops.device)
    layout = KVLayout.of(ops, LAYERS, BLOCK_SIZE, dims.kv_heads, dims.head_dim, dims.dtype)
    rope = RopeTable(*(torch.rand(64, dims.head_dim // 2).to(device) for _ in range(2)))
    rows = [torch.randn(sum(new for _, new in chunks), dims.qkv_size).to(ops.act_dtype) for chunks in passes]
    order = torch.randperm(BLOCKS)[:8].view(2, 4)
    results = []
    for slabs in (1, 2 * BLOCKS // blocks):
        cache = cache_in(layout, device, slabs, blocks)
        ids = torch.tensor(cache.blocks.allocate(BLOCKS))
        assert (ids.tolist() == list(range(BLOCKS))) == (slabs == 1)
        outputs = []
        for layer in range(LAYERS):
            for chunks, qkv in zip(passes, rows, strict=True):
                meta = metadata_for(chunks, BLOCK_SIZE, ids[order[: len(chunks)]])
                tensors = {name: t for name, t in vars(meta).items() if isinstance(t, torch.Tensor)}
                moved: dict[str, Any] = {name: t.to(device) for name, t in tensors.items()}
                qkv = (layer + 1) * qkv.to(device)
                got = ops.attention(qkv, None, None, rope, replace(meta, **moved), *cache.layer(layer))
                outputs.append(got.clone())
        results.append(outputs)
    for contiguous, scattered in zip(*results, strict=True):
        assert contiguous.isfinite().all()
        assert torch.equal(contiguous, scattered)


def test_padding_is_kept_out_of_the_arena():
    """The reference, as Triton's kernels do: a token of slot -1 writes nothing, not even to the last slab."""
    ops = TorchOps(
        replace(DIMS, dtype=torch.bfloat16), Limits(tokens=8, sequences=4, context=64, block_size=BLOCK_SIZE)
    )
    layout = KVLayout.of(ops, LAYERS, BLOCK_SIZE, DIMS.kv_heads, DIMS.head_dim, torch.bfloat16)
    cache = cache_in(layout, "cpu", 2 * BLOCKS, 1)
    meta = metadata_for([(0, 2)], BLOCK_SIZE, torch.tensor([cache.blocks.allocate(4)]))
    meta = replace(meta, slot_mapping=torch.full((2,), -1))
    before = cache.pool.memory.clone()
    rope = RopeTable(*(torch.rand(64, DIMS.head_dim // 2) for _ in range(2)))
    ops.attention(torch.randn(2, DIMS.qkv_size).to(ops.act_dtype), None, None, rope, meta, *cache.layer(LAYERS - 1))
    assert torch.equal(cache.pool.memory, before)
