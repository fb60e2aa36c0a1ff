"""The kernels of `delta_net`, where formulas, shapes and their order are.
DIMS is a `DeltaNetDims`, TILE a `DeltaNetTile`, where a `Sequences`, in all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..reference.delta_net import L2_EPS
from ..work import declares
from . import portable
from ._delta_net_work import CHUNK_TOKENS, chunk_work, conv_work, finish_work, recurrent_work, state_work
from .flat_batch import sequence_of

_L2_EPS = tl.constexpr(L2_EPS)
CHUNK = tl.constexpr(CHUNK_TOKENS)
# Side of the blocks of I + A that are inverted row by row.
_SIDE = tl.constexpr(16)
# exp of it is 0 in fp32. Sums of longer decays would only lose digits.
LEAST_LOG = -110.0
_LEAST_LOG = tl.constexpr(LEAST_LOG)


@dataclass(frozen=True)
class DeltaNetTile:
    """Sizes of what a program holds. keys, values, heads, taps: powers of two from those of a layer on; block_v:
    columns of a state that meet chunks, step_v: that meet one token after another; block_c: channels whose last inputs
    are kept."""

    keys: int
    values: int
    heads: int
    taps: int
    block_v: int
    step_v: int
    block_c: int

    @property
    def widest(self) -> int:
        """What holds a key, or a value."""
        return max(self.keys, self.values)


class Sequences(NamedTuple):
    """Whose tokens and states are which; (B,) int32, (B + 1,), (B,)."""

    slots: Tensor
    query_start: Tensor
    context_lens: Tensor


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _convolved(
    x_ptr, weight_ptr, state_ptr, begin, t, c, inside, length, reaches_back,
    STRIDE: tl.constexpr, CHANNELS: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """Convolution and SiLU at channels c of tokens t, which broadcast, of the sequence that begins at row `begin`
    (int64); fp32. reaches_back: whether inputs of an earlier pass may be among them.
    """
    total = tl.zeros_like(t + c).to(tl.float32)
    mask = inside & (t < length)
    # The earliest first, so that the order of a sum does not depend on where a pass begins.
    if reaches_back:
        for tap in tl.static_range(TAPS - 1):
            at = t - (TAPS - 1) + tap
            old = tl.load(state_ptr + (at + TAPS - 1) * CHANNELS + c, mask=mask & (at < 0), other=0.0)
            total += old.to(tl.float32) * tl.load(weight_ptr + c * TAPS + tap, mask=inside, other=0.0)
    for tap in tl.static_range(TAPS):
        at = t - (TAPS - 1) + tap
        x = tl.load(x_ptr + (begin + at) * STRIDE + c, mask=mask & (at >= 0), other=0.0)
        total += x.to(tl.float32) * tl.load(weight_ptr + c * TAPS + tap, mask=inside, other=0.0)
    return _silu(total)


@triton.jit
def _gates(b_ptr, h, rate_ptr, dt_ptr, mask, HEADS: tl.constexpr):
    """(log of the decay, β) of head h; b_ptr: where the b of tokens begin, before their a; 0 and ½ where masked."""
    beta = 1.0 / (1.0 + tl.exp(-tl.load(b_ptr + h, mask=mask, other=0.0).to(tl.float32)))
    a = tl.load(b_ptr + HEADS + h, mask=mask, other=0.0).to(tl.float32) + tl.load(dt_ptr + h)
    # softplus, which is its argument where exp would overflow.
    step = tl.where(a > 20.0, a, tl.log(1.0 + tl.exp(tl.minimum(a, 20.0))))
    return tl.where(mask, tl.maximum(-tl.load(rate_ptr + h) * step, _LEAST_LOG), 0.0), beta


@triton.jit(launch_metadata=declares(recurrent_work))
def _recurrent_kernel(
    x_ptr,  # (T, DIMS.projected)
    conv_ptr,  # (CHANNELS, TAPS) fp32
    conv_state_ptr,  # (slots, TAPS - 1, CHANNELS)
    rate_ptr,  # (VALUE_HEADS,) fp32
    dt_ptr,  # (VALUE_HEADS,) fp32
    state_ptr,  # (slots, VALUE_HEADS, DK, DV) fp32
    where,
    qkv_ptr,  # (T, CHANNELS), whose v becomes o
    DIMS: tl.constexpr,
    TILE: tl.constexpr,
    MOST_TOKENS: tl.constexpr,
):
    """Grid: (B, VALUE_HEADS, slices of DV): token by token, the slice's state in registers from first to last.

    Leaves sequences of more than MOST_TOKENS alone.
    """
    portable.after_inputs()
    sequence = tl.program_id(0)
    h = tl.program_id(1)
    # int64: what tokens and slots are multiplied with may pass 2^31.
    begin = tl.load(where.query_start + sequence).to(tl.int64)
    length = tl.load(where.query_start + sequence + 1) - begin
    if length > MOST_TOKENS:
        return
    context = tl.load(where.context_lens + sequence)
    DK: tl.constexpr = DIMS.key_dim
    DV: tl.constexpr = DIMS.value_dim
    CHANNELS: tl.constexpr = DIMS.channels
    i = tl.arange(0, TILE.keys)
    j = tl.program_id(2) * TILE.step_v + tl.arange(0, TILE.step_v)
    slot = tl.load(where.slots + sequence).to(tl.int64)
    at = state_ptr + (slot * DIMS.value_heads + h) * DK * DV + i[:, None] * DV + j[None, :]
    inside = (i < DK)[:, None] & (j < DV)[None, :]
    state = tl.load(at, mask=inside & (context > length), other=0.0)
    conv_state_ptr += slot * (DIMS.taps - 1) * CHANNELS
    key_head = h // (DIMS.value_heads // DIMS.key_heads)
    v_at = 2 * DIMS.key_size + h * DV + j
    for token in range(begin, begin + length):
        t = token - begin
        reaches_back = (t < DIMS.taps - 1) & (context > length)
        q = _convolved(
            x_ptr, conv_ptr, conv_state_ptr, begin, t, key_head * DK + i, i < DK, length, reaches_back,
            DIMS.projected, CHANNELS, DIMS.taps,
        )  # fmt: skip
        k = _convolved(
            x_ptr, conv_ptr, conv_state_ptr, begin, t, DIMS.key_size + key_head * DK + i, i < DK, length, reaches_back,
            DIMS.projected, CHANNELS, DIMS.taps,
        )  # fmt: skip
        v = _convolved(
            x_ptr, conv_ptr, conv_state_ptr, begin, t, v_at, j < DV, length, reaches_back,
            DIMS.projected, CHANNELS, DIMS.taps,
        )  # fmt: skip
        b_ptr = x_ptr + token * DIMS.projected + CHANNELS + DIMS.value_size
        log_decay, beta = _gates(b_ptr, h, rate_ptr, dt_ptr, t < length, DIMS.value_heads)
        q = q / tl.sqrt(tl.sum(q * q, axis=0) + _L2_EPS) / tl.sqrt(DK * 1.0)
        k = k / tl.sqrt(tl.sum(k * k, axis=0) + _L2_EPS)
        state = state * tl.exp(log_decay)
        known = tl.sum(state * k[:, None], axis=0)
        state += k[:, None] * ((v - known) * beta)[None, :]
        o = tl.sum(state * q[:, None], axis=0)
        row = qkv_ptr + token * CHANNELS
        tl.store(row + v_at, portable.cast(o, qkv_ptr.dtype.element_ty), mask=j < DV)
    tl.store(at, state, mask=inside)


@triton.jit(do_not_specialize=["num_sequences"], launch_metadata=declares(conv_work))
def _conv_kernel(
    x_ptr,  # (T, DIMS.projected)
    conv_ptr,  # (CHANNELS, TAPS) fp32
    conv_state_ptr,  # (slots, TAPS - 1, CHANNELS)
    where,
    qkv_ptr,  # (T, CHANNELS)
    num_sequences,
    DIMS: tl.constexpr,
    TILE: tl.constexpr,
    LEAST_TOKENS: tl.constexpr,
):
    """Grid: (chunks, 2 * KEY_HEADS + VALUE_HEADS): convolution of a chunk's q, k or v of one head; q and k to unit
    length, q scaled. Leaves sequences of less than LEAST_TOKENS alone."""
    portable.after_inputs()
    sequence, begin, end, at = sequence_of(tl.program_id(0), where.query_start, num_sequences, CHUNK)
    length, t0 = end - begin, at - begin
    if (length < LEAST_TOKENS) | (t0 >= length):
        return
    head = tl.program_id(1)
    is_key = head < 2 * DIMS.key_heads
    width = tl.where(is_key, DIMS.key_dim, DIMS.value_dim)
    c0 = tl.where(is_key, head * DIMS.key_dim, 2 * DIMS.key_size + (head - 2 * DIMS.key_heads) * DIMS.value_dim)
    d = tl.arange(0, TILE.widest)[None, :]
    t = t0 + tl.arange(0, CHUNK)[:, None]
    slot = tl.load(where.slots + sequence).to(tl.int64)
    y = _convolved(
        x_ptr, conv_ptr, conv_state_ptr + slot * (DIMS.taps - 1) * DIMS.channels, begin.to(tl.int64),
        t, c0 + d, d < width, length, (t0 < DIMS.taps - 1) & (tl.load(where.context_lens + sequence) > length),
        DIMS.projected, DIMS.channels, DIMS.taps,
    )  # fmt: skip
    unit = 1.0 / tl.sqrt(tl.sum(y * y, axis=1) + _L2_EPS)
    unit *= tl.where(head < DIMS.key_heads, 1.0 / tl.sqrt(DIMS.key_dim * 1.0), 1.0)
    y *= tl.where(is_key, unit, 1.0)[:, None]
    out = qkv_ptr + (begin + t).to(tl.int64) * DIMS.channels + c0 + d
    tl.store(out, portable.cast(y, qkv_ptr.dtype.element_ty), mask=(t < length) & (d < width))


@triton.jit
def _unit_lower_inverse(a):
    """(I + a)⁻¹ of a strictly lower triangular fp32 `a` [CHUNK, CHUNK].

    The diagonal blocks by forward substitution, all at once; then, twice, two neighbours and what couples them become
    one block:  [[P, 0], [C, R]]⁻¹ = [[P⁻¹, 0], [-R⁻¹ C P⁻¹, R⁻¹]].
    """
    BLOCKS: tl.constexpr = CHUNK // _SIDE
    n = tl.arange(0, BLOCKS)
    r = tl.arange(0, _SIDE)
    diagonal = (n[:, None] == n[None, :])[:, None, :, None]
    block = tl.sum(tl.where(diagonal, tl.reshape(a, (BLOCKS, _SIDE, BLOCKS, _SIDE)), 0.0), axis=2)
    inverse = tl.zeros_like(block) + tl.where(r[:, None] == r[None, :], 1.0, 0.0)[None, :, :]
    for step in tl.static_range(_SIDE - 1):
        done = tl.sum(tl.where((r == step)[None, :, None], inverse, 0.0), axis=1)
        coefficient = tl.sum(tl.where((r == step)[None, None, :], block, 0.0), axis=2)
        inverse -= coefficient[:, :, None] * done[:, None, :]
    inverse = tl.reshape(tl.where(diagonal, inverse[:, :, None, :], 0.0), (CHUNK, CHUNK))
    t = tl.arange(0, CHUNK)
    for doubling in tl.static_range(2):
        side = _SIDE << doubling
        apart = (t // side)[:, None] != (t // side)[None, :]
        pair = (t // (2 * side))[:, None] == (t // (2 * side))[None, :]
        couples = tl.where(pair & apart, a, 0.0)
        inverse -= portable.dot_fp32(portable.dot_fp32(inverse, couples), inverse)
    return inverse


@triton.jit(do_not_specialize=["num_tokens", "num_sequences"], launch_metadata=declares(chunk_work))
def _chunk_kernel(
    x_ptr,  # (T, DIMS.projected)
    qkv_ptr,  # (T, CHANNELS), after the convolution
    rate_ptr,  # (VALUE_HEADS,) fp32
    dt_ptr,  # (VALUE_HEADS,) fp32
    query_start_ptr,  # (B + 1,) int32
    inverse_ptr,  # (VALUE_HEADS, T, CHUNK)
    scores_ptr,  # (VALUE_HEADS, T, CHUNK)
    gates_ptr,  # (2, VALUE_HEADS, T) fp32: log of the decay since the chunk began, β
    num_tokens,
    num_sequences,
    DIMS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid: (chunks, VALUE_HEADS): what a chunk's tokens are to each other, whatever the state before them."""
    portable.after_inputs()
    _, begin, end, token0 = sequence_of(tl.program_id(0), query_start_ptr, num_sequences, CHUNK)
    if (end - begin < 2) | (token0 >= end):
        return
    h = tl.program_id(1)
    key_head = h // (DIMS.value_heads // DIMS.key_heads)
    r = tl.arange(0, CHUNK)
    i = tl.arange(0, TILE.keys)
    valid = token0 + r < end
    token = token0.to(tl.int64) + r
    rows = qkv_ptr + token[:, None] * DIMS.channels + key_head * DIMS.key_dim + i[None, :]
    mask = valid[:, None] & (i < DIMS.key_dim)[None, :]
    q = tl.load(rows, mask=mask, other=0.0)
    k = tl.load(rows + DIMS.key_size, mask=mask, other=0.0)
    b_ptr = x_ptr + token * DIMS.projected + DIMS.channels + DIMS.value_size
    log_decay, beta = _gates(b_ptr, h, rate_ptr, dt_ptr, valid, DIMS.value_heads)
    total = tl.cumsum(log_decay, axis=0)
    later, earlier = r[:, None], r[None, :]
    # Only ever exp of a difference that is not positive: exp(-total) would overflow.
    decay = tl.exp(tl.where(later >= earlier, total[:, None] - total[None, :], _LEAST_LOG))
    empty = tl.zeros([CHUNK, CHUNK], tl.float32)
    keys = tl.trans(k)
    at = (h.to(tl.int64) * num_tokens + token)[:, None] * CHUNK + r[None, :]
    dtype = qkv_ptr.dtype.element_ty
    scores = tl.where(later >= earlier, portable.dot(q, keys, empty) * decay, 0.0)
    tl.store(scores_ptr + at, portable.cast(scores, dtype), mask=valid[:, None])
    known = tl.where(later > earlier, portable.dot(k, keys, empty) * decay * beta[:, None], 0.0)
    inverse = _unit_lower_inverse(known)
    tl.store(inverse_ptr + at, portable.cast(inverse, dtype), mask=valid[:, None])
    gate = gates_ptr + h.to(tl.int64) * num_tokens + token
    tl.store(gate, total, mask=valid)
    tl.store(gate + DIMS.value_heads * num_tokens.to(tl.int64), beta, mask=valid)


@triton.jit(do_not_specialize=["num_tokens"], launch_metadata=declares(state_work))
def _state_kernel(
    qkv_ptr,  # (T, CHANNELS), after the convolution; v becomes o
    inverse_ptr,  # (VALUE_HEADS, T, CHUNK)
    scores_ptr,  # (VALUE_HEADS, T, CHUNK)
    gates_ptr,  # (2, VALUE_HEADS, T) fp32
    state_ptr,  # (slots, VALUE_HEADS, DK, DV) fp32
    where,
    num_tokens,
    DIMS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid: (B, VALUE_HEADS, slices of DV): chunk after chunk, the slice's state in registers from first to last."""
    portable.after_inputs()
    sequence = tl.program_id(0)
    h = tl.program_id(1)
    # int64: what tokens and slots are multiplied with may pass 2^31.
    begin = tl.load(where.query_start + sequence).to(tl.int64)
    end = tl.load(where.query_start + sequence + 1).to(tl.int64)
    if end - begin < 2:
        return
    first = tl.load(where.context_lens + sequence) <= end - begin
    DK: tl.constexpr = DIMS.key_dim
    DV: tl.constexpr = DIMS.value_dim
    BLOCK_V: tl.constexpr = TILE.block_v
    i = tl.arange(0, TILE.keys)
    j = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    r = tl.arange(0, CHUNK)
    slot = tl.load(where.slots + sequence).to(tl.int64)
    state_at = state_ptr + (slot * DIMS.value_heads + h) * DK * DV + i[:, None] * DV + j[None, :]
    inside = (i < DK)[:, None] & (j < DV)[None, :]
    state = tl.load(state_at, mask=inside & (not first), other=0.0)
    key_head = h // (DIMS.value_heads // DIMS.key_heads)
    head_at = h.to(tl.int64) * num_tokens
    beta_at = DIMS.value_heads * num_tokens.to(tl.int64)
    dtype = qkv_ptr.dtype.element_ty
    empty = tl.zeros([CHUNK, BLOCK_V], tl.float32)
    for token0 in range(begin, end, CHUNK):
        token = token0 + r
        valid = token < end
        keys_at = qkv_ptr + token[:, None] * DIMS.channels + key_head * DK + i[None, :]
        keys_mask = valid[:, None] & (i < DK)[None, :]
        values_at = qkv_ptr + token[:, None] * DIMS.channels + 2 * DIMS.key_size + h * DV + j[None, :]
        values_mask = valid[:, None] & (j < DV)[None, :]
        pairs_at = (head_at + token)[:, None] * CHUNK + r[None, :]
        q = tl.load(keys_at, mask=keys_mask, other=0.0)
        k = tl.load(keys_at + DIMS.key_size, mask=keys_mask, other=0.0)
        v = tl.load(values_at, mask=values_mask, other=0.0)
        inverse = tl.load(inverse_ptr + pairs_at, mask=valid[:, None], other=0.0)
        scores = tl.load(scores_ptr + pairs_at, mask=valid[:, None], other=0.0)
        total = tl.load(gates_ptr + head_at + token, mask=valid, other=0.0)
        beta = tl.load(gates_ptr + beta_at + head_at + token, mask=valid, other=0.0)
        whole = tl.load(gates_ptr + head_at + tl.minimum(token0 + CHUNK, end) - 1)
        decay = tl.exp(total)[:, None]
        before = portable.cast(state, dtype)
        new = (v.to(tl.float32) - portable.dot(k, before, empty) * decay) * beta[:, None]
        update = portable.dot(inverse, portable.cast(new, dtype), empty)
        o = portable.dot(scores, portable.cast(update, dtype), portable.dot(q, before, empty) * decay)
        tl.store(values_at, portable.cast(o, dtype), mask=values_mask)
        # Masked rows have total 0, and an update of 0.
        update = update * tl.exp(whole - total)[:, None]
        state = portable.dot(tl.trans(k), portable.cast(update, dtype), state * tl.exp(whole))
    tl.store(state_at, state, mask=inside)


@triton.jit
def _gated_norm(x_ptr, qkv_ptr, norm_ptr, out_ptr, eps, token, DIMS: tl.constexpr, TILE: tl.constexpr):
    """The output of one token: o of each head, over its rms, times weight and silu(z)."""
    h = tl.arange(0, TILE.heads)[:, None]
    j = tl.arange(0, TILE.values)[None, :]
    mask = (h < DIMS.value_heads) & (j < DIMS.value_dim)
    at = h * DIMS.value_dim + j
    o = tl.load(qkv_ptr + token * DIMS.channels + 2 * DIMS.key_size + at, mask=mask, other=0.0).to(tl.float32)
    z = tl.load(x_ptr + token * DIMS.projected + DIMS.channels + at, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(norm_ptr + j, mask=j < DIMS.value_dim, other=0.0)
    scale = 1.0 / tl.sqrt(tl.sum(o * o, axis=1) / DIMS.value_dim + eps)
    y = portable.cast(o * scale[:, None] * weight * _silu(z), out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * DIMS.value_size + at, y, mask=mask)


@triton.jit
def _keep_inputs(x_ptr, conv_state_ptr, c, length, first, DIMS: tl.constexpr, TILE: tl.constexpr):
    """The last inputs of channels c of one sequence, to its state."""
    tap = tl.arange(0, TILE.taps)[:, None]
    at = length - (DIMS.taps - 1) + tap
    mask = (c < DIMS.channels) & (tap < DIMS.taps - 1)
    x = tl.load(x_ptr + at.to(tl.int64) * DIMS.projected + c, mask=mask & (at >= 0), other=0.0)
    kept = (at + DIMS.taps - 1) * DIMS.channels + c
    old = tl.load(conv_state_ptr + kept, mask=mask & (at < 0) & (not first), other=0.0)
    # Rows move up inside the state: all are read before any is written, for threads that read a row above are not
    # those that overwrite it.
    tl.debug_barrier()
    tl.store(conv_state_ptr + tap * DIMS.channels + c, x + old, mask=mask)


@triton.jit(do_not_specialize=["num_tokens"], launch_metadata=declares(finish_work))
def _finish_kernel(
    x_ptr,  # (T, DIMS.projected)
    qkv_ptr,  # (T, CHANNELS), o in the place of v
    norm_ptr,  # (DV,) fp32
    conv_state_ptr,  # (slots, TAPS - 1, CHANNELS)
    where,
    out_ptr,  # (T, VALUE_HEADS * DV)
    eps,
    num_tokens,
    DIMS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid: (T + B * channel blocks,): what must wait until all slices have their o, a token's output; and until all
    programs have read a convolution's old inputs, its new ones."""
    portable.after_inputs()
    program = tl.program_id(0)
    if program < num_tokens:
        _gated_norm(x_ptr, qkv_ptr, norm_ptr, out_ptr, eps, program.to(tl.int64), DIMS, TILE)
    else:
        BLOCK_C: tl.constexpr = TILE.block_c
        BLOCKS: tl.constexpr = (DIMS.channels + BLOCK_C - 1) // BLOCK_C
        sequence = (program - num_tokens) // BLOCKS
        c = (program - num_tokens) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
        begin = tl.load(where.query_start + sequence)
        length = tl.load(where.query_start + sequence + 1) - begin
        x_ptr += begin.to(tl.int64) * DIMS.projected
        conv_state_ptr += tl.load(where.slots + sequence).to(tl.int64) * (DIMS.taps - 1) * DIMS.channels
        first = tl.load(where.context_lens + sequence) <= length
        _keep_inputs(x_ptr, conv_state_ptr, c, length, first, DIMS, TILE)
