"""ModelConfig: what a checkpoint's config.json says, checked, in the field's standard terms."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class ConfigError(ValueError):
    """A config.json that is missing, broken, or asks for what is not supported."""


@dataclass(frozen=True)
class RopeScaling:
    """A variant of rotary embeddings; `kind` as in Hugging Face's rope_type, `params` its numbers."""

    kind: str
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of a mixture-of-experts decoder.

    qk_norm: none, head (RMSNorm over each head) or full (over the whole projection). sliding_window: keys that
    a query sees, itself included; None for all. norm_topk_prob: renormalise the chosen router probabilities.
    """

    arch: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    top_k: int
    moe_intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    sliding_window: int | None
    norm_topk_prob: bool
    qk_norm: str
    attention_bias: bool
    clip_qkv: float | None
    dtype: torch.dtype
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None

    def __post_init__(self) -> None:
        for name in (
            "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "num_experts",
            "top_k", "moe_intermediate_size", "max_position_embeddings",
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a positive integer, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"{self.num_heads} attention heads cannot share {self.num_kv_heads} key-value heads")
        if self.top_k > self.num_experts:
            raise ConfigError(f"a token cannot choose {self.top_k} of {self.num_experts} experts")
        if self.head_dim % 2:
            raise ConfigError(f"rotary embeddings need an even head_dim, got {self.head_dim}")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ConfigError(f"sliding_window must be positive or null, got {self.sliding_window}")

    @property
    def gate_up_shape(self) -> tuple[int, int]:
        return 2 * self.moe_intermediate_size, self.hidden_size

    @property
    def down_shape(self) -> tuple[int, int]:
        return self.hidden_size, self.moe_intermediate_size

    @property
    def expert_params(self) -> int:
        """Parameters of one expert."""
        return 3 * self.hidden_size * self.moe_intermediate_size

    @property
    def expert_bytes_total(self) -> int:
        """Bytes of all experts of all layers."""
        return self.num_layers * self.num_experts * self.expert_params * self.dtype.itemsize

    @property
    def non_expert_bytes(self) -> int:
        """Bytes of all other matrices."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        layer = attention + self.num_experts * self.hidden_size
        vocab = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return (self.num_layers * layer + vocab) * self.dtype.itemsize

    @property
    def kv_bytes_per_token(self) -> int:
        """K and V of one token in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize


def load_config(model_dir: Path | str) -> ModelConfig:
    """Read `model_dir`/config.json (and generation_config.json for the end tokens). Raises ConfigError."""
    from . import ARCHITECTURES

    directory = Path(model_dir)
    if not directory.is_dir():
        raise ConfigError(f"{directory} is not a directory; give the folder of a Hugging Face checkpoint")
    path = directory / "config.json"
    if not path.exists():
        raise ConfigError(f"{path} does not exist; a checkpoint needs its config.json")
    hf = _read_json(path)
    arch = hf.get("model_type")
    if arch not in ARCHITECTURES:
        raise ConfigError(f"{path}: architecture {arch!r} is not supported; these are: {', '.join(ARCHITECTURES)}")
    generation = directory / "generation_config.json"
    if generation.exists():
        eos = _read_json(generation).get("eos_token_id")
        if eos is not None:
            hf["eos_token_id"] = eos
    try:
        return ARCHITECTURES[arch].config_from_hf(hf)
    except KeyError as error:
        raise ConfigError(f"{path}: key {error.args[0]!r} is missing") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (TypeError, AttributeError, ArithmeticError) as error:
        raise ConfigError(f"{path}: a value has the wrong type ({error})") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object, got a {type(value).__name__}")
    return value


def common_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The fields whose keys all architectures spell alike; both spellings of transformers 4 and 5."""
    if hf.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ConfigError(f"hidden_act {hf['hidden_act']!r} is not supported; experts must use silu")
    name = str(hf.get("dtype") or hf.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(f"dtype {name} is not supported; convert the checkpoint to {' or '.join(DTYPES)}")
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", hf.get("rope_theta", 10000.0))
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    if rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ConfigError("partial_rotary_factor other than 1 is not supported by this architecture")
    heads = hf["num_attention_heads"]
    eos = hf.get("eos_token_id")
    return dict(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        rms_norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
        rope_theta=float(theta),
        rope_scaling=None if kind == "default" else RopeScaling(kind, rope),
        max_position_embeddings=hf["max_position_embeddings"],
        tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
        dtype=DTYPES[name],
        eos_token_ids=() if eos is None else (tuple(eos) if isinstance(eos, list) else (eos,)),
        bos_token_id=hf.get("bos_token_id"),
    )
