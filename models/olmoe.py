"""OLMoE: RMSNorm over the whole query and key projections, optional clipping of q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .config import ModelConfig, common_fields, flag
from .naming import TensorRoles, moe_roles

# transformers' values for keys that a config.json may leave out.
_DEFAULTS = {"rms_norm_eps": 1e-5, "rope_theta": 1e4}


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    hf = {**_DEFAULTS, **hf}
    return ModelConfig(
        arch="olmoe",
        **common_fields(hf),
        num_experts=hf["num_experts"] if "num_experts" in hf else hf["num_local_experts"],
        top_k=hf["num_experts_per_tok"],
        moe_intermediate_size=hf["intermediate_size"],
        sliding_window=None,
        norm_topk_prob=flag(hf, "norm_topk_prob"),
        qk_norm="full",
        attention_bias=flag(hf, "attention_bias"),
        clip_qkv=hf.get("clip_qkv"),
    )


def tensor_roles(config: ModelConfig) -> TensorRoles:
    return moe_roles(config, {"mlp": ("gate_proj", "up_proj", "down_proj")})
