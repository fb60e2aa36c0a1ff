"""Qwen3-Next: Gated DeltaNet in three of four layers, gated attention in the fourth, 512 experts and a shared one.

A checkpoint keeps what belongs to a head together (each head's query beside its gate; q, k, v, z of a group of heads),
and norm weights as their distance from 1. `place` puts rows in the order that the decoder's kernels want.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fluxmoe.kernels.ops import DeltaNetDims
from torch import Tensor, cat

from .config import ConfigError, ModelConfig, common_fields, flag, layer_range, mlp_fields
from .naming import Role, TensorRoles, mlp_roles, moe_roles
from .rope import rotary_order

# transformers' values for keys that a config.json may leave out.
_DEFAULTS = {
    "rms_norm_eps": 1e-6, "rope_theta": 1e4, "num_key_value_heads": 2, "head_dim": 256, "partial_rotary_factor": 0.25,
    "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "full_attention_interval": 4,
    "shared_expert_intermediate_size": 512, "intermediate_size": 5632,
}  # fmt: skip
# Norm weights that a checkpoint keeps as their distance from 1.
ZERO_CENTRED = frozenset({"input_norm", "post_attn_norm", "q_norm", "k_norm", "final_norm"})
_KINDS = {"linear_attention": True, "full_attention": False}


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    hf = {**_DEFAULTS, **hf}
    if flag(hf, "attention_bias"):
        raise ConfigError("attention_bias is not supported by this architecture")
    return ModelConfig(
        arch="qwen3_next",
        **common_fields(hf, partial_rotary=True),
        **mlp_fields(hf),
        num_experts=hf["num_experts"] if "num_experts" in hf else hf["num_local_experts"],
        top_k=hf["num_experts_per_tok"],
        moe_intermediate_size=hf["moe_intermediate_size"],
        sliding_window=None,
        norm_topk_prob=flag(hf, "norm_topk_prob", True),
        qk_norm="head",
        attention_bias=False,
        clip_qkv=None,
        attention_gate=True,
        shared_intermediate_size=hf["shared_expert_intermediate_size"],
        delta=DeltaNetDims(
            key_heads=hf["linear_num_key_heads"],
            value_heads=hf["linear_num_value_heads"],
            key_dim=hf["linear_key_head_dim"],
            value_dim=hf["linear_value_head_dim"],
            taps=hf["linear_conv_kernel_dim"],
        ),
        delta_layers=_delta_layers(hf),
    )


def _delta_layers(hf: Mapping[str, Any]) -> tuple[int, ...]:
    kinds, layers = hf.get("layer_types"), layer_range(hf)
    if kinds is None:
        interval = hf["full_attention_interval"]
        if not isinstance(interval, int) or isinstance(interval, bool) or interval < 1:
            raise ConfigError(f"full_attention_interval must be a positive integer, got {interval!r}")
        return tuple(layer for layer in layers if (layer + 1) % interval)
    if not layers:
        return ()
    if not isinstance(kinds, list) or len(kinds) != len(layers) or not set(kinds) <= _KINDS.keys():
        raise ConfigError(
            f"layer_types must name {' or '.join(_KINDS)} for each of {len(layers)} layers, got {kinds!r}"
        )
    return tuple(layer for layer, kind in enumerate(kinds) if _KINDS[kind])


def _delta(config: ModelConfig) -> DeltaNetDims:
    assert config.delta is not None, "every Qwen3-Next has layers with Gated DeltaNet"
    return config.delta


def tensor_roles(config: ModelConfig) -> TensorRoles:
    c, d = config, _delta(config)
    roles = moe_roles(c, {"mlp": ("gate_proj", "up_proj", "down_proj")})
    h = c.hidden_size
    delta = {
        "in_proj_qkvz.weight": Role("in_qkvz", None, None, (2 * d.key_size + 2 * d.value_size, h)),
        "in_proj_ba.weight": Role("in_ba", None, None, (2 * d.value_heads, h)),
        "conv1d.weight": Role("conv", None, None, (d.channels, 1, d.taps)),
        "A_log": Role("a_log", None, None, (d.value_heads,), may_be_fp32=True),
        "dt_bias": Role("dt_bias", None, None, (d.value_heads,), may_be_fp32=True),
        "norm.weight": Role("delta_norm", None, None, (d.value_dim,), may_be_fp32=True),
        "out_proj.weight": Role("o_proj", None, None, (h, d.value_size)),
    }
    shared = {
        **mlp_roles("shared_expert", h, c.shared_intermediate_size),
        "shared_expert_gate.weight": Role("mlp_score", None, None, (1, h)),
    }
    required, moe_layers = dict(roles.required), frozenset(c.moe_layers)
    for layer in range(c.num_layers):
        named = {f"mlp.{name}": role for name, role in shared.items()} if layer in moe_layers else {}
        if layer in c.delta_layers:
            named |= {f"linear_attn.{name}": role for name, role in delta.items()}
        for name, role in named.items():
            required[f"model.layers.{layer}.{name}"] = Role(role.kind, layer, None, role.shape, role.may_be_fp32)
    # Heads that predict further tokens (multi-token prediction) come with the published checkpoints.
    return TensorRoles(required, roles.expert_schemes, unused=("mtp.",))


def place(config: ModelConfig, kind: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(role, tensor) of what a checkpoint's tensor becomes."""
    c, d = config, _delta(config)
    order = rotary_order(c.head_dim, c.rotary_dim)
    if kind == "q_proj":
        heads = weight.view(c.num_heads, 2, c.head_dim, -1)
        yield "q_proj", heads[:, 0, order].flatten(0, 1)
        yield "attn_gate", heads[:, 1].flatten(0, 1)
    elif kind == "k_proj":
        yield kind, weight.view(c.num_kv_heads, c.head_dim, -1)[:, order].flatten(0, 1)
    elif kind in ZERO_CENTRED:
        # Added in fp32, as transformers does it: bf16 would round.
        centred = weight.float() + 1
        yield kind, centred[order] if kind in ("q_norm", "k_norm") else centred
    elif kind == "in_qkvz":
        values = d.value_heads // d.key_heads * d.value_dim
        parts = weight.view(d.key_heads, -1, weight.shape[1]).split([d.key_dim, d.key_dim, values, values], dim=1)
        yield kind, cat([part.flatten(0, 1) for part in parts])
    elif kind == "in_ba":
        yield kind, weight.view(d.key_heads, 2, -1, weight.shape[1]).transpose(0, 1).flatten(0, 2)
    elif kind == "conv":
        yield kind, weight.squeeze(1).clone()
    elif kind == "a_log":
        yield "rate", weight.float().exp()
    else:
        yield kind, weight
