"""The Triton kernels of `paged_attention`, which says what they compute, on which data and grids, and what they declare
of their launches. kv: a `PagedKV`; DIMS: an `AttentionDims`; TILE: an `AttentionTile`, in all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..work import Work, contexts, declares, lengths
from . import portable
from .flat_batch import sequence_of

# Below this a share of a context costs more to start and merge than it saves.
MIN_SPLIT = tl.constexpr(256)


class PagedKV(NamedTuple):
    """The cache, and which of it belongs to which sequence."""

    k: Tensor  # (num_blocks, KV heads, block_size, D)
    v: Tensor
    block_table: Tensor  # (B, max_blocks) int32
    context_lens: Tensor  # (B,) int32
    query_start: Tensor  # (B + 1,) int32


class Partials(NamedTuple):
    """What each share of a context leaves. A total of 0: nothing in this share, the others are not written."""

    acc: Tensor  # (B, heads, splits, D) fp32
    largest: Tensor  # (B, heads, splits) fp32
    total: Tensor  # (B, heads, splits) fp32


@dataclass(frozen=True)
class AttentionDims:
    """group: heads that share a KV head; window: positions that a query sees, 0 for all."""

    kv_heads: int
    group: int
    head_dim: int
    block_size: int
    window: int

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def block_d(self) -> int:
        return padded_dim(self.head_dim)


@dataclass(frozen=True)
class AttentionTile:
    """block_rows (query token, head of the group) pairs, of block_q tokens, against block_kv positions at a time."""

    block_rows: int
    block_q: int
    block_kv: int
    num_warps: int
    num_stages: int


def padded_dim(head_dim: int) -> int:
    return max(triton.next_power_of_2(head_dim), 16)


def keys_seen(context: float, queries: float, window: int) -> float:
    """Pairs of a query and a key that it sees, of the last `queries` of `context` positions."""

    def before(position: float) -> float:
        full = min(position, window) if window else position
        return full * (full + 1) / 2 + (position - full) * window

    return before(context) - before(context - queries)


def _attention_work(args: Mapping[str, Any]) -> Work:
    """K and V of what is seen, queries, and the outputs or what shares leave of them."""
    kv, dims, q, partials = args["kv"], args["DIMS"], args["q_ptr"], args.get("partials")
    most = kv.block_table.shape[1] * dims.block_size
    keys = pairs = 0.0
    for queries, context in zip(lengths(kv.query_start, len(q)), contexts(kv.context_lens, most), strict=True):
        if queries:
            keys += min(context, queries + dims.window - 1) if dims.window else context
            pairs += keys_seen(context, queries, dims.window)
    written = args["out_ptr"].nbytes if partials is None else sum(part.nbytes for part in partials)
    kv_bytes = 2 * keys * dims.kv_heads * dims.head_dim * kv.k.element_size()
    return Work(kv_bytes + q.nbytes + written, 4.0 * pairs * dims.heads * dims.head_dim)


def _merge_work(args: Mapping[str, Any]) -> Work:
    return Work(sum(part.nbytes for part in args["partials"]) + args["out_ptr"].nbytes)


@triton.jit
def _attend(
    state,  # (sum of p·V [block_rows, block_d], largest score, sum of p), as it returns them
    q,  # [block_rows, block_d]
    row_position,  # [block_rows] int32, < 0: sees nothing; unused if ONE_QUERY
    k_ptr,  # (num_blocks, …, block_size, D) at this KV head
    v_ptr,
    block_table_ptr,  # (max_blocks,) of this sequence
    scale_log2,
    low,  # first position that any row sees
    begin,  # a multiple of block_kv
    end,
    DIMS: tl.constexpr,
    TILE: tl.constexpr,
    SEEN: tl.constexpr,  # "all": rows see begin … end - 1, both multiples; "span": low … end - 1; "causal"
):
    """The state after positions begin … end - 1 too; p = 2^(scale_log2 · score - largest), a row each.

    Whether a tile is masked or not must not change a bit of a row that sees all of it: the multiplication and the
    subtraction before the exponential are one operation by name, not by the compiler's choice.
    """
    BLOCK_ROWS: tl.constexpr = TILE.block_rows
    BLOCK_KV: tl.constexpr = TILE.block_kv
    HEAD_DIM: tl.constexpr = DIMS.head_dim
    BLOCK_SIZE: tl.constexpr = DIMS.block_size
    WINDOW: tl.constexpr = DIMS.window
    acc, largest, total = state
    d = tl.arange(0, DIMS.block_d)
    for start in tl.range(begin, end, BLOCK_KV):
        position = start + tl.arange(0, BLOCK_KV)
        inside = position
        if SEEN != "all":
            # Positions outside low … end - 1, which weigh 0, read one inside instead: masks here would cost 60
            # registers.
            inside = tl.minimum(position, end - 1)
            if WINDOW > 0:
                inside = tl.maximum(inside, low)
        page = tl.load(block_table_ptr + inside // BLOCK_SIZE)
        # int64: a pool of 2^16 blocks of 8 heads, 32 tokens and 128 dims has 2^31 elements.
        at = page.to(tl.int64) * (DIMS.kv_heads * BLOCK_SIZE * HEAD_DIM) + inside % BLOCK_SIZE * HEAD_DIM
        k = tl.load(k_ptr + at[:, None] + d[None, :], mask=(d < HEAD_DIM)[None, :], other=0.0)
        scores = portable.dot(q, tl.trans(k), tl.zeros([BLOCK_ROWS, BLOCK_KV], tl.float32))
        if SEEN == "span":
            seen = (position >= low) & (position < end)
            scores = tl.where(seen[None, :], scores, float("-inf"))
        elif SEEN == "causal":
            visible = position[None, :] <= row_position[:, None]
            if WINDOW > 0:
                visible &= position[None, :] > row_position[:, None] - WINDOW
            scores = tl.where(visible, scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=1) * scale_log2)
        # A row that has seen nothing yet: -inf - -inf would be NaN.
        shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        p = tl.exp2(tl.fma(scores, scale_log2, -shift[:, None]))
        decay = tl.exp2(largest - shift)
        total = total * decay + tl.sum(p, axis=1)
        v = tl.load(v_ptr + at[:, None] + d[None, :], mask=(d < HEAD_DIM)[None, :], other=0.0)
        acc = portable.dot(portable.cast(p, v.dtype), v, acc * decay[:, None])
        largest = new_largest
    return acc, largest, total


@triton.jit
def _nothing_seen(DIMS: tl.constexpr, TILE: tl.constexpr):
    BLOCK_ROWS: tl.constexpr = TILE.block_rows
    BLOCK_D: tl.constexpr = DIMS.block_d
    acc = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    return acc, tl.full([BLOCK_ROWS], float("-inf"), tl.float32), tl.zeros([BLOCK_ROWS], tl.float32)


@triton.jit
def _normalised(acc, total):
    return acc / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit(do_not_specialize=["stride_table_b", "num_splits"], launch_metadata=declares(_attention_work))
def _decode_kernel(
    q_ptr,  # (T, heads, D)
    kv,
    out_ptr,  # (T, heads, D), written without partials
    partials,  # `Partials`, or None
    scale_log2,
    num_splits,
    stride_table_b,
    DIMS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid: (B, KV heads, num_splits)."""
    portable.after_inputs()
    BLOCK_ROWS: tl.constexpr = TILE.block_rows
    BLOCK_KV: tl.constexpr = TILE.block_kv
    HEAD_DIM: tl.constexpr = DIMS.head_dim
    # int64: ids times strides may pass 2^31.
    sequence = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    token = tl.load(kv.query_start + sequence).to(tl.int64)
    if tl.load(kv.query_start + sequence + 1) == token:
        return
    context = tl.load(kv.context_lens + sequence)
    low = 0
    if DIMS.window > 0:
        low = tl.maximum(context - DIMS.window, 0)
    first_tile = low // BLOCK_KV
    tiles = tl.cdiv(context, BLOCK_KV) - first_tile
    share = tl.maximum(tl.cdiv(tiles, num_splits), MIN_SPLIT // BLOCK_KV)
    begin = (first_tile + split * share) * BLOCK_KV
    end = tl.minimum(begin + share * BLOCK_KV, context)

    row = tl.arange(0, BLOCK_ROWS)
    d = tl.arange(0, DIMS.block_d)
    mine = row < DIMS.group
    head = kv_head * DIMS.group + row
    partial = (sequence * DIMS.heads + head) * num_splits + split
    if partials is not None:
        nothing = begin >= end
        if nothing:
            tl.store(partials.total + partial, tl.zeros([BLOCK_ROWS], tl.float32), mask=mine)
            return
    mask = mine[:, None] & (d < HEAD_DIM)[None, :]
    at = (token * DIMS.heads + head)[:, None] * HEAD_DIM + d[None, :]
    q = tl.load(q_ptr + at, mask=mask, other=0.0)
    head_at = kv_head.to(tl.int64) * (DIMS.block_size * HEAD_DIM)
    acc, largest, total = _attend(
        _nothing_seen(DIMS, TILE), q, row, kv.k + head_at, kv.v + head_at,
        kv.block_table + sequence * stride_table_b, scale_log2, low, begin, end, DIMS, TILE, "span",
    )  # fmt: skip
    if partials is None:
        tl.store(out_ptr + at, portable.cast(_normalised(acc, total), out_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(partials.acc + partial[:, None] * HEAD_DIM + d[None, :], acc, mask=mask)
        tl.store(partials.largest + partial, largest, mask=mine)
        tl.store(partials.total + partial, total, mask=mine)


@triton.jit(do_not_specialize=["num_splits"], launch_metadata=declares(_merge_work))
def _merge_kernel(
    partials,  # `Partials`
    query_start_ptr,  # (B + 1,) int32
    out_ptr,  # (T, heads, D)
    num_splits,
    DIMS: tl.constexpr,
    SPLITS_P2: tl.constexpr,
):
    """Grid: (B, heads)."""
    portable.after_inputs()
    HEAD_DIM: tl.constexpr = DIMS.head_dim
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    token = tl.load(query_start_ptr + sequence).to(tl.int64)
    if tl.load(query_start_ptr + sequence + 1) == token:
        return
    split = tl.arange(0, SPLITS_P2)
    d = tl.arange(0, DIMS.block_d)
    partial = (sequence * DIMS.heads + head) * num_splits + split
    total = tl.load(partials.total + partial, mask=split < num_splits, other=0.0)
    # An empty share left the rest of its workspace as it found it. A NaN total is not empty, and must show.
    full = total != 0.0
    largest = tl.load(partials.largest + partial, mask=full, other=float("-inf"))
    mask = full[:, None] & (d < HEAD_DIM)[None, :]
    acc = tl.load(partials.acc + partial[:, None] * HEAD_DIM + d[None, :], mask=mask, other=0.0)
    peak = tl.max(largest, axis=0)
    # All empty: -inf - -inf would be NaN.
    weight = tl.exp2(largest - tl.where(peak == float("-inf"), 0.0, peak))
    total = tl.sum(total * weight, axis=0)
    result = tl.sum(acc * weight[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    at = (token * DIMS.heads + head) * HEAD_DIM + d
    tl.store(out_ptr + at, portable.cast(result, out_ptr.dtype.element_ty), mask=d < HEAD_DIM)


@triton.jit(do_not_specialize=["stride_table_b", "num_sequences"], launch_metadata=declares(_attention_work))
def _prefill_kernel(
    q_ptr,  # (T, heads, D)
    kv,
    out_ptr,  # (T, heads, D)
    scale_log2,
    num_sequences,
    stride_table_b,
    DIMS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid: (T // block_q + B, KV heads)."""
    portable.after_inputs()
    BLOCK_Q: tl.constexpr = TILE.block_q
    HEAD_DIM: tl.constexpr = DIMS.head_dim
    # The last tiles of a prompt have the longest contexts: started first, they do not trail behind the others.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence, _, stop, first_token = sequence_of(tile, kv.query_start, num_sequences, BLOCK_Q)
    if first_token >= stop:
        return
    context = tl.load(kv.context_lens + sequence)
    # Position of a token is its index in the batch plus this.
    shift = context - stop

    row = tl.arange(0, TILE.block_rows)
    d = tl.arange(0, DIMS.block_d)
    token = first_token + row // DIMS.group
    mine = (row < BLOCK_Q * DIMS.group) & (token < stop)
    end = tl.minimum(first_token + BLOCK_Q, stop) + shift
    low = 0
    if DIMS.window > 0:
        low = tl.maximum(first_token + shift - DIMS.window + 1, 0)
    mask = mine[:, None] & (d < HEAD_DIM)[None, :]
    # int64: T times the width of all heads may pass 2^31.
    at = (token.to(tl.int64) * DIMS.heads + kv_head * DIMS.group + row % DIMS.group)[:, None] * HEAD_DIM + d[None, :]
    q = tl.load(q_ptr + at, mask=mask, other=0.0)
    head_at = kv_head.to(tl.int64) * (DIMS.block_size * HEAD_DIM)
    block_table_ptr = kv.block_table + sequence.to(tl.int64) * stride_table_b
    k_ptr = kv.k + head_at
    v_ptr = kv.v + head_at
    state = _nothing_seen(DIMS, TILE)
    begin = low // TILE.block_kv * TILE.block_kv
    if DIMS.window == 0:
        # What the tile's first token sees, whole tiles of it, all others see.
        masked = (first_token + shift + 1) // TILE.block_kv * TILE.block_kv
        state = _attend(
            state, q, token, k_ptr, v_ptr, block_table_ptr, scale_log2, low, begin, masked, DIMS, TILE, "all"
        )
        begin = masked
    acc, _, total = _attend(
        state, q, token + shift, k_ptr, v_ptr, block_table_ptr, scale_log2, low, begin, end, DIMS, TILE, "causal"
    )
    # Found again: else rows and addresses would keep registers while the sum is made.
    token = first_token + tl.load(kv.query_start + sequence + 1, volatile=True) - stop + row // DIMS.group
    mask = ((row < BLOCK_Q * DIMS.group) & (token < stop))[:, None] & (d < HEAD_DIM)[None, :]
    at = (token.to(tl.int64) * DIMS.heads + kv_head * DIMS.group + row % DIMS.group)[:, None] * HEAD_DIM + d[None, :]
    tl.store(out_ptr + at, portable.cast(_normalised(acc, total), out_ptr.dtype.element_ty), mask=mask)
