"""TorchOps: the operations of a decoder but its experts in plain torch, on any device.

Slow and written independently of the fast kernels (loops over experts and sequences, no packing tricks): the
oracle that they are tested against, and a path for sizes that they do not take. Weights are row-major; a KV
block is [block_size, kv_heads, head_dim] for K and for V.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from ..attention_layer import AttentionLayer
from ..ops import AttentionMetadata, DeltaNetWeights, DenseMlp, LayerDims, Limits, Linear, RopeTable, RowMajor
from .delta_net import gated_delta_net_torch


class TorchOps(AttentionLayer, RowMajor):
    """Same contract as CpuOps; `act_dtype` defaults to fp32 on the CPU and to the weights' dtype elsewhere.

    torch allocates its temporaries itself: `workspace_bytes` is an upper bound on those of one layer at a time,
    computed from the limits, not memory held in advance.
    """

    def __init__(
        self,
        dims: LayerDims,
        limits: Limits,
        device: torch.device | str = "cpu",
        act_dtype: torch.dtype | None = None,
    ) -> None:
        self.dims, self.limits, self.device = dims, limits, torch.device(device)
        self.act_dtype = act_dtype or (torch.float32 if self.device.type == "cpu" else dims.dtype)
        floats = limits.tokens * (3 * dims.hidden + 2 * dims.qkv_size + 2 * dims.heads * dims.head_dim)
        floats += limits.tokens * dims.experts
        floats += dims.heads * limits.context * (2 * limits.tokens + 4 * dims.head_dim)
        floats += 2 * limits.sequences * dims.vocab
        floats += limits.tokens * (4 * dims.mlp + 2 * dims.heads * dims.head_dim * dims.attention_gate)
        if dims.delta is not None:
            d = dims.delta
            floats += 6 * limits.tokens * d.projected + 4 * d.value_heads * d.key_dim * d.value_dim
        self.workspace_bytes = 4 * floats

    def arrange_mlp(self, gate_up: Tensor, out: Tensor) -> None:
        self.arrange(gate_up, out)

    def kv_block_shape(self, block_size: int, kv_heads: int, head_dim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (block_size, kv_heads, head_dim), (block_size, kv_heads, head_dim)

    def embed(self, token_ids: Tensor, table: Linear) -> Tensor:
        return self.matrix(table)[token_ids.to(self.device)].to(self.act_dtype)

    def rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._norm(x, weight)

    def qkv(self, x: Tensor, weight: Linear) -> Tensor:
        return self._linear(x, weight)

    def attention(
        self, qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, rope: RopeTable, metadata: AttentionMetadata,
        k_cache: Tensor, v_cache: Tensor,
    ) -> Tensor:  # fmt: skip
        d = self.dims
        q, k, v = qkv.split([d.heads * d.head_dim, d.kv_heads * d.head_dim, d.kv_heads * d.head_dim], dim=-1)
        if d.qk_norm == "full":
            q, k = self._norm_qk(q, k, q_norm, k_norm)
        q, k, v = (rearrange(part, "t (h d) -> t h d", d=d.head_dim) for part in (q, k, v))
        if d.qk_norm == "head":
            q, k = self._norm_qk(q, k, q_norm, k_norm)
        if d.clip_qkv:
            q, k, v = (part.clamp(-d.clip_qkv, d.clip_qkv) for part in (q, k, v))
        cos, sin = (t[metadata.positions.long()][:, None].to(q.dtype) for t in (rope.cos, rope.sin))
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        kept = metadata.slot_mapping >= 0
        slots = metadata.slot_mapping[kept]
        block, offset = slots // metadata.block_size, slots % metadata.block_size
        k_cache[block, offset] = k[kept].to(k_cache.dtype)
        v_cache[block, offset] = v[kept].to(v_cache.dtype)
        starts = metadata.query_start.tolist()
        contexts = metadata.context_lens.tolist()
        outputs = []
        for b, context in enumerate(contexts):
            blocks = metadata.block_table[b, : -(-context // metadata.block_size)].long()
            keys = k_cache[blocks].reshape(-1, d.kv_heads, d.head_dim)[:context].to(self.act_dtype)
            values = v_cache[blocks].reshape(-1, d.kv_heads, d.head_dim)[:context].to(self.act_dtype)
            outputs.append(self._attend(q[starts[b] : starts[b + 1]], keys, values))
        return torch.cat(outputs) if outputs else q.reshape(0, d.heads * d.head_dim)

    def _norm_qk(self, q: Tensor, k: Tensor, q_norm: Tensor | None, k_norm: Tensor | None) -> tuple[Tensor, Tensor]:
        assert q_norm is not None, "a model that norms queries has weights for it"
        assert k_norm is not None, "a model that norms keys has weights for it"
        return self._norm(q, q_norm), self._norm(k, k_norm)

    def gate_attention(self, attended: Tensor, x: Tensor, weight: Linear) -> Tensor:
        return attended * self._linear(x, weight).sigmoid()

    def delta_net(
        self, x: Tensor, weights: DeltaNetWeights, metadata: AttentionMetadata, conv_state: Tensor, state: Tensor
    ) -> Tensor:
        return gated_delta_net_torch(
            self._linear(x, weights.in_proj), weights, self.dims.delta_net, metadata, conv_state, state, self.dims.eps,
            torch.float32,
        ).to(x.dtype)  # fmt: skip

    def mlp_add(self, x: Tensor, mlp: DenseMlp, residual: Tensor) -> Tensor:
        gate, up = self._linear(x, mlp.gate_up).chunk(2, dim=-1)
        y = self._linear(F.silu(gate) * up, mlp.down)
        return residual + (y if mlp.score is None else self._linear(x, mlp.score).sigmoid() * y)

    def project_add(self, x: Tensor, weight: Linear, residual: Tensor) -> Tensor:
        return residual + self._linear(x, weight)

    def router(self, x: Tensor, weight: Linear) -> Tensor:
        return self._linear(x, weight).float()

    def logits(self, x: Tensor, weight: Linear) -> Tensor:
        return self._linear(x, weight).float()

    def _linear(self, x: Tensor, weight: Linear) -> Tensor:
        w = self.matrix(weight).to(x.dtype)
        return F.linear(x, w, None if weight.bias is None else weight.bias.to(x.dtype))

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x.float(), weight.float(), self.dims.eps).to(x.dtype)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [n, heads, D] are the last n positions of k, v [context, kv_heads, D] → [n, heads·D]."""
        d, context = self.dims, len(k)
        group = d.heads // d.kv_heads
        k, v = (repeat(part, "c h d -> (h g) c d", g=group) for part in (k, v))
        position = torch.arange(context - len(q), context, device=q.device)[:, None]
        key = torch.arange(context, device=q.device)[None]
        visible = key <= position
        if d.window:
            visible = visible & (key > position - d.window)
        scores = torch.einsum("nhd,hcd->hnc", q, k).float() * d.head_dim**-0.5
        weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1).to(v.dtype)
        return rearrange(torch.einsum("hnc,hcd->nhd", weights, v), "n h d -> n (h d)")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) · weight, row by row, in their dtype."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
