"""Paged attention on the CPU, its KV layout, and the fused QK-norm + RoPE + KV write before it.

The KV cache is laid out so that both products of attention are the GEMM tile of `tile`. A block of one layer,
`block_size` a multiple of 16, dtype bf16 or fp32:

    k  [kv_heads, block_size/16, head_dim, 16]      scores[rows, 16 positions] = q[rows, D] @ panel
    v  [kv_heads, ceil(head_dim/16), block_size, 16]  out[rows, 16 dims] += p[rows, positions] @ panel

Where products of bf16 are dot products (`tile`), q and the exponentials are rounded to bf16; the sum that they are
divided by is of those that are not. Softmax is exact over the whole context in one pass (the scores of ≤ 10 query rows
fit in L2 up to 32 K tokens), and every sum runs over positions in an order that depends on nothing else. A query's
result therefore does not depend on how its prompt was chunked, nor on the batch, nor on which blocks it was given.

Work is split into (tile of rows, as many as `tile` takes; kv head). The rows of a tile are (token, query head of the
group): for decode the heads that share a KV head (GQA) are read together, in prefill several tokens are. Where
rows are few, a task takes several KV heads, which lie side by side in a block: 64 KiB in a row where one head has 8.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numba import prange, types
from torch import Tensor

from ..numba_cache import cached_njit
from ..ops import AttentionMetadata, KernelError, LayerDims, RopeTable
from .gemm import LANES, Scratch, padded
from .norm import rms_scale
from .simd import (
    FEW,
    address_of,
    exp_f32,
    fetch_add,
    float_bits,
    floats,
    largest,
    round_bf16,
    round_row,
    store_u16,
    store_u32,
)  # fmt: skip
from .tile import BF16_DOT, DOT_ROWS, FP32, MAX_ROWS, gemm_tile, kind_of

_NORMS = {"none": 0, "head": 1, "full": 2}


def kv_block_shape(block_size: int, kv_heads: int, head_dim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of one layer's share of a KV block, (k, v); KernelError unless block_size is a multiple of 16."""
    if block_size < LANES or block_size % LANES:
        raise KernelError(f"on the CPU a KV block holds a multiple of {LANES} tokens, got block size {block_size}")
    k = (kv_heads, block_size // LANES, head_dim, LANES)
    v = (kv_heads, padded(head_dim) // LANES, block_size, LANES)
    return k, v


@cached_njit(nogil=True, inline="always")
def _store(base, index, value, bf16):
    if bf16:
        store_u16(base + 2 * index, round_bf16(value))
    else:
        store_u32(base + 4 * index, float_bits(value))


@cached_njit(nogil=True)
def _rotate(head, cos, sin):
    """Rotate (d, d + D/2) pairs in place: the half-split convention of Hugging Face checkpoints."""
    half = head.shape[0] // 2
    for d in range(half):
        a, b = head[d], head[d + half]
        head[d] = a * cos[d] - b * sin[d]
        head[d + half] = b * cos[d] + a * sin[d]


@cached_njit(nogil=True)
def _normalise(row, weight, eps):
    scale = rms_scale(row, eps)
    for i in range(row.shape[0]):
        row[i] = row[i] * scale * weight[i]


@cached_njit(nogil=True)
def _prepare_tokens(
    first, last, qkv, heads, kv_heads, dim, norm, q_weight, k_weight, eps, clip, positions, slots, cos, sin, k_cache,
    v_cache, k_block_bytes, v_block_bytes, block_size, bf16,
):  # fmt: skip
    q_size, kv_size = heads * dim, kv_heads * dim
    v_panels = (dim + 15) // 16
    for t in range(first, last):
        row = qkv[t]
        q, k, v = row[:q_size], row[q_size : q_size + kv_size], row[q_size + kv_size : q_size + 2 * kv_size]
        if norm == 2:
            _normalise(q, q_weight, eps)
            _normalise(k, k_weight, eps)
        elif norm == 1:
            for h in range(heads):
                _normalise(q[h * dim : (h + 1) * dim], q_weight, eps)
            for h in range(kv_heads):
                _normalise(k[h * dim : (h + 1) * dim], k_weight, eps)
        if clip > 0:
            for i in range(q_size + 2 * kv_size):
                row[i] = min(max(row[i], -clip), clip)
        for h in range(heads):
            _rotate(q[h * dim : (h + 1) * dim], cos[positions[t]], sin[positions[t]])
        for h in range(kv_heads):
            _rotate(k[h * dim : (h + 1) * dim], cos[positions[t]], sin[positions[t]])
        block, offset = slots[t] // block_size, slots[t] % block_size
        k_block, v_block = k_cache + block * k_block_bytes, v_cache + block * v_block_bytes
        for h in range(kv_heads):
            panel = (h * (block_size // 16) + offset // 16) * dim * 16 + offset % 16
            for d in range(dim):
                _store(k_block, panel + d * 16, k[h * dim + d], bf16)
            for d in range(dim):
                place = ((h * v_panels + d // 16) * block_size + offset) * 16 + d % 16
                _store(v_block, place, v[h * dim + d], bf16)


@cached_njit(parallel=True, nogil=True)
def prepare_qkv(
    qkv_address, columns, heads, kv_heads, dim, norm, q_norm, k_norm, eps, clip, positions, slots, cos_address,
    sin_address, rope_rows, k_cache, v_cache, k_block_bytes, v_block_bytes, block_size, bf16,
):  # fmt: skip
    qkv = floats(qkv_address, positions.shape[0], columns)
    q_weight, k_weight = floats(q_norm, 1, heads * dim)[0], floats(k_norm, 1, kv_heads * dim)[0]
    cos, sin = floats(cos_address, rope_rows, dim // 2), floats(sin_address, rope_rows, dim // 2)
    if qkv.size <= FEW:
        _prepare_tokens(
            0, qkv.shape[0], qkv, heads, kv_heads, dim, norm, q_weight, k_weight, eps, clip, positions, slots, cos, sin,
            k_cache, v_cache, k_block_bytes, v_block_bytes, block_size, bf16,
        )  # fmt: skip
    else:
        for t in prange(qkv.shape[0]):
            _prepare_tokens(
                t, t + 1, qkv, heads, kv_heads, dim, norm, q_weight, k_weight, eps, clip, positions, slots, cos, sin,
                k_cache, v_cache, k_block_bytes, v_block_bytes, block_size, bf16,
            )  # fmt: skip


@cached_njit(nogil=True, fastmath={"reassoc", "contract"})
def _sum(row):
    total = types.float32(0.0)
    for i in range(row.shape[0]):
        total += row[i]
    return total


@cached_njit(nogil=True)
def _softmax(row):
    """In place; returns 1 / sum so that the caller scales the (shorter) output row."""
    peak = largest(row.ctypes.data, row.shape[0])
    for i in range(row.shape[0]):
        row[i] = exp_f32(row[i] - peak)
    return types.float32(1.0) / _sum(row)


@cached_njit(parallel=True, nogil=True)
def attend(
    qkv_address, columns, heads, kv_heads, dim, softmax_scale, window, tasks, query_start, context_lens, block_table,
    k_cache, v_cache, k_block_bytes, v_block_bytes, block_size, kind, out_address, q_rows, scores, results, row_tables,
    counter, threads,
):  # fmt: skip
    tokens = query_start[-1]
    qkv, out = floats(qkv_address, tokens, columns), floats(out_address, tokens, heads * dim)
    group = heads // kv_heads
    item, x_item = 4 if kind == FP32 else 2, 2 if kind == BF16_DOT else 4
    v_panels = (dim + 15) // 16
    panels_per_block = block_size // 16
    k_panel, v_panel = dim * 16 * item, block_size * 16 * item
    k_head, v_head = panels_per_block * k_panel, v_panels * v_panel
    score_stride, result_stride = scores.shape[2] * 4, results.shape[2] * 4
    counter[0] = 0
    claim = counter.ctypes.data
    for thread in prange(threads):
        q, score, result, rows_at = q_rows[thread], scores[thread], results[thread], row_tables[thread]
        inverse = np.empty(q.shape[0], np.float32)
        while True:
            task = fetch_add(claim)
            if task >= tasks.shape[0]:
                break
            sequence, first_row, rows, head, last_head = tasks[task]
            first_token = query_start[sequence]
            past = context_lens[sequence] - (query_start[sequence + 1] - first_token)
            for h in range(last_head - head):
                for r in range(rows):
                    i = h * rows + r
                    token, column = (first_row + r) // group, ((head + h) * group + (first_row + r) % group) * dim
                    for d in range(dim):
                        q[i, d] = qkv[first_token + token, column + d] * softmax_scale
                    rows_at[i] = q.ctypes.data + i * q.shape[1] * 4
                    if kind == BF16_DOT:
                        round_row(rows_at[i], rows_at[i], dim)
            end = past + (first_row + rows - 1) // group + 1
            begin = 0
            if window > 0:
                begin = max(0, past + first_row // group + 1 - window)
            first_block, last_block = begin // block_size, (end - 1) // block_size
            origin = first_block * block_size
            for b in range(first_block, last_block + 1):
                for h in range(last_head - head):
                    at = k_cache + block_table[sequence, b] * k_block_bytes + (head + h) * k_head
                    ahead = k_head
                    if head + h + 1 == last_head:
                        ahead = (
                            k_cache + block_table[sequence, min(b + 1, last_block)] * k_block_bytes + head * k_head - at
                        )
                    for p in range(min(panels_per_block, (end - b * block_size + 15) // 16)):
                        y = score.ctypes.data + h * rows * score_stride + (b * block_size - origin + p * 16) * 4
                        gemm_tile(
                            at + p * k_panel, kind, rows_at.ctypes.data + 8 * h * rows, rows, dim, ahead, y,
                            score_stride, 0,
                        )  # fmt: skip
            for h in range(last_head - head):
                for r in range(rows):
                    i = h * rows + r
                    position = past + (first_row + r) // group
                    low = max(0, position + 1 - window) if window > 0 else 0
                    score[i, : low - origin] = 0.0
                    inverse[i] = _softmax(score[i, low - origin : position + 1 - origin])
                    score[i, position + 1 - origin : end - origin] = 0.0
                    if kind == BF16_DOT:
                        at = score.ctypes.data + i * score_stride
                        round_row(at, at, end - origin)
            for b in range(first_block, last_block + 1):
                depth = min(block_size, end - b * block_size)
                for h in range(last_head - head):
                    for i in range(h * rows, (h + 1) * rows):
                        rows_at[i] = score.ctypes.data + i * score_stride + (b - first_block) * block_size * x_item
                    at = v_cache + block_table[sequence, b] * v_block_bytes + (head + h) * v_head
                    ahead = v_head
                    if head + h + 1 == last_head:
                        ahead = (
                            v_cache + block_table[sequence, min(b + 1, last_block)] * v_block_bytes + head * v_head - at
                        )
                    for p in range(v_panels):
                        gemm_tile(
                            at + p * v_panel, kind, rows_at.ctypes.data + 8 * h * rows, rows, depth, ahead,
                            result.ctypes.data + h * rows * result_stride + p * 64, result_stride, b - first_block,
                        )  # fmt: skip
            for h in range(last_head - head):
                for r in range(rows):
                    token, column = (first_row + r) // group, ((head + h) * group + (first_row + r) % group) * dim
                    for d in range(dim):
                        out[first_token + token, column + d] = result[h * rows + r, d] * inverse[h * rows + r]


@cached_njit(nogil=True)
def _tasks(query_start, group, kv_heads, most, threads):
    """Tasks of at most `most` rows, four a thread where there are as many heads; see _Arrays."""
    tiles = 0
    for b in range(query_start.shape[0] - 1):
        tiles += ((query_start[b + 1] - query_start[b]) * group + most - 1) // most
    most_heads = max(1, tiles * kv_heads // (4 * threads))
    tasks = np.empty((tiles * kv_heads, 5), np.int64)
    count = 0
    for b in range(query_start.shape[0] - 1):
        all_rows = (query_start[b + 1] - query_start[b]) * group
        for first in range(0, all_rows, most):
            rows = min(most, all_rows - first)
            shares = (kv_heads + min(most // rows, most_heads) - 1) // min(most // rows, most_heads)
            for share in range(shares):
                tasks[count, :3] = b, first, rows
                tasks[count, 3:] = share * kv_heads // shares, (share + 1) * kv_heads // shares
                count += 1
    return tasks[:count]


class _Arrays(NamedTuple):
    """tasks: int64 [tasks, 5], sequence, first row (a query head of a token), rows, first KV head, the one behind the
    last; the others as in AttentionMetadata."""

    tasks: np.ndarray
    query_start: np.ndarray
    context_lens: np.ndarray
    block_table: np.ndarray
    positions: np.ndarray
    slots: np.ndarray


class AttentionBuffers:
    """Per-thread scratch: as many query rows as a tile has, their scores over `max_context` positions, their output."""

    def __init__(self, head_dim: int, max_context: int, block_size: int, threads: int, dtype: torch.dtype) -> None:
        rows = DOT_ROWS if kind_of(dtype) == BF16_DOT else MAX_ROWS
        # A sliding window starts anywhere in a block, hence one block more than the context.
        positions = (-(-max_context // block_size) + 1) * block_size
        self.q, self.scores, self.out = (
            np.zeros((threads, rows, width), np.float32) for width in (head_dim, positions, padded(head_dim))
        )
        self.row_tables = np.zeros((threads, rows), np.int64)
        self._known: tuple[AttentionMetadata, _Arrays] | None = None

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, np.ndarray))

    def arrays(self, metadata: AttentionMetadata, heads: int, kv_heads: int) -> _Arrays:
        """Of a pass, the same in all layers."""
        if self._known is None or self._known[0] is not metadata:
            m = metadata
            tensors = m.query_start, m.context_lens, m.block_table, m.positions, m.slot_mapping
            arrays = [tensor.numpy() for tensor in tensors]
            threads, most, _ = self.q.shape
            self._known = m, _Arrays(_tasks(arrays[0], heads // kv_heads, kv_heads, most, threads), *arrays)
        return self._known[1]


def launches(
    dims: LayerDims, qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, rope: RopeTable,
    metadata: AttentionMetadata, k_cache: Tensor, v_cache: Tensor, out: Tensor, buffers: AttentionBuffers,
    scratch: Scratch,
) -> tuple[tuple, tuple]:  # fmt: skip
    """The arguments of `prepare_qkv` and of `attend` for `attention`."""
    sizes = qkv.data_ptr(), qkv.stride(0), dims.heads, dims.kv_heads, dims.head_dim
    batch = buffers.arrays(metadata, dims.heads, dims.kv_heads)
    norms = (0 if weight is None else address_of(weight) for weight in (q_norm, k_norm))
    caches = (
        k_cache.data_ptr(), v_cache.data_ptr(), k_cache.stride(0) * k_cache.itemsize,
        v_cache.stride(0) * v_cache.itemsize, metadata.block_size,
    )  # fmt: skip
    prepared = (
        *sizes, _NORMS[dims.qk_norm], *norms, dims.eps, dims.clip_qkv, batch.positions, batch.slots,
        rope.cos.data_ptr(), rope.sin.data_ptr(), rope.cos.shape[0], *caches, k_cache.dtype == torch.bfloat16,
    )  # fmt: skip
    attended = (
        *sizes, np.float32(dims.head_dim**-0.5), dims.window, batch.tasks, batch.query_start, batch.context_lens,
        batch.block_table, *caches, kind_of(k_cache.dtype), address_of(out), buffers.q, buffers.scores, buffers.out,
        buffers.row_tables, scratch.counter, scratch.threads,
    )  # fmt: skip
    return prepared, attended


def attention(
    dims: LayerDims, qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, rope: RopeTable,
    metadata: AttentionMetadata, k_cache: Tensor, v_cache: Tensor, out: Tensor, buffers: AttentionBuffers,
    scratch: Scratch,
) -> Tensor:  # fmt: skip
    """QK-norm, clip, RoPE and KV write, then causal attention of the queries over their cached contexts, in `out`.

    qkv fp32 [T, ≥ (heads + 2·kv_heads)·D] becomes normalised and rotated; q_norm, k_norm fp32: [D] by head, [heads·D]
    of all; K and V are rounded to the cache's dtype (nearest even) and written to `metadata.slot_mapping`. out fp32
    [T, heads·D].
    """
    prepared, attended = launches(dims, qkv, q_norm, k_norm, rope, metadata, k_cache, v_cache, out, buffers, scratch)
    prepare_qkv(*prepared)
    attend(*attended)
    return out
