"""Random small models made by transformers, for parity tests."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

# Where flash-linear-attention is installed transformers takes its kernels, which no CPU runs, when it imports this.
with pytest.MonkeyPatch.context() as hidden:
    hidden.setitem(sys.modules, "fla", None)
    import transformers.models.qwen3_next.modeling_qwen3_next

_BASE = dict[str, Any](
    vocab_size=96, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=128, initializer_range=0.15, pad_token_id=None, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_ARCHS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": (
        "Mixtral",
        dict(intermediate_size=40, num_local_experts=5, num_experts_per_tok=2, sliding_window=None),
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        dict(
            moe_intermediate_size=24, intermediate_size=64, num_experts=7, num_experts_per_tok=3, head_dim=20,
            norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
        ),
    ),
    "qwen3_next": (
        "Qwen3Next",
        dict(
            num_hidden_layers=4, moe_intermediate_size=24, shared_expert_intermediate_size=20, intermediate_size=64,
            num_experts=7, num_experts_per_tok=3, head_dim=20, norm_topk_prob=True, decoder_sparse_step=1,
            mlp_only_layers=[], linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=12,
            linear_value_head_dim=10, linear_conv_kernel_dim=4,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.4},
        ),
    ),
    "olmoe": ("Olmoe", dict(intermediate_size=24, num_experts=6, num_experts_per_tok=4, norm_topk_prob=False)),
}  # fmt: skip


def save_random_model(arch: str, directory: Path, seed: int = 0, dtype=torch.float32, max_shard="1GB", **overrides):
    """Save a random `arch` model to `directory`; returns it in fp32, holding exactly the saved weights."""
    name, defaults = _ARCHS[arch]
    config = getattr(transformers, f"{name}Config")(**{**_BASE, **defaults, **overrides})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            # Norm weights of 1 and biases of 0 would hide a norm or a bias that is left out.
            if "norm" in key:
                parameter.uniform_(0.5, 1.5)
            elif key.endswith("bias"):
                parameter.normal_(std=0.2)
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard)
    return model.float()
