"""Attention on the CPU over a whole KV cache, in slabs beside one contiguous cache, the two in turns.

    fluxmoe bench attention-cpu --out results/measured/<cpu>/attention

The caches hold all layers of a model and are read whole, layer by layer, by one thread and in its own CPU time, which
hardly changes with what else the machine does. Every other slab is another's; a slab is as large as the model's expert
in planar12.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from fluxmoe.kernels.cpu.ops import CpuOps
from fluxmoe.kernels.ops import AttentionMetadata, LayerDims, Limits, RopeTable
from fluxmoe.runtime.devices import HOST
from fluxmoe.runtime.serving.kv_cache import KVLayout, PagedKVCache
from torch import Tensor

from ..lib.args import option
from ..lib.sweep import Sweep, WrongError, say
from .timing import times_in_turns

# heads, kv_heads, head_dim; layers with attention; bytes of an expert in planar12.
MODELS = {
    "qwen3_30b": ((32, 4, 128), 48, 3 * 2048 * 768 * 12 // 8),
    "qwen3_next": ((16, 2, 256), 12, 3 * 2048 * 512 * 12 // 8),
    "olmoe": ((16, 16, 128), 16, 3 * 2048 * 1024 * 12 // 8),
    "tiny": ((4, 2, 16), 3, 3 * 64 * 64 * 12 // 8),
}
_BLOCK_SIZE = 32


def cache_of(layout: KVLayout, blocks: int, slab_bytes: int | None) -> tuple[PagedKVCache, Tensor]:
    """A cache of random K and V and the ids of its blocks: one slab, or every other slab of a pool."""
    per_slab = 1 if slab_bytes is None else slab_bytes // layout.block_bytes
    count = 1 if slab_bytes is None else 2 * -(-blocks // per_slab)
    cache = PagedKVCache(layout, HOST.make_slabs(count, slab_bytes or blocks * layout.block_bytes))
    while cache.num_blocks < blocks:
        cache.grow()
        if cache.pool.num_free:
            cache.pool.take("experts")
    ids = torch.tensor(cache.blocks.allocate(blocks), dtype=torch.int32)
    values = torch.Generator().manual_seed(0)
    for layer in range(layout.num_layers):
        for part in cache.layer(layer):
            part[ids.long()] = torch.randn((blocks, *part.shape[1:]), generator=values).to(layout.dtype)
    return cache, ids


def compare_layouts(name: str, sequences: int, queries: int, context: int, turns: int) -> dict:
    """A row: attention of all layers over a whole cache, in one slab and in many."""
    (heads, kv_heads, dim), layers, expert_bytes = MODELS[name]
    dims = LayerDims(hidden=16, heads=heads, kv_heads=kv_heads, head_dim=dim, experts=1, vocab=16, dtype=torch.bfloat16)
    ops = CpuOps(dims, Limits(sequences * queries, sequences, context, _BLOCK_SIZE), threads=1)
    layout = KVLayout.of(ops, layers, _BLOCK_SIZE, kv_heads, dim, dims.dtype)
    each = -(-context // _BLOCK_SIZE)
    caches = {kind: cache_of(layout, sequences * each, size)
              for kind, size in (("contiguous", None), ("slabs", layout.slab_bytes(expert_bytes)))}  # fmt: skip
    order = torch.randperm(sequences * each, generator=torch.Generator().manual_seed(1)).view(sequences, each)
    new = torch.arange(context - queries, context).repeat(sequences)
    owner = torch.arange(sequences).repeat_interleave(queries)
    rope, rows = (
        RopeTable(torch.ones(context, dim // 2), torch.zeros(context, dim // 2)),
        torch.randn(sequences * queries, dims.qkv_size),
    )

    def metadata(ids: Tensor) -> AttentionMetadata:
        table = ids[order]
        slots = table[owner, new // _BLOCK_SIZE].long() * _BLOCK_SIZE + new % _BLOCK_SIZE
        return AttentionMetadata(
            query_start=torch.arange(sequences + 1, dtype=torch.int32) * queries,
            context_lens=torch.full((sequences,), context, dtype=torch.int32), block_table=table,
            positions=new.int(), slot_mapping=slots, block_size=_BLOCK_SIZE,
        )  # fmt: skip

    batches = {kind: metadata(ids) for kind, (_, ids) in caches.items()}

    def run(kind: str, layer: int) -> tuple[float, Tensor]:
        qkv = rows.clone()
        begin = time.thread_time()
        out = ops.attention(qkv, None, None, rope, batches[kind], *caches[kind][0].layer(layer))
        return time.thread_time() - begin, out

    for layer in range(layers):  # kernels compiled, pages touched
        expected = run("contiguous", layer)[1].clone()
        if not torch.equal(run("slabs", layer)[1], expected):
            raise WrongError(f"layer {layer} of {name} has other bits in slabs")
    found = times_in_turns(lambda kind, turn: run(kind, turn % layers)[0], list(caches), turns * layers)
    times = {kind: each.reshape(turns, layers) for kind, each in found.items()}
    passes = {kind: each.sum(axis=1) for kind, each in times.items()}
    low, middle, high = np.percentile(passes["slabs"] / passes["contiguous"], [25, 50, 75])
    medians = {f"{kind}_us": float(np.median(each)) * 1e6 for kind, each in passes.items()}
    # What disturbs only adds time: of each layer its shortest.
    least = {kind: each.min(axis=0).sum() for kind, each in times.items()}
    return {
        "layers": layers, "kv_bytes": sequences * each * layout.block_bytes,
        "blocks_per_slab": caches["slabs"][0].blocks_per_slab, **medians,
        "slabs_over_contiguous": middle, "ratio_p25": low, "ratio_p75": high,
        "ratio_of_shortest": least["slabs"] / least["contiguous"],
    }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Arguments:
    shapes: tuple[str, ...] = option("models", ("qwen3_30b", "qwen3_next", "olmoe"), choices=tuple(MODELS))
    sequences: tuple[int, ...] = option("decode batch sizes", (4,), least=1)
    contexts: tuple[int, ...] = option("of decode", (1024,), least=1)
    prompts: tuple[int, ...] = option("prefill lengths", (256,), least=1)
    turns: int = option("passes of each layout", 15, least=5)
    out: Path = option("folder of the results", metavar="DIR")


def run(args: Arguments) -> None:
    points = [(n, s, 1, c) for n in args.shapes for s in args.sequences for c in args.contexts]
    points += [(n, 1, p, p) for n in args.shapes for p in args.prompts]
    results = Sweep(args.out, "bench attention-cpu", "rows.csv", {"turns": args.turns}, kind="measured")
    for name, sequences, queries, context in points:
        measure = partial(compare_layouts, name, sequences, queries, context, args.turns)
        say(results.measure(measure, shape=name, sequences=sequences, queries=queries, context=context))
    results.finish()
