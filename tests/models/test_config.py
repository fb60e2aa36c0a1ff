"""config.json: what transformers reads we read alike, and every value that cannot be meant is one clear error."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fluxmoe.models.config import ConfigError, load_config
from fluxmoe.models.decoder import expert_dims
from transformers import AutoModelForCausalLM

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "dtype": "bfloat16",
}
OWN: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "intermediate_size": 32},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32},
    "olmoe": {"num_experts": 4, "intermediate_size": 32},
    "qwen3_next": {
        "num_experts": 4,
        "moe_intermediate_size": 32,
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
}
CLASSES = {
    "mixtral": transformers.MixtralConfig,
    "qwen3_moe": transformers.Qwen3MoeConfig,
    "olmoe": transformers.OlmoeConfig,
    "qwen3_next": transformers.Qwen3NextConfig,
}


def write(directory: Path, arch: str, **changes) -> Path:
    (directory / "config.json").write_text(json.dumps({"model_type": arch, **SIZES, **OWN[arch], **changes}))
    return directory


def error_of(directory: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(directory)
    return str(caught.value)


@pytest.mark.parametrize("arch", list(OWN))
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 2, "rms_norm_eps": 1e-3, "rope_theta": 5e5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}},
        {"rope_theta": 77.0, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
    ],
    ids=lambda changes: "+".join(changes) or "minimal",
)
def test_fields_are_transformers(arch, changes, tmp_path):
    """Keys that are left out have other defaults in each architecture; a wrong one is wrong tokens, not an error."""
    theirs = CLASSES[arch](**json.loads((write(tmp_path, arch, **changes) / "config.json").read_text()))
    ours = load_config(tmp_path)
    assert ours.arch == arch
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    kind = theirs.rope_parameters["rope_type"]
    assert (ours.rope_scaling.kind if ours.rope_scaling else "default") == kind
    assert ours.head_dim == 8
    assert ours.top_k == 2
    assert ours.num_experts == 4
    assert ours.moe_intermediate_size == 32
    assert ours.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sliding_window": 16},
        {"use_sliding_window": True},
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
        {"use_sliding_window": True, "sliding_window": None},
    ],
    ids=lambda changes: "+".join(changes) or "minimal",
)
def test_sliding_window_of_qwen3_is_transformers(changes, tmp_path):
    theirs = transformers.Qwen3MoeConfig(**changes)
    assert load_config(write(tmp_path, "qwen3_moe", **changes)).sliding_window == theirs.sliding_window


def test_null_heads_of_keys_are_as_many_as_of_queries(tmp_path):
    assert transformers.OlmoeConfig(num_attention_heads=8, num_key_value_heads=None).num_key_value_heads == 8
    assert load_config(write(tmp_path, "olmoe", num_key_value_heads=None)).num_kv_heads == 8


@pytest.mark.parametrize(("arch", "expected"), [("mixtral", True), ("qwen3_moe", False), ("olmoe", False)])
def test_norm_topk_prob_when_left_out(arch, expected, tmp_path):
    assert load_config(write(tmp_path, arch)).norm_topk_prob is expected


def test_qwen3_next_is_read_as_transformers_reads_it(tmp_path):
    """Without layer_types every fourth layer attends; KV exists there alone."""
    write(tmp_path, "qwen3_next", num_hidden_layers=8, layer_types=None, full_attention_interval=4)
    theirs: Any = transformers.Qwen3NextConfig(**json.loads((tmp_path / "config.json").read_text()))
    ours = load_config(tmp_path)
    kinds = ["linear_attention" if i in ours.delta_layers else "full_attention" for i in range(8)]
    assert kinds == theirs.layer_types
    assert ours.rotary_dim == theirs.head_dim * theirs.rope_parameters["partial_rotary_factor"] == 2
    assert ours.delta is not None
    assert ours.delta.value_heads == theirs.linear_num_value_heads
    assert ours.shared_intermediate_size == theirs.shared_expert_intermediate_size
    assert ours.kv_bytes_per_token == 2 * 2 * ours.num_kv_heads * 8 * 2
    assert ours.state_bytes_per_sequence == 6 * (32 * 128 * 128 * 4 + 3 * (2 * 16 * 128 + 32 * 128) * 2)


@pytest.mark.parametrize("arch", ["qwen3_moe", "qwen3_next"])
@pytest.mark.parametrize(
    ("changes", "dense"),
    [
        ({}, ()),
        ({"mlp_only_layers": None}, ()),
        ({"mlp_only_layers": [2, 0, 2]}, (0, 2)),
        ({"mlp_only_layers": [-1, 4]}, ()),  # no layers of this model
        ({"decoder_sparse_step": 2}, (0, 2)),
        ({"decoder_sparse_step": 3, "mlp_only_layers": [1]}, (0, 1, 3)),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3], "intermediate_size": 40}, (0, 2, 3)),
    ],
    ids=str,
)
def test_layers_without_experts_are_transformers(arch, changes, dense, tmp_path):
    kinds = {"layer_types": ["full_attention"] * 4} if arch == "qwen3_next" else {}
    hf = json.loads((write(tmp_path, arch, num_hidden_layers=4, **kinds, **changes) / "config.json").read_text())
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(CLASSES[arch](**hf)).model.layers
    ours = load_config(tmp_path)
    assert ours.dense_layers == dense == tuple(i for i, layer in enumerate(theirs) if not hasattr(layer.mlp, "experts"))
    assert ours.moe_layers == tuple(i for i in range(4) if i not in dense)
    assert ours.expert_bytes_total == len(ours.moe_layers) * 4 * 3 * 64 * 32 * 2
    if dense:
        assert theirs[dense[0]].mlp.up_proj.weight.shape == (ours.mlp_intermediate_size, 64)
    others = [w for name, w in theirs.named_parameters() if w.dim() == 2 and "shared_expert_gate" not in name]
    counted = ours.non_expert_bytes - 2 * 96 * 64 * 2
    assert counted == 2 * sum(w.numel() for w in others)


def test_top_level_original_length_has_priority(tmp_path):
    write(
        tmp_path,
        "mixtral",
        original_max_position_embeddings=32,
        rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    )
    scaling = load_config(tmp_path).rope_scaling
    assert scaling is not None
    assert scaling.params["original_max_position_embeddings"] == 32


def test_sizes_count_what_is_stored(tmp_path):
    config = load_config(write(tmp_path, "mixtral", num_key_value_heads=2))
    assert expert_dims(config).shapes == ((64, 64), (64, 32))
    assert config.expert_params == 64 * 64 + 64 * 32
    assert config.expert_bytes_total == 2 * 4 * (64 * 64 + 64 * 32) * 2
    assert config.kv_bytes_per_token == 2 * 2 * 2 * 8 * 2


@pytest.mark.parametrize(
    ("arch", "changes", "match"),
    [
        ("mixtral", {"num_hidden_layers": 0}, "num_hidden_layers"),
        ("mixtral", {"num_hidden_layers": True}, "num_hidden_layers"),
        ("mixtral", {"num_attention_heads": 0}, "num_attention_heads"),
        ("mixtral", {"num_attention_heads": 6}, "no multiple of num_attention_heads 6"),
        ("mixtral", {"num_key_value_heads": 0}, "num_key_value_heads"),
        ("mixtral", {"head_dim": 0}, "head_dim"),
        ("mixtral", {"head_dim": 7}, "even head_dim"),
        ("mixtral", {"vocab_size": 1.5}, "vocab_size"),
        ("mixtral", {"sliding_window": 1.5}, "sliding_window"),
        ("mixtral", {"sliding_window": True}, "sliding_window"),
        ("mixtral", {"rms_norm_eps": "x"}, "rms_norm_eps"),
        ("mixtral", {"rms_norm_eps": math.nan}, "rms_norm_eps"),
        ("mixtral", {"rms_norm_eps": -1.0}, "rms_norm_eps"),
        ("mixtral", {"rope_theta": "x"}, "rope_theta"),
        ("mixtral", {"rope_theta": 0}, "rope_theta"),
        ("mixtral", {"rope_theta": math.inf}, "rope_theta"),
        ("mixtral", {"rope_scaling": "yarn"}, "rope_scaling must be an object"),
        ("mixtral", {"rope_parameters": {"rope_type": ["linear"]}}, "rope_type"),
        ("mixtral", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "layer type"),
        ("mixtral", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("mixtral", {"eos_token_id": "x"}, "eos_token_id"),
        ("mixtral", {"eos_token_id": [1, None]}, "eos_token_id"),
        ("mixtral", {"bos_token_id": "x"}, "bos_token_id"),
        ("mixtral", {"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false"),
        ("mixtral", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ("mixtral", {"quantization_config": "fluxmoe"}, "quantization_config"),
        ("mixtral", {"dtype": "float16"}, "float16 is not supported; convert"),
        ("mixtral", {"hidden_act": "gelu"}, "hidden_act"),
        ("mixtral", {"model_type": ["mixtral"]}, "these are: mixtral, qwen3_moe, olmoe"),
        ("qwen3_moe", {"decoder_sparse_step": 3}, "at least one layer with experts"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step must be a positive integer, got 0"),
        ("qwen3_moe", {"decoder_sparse_step": 1.0}, "decoder_sparse_step must be a positive integer, got 1.0"),
        ("qwen3_moe", {"decoder_sparse_step": None}, "decoder_sparse_step must be a positive integer, got None"),
        ("qwen3_moe", {"mlp_only_layers": [0, 1]}, "at least one layer with experts"),
        ("qwen3_moe", {"mlp_only_layers": 1}, "mlp_only_layers must be a list of layer numbers or null, got 1"),
        ("qwen3_moe", {"mlp_only_layers": ["1"]}, "mlp_only_layers must be a list of layer numbers or null"),
        ("qwen3_moe", {"mlp_only_layers": [True]}, "mlp_only_layers must be a list of layer numbers or null"),
        ("qwen3_moe", {"mlp_only_layers": [1], "intermediate_size": 0}, "intermediate_size of the layers without"),
        ("qwen3_moe", {"mlp_only_layers": [1], "intermediate_size": "x"}, "intermediate_size of the layers without"),
        ("qwen3_moe", {"num_hidden_layers": "2"}, "num_hidden_layers"),
        ("qwen3_moe", {"use_sliding_window": 1}, "use_sliding_window must be true or false"),
        ("qwen3_moe", {"attention_bias": "yes"}, "attention_bias must be true or false"),
        ("qwen3_next", {"mlp_only_layers": [0, 1]}, "at least one layer with experts"),
        ("qwen3_next", {"attention_bias": True}, "attention_bias"),
        ("qwen3_next", {"layer_types": ["linear_attention"] * 2}, "at least one layer of full attention"),
        ("qwen3_next", {"layer_types": ["full_attention"]}, "for each of 2 layers"),
        ("qwen3_next", {"layer_types": ["full_attention", "sliding"]}, "linear_attention or full_attention"),
        ("qwen3_next", {"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        ("qwen3_next", {"partial_rotary_factor": 0.4}, "3 of 8 dimensions"),
        ("qwen3_next", {"linear_num_value_heads": 24}, "24 value heads cannot share 16 key heads"),
        ("qwen3_next", {"linear_conv_kernel_dim": 1}, "taps"),
        ("qwen3_next", {"shared_expert_intermediate_size": -1}, "shared_expert_intermediate_size"),
        ("olmoe", {"norm_topk_prob": 0}, "norm_topk_prob must be true or false"),
        ("olmoe", {"clip_qkv": "x"}, "clip_qkv"),
        ("olmoe", {"clip_qkv": -1.0}, "clip_qkv"),
    ],
)
def test_values_that_cannot_be_meant(arch, changes, match, tmp_path):
    message = error_of(write(tmp_path, arch, **changes))
    assert match in message
    assert str(tmp_path / "config.json") in message
    assert "\n" not in message


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers", "num_local_experts"])
def test_missing_key_is_named(key, tmp_path):
    path = write(tmp_path, "mixtral") / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))
    assert f"{key!r} is missing" in error_of(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"{", b"", b"\xff", b"[" * 100_000, b'{"a": 1' + b"0" * 5000 + b"}"],
    ids=["cut", "empty", "not-utf8", "deep", "huge-number"],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_files_that_are_not_json(content, name, tmp_path):
    write(tmp_path, "mixtral")
    (tmp_path / name).write_bytes(content)
    message = error_of(tmp_path)
    assert "not valid JSON" in message
    assert str(tmp_path / name) in message


def test_directory_without_config(tmp_path):
    assert "config.json does not exist" in error_of(tmp_path)
    assert "is not a directory" in error_of(tmp_path / "gone")
    (tmp_path / "config.json").mkdir()
    assert "config.json cannot be read" in error_of(tmp_path)
