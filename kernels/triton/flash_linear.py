"""flash-linear-attention's delta rule for passes with prompts, in the place of `_chunk` and `_state` of `delta_net`.

For comparison, where its package is installed (github.com/fla-org/flash-linear-attention; read at 0.6.0). Convolution,
gated norm and steps of one token a sequence stay ours. Its state is laid out as ours is. It allocates what it needs
(`transient_bytes`), waits for the device once a pass, and tunes itself at the first call of a shape.
"""

from __future__ import annotations

import importlib
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import AttentionMetadata, DeltaNetDims, DeltaNetWeights, KernelError
from ._delta_net import LEAST_LOG
from ._delta_net_work import CHUNK_TOKENS


class ChunkRule(Protocol):
    """q, k [1, T, key_heads, DK], v [1, T, value_heads, DV], g (log of the decay) and beta fp32 [1, T, value_heads] →
    (o like v, states [B, value_heads, DK, DV]); cu_seqlens int32 [B + 1]: where sequences begin."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, scale: float, initial_state: Tensor,
        output_final_state: bool, cu_seqlens: Tensor,
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def chunk_rule(device: torch.device) -> ChunkRule:
    """KernelError without a GPU or the package."""
    if device.type != "cuda":
        raise KernelError("flash-linear-attention's kernels need a CUDA device: leave --delta-net out")
    try:
        return importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    except (ImportError, AttributeError) as error:
        raise KernelError(
            f"--delta-net fla needs the package flash-linear-attention, which cannot be imported: {error}"
        ) from None


def transient_bytes(dims: DeltaNetDims, tokens: int, sequences: int, dtype: torch.dtype) -> int:
    """Bytes that the rule allocates, at most, in a pass of so many tokens and sequences."""
    operand, states = 4 if dtype == torch.float32 else 2, dims.value_heads * dims.key_dim * dims.value_dim
    # Copies of q, k and v; what of v each token adds, in two steps; (I + A)⁻¹βΓK; o, and the state before each chunk.
    wide = 2 * dims.key_size + 4 * dims.value_size + dims.value_heads * dims.key_dim
    a_token = wide * operand + dims.value_heads * (CHUNK_TOKENS * (4 + operand) + 6 * 4)
    return tokens * a_token + (tokens // CHUNK_TOKENS + sequences) * states * operand + 2 * sequences * states * 4


def apply_rule(
    rule: ChunkRule, projected: Tensor, weights: DeltaNetWeights, dims: DeltaNetDims, metadata: AttentionMetadata,
    qkv: Tensor, state: Tensor,
) -> None:  # fmt: skip
    """o of all tokens in the place of their v, and states to their slots. qkv: as `_conv` leaves it, q scaled."""
    q, k, v = qkv[None].split([dims.key_size, dims.key_size, dims.value_size], dim=-1)
    b, a = projected[None, :, dims.channels + dims.value_size :].float().split(dims.value_heads, dim=-1)
    slots, started = metadata.state_slots, metadata.context_lens > metadata.query_start.diff()
    assert slots is not None, "layers of Gated DeltaNet have states"
    before = state.index_select(0, slots).masked_fill_(~started[:, None, None, None], 0.0)
    with torch.no_grad():
        # Its tables of chunks are kept by this very tensor of starts, from layer to layer.
        o, after = rule(
            q.unflatten(-1, (dims.key_heads, dims.key_dim)), k.unflatten(-1, (dims.key_heads, dims.key_dim)),
            v.unflatten(-1, (dims.value_heads, dims.value_dim)),
            (-weights.rate * F.softplus(a + weights.dt_bias)).clamp_min(LEAST_LOG), b.sigmoid(), scale=1.0,
            initial_state=before, output_final_state=True, cu_seqlens=metadata.query_start,
        )  # fmt: skip
    v.copy_(o.flatten(-2))
    state.index_copy_(0, slots.long(), after)
