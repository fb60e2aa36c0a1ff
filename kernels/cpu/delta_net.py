"""Gated DeltaNet on the CPU; the formulas and shapes are those of `kernels.delta_net`.

Convolution and normalised q and k of all tokens first, token by token in parallel; then the recurrence, sequence by
head in parallel, the state of a head (64 KiB at 128 x 128) in cache from its first token to its last. Everything goes
token after token in one order, so a prompt's states do not depend on how it was cut into chunks.
"""

from __future__ import annotations

import numpy as np
from numba import prange, types
from torch import Tensor

from ..numba_cache import cached_njit
from ..ops import AttentionMetadata, DeltaNetDims, DeltaNetWeights
from ..reference.delta_net import L2_EPS
from .gates import sigmoid
from .norm import rms_scale


@cached_njit(nogil=True, fastmath={"reassoc", "contract"})
def _to_unit(row, scale):
    total = types.float32(0.0)
    for i in range(row.shape[0]):
        total += row[i] * row[i]
    factor = types.float32(scale / (total + L2_EPS) ** 0.5)
    for i in range(row.shape[0]):
        row[i] *= factor


@cached_njit(parallel=True, nogil=True)
def _convolve(x, weight, state, slots, first, owner, local, key_heads, key_dim, out):
    tokens, taps = x.shape[0], weight.shape[0]
    channels = weight.shape[1]
    scale = types.float32(1.0) / types.float32(key_dim) ** 0.5
    for t in prange(tokens):
        b, row = owner[t], out[t]
        for c in range(channels):
            row[c] = 0.0
        for tap in range(taps):
            at, w = local[t] - (taps - 1) + tap, weight[tap]
            if at >= 0:
                source = x[t - (taps - 1) + tap]
                for c in range(channels):
                    row[c] += source[c] * w[c]
            elif not first[b]:
                kept = state[slots[b], at + taps - 1]
                for c in range(channels):
                    row[c] += kept[c] * w[c]
        for c in range(channels):
            row[c] = row[c] * sigmoid(row[c])
        for h in range(key_heads):
            _to_unit(row[h * key_dim : (h + 1) * key_dim], scale)
        for h in range(key_heads, 2 * key_heads):
            _to_unit(row[h * key_dim : (h + 1) * key_dim], types.float32(1.0))


@cached_njit(parallel=True, nogil=True)
def _keep_inputs(x, state, slots, first, query_start):
    keep, channels = state.shape[1], state.shape[2]
    for b in prange(slots.shape[0]):
        length = query_start[b + 1] - query_start[b]
        # Ascending: what is read of the old state lies behind all that was written before.
        for i in range(keep):
            at, target = length - keep + i, state[slots[b], i]
            if at >= 0:
                source = x[query_start[b] + at]
                for c in range(channels):
                    target[c] = source[c]
            elif first[b]:
                for c in range(channels):
                    target[c] = 0.0
            else:
                kept = state[slots[b], at + keep]
                for c in range(channels):
                    target[c] = kept[c]


@cached_njit(parallel=True, nogil=True)
def _recur(qkv, x, rate, dt, norm, state, slots, first, query_start, key_heads, eps, out):
    sequences, heads = slots.shape[0], state.shape[1]
    dk, dv = state.shape[2], state.shape[3]
    group, z_at = heads // key_heads, qkv.shape[1]
    b_at = z_at + heads * dv
    for task in prange(sequences * heads):
        b, h = task // heads, task % heads
        s = state[slots[b], h]
        if first[b]:
            s[:] = 0.0
        known = np.empty(dv, np.float32)
        for t in range(query_start[b], query_start[b + 1]):
            q = qkv[t, (h // group) * dk : (h // group + 1) * dk]
            k = qkv[t, (key_heads + h // group) * dk : (key_heads + h // group + 1) * dk]
            v = qkv[t, 2 * key_heads * dk + h * dv : 2 * key_heads * dk + (h + 1) * dv]
            o = out[t, h * dv : (h + 1) * dv]
            beta = sigmoid(x[t, b_at + h])
            a = x[t, b_at + heads + h] + dt[h]
            step = a if a > 20.0 else types.float32(np.log1p(np.exp(a)))
            decay = types.float32(np.exp(-rate[h] * step))
            for j in range(dv):
                known[j] = 0.0
                o[j] = 0.0
            for i in range(dk):
                row, weight = s[i], k[i]
                for j in range(dv):
                    row[j] *= decay
                    known[j] += row[j] * weight
            for j in range(dv):
                known[j] = (v[j] - known[j]) * beta
            for i in range(dk):
                row, weight, query = s[i], k[i], q[i]
                for j in range(dv):
                    row[j] += weight * known[j]
                    o[j] += query * row[j]
            scale = rms_scale(o, eps)
            for j in range(dv):
                z = x[t, z_at + h * dv + j]
                o[j] = o[j] * scale * norm[j] * z * sigmoid(z)


def gated_delta_net(
    projected: Tensor, weights: DeltaNetWeights, dims: DeltaNetDims, metadata: AttentionMetadata, conv_state: Tensor,
    state: Tensor, mixed: Tensor, out: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    """See `kernels.delta_net.gated_delta_net`; all fp32. projected may have more columns than it
    needs; mixed [T, channels], out [T, value_size]."""
    if not len(projected):
        return out
    assert metadata.state_slots is not None, "sequences have recurrent states"
    x = projected.numpy()
    starts, slots = metadata.query_start.numpy(), metadata.state_slots.numpy()
    lengths = np.diff(starts)
    first = metadata.context_lens.numpy() <= lengths
    owner = np.repeat(np.arange(len(slots)), lengths)
    local = np.arange(len(x)) - starts[owner]
    weight = weights.conv.t().contiguous().numpy()
    _convolve(
        x, weight, conv_state.numpy(), slots, first, owner, local, dims.key_heads, dims.key_dim, mixed.numpy()
    )  # fmt: skip
    _keep_inputs(x, conv_state.numpy(), slots, first, starts)
    _recur(
        mixed.numpy(), x, weights.rate.numpy(), weights.dt_bias.numpy(), weights.norm.numpy(), state.numpy(),
        slots, first, starts, dims.key_heads, np.float32(eps), out.numpy(),
    )  # fmt: skip
    return out
