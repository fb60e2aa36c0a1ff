"""The Triton kernels of `paged_attention`, which says what they compute, on which data and grids."""

from __future__ import annotations

import triton
import triton.language as tl

from . import portable
from .flat_batch import sequence_of


@triton.jit
def _attend(
    q,  # [BLOCK_ROWS, BLOCK_D]
    row_position,  # [BLOCK_ROWS] int32, < 0: sees nothing; unused if ONE_QUERY
    k_ptr,  # (num_blocks, …, BLOCK_SIZE, HEAD_DIM) at this KV head
    v_ptr,
    block_table_ptr,  # (max_blocks,) of this sequence
    scale_log2,
    low,  # first position that any row sees
    begin,  # a multiple of BLOCK_KV
    end,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    ONE_QUERY: tl.constexpr,  # all rows are of one token: each sees low … end - 1
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(sum of p·V, largest score, sum of p) over positions begin … end - 1, p = 2^(score - largest), a row each."""
    d = tl.arange(0, BLOCK_D)
    largest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    for start in tl.range(begin, end, BLOCK_KV):
        position = start + tl.arange(0, BLOCK_KV)
        # Positions outside low … end - 1, which weigh 0, read one inside instead: masks here would cost 60 registers.
        inside = tl.minimum(position, end - 1)
        if WINDOW > 0:
            inside = tl.maximum(inside, low)
        page = tl.load(block_table_ptr + inside // BLOCK_SIZE)
        # int64: a pool of 2^16 blocks of 8 heads, 32 tokens and 128 dims has 2^31 elements.
        at = page.to(tl.int64) * (KV_HEADS * BLOCK_SIZE * HEAD_DIM) + inside % BLOCK_SIZE * HEAD_DIM
        k = tl.load(k_ptr + at[:, None] + d[None, :], mask=(d < HEAD_DIM)[None, :], other=0.0)
        scores = portable.dot(q, tl.trans(k), tl.zeros([BLOCK_ROWS, BLOCK_KV], tl.float32)) * scale_log2
        if ONE_QUERY:
            seen = (position >= low) & (position < end)
            scores = tl.where(seen[None, :], scores, float("-inf"))
        else:
            visible = position[None, :] <= row_position[:, None]
            if WINDOW > 0:
                visible &= position[None, :] > row_position[:, None] - WINDOW
            scores = tl.where(visible, scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=1))
        # A row that has seen nothing yet: -inf - -inf would be NaN.
        shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        p = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(largest - shift)
        total = total * decay + tl.sum(p, axis=1)
        v = tl.load(v_ptr + at[:, None] + d[None, :], mask=(d < HEAD_DIM)[None, :], other=0.0)
        acc = portable.dot(portable.cast(p, v.dtype), v, acc * decay[:, None])
        largest = new_largest
    return acc, largest, total


@triton.jit
def _normalised(acc, total):
    return acc / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit(do_not_specialize=["stride_table_b", "num_splits"])
def _decode_kernel(
    q_ptr,  # (T, HEADS, HEAD_DIM)
    k_ptr,  # (num_blocks, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    v_ptr,  # (num_blocks, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    block_table_ptr,  # (B, max_blocks) int32
    context_lens_ptr,  # (B,) int32
    query_start_ptr,  # (B + 1,) int32
    out_ptr,  # (T, HEADS, HEAD_DIM), written if DIRECT
    acc_ptr,  # (B, HEADS, num_splits, HEAD_DIM) fp32, else
    largest_ptr,  # (B, HEADS, num_splits) fp32
    total_ptr,  # (B, HEADS, num_splits) fp32; 0: nothing in this share, the others are not written
    scale_log2,
    num_splits,
    stride_table_b,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    MIN_TILES: tl.constexpr,
    DIRECT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: (B, KV_HEADS, num_splits)."""
    # int64: ids times strides may pass 2^31.
    sequence = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    token = tl.load(query_start_ptr + sequence).to(tl.int64)
    if tl.load(query_start_ptr + sequence + 1) == token:
        return
    context = tl.load(context_lens_ptr + sequence)
    low = 0
    if WINDOW > 0:
        low = tl.maximum(context - WINDOW, 0)
    first_tile = low // BLOCK_KV
    tiles = tl.cdiv(context, BLOCK_KV) - first_tile
    share = tl.maximum(tl.cdiv(tiles, num_splits), MIN_TILES)
    begin = (first_tile + split * share) * BLOCK_KV
    end = tl.minimum(begin + share * BLOCK_KV, context)

    row = tl.arange(0, BLOCK_ROWS)
    d = tl.arange(0, BLOCK_D)
    mine = row < GROUP
    head = kv_head * GROUP + row
    partial = (sequence * KV_HEADS * GROUP + head) * num_splits + split
    if (begin >= end) & (not DIRECT):
        tl.store(total_ptr + partial, tl.zeros([BLOCK_ROWS], tl.float32), mask=mine)
        return
    mask = mine[:, None] & (d < HEAD_DIM)[None, :]
    at = (token * KV_HEADS * GROUP + head)[:, None] * HEAD_DIM + d[None, :]
    q = tl.load(q_ptr + at, mask=mask, other=0.0)
    head_at = kv_head.to(tl.int64) * (BLOCK_SIZE * HEAD_DIM)
    acc, largest, total = _attend(
        q, row, k_ptr + head_at, v_ptr + head_at, block_table_ptr + sequence * stride_table_b, scale_log2,
        low, begin, end, KV_HEADS, HEAD_DIM, BLOCK_SIZE, WINDOW, True, BLOCK_ROWS, BLOCK_KV, BLOCK_D,
    )  # fmt: skip
    if DIRECT:
        tl.store(out_ptr + at, portable.cast(_normalised(acc, total), out_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(acc_ptr + partial[:, None] * HEAD_DIM + d[None, :], acc, mask=mask)
        tl.store(largest_ptr + partial, largest, mask=mine)
        tl.store(total_ptr + partial, total, mask=mine)


@triton.jit(do_not_specialize=["num_splits"])
def _merge_kernel(
    acc_ptr,  # (B, HEADS, num_splits, HEAD_DIM) fp32
    largest_ptr,  # (B, HEADS, num_splits) fp32
    total_ptr,  # (B, HEADS, num_splits) fp32
    query_start_ptr,  # (B + 1,) int32
    out_ptr,  # (T, HEADS, HEAD_DIM)
    num_splits,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLITS_P2: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: (B, HEADS)."""
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    token = tl.load(query_start_ptr + sequence).to(tl.int64)
    if tl.load(query_start_ptr + sequence + 1) == token:
        return
    split = tl.arange(0, SPLITS_P2)
    d = tl.arange(0, BLOCK_D)
    partial = (sequence * HEADS + head) * num_splits + split
    total = tl.load(total_ptr + partial, mask=split < num_splits, other=0.0)
    # An empty share left the rest of its workspace as it found it. A NaN total is not empty, and must show.
    full = total != 0.0
    largest = tl.load(largest_ptr + partial, mask=full, other=float("-inf"))
    mask = full[:, None] & (d < HEAD_DIM)[None, :]
    acc = tl.load(acc_ptr + partial[:, None] * HEAD_DIM + d[None, :], mask=mask, other=0.0)
    peak = tl.max(largest, axis=0)
    # All empty: -inf - -inf would be NaN.
    weight = tl.exp2(largest - tl.where(peak == float("-inf"), 0.0, peak))
    total = tl.sum(total * weight, axis=0)
    result = tl.sum(acc * weight[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    at = (token * HEADS + head) * HEAD_DIM + d
    tl.store(out_ptr + at, portable.cast(result, out_ptr.dtype.element_ty), mask=d < HEAD_DIM)


@triton.jit(do_not_specialize=["stride_table_b", "num_sequences"])
def _prefill_kernel(
    q_ptr,  # (T, HEADS, HEAD_DIM)
    k_ptr,  # (num_blocks, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    v_ptr,  # (num_blocks, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    block_table_ptr,  # (B, max_blocks) int32
    context_lens_ptr,  # (B,) int32
    query_start_ptr,  # (B + 1,) int32
    out_ptr,  # (T, HEADS, HEAD_DIM)
    scale_log2,
    num_sequences,
    stride_table_b,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: (T // BLOCK_Q + B, KV_HEADS)."""
    # The last tiles of a prompt have the longest contexts: started first, they do not trail behind the others.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence, _, stop, first_token = sequence_of(tile, query_start_ptr, num_sequences, BLOCK_Q)
    if first_token >= stop:
        return
    context = tl.load(context_lens_ptr + sequence)
    # Position of a token is its index in the batch plus this.
    shift = context - stop

    row = tl.arange(0, BLOCK_ROWS)
    d = tl.arange(0, BLOCK_D)
    token = first_token + row // GROUP
    mine = (row < BLOCK_Q * GROUP) & (token < stop)
    end = tl.minimum(first_token + BLOCK_Q, stop) + shift
    low = 0
    if WINDOW > 0:
        low = tl.maximum(first_token + shift - WINDOW + 1, 0)
    mask = mine[:, None] & (d < HEAD_DIM)[None, :]
    # int64: T times the width of all heads may pass 2^31.
    at = (token.to(tl.int64) * (KV_HEADS * GROUP) + kv_head * GROUP + row % GROUP)[:, None] * HEAD_DIM + d[None, :]
    q = tl.load(q_ptr + at, mask=mask, other=0.0)
    head_at = kv_head.to(tl.int64) * (BLOCK_SIZE * HEAD_DIM)
    block_table_ptr += sequence.to(tl.int64) * stride_table_b
    acc, _, total = _attend(
        q, token + shift, k_ptr + head_at, v_ptr + head_at, block_table_ptr, scale_log2,
        low, low // BLOCK_KV * BLOCK_KV, end,
        KV_HEADS, HEAD_DIM, BLOCK_SIZE, WINDOW, False, BLOCK_ROWS, BLOCK_KV, BLOCK_D,
    )  # fmt: skip
    tl.store(out_ptr + at, portable.cast(_normalised(acc, total), out_ptr.dtype.element_ty), mask=mask)
