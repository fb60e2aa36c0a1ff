"""Qwen3-MoE: many small experts, RMSNorm on every query and key head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .config import ModelConfig, common_fields, flag, mlp_fields
from .naming import TensorRoles, moe_roles

# transformers' values for keys that a config.json may leave out.
_DEFAULTS = {
    "rms_norm_eps": 1e-6, "rope_theta": 1e4, "num_key_value_heads": 4, "sliding_window": 4096,
    "intermediate_size": 6144,
}  # fmt: skip


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    hf = {**_DEFAULTS, **hf}
    return ModelConfig(
        arch="qwen3_moe",
        **common_fields(hf),
        **mlp_fields(hf),
        num_experts=hf["num_experts"] if "num_experts" in hf else hf["num_local_experts"],
        top_k=hf["num_experts_per_tok"],
        moe_intermediate_size=hf["moe_intermediate_size"],
        # As in transformers, max_window_layers plays no role in this architecture.
        sliding_window=hf["sliding_window"] if flag(hf, "use_sliding_window") else None,
        norm_topk_prob=flag(hf, "norm_topk_prob"),
        qk_norm="head",
        attention_bias=flag(hf, "attention_bias"),
        clip_qkv=None,
    )


def tensor_roles(config: ModelConfig) -> TensorRoles:
    return moe_roles(config, {"mlp": ("gate_proj", "up_proj", "down_proj")})
