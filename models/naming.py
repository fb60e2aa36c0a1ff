"""Which tensor of a checkpoint plays which role, and the shape that it must have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .config import ModelConfig

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Role:
    """What a tensor is.

    kind: a non-expert role (embed_tokens, q_proj, …), or gate, up, down of one `expert`, or fused_gate_up
    [E, 2I, H], fused_down [E, H, I] of all experts of a layer.
    """

    kind: str
    layer: int | None
    expert: int | None
    shape: Shape
    # Checkpoints may hold it in fp32, whatever the dtype of the rest.
    may_be_fp32: bool = False

    @property
    def is_expert(self) -> bool:
        return self.expert is not None or self.kind.startswith("fused")


@dataclass(frozen=True)
class TensorRoles:
    """required: name → role of every non-expert tensor. expert_schemes: the accepted ways to store the experts of each
    layer that has some; every one must match one of them completely. unused: prefixes of tensors that inference does
    not need.
    """

    required: Mapping[str, Role]
    expert_schemes: tuple[tuple[Mapping[str, Role], ...], ...]
    unused: tuple[str, ...] = ()


def moe_roles(config: ModelConfig, blocks: Mapping[str, tuple[str, str, str]]) -> TensorRoles:
    """Roles for a decoder whose MoE block is called one of `blocks`: block name → names of gate, up, down.

    Layers without experts have an MLP called mlp.
    """
    c = config
    h, i, e = c.hidden_size, c.moe_intermediate_size, c.num_experts
    required = {
        "model.embed_tokens.weight": Role("embed_tokens", None, None, (c.vocab_size, h)),
        "model.norm.weight": Role("final_norm", None, None, (h,)),
    }
    if not c.tie_word_embeddings:
        required["lm_head.weight"] = Role("lm_head", None, None, (c.vocab_size, h))
    schemes, attention_layers = [], frozenset(c.attention_layers)
    for layer in range(c.num_layers):
        prefix = f"model.layers.{layer}"
        shapes: dict[str, tuple[str, Shape]] = {
            "input_layernorm.weight": ("input_norm", (h,)),
            "post_attention_layernorm.weight": ("post_attn_norm", (h,)),
        }
        if layer in attention_layers:
            shapes |= {f"self_attn.{name}": role for name, role in _attention(c).items()}
        required |= {f"{prefix}.{name}": Role(kind, layer, None, shape) for name, (kind, shape) in shapes.items()}
        if layer in c.dense_layers:
            required |= mlp_roles(f"{prefix}.mlp", h, c.mlp_intermediate_size, layer)
            continue
        ways = []
        for block, (gate, up, down) in blocks.items():
            router = {f"{prefix}.{block}.gate.weight": Role("router", layer, None, (e, h))}
            single, experts = dict(router), f"{prefix}.{block}.experts"
            for expert in range(e):
                single |= {
                    f"{experts}.{expert}.{gate}.weight": Role("gate", layer, expert, (i, h)),
                    f"{experts}.{expert}.{up}.weight": Role("up", layer, expert, (i, h)),
                    f"{experts}.{expert}.{down}.weight": Role("down", layer, expert, (h, i)),
                }
            ways.append(single)
            ways.append(
                {
                    **router,
                    f"{experts}.gate_up_proj": Role("fused_gate_up", layer, None, (e, 2 * i, h)),
                    f"{experts}.down_proj": Role("fused_down", layer, None, (e, h, i)),
                }
            )
        schemes.append(tuple(ways))
    return TensorRoles(required, tuple(schemes))


def mlp_roles(prefix: str, hidden: int, intermediate: int, layer: int | None = None) -> dict[str, Role]:
    """name → role of an MLP that every token uses: that of a layer without experts, or a shared expert."""
    return {
        f"{prefix}.gate_proj.weight": Role("mlp_gate", layer, None, (intermediate, hidden)),
        f"{prefix}.up_proj.weight": Role("mlp_up", layer, None, (intermediate, hidden)),
        f"{prefix}.down_proj.weight": Role("mlp_down", layer, None, (hidden, intermediate)),
    }


def _attention(c: ModelConfig) -> dict[str, tuple[str, Shape]]:
    """name → (role, shape) of a layer's attention."""
    h, q, kv = c.hidden_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    shapes: dict[str, tuple[str, Shape]] = {
        # A gate lies beside each head's query.
        "q_proj.weight": ("q_proj", (2 * q if c.attention_gate else q, h)),
        "k_proj.weight": ("k_proj", (kv, h)),
        "v_proj.weight": ("v_proj", (kv, h)),
        "o_proj.weight": ("o_proj", (h, q)),
    }
    if c.attention_bias:
        for part, size in (("q", q), ("k", kv), ("v", kv), ("o", h)):
            shapes[f"{part}_proj.bias"] = (f"{part}_bias", (size,))
    if c.qk_norm != "none":
        head = c.qk_norm == "head"
        shapes["q_norm.weight"] = ("q_norm", (c.head_dim if head else q,))
        shapes["k_norm.weight"] = ("k_norm", (c.head_dim if head else kv,))
    return shapes
