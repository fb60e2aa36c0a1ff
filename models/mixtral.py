"""Mixtral: renormalised top-k of few large experts, optional sliding window, no QK-norm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .config import ModelConfig, common_fields
from .naming import TensorRoles, moe_roles

# transformers' values for keys that a config.json may leave out.
_DEFAULTS = {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_key_value_heads": 8}


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    hf = {**_DEFAULTS, **hf}
    return ModelConfig(
        arch="mixtral",
        **common_fields(hf),
        num_experts=hf["num_local_experts"],
        top_k=hf["num_experts_per_tok"],
        moe_intermediate_size=hf["intermediate_size"],
        sliding_window=hf.get("sliding_window"),
        norm_topk_prob=True,
        qk_norm="none",
        attention_bias=False,
        clip_qkv=None,
    )


def tensor_roles(config: ModelConfig) -> TensorRoles:
    """On the Hub: block_sparse_moe with w1 (gate), w3 (up), w2 (down); newer files may use mlp and fused tensors."""
    return moe_roles(config, {"block_sparse_moe": ("w1", "w3", "w2"), "mlp": ("gate_proj", "up_proj", "down_proj")})
