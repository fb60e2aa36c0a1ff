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

A sequence's tokens may be cut into passes anywhere: state goes on from its slot, or from zero where a pass begins the
sequence. value_heads / key_heads value heads in a row share a query and key head.

One token of a sequence, as in decode, is the formula above. More go in chunks of 64 (the WY form; arXiv 2406.06484, and
2412.06464 with decay). With K, Q, V the rows of a chunk's tokens, S the state before it and Γ_t the product of g from
the chunk's first token to t,

    A_ts = β_t (Γ_t / Γ_s) k_t·k_s  for s < t,  P_ts = (Γ_t / Γ_s) q_t·k_s  for s ≤ t,  0 elsewhere
    U    = (I + A)⁻¹ β (V - Γ K S)               what each token adds to the state
    O    = Γ Q S + P U
    S    ← Γ_64 S + (Γ_64 / Γ · K)ᵀ U

The kernels, by what needs what; each of them leaves what is not its own alone, so that a pass may mix both kinds:

    _recurrent   B x heads x slices of DV    sequences of one token: convolution, rule, o
    _conv        chunks x heads              the others' q, k, v
    _chunk       chunks x heads              P and (I + A)⁻¹ of a chunk, in parallel
    _state       B x heads x slices of DV    S, U and O, chunk after chunk
    _finish      tokens, sequences           gated norm; what the convolution keeps

Operands of products are bf16 where activations have 16 bits and fp32 where they have 32, sums and the state fp32.
(I + A)⁻¹ is computed to 16 bits and rounded once. It is kept in the place of the usual (I + A)⁻¹βV and (I + A)⁻¹βΓK:
a quarter of their bytes and no worse. In float64 with bf16's roundings put in, for random, equal and nearly equal keys,
o has 1.2 to 1.8 times the error that rounding q, k and v alone makes; with the usual two 1.2 to 1.9 times.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial

import torch
import triton
from torch import Tensor

from ..launches import Case
from ..ops import AttentionMetadata, DeltaNetDims, DeltaNetWeights, KernelError, Linear
from ._delta_net import (
    DeltaNetTile,
    Sequences,
    _chunk_kernel,
    _conv_kernel,
    _finish_kernel,
    _recurrent_kernel,
    _state_kernel,
)
from ._delta_net_work import CHUNK_TOKENS
from .flash_linear import ChunkRule, apply_rule
from .flat_batch import num_tiles
from .norm import DTYPES
from .portable import dependent_launch
from .tiles import capability_of, shared_limit

# Columns of a state a program: four slices of Qwen3-Next's 32 heads give 128 programs even to one sequence.
_BLOCK_V = 32
# Token by token: columns of a state, and warps, a program. Two warps hold 128 x 64 in their registers and meet twice a
# sum; 32 columns by 4 warps take 1.25 to 1.35 times as long from 32 sequences on, and 0.95 for one (H200).
_STEP_V = 64
_STEP_WARPS = 2
_BLOCK_C = 1024
_ALL = 2**31 - 1


def _workspace_parts(dims: DeltaNetDims, tokens: int, dtype: torch.dtype) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """(shape, dtype) of P, of (I + A)⁻¹, of (log Γ, β), and of q | k | v, whose v becomes o."""
    operand = torch.float32 if dtype == torch.float32 else torch.bfloat16
    pairs = (dims.value_heads, tokens, CHUNK_TOKENS), operand
    return [pairs, pairs, ((2, dims.value_heads, tokens), torch.float32), ((tokens, dims.channels), operand)]


def workspace_bytes(dims: DeltaNetDims, tokens: int, dtype: torch.dtype) -> int:
    """Bytes that suffice for any pass of up to `tokens` tokens of `dtype`."""
    return sum(torch.Size(shape).numel() * part.itemsize for shape, part in _workspace_parts(dims, tokens, dtype))


def gated_delta_net(
    projected: Tensor, weights: DeltaNetWeights, dims: DeltaNetDims, metadata: AttentionMetadata, conv_state: Tensor,
    state: Tensor, out: Tensor, eps: float, workspace: Tensor, batch_invariant: bool = False,
    rule: ChunkRule | None = None,
) -> Tensor:  # fmt: skip
    """Everything between the input and the output projection; returns out. Shapes: see the module.

    Every sequence goes on from, and leaves its state in, slot `metadata.state_slots[b]`, which no other sequence of the
    batch may have. workspace: contiguous, at least `workspace_bytes`, aligned to 16. batch_invariant: token by token
    whatever the lengths, so that bits do not depend on how a prompt is cut into passes; slow in prefill. rule: another
    one than ours, for all sequences of a pass in which one has more than a token. KernelError on other shapes.
    """
    tokens, stride = projected.shape
    sequences = len(metadata.context_lens)
    if projected.dtype not in DTYPES or stride != dims.projected or not projected.is_contiguous():
        raise KernelError(f"projected must be contiguous [T, {dims.projected}], got {tuple(projected.shape)}")
    if tuple(conv_state.shape[1:]) != (dims.taps - 1, dims.channels) or not conv_state.is_contiguous():
        raise KernelError(f"conv_state must be [slots, {dims.taps - 1}, {dims.channels}]")
    if tuple(state.shape[1:]) != (dims.value_heads, dims.key_dim, dims.value_dim) or state.dtype != torch.float32:
        raise KernelError(f"state must be fp32 [slots, {dims.value_heads}, {dims.key_dim}, {dims.value_dim}]")
    needed = workspace_bytes(dims, tokens, projected.dtype)
    if workspace.nbytes < needed or not workspace.is_contiguous():
        raise KernelError(f"{tokens} tokens need a contiguous workspace of {needed} bytes, got {workspace.nbytes}")
    if not tokens:
        return out
    scores, inverse, gates, qkv = _divided(workspace, _workspace_parts(dims, tokens, projected.dtype))
    assert metadata.state_slots is not None, "layers of Gated DeltaNet have states"
    where = Sequences(metadata.state_slots, metadata.query_start, metadata.context_lens)
    conv = (projected, weights.conv, conv_state)
    tile = _tile(dims)
    heads = (sequences, dims.value_heads)
    capability = capability_of(projected.device)
    dependent = dependent_launch(capability)
    # No sequence is without tokens: as many tokens as sequences means one each.
    chunked = tokens > sequences and not batch_invariant
    theirs = chunked and rule is not None
    if not theirs:
        _recurrent_kernel[(*heads, triton.cdiv(dims.value_dim, tile.step_v))](
            *conv, weights.rate, weights.dt_bias, state, where, qkv, dims, tile, _ALL if batch_invariant else 1,
            num_warps=_STEP_WARPS, **dependent,
        )  # fmt: skip
    chunks = num_tiles(tokens, sequences, CHUNK_TOKENS)
    if chunked:
        _conv_kernel[(chunks, 2 * dims.key_heads + dims.value_heads)](
            *conv, where, qkv, sequences, dims, tile, 1 if theirs else 2, num_warps=8, **dependent
        )
    if chunked and rule is not None:
        apply_rule(rule, projected, weights, dims, metadata, qkv, state)
    elif chunked:
        _chunk_kernel[(chunks, dims.value_heads)](
            projected, qkv, weights.rate, weights.dt_bias, metadata.query_start, inverse, scores, gates, tokens,
            sequences, dims, tile, num_warps=4, **dependent,
        )  # fmt: skip
        _state_kernel[(*heads, triton.cdiv(dims.value_dim, tile.block_v))](
            qkv, inverse, scores, gates, state, where, tokens, dims, tile, num_warps=4,
            num_stages=_state_stages(tile, qkv.dtype.itemsize, capability), **dependent,
        )  # fmt: skip
    kept = sequences * triton.cdiv(dims.channels, tile.block_c)
    _finish_kernel[(tokens + kept,)](
        projected, qkv, weights.norm, conv_state, where, out, eps, tokens, dims, tile, num_warps=4, **dependent
    )
    return out


@cache
def _tile(dims: DeltaNetDims) -> DeltaNetTile:
    keys, values = (max(triton.next_power_of_2(dim), 16) for dim in (dims.key_dim, dims.value_dim))
    heads, taps = map(triton.next_power_of_2, (dims.value_heads, dims.taps))
    return DeltaNetTile(keys, values, heads, taps, min(values, _BLOCK_V), min(values, _STEP_V), _BLOCK_C)


def _state_stages(tile: DeltaNetTile, itemsize: int, capability: int) -> int:
    """Stages of the loop over chunks: two where a second chunk's q, k, v, P and (I + A)⁻¹ fit in shared memory."""
    chunk = CHUNK_TOKENS * (2 * tile.keys + tile.block_v + 2 * CHUNK_TOKENS) * itemsize
    return 2 if 3 * chunk < shared_limit(capability) else 1


def _divided(workspace: Tensor, parts: list[tuple[tuple[int, ...], torch.dtype]]) -> list[Tensor]:
    """Views of a workspace, one after another."""
    rest, views = workspace.view(-1).view(torch.uint8), []
    for shape, dtype in parts:
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        views.append(rest[:nbytes].view(dtype).view(shape))
        rest = rest[nbytes:]
    return views


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
            empty(64, 3, dims.channels, dtype=torch.bfloat16), empty(64, 32, 128, 128),
            empty(tokens, dims.value_size, dtype=torch.bfloat16), 1e-6,
            empty(workspace_bytes(dims, tokens, torch.bfloat16), dtype=torch.uint8),
        )  # fmt: skip
        yield Case(f"delta_net_{name}/qwen3-next", launch, wide=(_chunk_kernel, _state_kernel))
