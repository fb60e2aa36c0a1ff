"""Causal attention of a flat batch of tokens over a paged KV cache (PagedAttention, arXiv 2309.06180), two schedules.

A sequence's queries are the last n of its `context` positions; a query at position p sees keys max(0, p - window + 1)
to p (window 0: from 0):  out = softmax(scale · q · Kᵀ) · V, with fp32 scores, sums and accumulators.

    q, out            [T, heads, D]                            bf16, fp16 or fp32; head h reads KV head h // group
    k_cache, v_cache  [num_blocks, kv_heads, block_size, D]    q's dtype, as `rope_and_cache` writes it
    block_table       [B, max_blocks]  int32                   never read beyond a context, nor below its window;
                                                               blocks that it does not name may be anything
    context_lens      [B]              int32                   cached positions, this pass's included; 0: out is 0
    query_start       [B + 1]          int32                   sequence s owns tokens query_start[s] to [s + 1] - 1

Example: block_size 16, group 8, contexts 40 and 3, queries 2 and 1: query_start 0 2 3; token 1 (position 39, heads
0-7) is rows 8-15 of a tile and reads blocks block_table[0, 0:3] of KV head 0.

The query heads that share a KV head (GQA) are rows of one tile, so K and V are read once for them. The inner loop is
FlashAttention's (arXiv 2205.14135), base 2; only tiles that some row sees in part are masked. Around it:

    decode   grid (B, kv_heads, splits): each program takes a share of one context, and a second kernel merges the
             shares in a fixed order (Flash-Decoding, pytorch.org/blog/flash-decoding). Shares are computed from
             context_lens on the device, hence a captured CUDA graph serves any contexts up to its maximum.
    prefill  grid (T // block_q + B, kv_heads): the tiles of `flat_batch`; those that no sequence needs leave at once.

Neither synchronises with the host. Tile boundaries are multiples of block_kv counted from position 0, and a tile in
which a row sees nothing leaves it as it was, so with one tile shape a row's bits depend on its own context alone:
that is `batch_invariant`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import triton
from torch import Tensor

from ..launches import Case
from ..ops import KernelError
from ._paged_attention import (
    MIN_SPLIT,
    AttentionDims,
    AttentionTile,
    PagedKV,
    Partials,
    _decode_kernel,
    _merge_kernel,
    _prefill_kernel,
    padded_dim,
)
from .flat_batch import num_tiles
from .norm import DTYPES
from .portable import dependent_launch
from .tiles import capability_of, num_sms_of

# Heads that share a KV head are rows of one tile, whose accumulator must fit in registers.
MAX_GROUP = 64
# Two KV heads at batch 1 are then 128 programs for the 132 SMs of an H100.
MAX_SPLITS = 64
LOG2_E = 1.4426950408889634
# One tile for every batch: as many queries as fill 64 rows, the least that wgmma takes.
INVARIANT_ROWS = 64


def attention_tile(head_dim: int, group: int, itemsize: int, max_query_len: int, capability: int) -> AttentionTile:
    """The tile for at most `max_query_len` queries a sequence on capability 80, 89, 90, …; pure.

    Rows: what one sequence needs, in powers of two, from 16 (a matrix instruction's least) to 128, or to 64 for
    head_dim > 128. 4 warps hold the fp32 accumulator of 64 x 128, where matrix instructions take operands from
    shared memory (see below); more take 8.
    block_kv: 64 positions of bf16 at head_dim 128 are 16 KiB; two programs an SM, each with K or V on its way, ask for
    more than the 20 KiB that 3.35 TB/s times 0.8 us of latency need on an H100. 128 positions halve what a step does
    once (page numbers, addresses, waits), and are 5 % slower with 128 rows on an H200. 32 where 64 would spill: a
    head_dim > 128, and 64 rows or more on GPUs whose matrix instructions take both operands from registers (all but
    sm_90 and sm_100).
    Stages: the pipeliner spends two on the block table before each buffer of K and V: 3 make one buffer, 5 two. Two
    where few programs share an SM: 128 rows (one program), and decode where two fit in 227 KiB of shared memory.
    fp32 has no matrix instructions without rounding to TF32: the tile is small enough for plain FMAs not to spill.
    """
    dim = padded_dim(head_dim)
    if itemsize == 4:
        side = 32 if dim <= 64 else 16
        rows = max(min(triton.next_power_of_2(max_query_len * group), side), triton.next_power_of_2(group), 16)
        return AttentionTile(rows, rows // group, side, 4, 1)
    wgmma = 90 <= capability < 120
    most = 64 if dim > 128 else 128
    rows = max(min(triton.next_power_of_2(max_query_len * group), most), triton.next_power_of_2(group), 16)
    block_kv = 32 if dim > 128 or (rows >= 64 and not wgmma) else 64
    num_warps = 8 if rows * dim > 64 * 128 or rows >= 128 or (rows >= 64 and not wgmma) else 4
    two_buffers = rows >= 128 or (rows <= 32 and wgmma)
    return AttentionTile(rows, rows // group, block_kv, num_warps, 5 if two_buffers else 3)


def choose_num_splits(num_sequences: int, kv_heads: int, max_context: int, num_sms: int) -> int:
    """Shares of a context in decode: about two programs an SM, at least MIN_SPLIT tokens each, at most MAX_SPLITS; one
    where every SM has a program without: 256 programs in two shares are 17 % slower than whole on an H200."""
    programs = max(num_sequences * kv_heads, 1)
    if programs > num_sms:
        return 1
    return max(1, min(-(-2 * num_sms // programs), max_context // MIN_SPLIT.value, MAX_SPLITS))


def workspace_bytes(
    max_sequences: int, heads: int, kv_heads: int, head_dim: int, max_context: int, num_sms: int, window: int = 0
) -> int:
    """Bytes that suffice for decoding any batch of up to `max_sequences` with contexts up to `max_context`."""
    span = min(max_context, window) if window else max_context
    partials = 0
    for sequences in range(1, max_sequences + 1):
        splits = choose_num_splits(sequences, kv_heads, span, num_sms)
        if splits > 1:
            partials = max(partials, sequences * splits)
    return partials * heads * (head_dim + 2) * 4


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    query_start: Tensor,
    *,
    scale: float,
    window: int = 0,
    block_size: int,
    max_query_len: int,
    out: Tensor,
    workspace: Tensor | None = None,
    max_context: int | None = None,
    num_splits: int | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """Write `out` [T, heads, D] and return it. Shapes and dtypes: see the module.

    max_query_len: no sequence has more queries; 1 means decode. max_context: no context is longer (default: what the
    block table can hold); it decides the number of splits, as the contexts themselves are on the device.
    workspace: contiguous, at least `workspace_bytes`, on the same device; needed in decode if splits > 1.
    num_splits: overrides the choice. batch_invariant: a query has the same bits alone and in any batch or chunking,
    at the price of idle SMs when few sequences have long contexts.
    Tokens that belong to no sequence keep what `out` held. Device tables are not checked. KernelError on the rest.
    """
    tokens, heads, head_dim = _check(q, k_cache, v_cache, block_table, context_lens, query_start, out, block_size)
    kv_heads, sequences = k_cache.shape[1], context_lens.shape[0]
    if not scale > 0:
        raise KernelError(f"scale must be positive, got {scale}")
    if window < 0 or max_query_len < 0:
        raise KernelError(f"window and max_query_len must not be negative, got {window} and {max_query_len}")
    if not tokens or not sequences:
        return out
    group, itemsize = heads // kv_heads, q.dtype.itemsize
    queries = max(INVARIANT_ROWS // group, 1) if batch_invariant else max(max_query_len, 1)
    capability = capability_of(q.device)
    tile, dependent = attention_tile(head_dim, group, itemsize, queries, capability), dependent_launch(capability)
    dims = AttentionDims(kv_heads, group, head_dim, block_size, window)
    launch = {"DIMS": dims, "TILE": tile, "num_warps": tile.num_warps, "num_stages": tile.num_stages} | dependent
    kv = PagedKV(k_cache, v_cache, block_table, context_lens, query_start)
    scale_log2, stride_table = float(scale) * LOG2_E, block_table.stride(0)
    if batch_invariant or max_query_len > 1:
        tiles = num_tiles(tokens, sequences, tile.block_q)
        _prefill_kernel[(tiles, kv_heads)](q, kv, out, scale_log2, sequences, stride_table, **launch)
        return out
    if num_splits is None:
        span = block_table.shape[1] * block_size if max_context is None else max_context
        num_splits = choose_num_splits(sequences, kv_heads, min(span, window) if window else span, num_sms_of(q.device))
    if not 1 <= num_splits <= MAX_SPLITS:
        raise KernelError(f"num_splits must be 1 to {MAX_SPLITS}, got {num_splits}")
    partials = None if num_splits == 1 else _partials(workspace, sequences, heads, head_dim, num_splits)
    _decode_kernel[(sequences, kv_heads, num_splits)](
        q, kv, out, partials, scale_log2, num_splits, stride_table, **launch
    )
    if partials is not None:
        splits = triton.next_power_of_2(num_splits)
        _merge_kernel[(sequences, heads)](
            partials, query_start, out, num_splits, dims, splits, num_warps=4, **dependent
        )  # fmt: skip
    return out


def _partials(workspace: Tensor | None, sequences: int, heads: int, head_dim: int, num_splits: int) -> Partials:
    """fp32 views of `workspace`."""
    count = sequences * heads * num_splits
    needed = count * (head_dim + 2) * 4
    if workspace is None or workspace.nbytes < needed or not workspace.is_contiguous():
        got = "none" if workspace is None else f"{workspace.nbytes}"
        raise KernelError(f"{num_splits} splits of {sequences} sequences need {needed} contiguous bytes, got {got}")
    floats = workspace.view(-1).view(torch.uint8)[:needed].view(torch.float32)
    return Partials(floats[: count * head_dim], floats[count * head_dim : count * (head_dim + 1)], floats[-count:])


def _check(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, context_lens: Tensor, query_start: Tensor,
    out: Tensor, block_size: int,
) -> tuple[int, int, int]:  # fmt: skip
    """(T, heads, D); KernelError unless shapes, dtypes and layouts are those of the module."""
    if q.dim() != 3 or q.dtype not in DTYPES or not q.is_contiguous():
        raise KernelError(f"q must be contiguous [T, heads, D] of bf16, fp16 or fp32, got {tuple(q.shape)} {q.dtype}")
    if out.shape != q.shape or out.dtype != q.dtype or not out.is_contiguous():
        raise KernelError(f"out must be contiguous {tuple(q.shape)} {q.dtype}, got {tuple(out.shape)} {out.dtype}")
    heads, head_dim = q.shape[1:]
    if k_cache.dim() != 4 or heads % k_cache.shape[1]:
        raise KernelError(f"{heads} heads need K [num_blocks, kv_heads, block_size, D], got {tuple(k_cache.shape)}")
    if heads > MAX_GROUP * k_cache.shape[1]:
        raise KernelError(f"at most {MAX_GROUP} heads may share a KV head, got {heads} and {k_cache.shape[1]} KV heads")
    if block_size < 16 or block_size % 16:
        raise KernelError(f"block_size must be a multiple of 16, got {block_size}")
    for name, part in (("k_cache", k_cache), ("v_cache", v_cache)):
        expected = (*k_cache.shape[:2], block_size, head_dim)
        if tuple(part.shape) != expected or part.dtype != q.dtype or not part.is_contiguous():
            raise KernelError(f"{name} must be contiguous {expected} {q.dtype}, got {tuple(part.shape)} {part.dtype}")
    sequences = context_lens.shape[0]
    if block_table.shape[:1] != (sequences,) or block_table.dim() != 2 or query_start.shape != (sequences + 1,):
        raise KernelError(
            f"{sequences} contexts need block_table [{sequences}, n] and query_start [{sequences + 1}], "
            f"got {tuple(block_table.shape)} and {tuple(query_start.shape)}"
        )
    for name, table in (("block_table", block_table), ("context_lens", context_lens), ("query_start", query_start)):
        if table.dtype != torch.int32 or table.stride(-1) != 1:
            raise KernelError(f"{name} must be int32 with stride 1, got {table.dtype} with strides {table.stride()}")
    return q.shape[0], heads, head_dim


def paged_attention_torch(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, context_lens: Tensor, query_start: Tensor, *,
    scale: float, window: int = 0, block_size: int,
) -> Tensor:  # fmt: skip
    """The same in float64, query by query and head by head, returned in float64."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    group = q.shape[1] // k_cache.shape[1]
    starts, contexts = query_start.tolist(), context_lens.tolist()
    for s, context in enumerate(contexts):
        for t in range(starts[s], starts[s + 1]):
            position = context - starts[s + 1] + t
            low = max(0, position - window + 1) if window else 0
            seen = torch.arange(low, position + 1)
            if not len(seen):
                continue
            pages = block_table[s].cpu()[seen // block_size].long()
            keys, values = (c.cpu()[pages, :, seen % block_size].double() for c in (k_cache, v_cache))
            for h in range(q.shape[1]):
                weights = (keys[:, h // group] @ q[t, h].cpu().double() * scale).softmax(dim=0)
                out[t, h] = weights @ values[:, h // group]
    return out


def audit_cases() -> Iterator[Case]:
    """For `kernels.audit`: decode, one long context in shares, prefill and batch-invariant, of three models."""
    bf16, ids = (partial(torch.empty, dtype=dtype, device="meta") for dtype in (torch.bfloat16, torch.int32))
    for model, heads, kv_heads, dim, block_size in (
        ("qwen3-30b-a3b", 32, 4, 128, 32),
        ("mixtral-8x7b", 32, 8, 128, 16),
        ("qwen3-next", 16, 2, 256, 32),
    ):
        workspace = torch.empty(workspace_bytes(1, heads, kv_heads, dim, 32768, 132), dtype=torch.uint8, device="meta")
        cache = bf16(256, kv_heads, block_size, dim)
        for name, sequences, queries, context, extra in (
            ("decode", 128, 1, 4096, {"num_splits": 1}),
            ("split", 1, 1, 32768, {"workspace": workspace}),
            ("prefill", 2, 512, 4096, {}),
            ("invariant", 64, 1, 4096, {"batch_invariant": True}),
        ):
            q = bf16(sequences * queries, heads, dim)
            tables = (ids(sequences, context // block_size), ids(sequences))
            launch = partial(
                paged_attention, q, cache, cache, *tables, ids(sequences + 1), scale=dim**-0.5,
                block_size=block_size, max_query_len=queries, out=torch.empty_like(q), **extra,
            )  # fmt: skip
            yield Case(f"attention_{name}/{model}", launch, wide=(_decode_kernel, _prefill_kernel))
