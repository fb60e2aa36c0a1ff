"""The decoder that Mixtral, Qwen3-MoE and OLMoE share: attention and a mixture of experts in every layer.

The architectures differ in what ModelConfig says (QK-norm, clipping, window, renormalisation), not in code. The
decoder owns the non-expert weights. Expert weights it never sees: for each layer it asks an `ExpertPager` for a
table of addresses, and hands that to the kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from fluxmoe.kernels.ops import AttentionMetadata, LayerDims, LayerExperts, Ops, PackedLinear, RopeTable
from torch import Tensor

from .config import ModelConfig
from .rope import rope_tables


class ExpertPager(Protocol):
    """Where a decoder gets its experts: inside the context they may be read, after it their slot is recycled."""

    def layer(self, index: int) -> AbstractContextManager[LayerExperts]: ...


class LayerCache(Protocol):
    """KV tensors of one layer."""

    k: list[Tensor] | Tensor
    v: list[Tensor] | Tensor


class Tracer(Protocol):
    """Times a stretch of work of one layer (a timeline); see runtime.timeline."""

    def span(self, track: str, name: str) -> AbstractContextManager[None]: ...


def layer_dims(config: ModelConfig) -> LayerDims:
    """The sizes that kernels need, from a model's config."""
    return LayerDims(
        hidden=config.hidden_size,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        experts=config.num_experts,
        top_k=config.top_k,
        intermediate=config.moe_intermediate_size,
        vocab=config.vocab_size,
        dtype=config.dtype,
        renormalise=config.norm_topk_prob,
        qk_norm=config.qk_norm,
        clip_qkv=config.clip_qkv or 0.0,
        window=config.sliding_window or 0,
        eps=config.rms_norm_eps,
    )


def _norm_sizes(config: ModelConfig) -> tuple[int, int]:
    """Lengths of the q and k norms' weights."""
    if config.qk_norm == "head":
        return config.head_dim, config.head_dim
    if config.qk_norm == "full":
        return config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return 0, 0


def non_expert_bytes(config: ModelConfig, ops: Ops, max_context: int) -> int:
    """Device bytes of everything but experts: embeddings, projections, routers, norms and biases (fp32), RoPE."""
    c, d = config, layer_dims(config)
    floats = 2 * c.hidden_size + sum(_norm_sizes(c))
    linears = [
        (d.qkv_size, c.hidden_size),
        (c.hidden_size, c.num_heads * c.head_dim),
        (c.num_experts, c.hidden_size),
    ]
    if c.attention_bias:
        floats += d.qkv_size + c.hidden_size
    layer = sum(ops.packed_bytes(n, k) for n, k in linears) + 4 * floats
    vocab = ops.packed_bytes(c.vocab_size, c.hidden_size) * (1 if c.tie_word_embeddings else 2)
    rope = 4 * max_context * (c.head_dim // 2) * 2
    return c.num_layers * layer + vocab + 4 * c.hidden_size + rope


@dataclass
class DecoderLayer:
    """Non-expert weights of one layer, on the device."""

    input_norm: Tensor | None = None
    post_attn_norm: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    qkv: PackedLinear | None = None
    o_proj: PackedLinear | None = None
    router: PackedLinear | None = None
    pending: dict[str, Tensor] = field(default_factory=dict)


class Decoder:
    """Forward pass over a flat batch of tokens; weights arrive one by one through `load`."""

    def __init__(self, config: ModelConfig, ops: Ops, max_context: int) -> None:
        self.config, self.ops = config, ops
        cos, sin = rope_tables(config, max_context)
        self.rope = RopeTable(cos.to(ops.device), sin.to(ops.device))
        self.layers = [DecoderLayer() for _ in range(config.num_layers)]
        self.embed_tokens: PackedLinear | None = None
        self.lm_head: PackedLinear | None = None
        self.final_norm: Tensor | None = None

    def load(self, role: str, layer: int | None, weight: Tensor) -> None:
        """Place one non-expert tensor (roles of models.checkpoint) on the device, packed where it is a matrix."""
        if layer is None:
            value = self._vector(weight) if role == "final_norm" else self._pack(weight)
            setattr(self, role, value)
            if role == "embed_tokens" and self.config.tie_word_embeddings:
                self.lm_head = value
            return
        target = self.layers[layer]
        if role in ("input_norm", "post_attn_norm", "q_norm", "k_norm"):
            setattr(target, role, self._vector(weight))
        elif role == "router":
            target.router = self._pack(weight)
        else:
            # q, k, v are one matrix on the device, and a bias belongs to its matrix: wait until all are here.
            target.pending[role] = weight
            self._assemble(target)

    def _assemble(self, layer: DecoderLayer) -> None:
        bias = self.config.attention_bias
        for attribute, parts in (("qkv", "qkv"), ("o_proj", "o")):
            matrices, biases = [f"{p}_proj" for p in parts], [f"{p}_bias" for p in parts if bias]
            if all(name in layer.pending for name in matrices + biases):
                weight = torch.cat([layer.pending.pop(name) for name in matrices])
                vector = torch.cat([layer.pending.pop(name) for name in biases]) if bias else None
                setattr(layer, attribute, self._pack(weight, vector))

    def _vector(self, weight: Tensor) -> Tensor:
        return weight.float().to(self.ops.device)

    def _pack(self, weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
        n, k = weight.shape
        block = torch.empty(self.ops.packed_bytes(n, k), dtype=torch.uint8)
        self.ops.pack(weight, block)
        vector = None if bias is None else self._vector(bias)
        return PackedLinear(block.to(self.ops.device), n, k, weight.dtype, vector)

    def tensors(self) -> Iterator[Tensor]:
        """Every device tensor that the decoder holds, once."""
        yield from (self.rope.cos, self.rope.sin, self.final_norm, self.embed_tokens.block)
        if self.lm_head is not self.embed_tokens:
            yield self.lm_head.block
        for layer in self.layers:
            yield from (
                t for t in (layer.input_norm, layer.post_attn_norm, layer.q_norm, layer.k_norm) if t is not None
            )
            for linear in (layer.qkv, layer.o_proj, layer.router):
                yield linear.block
                if linear.bias is not None:
                    yield linear.bias

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors())

    @torch.inference_mode()
    def forward(
        self,
        token_ids: Tensor,
        metadata: AttentionMetadata,
        cache: LayerCache,
        experts: ExpertPager,
        logit_rows: Tensor,
        tracer: Tracer,
    ) -> Tensor:
        """token_ids int64 [T] → fp32 logits [B', vocab] of the rows that `logit_rows` int64 [B'] names.

        Writes the K and V of every token to the cache. The logits are valid until the next pass.
        """
        ops = self.ops
        hidden = ops.embed(token_ids, self.embed_tokens)
        for index, layer in enumerate(self.layers):
            with tracer.span("compute", f"attention {index}"):
                qkv = ops.qkv(ops.rms_norm(hidden, layer.input_norm), layer.qkv)
                attended = ops.attention(
                    qkv, layer.q_norm, layer.k_norm, self.rope, metadata, cache.k[index], cache.v[index]
                )
                hidden = ops.project_add(attended, layer.o_proj, hidden)
            with experts.layer(index) as paged, tracer.span("compute", f"experts {index}"):
                normed = ops.rms_norm(hidden, layer.post_attn_norm)
                hidden = ops.moe_add(normed, layer.router, paged, hidden, metadata.num_tokens)
        last = hidden[logit_rows]
        return ops.logits(ops.rms_norm(last, self.final_norm), self.lm_head)
