"""Mixture-of-experts layer on the CPU: routing, grouped GEMM over an ExpertTable, weighted combine.

Data map for T tokens, E experts, R = T·top_k rows, one a token and choice:

    topk_weights  fp32  [T, top_k]  router probabilities of the chosen experts       route → combine
    row_of        int32 [T, top_k]  place of (token, choice) in expert order         route → combine
                                    (-1: an expert that is elsewhere)
    row_token     int32 [R]         token of each row, rows sorted by expert, stable  route → gate_up
    expert_start  int32 [E + 1]     first row of each expert                         route → gate_up, down
    activation    [R, I]            silu(gate) * up, fp32 or bf16                    gate_up → down
    expert_out    fp32  [R, H]      down projection                                  down → combine

x and activation are rounded to bf16 where the tile multiplies bf16 (`tile.kind_of`), else fp32 all along.
The gate/up GEMM gathers its rows through the tile's row table, so no copy of the tokens is made; combine adds
each token's top_k rows in the order of the router, so the result does not depend on who did the work.

Layout of an expert, dtype bf16 or fp32:

    GATE_UP  [ceil(I/16), 2, H, 16]   gate panel j, then up panel j: one sequential read for a tile of SwiGLU
    DOWN     [ceil(H/16), I, 16]      as in `gemm`

or the same panels compressed (`planar`), as the table says of each block.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numba import prange, types
from torch import Tensor

from ..expert_table import ExpertTable
from ..formats import FORMATS
from ..numba_cache import cached_njit
from ..ops import KernelError
from . import gemm
from .gemm import LANES, Scratch, fill_rows, padded, round_rows, tasks_of, zeros
from .simd import FEW, address_of, copy_16, exp_f32, fetch_add, floats, round_16
from .tile import BF16_DOT, FP32, kind_of, x_dtype
from .wide_tile import gemm_panels

_PLANAR12 = FORMATS["planar12"].number
# Rows of gate and up kept per thread between the GEMM and SwiGLU: 2 x 48 x 16 fp32 = 6 KiB stay in L1.
_CHUNK_ROWS = 48
# Rows of K between the rooms of two threads, 16 KiB: what a core fetches ahead at the end of its own would be lines
# that another core writes, and a layer that is decoded once took 1.3 to 1.5 times as long.
_GAP = 512


def arrange_gate_up(gate_up: Tensor, out: Tensor) -> None:
    """Write gate_up [2I, H] (gate rows, then up rows) into `out`, uint8."""
    double, hidden = gate_up.shape
    bits = torch.int16 if gate_up.dtype == torch.bfloat16 else torch.int32
    panels = out.view(bits).view(-1, 2, hidden, LANES)
    for which, half in enumerate(gate_up.view(2, double // 2, hidden)):
        half_block = torch.empty(gemm.arranged_bytes(double // 2, hidden, half.dtype), dtype=torch.uint8, device="cpu")
        gemm.arrange(half, half_block)
        panels[:, which].copy_(half_block.view(bits).view(-1, hidden, LANES))


def restore_gate_up(block: Tensor, intermediate: int, hidden: int, dtype: torch.dtype) -> Tensor:
    """Inverse of `arrange_gate_up`: [2I, H]."""
    panels = block.view(dtype).view(-1, 2, hidden, LANES)
    halves = [
        gemm.restore(panels[:, which].contiguous().view(torch.uint8), intermediate, hidden, dtype) for which in (0, 1)
    ]
    return torch.cat(halves)


@cached_njit(nogil=True)
def _top_k_of_token(logits, top_k, renormalise, ids, weights):
    """Softmax over all experts, then the top_k largest in order (ties: lower id); one token."""
    experts = logits.shape[0]
    peak = logits[0]
    for e in range(1, experts):
        peak = max(peak, logits[e])
    total = types.float32(0.0)
    for e in range(experts):
        total += exp_f32(logits[e] - peak)
    chosen_sum = types.float32(0.0)
    previous = -1
    for choice in range(top_k):
        best = -1
        for e in range(experts):
            after = previous < 0 or logits[e] < logits[previous] or (logits[e] == logits[previous] and e > previous)
            if after and (best < 0 or logits[e] > logits[best]):
                best = e
        # NaN compares with nothing: keep the index legal and let the NaN show in the output.
        best = best if best >= 0 else choice
        ids[choice] = best
        weights[choice] = exp_f32(logits[best] - peak) / total
        chosen_sum += weights[choice]
        previous = best
    if renormalise:
        for choice in range(top_k):
            weights[choice] /= chosen_sum


@cached_njit(parallel=True, nogil=True)
def _top_k(address, columns, experts, top_k, renormalise, topk_ids, topk_weights):
    """The logits are the first `experts` columns of fp32 [T, columns] at an address."""
    logits = floats(address, topk_ids.shape[0], columns)[:, :experts]
    if logits.size * top_k <= FEW:
        for t in range(logits.shape[0]):
            _top_k_of_token(logits[t], top_k, renormalise, topk_ids[t], topk_weights[t])
    else:
        for t in prange(logits.shape[0]):
            _top_k_of_token(logits[t], top_k, renormalise, topk_ids[t], topk_weights[t])


@cached_njit(nogil=True)
def _sort_by_expert(topk_ids, row_of, row_token, expert_start):
    """Counting sort, stable in token order; ids outside the experts get no row."""
    tokens, top_k = topk_ids.shape
    experts = expert_start.shape[0] - 1
    expert_start[:] = 0
    for t in range(tokens):
        for choice in range(top_k):
            if 0 <= topk_ids[t, choice] < experts:
                expert_start[topk_ids[t, choice] + 1] += 1
    for e in range(experts):
        expert_start[e + 1] += expert_start[e]
    # expert_start advances while filling and is shifted back afterwards.
    for t in range(tokens):
        for choice in range(top_k):
            e = topk_ids[t, choice]
            if e < 0 or e >= experts:
                row_of[t, choice] = -1
                continue
            row = expert_start[e]
            expert_start[e] = row + 1
            row_of[t, choice] = row
            row_token[row] = t
    for e in range(experts, 0, -1):
        expert_start[e] = expert_start[e - 1]
    expert_start[0] = 0


@cached_njit(nogil=True)
def _route(address, columns, experts, top_k, renormalise, topk_ids, topk_weights, row_of, row_token, expert_start):
    _top_k(address, columns, experts, top_k, renormalise, topk_ids, topk_weights)
    _sort_by_expert(topk_ids, row_of, row_token, expert_start)


@cached_njit(nogil=True)
def _busy(expert_start, chosen):
    """int64: those of the chosen experts that have rows."""
    busy = np.empty(chosen.shape[0], np.int64)
    count = 0
    for e in range(chosen.shape[0]):
        if chosen[e] and expert_start[e] < expert_start[e + 1]:
            busy[count] = e
            count += 1
    return busy[:count]


@cached_njit(parallel=True, nogil=True)
def _gate_up(
    table, formats, chosen, kind, hidden, panels, x, x_stride, tokens, rounded, row_token, expert_start, activation,
    act_stride, row_table, tiles, rooms, counter, threads,
):  # fmt: skip
    if kind == BF16_DOT:
        round_rows(x, x_stride, tokens, hidden, rounded, 2 * hidden)
        x, x_stride = rounded, 2 * hidden
    for r in range(expert_start[-1]):
        row_table[r] = x + row_token[r] * x_stride
    act_panel_bytes = 16 * (2 if kind == BF16_DOT else 4)
    busy = _busy(expert_start, chosen)
    first_pair = tasks_of(busy.shape[0] * panels, hidden * 32 * (4 if kind == FP32 else 2), threads)
    counter[0] = 0
    claim = counter.ctypes.data
    rows_base = row_table.ctypes.data
    chunk = tiles.shape[2]
    for thread in prange(threads):
        gate, up, room = tiles[thread, 0], tiles[thread, 1], rooms[thread].ctypes.data
        while True:
            task = fetch_add(claim)
            if task >= first_pair.shape[0] - 1:
                break
            for at in range(first_pair[task], first_pair[task + 1]):
                expert, p = busy[at // panels], at % panels
                first, last = expert_start[expert], expert_start[expert + 1]
                planar = formats[expert, 0] == _PLANAR12
                for begin in range(first, last, chunk):
                    count = min(chunk, last - begin)
                    gemm_panels(
                        table[expert, 0], planar, 2 * p, 2, 2 * panels, kind, rows_base + 8 * begin, count, hidden,
                        room, gate.ctypes.data, chunk * 64, 64,
                    )  # fmt: skip
                    for r in range(count):
                        for lane in range(16):
                            g = gate[r, lane]
                            gate[r, lane] = g / (types.float32(1.0) + exp_f32(-g)) * up[r, lane]
                        out = activation + (begin + r) * act_stride + p * act_panel_bytes
                        if kind == BF16_DOT:
                            round_16(gate.ctypes.data + r * 64, out)
                        else:
                            copy_16(gate.ctypes.data + r * 64, out)


@cached_njit(parallel=True, nogil=True)
def _down(
    table, formats, chosen, kind, depth, panels, activation, act_stride, expert_start, out, row_table, rooms, counter,
    threads,
):  # fmt: skip
    fill_rows(row_table, activation, act_stride, expert_start[-1])
    pairs = (panels + 1) // 2
    busy = _busy(expert_start, chosen)
    first_pair = tasks_of(busy.shape[0] * pairs, depth * 32 * (4 if kind == FP32 else 2), threads)
    counter[0] = 0
    claim = counter.ctypes.data
    rows_base = row_table.ctypes.data
    for thread in prange(threads):
        room = rooms[thread].ctypes.data
        while True:
            task = fetch_add(claim)
            if task >= first_pair.shape[0] - 1:
                break
            for at in range(first_pair[task], first_pair[task + 1]):
                expert, p = busy[at // pairs], 2 * (at % pairs)
                first, last = expert_start[expert], expert_start[expert + 1]
                planar = formats[expert, 1] == _PLANAR12
                gemm_panels(
                    table[expert, 1], planar, p, min(2, panels - p), panels, kind, rows_base + 8 * first, last - first,
                    depth, room, out.ctypes.data + first * out.strides[0] + p * 64, 64, out.strides[0],
                )  # fmt: skip


@cached_njit(nogil=True)
def _combine_token(expert_out, weights, rows, residual, out):
    total = np.zeros(out.shape[0], np.float32)
    for choice in range(rows.shape[0]):
        if rows[choice] >= 0:
            weight, row = weights[choice], expert_out[rows[choice]]
            for h in range(out.shape[0]):
                total[h] += weight * row[h]
    for h in range(out.shape[0]):
        out[h] = residual[h] + total[h]


@cached_njit(parallel=True, nogil=True)
def _combine(expert_out, topk_weights, row_of, residual_address, out_address, hidden):
    tokens, top_k = row_of.shape
    residual, out = floats(residual_address, tokens, hidden), floats(out_address, tokens, hidden)
    if out.size * top_k <= FEW:
        for t in range(tokens):
            _combine_token(expert_out, topk_weights[t], row_of[t], residual[t], out[t])
    else:
        for t in prange(tokens):
            _combine_token(expert_out, topk_weights[t], row_of[t], residual[t], out[t])


def _array(*shape: int, dtype: torch.dtype = torch.float32) -> np.ndarray:
    """`zeros` as kernels take it: a view of a tensor that is made at each launch costs more than the launch's argument,
    and a layer at one token has room for neither."""
    return zeros(*shape, dtype=dtype).numpy()


class MoeBuffers:
    """Buffers of one MoE layer for at most `max_tokens` tokens; all layers share them. Arrays, but for what is bf16."""

    def __init__(
        self, max_tokens: int, hidden: int, intermediate: int, experts: int, top_k: int, threads: int,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:  # fmt: skip
        rows = max_tokens * top_k
        self.topk_ids = _array(max_tokens, top_k, dtype=torch.int32)
        self.topk_weights = _array(max_tokens, top_k)
        self.row_of = _array(max_tokens, top_k, dtype=torch.int32)
        self.row_token = _array(rows, dtype=torch.int32)
        self.expert_start = _array(experts + 1, dtype=torch.int32)
        kind = kind_of(dtype)
        self.rounded = zeros(max_tokens if kind == BF16_DOT else 0, hidden, dtype=torch.bfloat16)
        self.activation = zeros(rows, padded(intermediate), dtype=x_dtype(kind))
        self.expert_out = _array(rows, padded(hidden))
        self.tiles = _array(threads, 2, _CHUNK_ROWS, LANES)
        # By dot products, a panel that is decoded once for many rows: 64 KiB a thread at a hidden size of 2048, in L2.
        depth = max(hidden, intermediate) if kind == BF16_DOT else 0
        self.rooms = _array(threads, depth and depth + _GAP, LANES, dtype=torch.int16)
        self.all = np.ones(experts, dtype=np.uint8)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in vars(self).values())

    @property
    def activation_at(self) -> tuple[int, int]:
        """Its address, and bytes from row to row."""
        return self.activation.data_ptr(), self.activation.stride(0) * self.activation.itemsize


class Routing(NamedTuple):
    """Which rows each expert gets; see the module's data map. Views of MoeBuffers."""

    topk_ids: np.ndarray
    topk_weights: np.ndarray
    row_of: np.ndarray
    row_token: np.ndarray
    expert_start: np.ndarray

    def busy(self) -> np.ndarray:
        """Experts that have rows."""
        return (self.expert_start[1:] > self.expert_start[:-1]).nonzero()[0]


def route(logits: Tensor, top_k: int, renormalise: bool, buffers: MoeBuffers) -> Routing:
    """Softmax over fp32 logits [T, E], top_k experts a token (renormalised or not), rows sorted by expert."""
    tokens, experts = logits.shape
    routing = _routing(tokens, buffers)
    _route(logits.data_ptr(), logits.stride(0), experts, top_k, renormalise, *routing)
    return routing


def route_to(topk_ids: Tensor, topk_weights: Tensor, buffers: MoeBuffers) -> Routing:
    """The same for experts [T, top_k] that are chosen already; ids outside 0 … E - 1 are experts elsewhere."""
    tokens = topk_ids.shape[0]
    ids, weights = buffers.topk_ids[:tokens], buffers.topk_weights[:tokens]
    if topk_ids.shape != ids.shape or topk_weights.shape != ids.shape:
        raise KernelError(
            f"topk_ids and topk_weights must be [T ≤ {len(buffers.topk_ids)}, {ids.shape[1]}], got "
            f"{list(topk_ids.shape)} and {list(topk_weights.shape)}"
        )
    ids[:], weights[:] = topk_ids.numpy(force=True), topk_weights.float().numpy(force=True)
    routing = _routing(tokens, buffers)
    _sort_by_expert(ids, *routing[2:])
    return routing


def _routing(tokens: int, b: MoeBuffers) -> Routing:
    return Routing(b.topk_ids[:tokens], b.topk_weights[:tokens], b.row_of[:tokens], b.row_token, b.expert_start)


def gate_up(
    x: Tensor, table: ExpertTable, intermediate: int, dtype: torch.dtype, routing: Routing, b: MoeBuffers, s: Scratch,
    chosen: Tensor | None = None,
) -> None:  # fmt: skip
    """activation[r] = silu(x[token of r] @ gate^T) * (x[token of r] @ up^T); x fp32 [T, H]. chosen uint8 [E]: rows of
    these experts alone."""
    _gate_up(*_of_gate_up(x, table, intermediate, dtype, routing, b, s, chosen))


def _of_gate_up(
    x: Tensor, table: ExpertTable, intermediate: int, dtype: torch.dtype, routing: Routing, b: MoeBuffers, s: Scratch,
    chosen: Tensor | None = None,
) -> tuple:  # fmt: skip
    tokens, hidden = x.shape
    return (
        *table.arrays, b.all if chosen is None else chosen.numpy(), kind_of(dtype), hidden,
        padded(intermediate) // LANES, x.data_ptr(), x.stride(0) * 4, tokens, b.rounded.data_ptr(), routing.row_token,
        routing.expert_start, *b.activation_at, s.row_table, b.tiles, b.rooms, s.counter, s.threads,
    )  # fmt: skip


def down(
    table: ExpertTable, intermediate: int, dtype: torch.dtype, routing: Routing, b: MoeBuffers, s: Scratch,
    chosen: Tensor | None = None,
) -> None:  # fmt: skip
    """expert_out[r] = activation[r, :I] @ down^T. chosen uint8 [E]: rows of these experts alone."""
    _down(*_of_down(table, intermediate, dtype, routing, b, s, chosen))


def _of_down(
    table: ExpertTable, intermediate: int, dtype: torch.dtype, routing: Routing, b: MoeBuffers, s: Scratch,
    chosen: Tensor | None = None,
) -> tuple:  # fmt: skip
    return (
        *table.arrays, b.all if chosen is None else chosen.numpy(), kind_of(dtype), intermediate,
        b.expert_out.shape[1] // LANES, *b.activation_at, routing.expert_start, b.expert_out, s.row_table, b.rooms,
        s.counter, s.threads,
    )  # fmt: skip


def combine(residual: Tensor, out: Tensor, routing: Routing, b: MoeBuffers) -> Tensor:
    """out[t] = residual[t] + sum over choices of topk_weight * expert_out row; fp32 [T, H], may alias residual."""
    _combine(*_of_combine(residual, out, routing, b))
    return out


def _of_combine(residual: Tensor, out: Tensor, routing: Routing, b: MoeBuffers) -> tuple:
    return b.expert_out, routing.topk_weights, routing.row_of, address_of(residual), address_of(out), out.shape[1]


@cached_njit(nogil=True)
def _layer(of_gate_up, of_down, of_combine):
    _gate_up(*of_gate_up)
    _down(*of_down)
    _combine(*of_combine)


def layer(
    x: Tensor, table: ExpertTable, intermediate: int, dtype: torch.dtype, routing: Routing, residual: Tensor,
    b: MoeBuffers, s: Scratch,
) -> Tensor:  # fmt: skip
    """residual += the experts of x: `gate_up`, `down` and `combine` as one call, where all experts are in place."""
    experts = table, intermediate, dtype, routing, b, s
    _layer(_of_gate_up(x, *experts), _of_down(*experts), _of_combine(residual, residual, routing, b))
    return residual
