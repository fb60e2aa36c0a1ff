"""The decoder that all architectures share: attention or Gated DeltaNet, then a mixture of experts or an MLP.

The architectures differ in what ModelConfig says (QK-norm, clipping, window, gates, shared expert, …), not in code. The
decoder owns the non-expert weights. Expert weights it never sees: those of each layer that has experts are added by who
pages them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Protocol

import torch
from fluxmoe.kernels.host_memory import host_zeros
from fluxmoe.kernels.ops import (
    AttentionBlock,
    AttentionMetadata,
    DeltaNetWeights,
    DenseMlp,
    ExpertDims,
    LayerDims,
    Linear,
    MoeBlock,
    Ops,
    OpSizes,
    RopeTable,
)
from torch import Tensor

from .config import ModelConfig
from .rope import rope_tables


class Experts(Protocol):
    """What computes experts, wherever they are; see runtime.experts.pager.ExpertPager. `layer` counts the layers with
    experts alone."""

    def mixture(
        self, layer: int, hidden: Tensor, block: MoeBlock, num_tokens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...


class LayerCache(Protocol):
    """K and V blocks of the layers with attention, in order."""

    def layer(self, layer: int) -> tuple[Tensor, Tensor]: ...


class LayerStates(Protocol):
    """States of the layers with Gated DeltaNet, in order."""

    conv: Tensor
    recurrent: Tensor


class Tracer(Protocol):
    """Times a stretch of work (a timeline); see runtime.timeline."""

    def span(self, track: str, name: str, kind: str = "compute", **args: int) -> AbstractContextManager[None]: ...


def expert_dims(config: ModelConfig) -> ExpertDims:
    """The sizes that experts' kernels need, from a model's config."""
    return ExpertDims(
        hidden=config.hidden_size,
        intermediate=config.moe_intermediate_size,
        experts=config.num_experts,
        top_k=config.top_k,
        dtype=config.dtype,
        renormalise=config.norm_topk_prob,
    )


def layer_dims(config: ModelConfig) -> LayerDims:
    """The sizes that kernels need beside the experts', from a model's config."""
    return LayerDims(
        hidden=config.hidden_size,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        experts=config.num_experts,
        vocab=config.vocab_size,
        dtype=config.dtype,
        qk_norm=config.qk_norm,
        clip_qkv=config.clip_qkv or 0.0,
        window=config.sliding_window or 0,
        eps=config.rms_norm_eps,
        attention_gate=config.attention_gate,
        mlp=max(config.shared_intermediate_size, config.mlp_intermediate_size),
        delta=config.delta,
    )


def _norm_sizes(config: ModelConfig) -> tuple[int, int]:
    """Lengths of the q and k norms' weights."""
    if config.qk_norm == "head":
        return config.head_dim, config.head_dim
    if config.qk_norm == "full":
        return config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return 0, 0


def non_expert_bytes(config: ModelConfig, ops: OpSizes, max_context: int) -> int:
    """Device bytes of everything but experts: embeddings, projections, routers, norms and biases (fp32), RoPE."""
    c = config
    linears = [shape for layer in range(c.num_layers) for shape in c.matrices(layer)]
    linears += len(c.moe_layers) * [(1, c.hidden_size)] if c.shared_intermediate_size else []
    biases = layer_dims(c).qkv_size + c.hidden_size if c.attention_bias else 0
    floats = c.num_layers * 2 * c.hidden_size + len(c.attention_layers) * (sum(_norm_sizes(c)) + biases)
    if c.delta is not None:
        vectors = c.delta.channels * c.delta.taps + 2 * c.delta.value_heads + c.delta.value_dim
        floats += len(c.delta_layers) * vectors
    layers = sum(ops.arranged_bytes(n, k) for n, k in linears) + 4 * floats
    vocab = ops.arranged_bytes(c.vocab_size, c.hidden_size) * (1 if c.tie_word_embeddings else 2)
    rope = 4 * max_context * (c.head_dim // 2) * 2
    return layers + vocab + 4 * c.hidden_size + rope


# Matrices that the kernels want as one, by role, and what they are called then; a bias belongs to its matrix.
_MATRICES = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o_proj": ("o_proj",),
    "attn_gate": ("attn_gate",),
    "in_proj": ("in_qkvz", "in_ba"),
    "router": ("router",),
    "mlp_gate_up": ("mlp_gate", "mlp_up"),
    "mlp_down": ("mlp_down",),
    "mlp_score": ("mlp_score",),
}
_BIASES = ("q_bias", "k_bias", "v_bias", "o_bias")


class DecoderLayer:
    """Non-expert weights of one layer, on the device: `matrices` and fp32 `vectors`, by name."""

    def __init__(self) -> None:
        self.matrices: dict[str, Linear] = {}
        self.vectors: dict[str, Tensor] = {}
        self.pending: dict[str, Tensor] = {}

    @cached_property
    def delta(self) -> DeltaNetWeights | None:
        if "in_proj" not in self.matrices:
            return None
        v = self.vectors
        return DeltaNetWeights(self.matrices["in_proj"], v["conv"], v["rate"], v["dt_bias"], v["delta_norm"])

    @cached_property
    def mlp(self) -> DenseMlp | None:
        """The MLP in the place of experts, or the shared expert beside them."""
        if "mlp_down" not in self.matrices:
            return None
        return DenseMlp(self.matrices["mlp_gate_up"], self.matrices["mlp_down"], self.matrices.get("mlp_score"))


class Decoder:
    """Forward pass over a flat batch of tokens; weights arrive one by one through `load`."""

    embed_tokens: Linear
    lm_head: Linear
    final_norm: Tensor

    def __init__(self, config: ModelConfig, ops: Ops, max_context: int) -> None:
        self.config, self.ops = config, ops
        cos, sin = rope_tables(config, max_context)
        self.rope = RopeTable(cos.to(ops.device), sin.to(ops.device))
        self.layers = [DecoderLayer() for _ in range(config.num_layers)]

    def load(self, role: str, layer: int | None, weight: Tensor) -> None:
        """Place one non-expert tensor (roles of models.checkpoint) on the device, arranged where it is a matrix."""
        if layer is None:
            if role == "final_norm":
                self.final_norm = self._vector(weight)
            elif role == "lm_head":
                self.lm_head = self._arrange(weight, self.ops.arrange)
            else:
                self.embed_tokens = self._arrange(weight, self.ops.arrange)
                if self.config.tie_word_embeddings:
                    self.lm_head = self.embed_tokens
            return
        target = self.layers[layer]
        whole = next((name for name, parts in _MATRICES.items() if role in parts), None)
        if whole is None and role not in _BIASES:
            target.vectors[role] = self._vector(weight)
            return
        # Parts of one matrix, and its bias, wait until all are here.
        target.pending[role] = weight
        self._assemble(target)

    def _assemble(self, layer: DecoderLayer) -> None:
        for name, parts in _MATRICES.items():
            biases = [part.replace("_proj", "_bias") for part in parts] if self.config.attention_bias else []
            biases = [name for name in biases if name in _BIASES]
            if all(part in layer.pending for part in (*parts, *biases)):
                weight = torch.cat([layer.pending.pop(part) for part in parts])
                bias = torch.cat([layer.pending.pop(part) for part in biases]) if biases else None
                arrange = self.ops.arrange_mlp if name == "mlp_gate_up" else self.ops.arrange
                layer.matrices[name] = self._arrange(weight, arrange, bias)

    def _vector(self, weight: Tensor) -> Tensor:
        return weight.float().to(self.ops.device)

    def _arrange(self, weight: Tensor, arrange: Callable[[Tensor, Tensor], None], bias: Tensor | None = None) -> Linear:
        n, k = weight.shape
        block = host_zeros(self.ops.arranged_bytes(n, k))
        arrange(weight, block)
        vector = None if bias is None else self._vector(bias)
        return Linear(block.to(self.ops.device), n, k, weight.dtype, vector)

    def tensors(self) -> Iterator[Tensor]:
        """Every device tensor that the decoder holds, once."""
        yield from (self.rope.cos, self.rope.sin, self.final_norm, self.embed_tokens.block)
        if self.lm_head is not self.embed_tokens:
            yield self.lm_head.block
        for layer in self.layers:
            yield from layer.vectors.values()
            for linear in layer.matrices.values():
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
        experts: Experts,
        logit_rows: Tensor,
        tracer: Tracer,
        states: LayerStates | None = None,
    ) -> Tensor:
        """token_ids int64 [T] → fp32 logits [B', vocab] of the rows that `logit_rows` int64 [B'] names.

        Writes the K and V of every token to the cache, and to `states` how far each sequence has come. The logits are
        valid until the next pass.
        """
        ops = self.ops
        with tracer.span("compute", "embed"):
            hidden = ops.embed(token_ids, self.embed_tokens)
            normed = ops.rms_norm(hidden, self.layers[0].vectors["input_norm"])
        attention = delta = moe = 0  # layers of each kind so far
        for index, layer in enumerate(self.layers):
            with tracer.span("compute", f"attention {index}", layer=index):
                if (attends := self.attention_blocks[index]) is not None:
                    hidden = ops.attend(normed, attends, metadata, *cache.layer(attention), hidden)
                    attention += 1
                else:
                    assert states is not None, "a layer with Gated DeltaNet keeps states"
                    assert layer.delta is not None, "a layer has one or the other"
                    mixed = ops.delta_net(normed, layer.delta, metadata, states.conv[delta], states.recurrent[delta])
                    hidden = ops.project_add(mixed, layer.matrices["o_proj"], hidden)
                    delta += 1
            if (block := self.moe_blocks[index]) is not None:
                hidden, normed = experts.mixture(moe, hidden, block, metadata.num_tokens)
                moe += 1
                continue
            assert layer.mlp is not None, "a layer without experts has an MLP"
            with tracer.span("compute", f"mlp {index}", layer=index):
                hidden = ops.mlp_add(ops.rms_norm(hidden, layer.vectors["post_attn_norm"]), layer.mlp, hidden)
                normed = ops.rms_norm(hidden, self._norm_after(index))
        with tracer.span("compute", "logits"):
            # All of them, when sequences only decode.
            sampled = normed if len(logit_rows) == len(normed) else normed[logit_rows]
            return ops.logits(sampled, self.lm_head)

    @cached_property
    def attention_blocks(self) -> list[AttentionBlock | None]:
        """Of each layer with attention, once all weights are here."""
        return [
            AttentionBlock(
                layer.matrices["qkv"], layer.matrices["o_proj"], self.rope, layer.vectors.get("q_norm"),
                layer.vectors.get("k_norm"), layer.matrices.get("attn_gate"),
            )
            if layer.delta is None
            else None
            for layer in self.layers
        ]  # fmt: skip

    @cached_property
    def moe_blocks(self) -> list[MoeBlock | None]:
        """Of each layer with experts, once all weights are here."""
        return [
            MoeBlock(
                self.ops, layer.vectors["post_attn_norm"], layer.matrices["router"], self._norm_after(index), layer.mlp
            )
            if "router" in layer.matrices
            else None
            for index, layer in enumerate(self.layers)
        ]

    def _norm_after(self, index: int) -> Tensor:
        """The norm that follows a layer: the next one's first, or the last of all."""
        return self.layers[index + 1].vectors["input_norm"] if index + 1 < len(self.layers) else self.final_norm
