"""Gated DeltaNet in plain torch, token by token: the reference of both kernels, and the path of TorchOps.

Apart from `delta_net`, for it runs where triton does not exist. The formulas and shapes are there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import AttentionMetadata, DeltaNetDims, DeltaNetWeights

# Added to |q|² and |k|², as in flash-linear-attention and transformers.
L2_EPS = 1e-6


def gated_delta_net_torch(
    projected: Tensor, weights: DeltaNetWeights, dims: DeltaNetDims, metadata: AttentionMetadata, conv_state: Tensor,
    state: Tensor, eps: float, dtype: torch.dtype = torch.float64,
) -> Tensor:  # fmt: skip
    """[T, value_size] in `dtype`; updates conv_state and state. Shapes: see `delta_net`."""
    out = torch.zeros(len(projected), dims.value_size, dtype=dtype, device=projected.device)
    starts, contexts = metadata.query_start.tolist(), metadata.context_lens.tolist()
    heads, group = dims.value_heads, dims.value_heads // dims.key_heads
    conv = weights.conv.to(dtype)
    assert metadata.state_slots is not None, "a sequence's state lies in its slot"
    for b, slot in enumerate(metadata.state_slots.tolist()):
        begin, end = starts[b], starts[b + 1]
        first = contexts[b] <= end - begin
        x = projected[begin:end].to(dtype)
        qkv, z, beta, a = x.split([dims.channels, dims.value_size, heads, heads], dim=-1)
        kept = conv_state[slot].to(dtype)
        past = torch.zeros_like(kept) if first else kept
        inputs = torch.cat([past, qkv])
        conv_state[slot] = inputs[len(inputs) - (dims.taps - 1) :].to(conv_state.dtype)
        taps = (inputs[tap : tap + end - begin] * conv[:, tap] for tap in range(dims.taps))
        mixed = F.silu(sum(taps, torch.zeros_like(qkv)))
        q, k, v = mixed.split([dims.key_size, dims.key_size, dims.value_size], dim=-1)
        q, k = (part.view(-1, dims.key_heads, dims.key_dim).repeat_interleave(group, dim=1) for part in (q, k))
        q, k = (part / (part.square().sum(-1, keepdim=True) + L2_EPS).sqrt() for part in (q, k))
        v, z = v.view(-1, heads, dims.value_dim), z.view(-1, heads, dims.value_dim)
        decay = (-weights.rate.to(dtype) * F.softplus(a + weights.dt_bias.to(dtype))).exp()
        s = torch.zeros_like(state[slot], dtype=dtype) if first else state[slot].to(dtype)
        for t in range(end - begin):
            s = s * decay[t, :, None, None]
            known = torch.einsum("hkv,hk->hv", s, k[t])
            s = s + torch.einsum("hk,hv->hkv", k[t], (v[t] - known) * beta[t].sigmoid()[:, None])
            o = torch.einsum("hkv,hk->hv", s, q[t]) * dims.key_dim**-0.5
            o = o / (o.square().mean(-1, keepdim=True) + eps).sqrt() * weights.norm.to(dtype) * F.silu(z[t])
            out[begin + t] = o.flatten()
        state[slot] = s.to(state.dtype)
    return out
