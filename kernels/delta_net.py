"""Gated DeltaNet: linear attention with a convolution before it and one matrix of state a head (arXiv 2412.06464).

For each sequence and value head, token after token, with S [DK, DV] the state and q, k, v after convolution and SiLU:

    q, k  ← q / |q| · DK^-½, k / |k|
    g, β  = exp(-rate · softplus(a + dt)), sigmoid(b)
    S     ← g·S + k (β·(v - (g·S)ᵀk))ᵀ           the delta rule: what the state already says of k is replaced
    o     = Sᵀq
    out   = o / rms(o) · weight · silu(z)

    projected  [T, channels + value_size + 2·value_heads]   q | k | v | z | b | a of every token
    conv       [channels, taps]            fp32, depthwise and causal; the last tap meets the token itself
    conv_state [slots, taps - 1, channels] the last inputs of q | k | v
    state      [slots, value_heads, DK, DV] fp32
    out        [T, value_size]

A sequence's chunk may begin anywhere: state goes on from its slot, or from zero where the chunk begins the sequence.
value_heads / key_heads value heads in a row share a query and key head.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import portable
from .delta_net_torch import L2_EPS
from .launches import Case
from .norm import DTYPES
from .ops import AttentionMetadata, DeltaNetDims, DeltaNetWeights, KernelError, Linear


@triton.jit
def _conv_kernel(
    x_ptr,  # (T, STRIDE), q | k | v first
    weight_ptr,  # (CHANNELS, TAPS) fp32
    state_ptr,  # (slots, TAPS - 1, CHANNELS)
    slots_ptr,  # (B,) int32
    query_start_ptr,  # (B + 1,) int32
    context_lens_ptr,  # (B,) int32
    out_ptr,  # (T, CHANNELS) fp32
    STRIDE: tl.constexpr,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
    TAPS_P2: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (B, channel blocks): convolution and SiLU of one sequence's tokens, then its last inputs to the state."""
    b = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    begin = tl.load(query_start_ptr + b)
    length = tl.load(query_start_ptr + b + 1) - begin
    first = tl.load(context_lens_ptr + b) <= length
    x_ptr += begin.to(tl.int64) * STRIDE
    out_ptr += begin.to(tl.int64) * CHANNELS
    state_ptr += tl.load(slots_ptr + b).to(tl.int64) * (TAPS - 1) * CHANNELS
    inside = c < CHANNELS
    for t0 in range(0, length, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
        for tap in tl.static_range(TAPS):
            at = t - (TAPS - 1) + tap
            new = (at >= 0) & (t < length)
            x = tl.load(x_ptr + at[:, None].to(tl.int64) * STRIDE + c[None, :], mask=new[:, None] & inside, other=0.0)
            old = tl.load(
                state_ptr + (at + TAPS - 1)[:, None] * CHANNELS + c[None, :],
                mask=((at < 0) & (t < length))[:, None] & inside & (not first),
                other=0.0,
            )
            weight = tl.load(weight_ptr + c * TAPS + tap, mask=inside, other=0.0)
            total += (x.to(tl.float32) + old.to(tl.float32)) * weight[None, :]
        total = total / (1.0 + tl.exp(-total))
        tl.store(out_ptr + t[:, None].to(tl.int64) * CHANNELS + c[None, :], total, mask=(t < length)[:, None] & inside)
    # All of the new state is read before any of it is written: rows move up inside the state, and threads that read a
    # row above, or the convolution's last tile, are not those that overwrite it.
    tap = tl.arange(0, TAPS_P2)[:, None]
    at = length - (TAPS - 1) + tap
    inside = inside[None, :] & (tap < TAPS - 1)
    x = tl.load(x_ptr + at.to(tl.int64) * STRIDE + c[None, :], mask=inside & (at >= 0), other=0.0)
    old = tl.load(state_ptr + (at + TAPS - 1) * CHANNELS + c[None, :], mask=inside & (at < 0) & (not first), other=0.0)
    tl.debug_barrier()
    tl.store(state_ptr + tap * CHANNELS + c[None, :], x + old, mask=inside)


@triton.jit
def _delta_kernel(
    qkv_ptr,  # (T, CHANNELS) fp32, after the convolution
    gates_ptr,  # (T, STRIDE), z | b | a of value heads
    rate_ptr,  # (VALUE_HEADS,) fp32
    dt_ptr,  # (VALUE_HEADS,) fp32
    norm_ptr,  # (DV,) fp32
    state_ptr,  # (slots, VALUE_HEADS, DK, DV) fp32
    slots_ptr,  # (B,) int32
    query_start_ptr,  # (B + 1,) int32
    context_lens_ptr,  # (B,) int32
    out_ptr,  # (T, VALUE_HEADS * DV)
    eps,
    STRIDE: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    VALUE_HEADS: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    DK_P2: tl.constexpr,
    DV_P2: tl.constexpr,
    L2_EPS: tl.constexpr,
):
    """Grid: (B, VALUE_HEADS): one head of one sequence, its state in registers from its first token to its last."""
    b = tl.program_id(0)
    h = tl.program_id(1)
    # int64, and so is each token: what they are multiplied with may pass 2^31.
    begin = tl.load(query_start_ptr + b).to(tl.int64)
    end = tl.load(query_start_ptr + b + 1).to(tl.int64)
    first = tl.load(context_lens_ptr + b) <= end - begin
    i = tl.arange(0, DK_P2)
    j = tl.arange(0, DV_P2)
    slot = tl.load(slots_ptr + b).to(tl.int64)
    at = state_ptr + (slot * VALUE_HEADS + h) * DK * DV + i[:, None] * DV + j[None, :]
    inside = (i < DK)[:, None] & (j < DV)[None, :]
    state = tl.load(at, mask=inside & (not first), other=0.0)
    rate = tl.load(rate_ptr + h)
    dt = tl.load(dt_ptr + h)
    weight = tl.load(norm_ptr + j, mask=j < DV, other=0.0)
    key_head = h // (VALUE_HEADS // KEY_HEADS)
    CHANNELS: tl.constexpr = 2 * KEY_HEADS * DK + VALUE_HEADS * DV
    for token in range(begin, end):
        row = qkv_ptr + token * CHANNELS
        gates = gates_ptr + token * STRIDE
        q = tl.load(row + key_head * DK + i, mask=i < DK, other=0.0)
        k = tl.load(row + (KEY_HEADS + key_head) * DK + i, mask=i < DK, other=0.0)
        v = tl.load(row + 2 * KEY_HEADS * DK + h * DV + j, mask=j < DV, other=0.0)
        z = tl.load(gates + h * DV + j, mask=j < DV, other=0.0).to(tl.float32)
        beta = 1.0 / (1.0 + tl.exp(-tl.load(gates + VALUE_HEADS * DV + h).to(tl.float32)))
        a = tl.load(gates + VALUE_HEADS * DV + VALUE_HEADS + h).to(tl.float32) + dt
        # softplus, which is its argument where exp would overflow.
        step = tl.where(a > 20.0, a, tl.log(1.0 + tl.exp(tl.minimum(a, 20.0))))
        q = q / tl.sqrt(tl.sum(q * q, axis=0) + L2_EPS) / tl.sqrt(DK * 1.0)
        k = k / tl.sqrt(tl.sum(k * k, axis=0) + L2_EPS)
        state = state * tl.exp(-rate * step)
        known = tl.sum(state * k[:, None], axis=0)
        state += k[:, None] * ((v - known) * beta)[None, :]
        o = tl.sum(state * q[:, None], axis=0)
        o = o / tl.sqrt(tl.sum(o * o, axis=0) / DV + eps) * weight * z / (1.0 + tl.exp(-z))
        out = out_ptr + token * VALUE_HEADS * DV + h * DV + j
        tl.store(out, portable.cast(o, out_ptr.dtype.element_ty), mask=j < DV)
    tl.store(at, state, mask=inside)


_CONV_TILE = {True: (1, 256), False: (16, 64)}


def _launch(dims: DeltaNetDims, stride: int) -> tuple[dict, int]:
    """(constexprs, warps) of the delta kernel: 64 elements of state a thread."""
    constexprs = {
        "STRIDE": stride, "KEY_HEADS": dims.key_heads, "VALUE_HEADS": dims.value_heads, "DK": dims.key_dim,
        "DV": dims.value_dim, "DK_P2": triton.next_power_of_2(dims.key_dim),
        "DV_P2": triton.next_power_of_2(dims.value_dim), "L2_EPS": L2_EPS,
    }  # fmt: skip
    elements = constexprs["DK_P2"] * constexprs["DV_P2"]
    return constexprs, min(max(elements // (32 * 64), 1), 8)


def gated_delta_net(
    projected: Tensor, weights: DeltaNetWeights, dims: DeltaNetDims, metadata: AttentionMetadata, conv_state: Tensor,
    state: Tensor, mixed: Tensor, out: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    """Everything between the input and the output projection; returns out. Shapes: see the module.

    mixed: fp32 [T, channels], for what lies between the two kernels. Every sequence goes on from, and leaves its state
    in, slot `metadata.state_slots[b]`, which no other sequence of the batch may have. KernelError on other shapes.
    """
    tokens, stride = projected.shape
    sequences = len(metadata.context_lens)
    if projected.dtype not in DTYPES or stride != dims.projected or not projected.is_contiguous():
        raise KernelError(f"projected must be contiguous [T, {dims.projected}], got {tuple(projected.shape)}")
    if tuple(conv_state.shape[1:]) != (dims.taps - 1, dims.channels) or not conv_state.is_contiguous():
        raise KernelError(f"conv_state must be [slots, {dims.taps - 1}, {dims.channels}]")
    if tuple(state.shape[1:]) != (dims.value_heads, dims.key_dim, dims.value_dim) or state.dtype != torch.float32:
        raise KernelError(f"state must be fp32 [slots, {dims.value_heads}, {dims.key_dim}, {dims.value_dim}]")
    if not tokens:
        return out
    where = (metadata.state_slots, metadata.query_start, metadata.context_lens)
    block_t, block_c = _CONV_TILE[tokens == sequences]
    _conv_kernel[(sequences, triton.cdiv(dims.channels, block_c))](
        projected, weights.conv, conv_state, *where, mixed, STRIDE=stride, CHANNELS=dims.channels, TAPS=dims.taps,
        TAPS_P2=triton.next_power_of_2(dims.taps), BLOCK_T=block_t, BLOCK_C=block_c, num_warps=4,
    )  # fmt: skip
    constexprs, num_warps = _launch(dims, stride)
    _delta_kernel[(sequences, dims.value_heads)](
        mixed, projected[:, dims.channels :], weights.rate, weights.dt_bias, weights.norm, state, *where, out, eps,
        **constexprs, num_warps=num_warps,
    )  # fmt: skip
    return out


def audit_cases() -> Iterator[Case]:
    """For `kernels.audit`: a decode step of 64 sequences and two prompts, of Qwen3-Next-80B-A3B."""
    dims = DeltaNetDims(key_heads=16, value_heads=32, key_dim=128, value_dim=128, taps=4)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    in_proj = Linear(empty(0, dtype=torch.uint8), dims.projected, 2048, torch.bfloat16)
    weights = DeltaNetWeights(in_proj, empty(dims.channels, 4), empty(32), empty(32), empty(128))
    for name, sequences, tokens in (("decode", 64, 64), ("prefill", 2, 512)):
        ids = partial(empty, dtype=torch.int32)
        metadata = AttentionMetadata(
            ids(sequences + 1), ids(sequences), ids(sequences, 1), ids(tokens), empty(tokens, dtype=torch.int64), 32,
            state_slots=ids(sequences),
        )  # fmt: skip
        launch = partial(
            gated_delta_net, empty(tokens, dims.projected, dtype=torch.bfloat16), weights, dims, metadata,
            empty(64, 3, dims.channels, dtype=torch.bfloat16), empty(64, 32, 128, 128), empty(tokens, dims.channels),
            empty(tokens, dims.value_size, dtype=torch.bfloat16), 1e-6,
        )  # fmt: skip
        yield Case(f"delta_net_{name}/qwen3-next", launch)
