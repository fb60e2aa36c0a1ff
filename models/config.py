"""ModelConfig: what a checkpoint's config.json says, checked, in the field's standard terms."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from fluxmoe.kernels.ops import DeltaNetDims

from .json_files import read_json

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# How config.json spells the fields that we call otherwise, so that an error names what the reader has to change.
_HF_KEYS = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "top_k": "num_experts_per_tok",
}
# Several times what any published model has. Tables of layers, experts and tensors are made from these numbers, so a
# damaged one must be refused before.
_MOST = {
    "vocab_size": 1 << 22, "hidden_size": 1 << 16, "num_layers": 512, "num_heads": 1024, "num_kv_heads": 1024,
    "head_dim": 4096, "num_experts": 4096, "top_k": 4096, "moe_intermediate_size": 1 << 17,
    "max_position_embeddings": 1 << 27,
}  # fmt: skip
_MOST_INTERMEDIATE, _MOST_DELTA, _MOST_WINDOW, _MOST_EXPERTS = 1 << 18, 4096, 1 << 27, 1 << 16


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
    rotary_dim: leading dimensions of a head that rotate; None for all. attention_gate: a sigmoid gate on the output of
    attention. shared_intermediate_size: of an expert that every token uses; 0 for none. delta, delta_layers: sizes of
    Gated DeltaNet, and the layers that have it in the place of attention. dense_layers: layers that have an ordinary
    SwiGLU MLP of mlp_intermediate_size in the place of experts.
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
    rotary_dim: int | None = None
    attention_gate: bool = False
    shared_intermediate_size: int = 0
    delta: DeltaNetDims | None = None
    delta_layers: tuple[int, ...] = ()
    dense_layers: tuple[int, ...] = ()
    mlp_intermediate_size: int = 0

    def __post_init__(self) -> None:
        for name, most in _MOST.items():
            value = getattr(self, name)
            if not _is_int(value, 1, most):
                key = f" ({_HF_KEYS[name]})" if name in _HF_KEYS else ""
                raise ConfigError(f"{name}{key} must be a positive integer up to {most}, got {value!r}")
        if self.num_layers * self.num_experts > _MOST_EXPERTS:
            raise ConfigError(
                f"num_experts {self.num_experts} in each of {self.num_layers} layers are over {_MOST_EXPERTS} experts"
            )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"{self.num_heads} attention heads cannot share {self.num_kv_heads} key-value heads")
        if self.top_k > self.num_experts:
            raise ConfigError(f"a token cannot choose {self.top_k} of {self.num_experts} experts")
        if self.head_dim % 2:
            raise ConfigError(f"rotary embeddings need an even head_dim, got {self.head_dim}")
        if self.rotary_dim is not None and not (0 < self.rotary_dim <= self.head_dim and self.rotary_dim % 2 == 0):
            raise ConfigError(f"{self.rotary_dim} of {self.head_dim} dimensions of a head cannot rotate in pairs")
        if not _is_int(self.shared_intermediate_size, 0, _MOST_INTERMEDIATE):
            raise ConfigError(
                f"shared_expert_intermediate_size is {self.shared_intermediate_size!r}; give an integer up to "
                f"{_MOST_INTERMEDIATE}"
            )
        if not self.moe_layers:
            raise ConfigError(
                "a model needs at least one layer with experts; mlp_only_layers and decoder_sparse_step leave none"
            )
        if self.dense_layers and not _is_int(self.mlp_intermediate_size, 1, _MOST_INTERMEDIATE):
            raise ConfigError(
                f"intermediate_size of the layers without experts is {self.mlp_intermediate_size!r}; give a positive "
                f"integer up to {_MOST_INTERMEDIATE}"
            )
        if self.delta is not None:
            for name, value in asdict(self.delta).items():
                if not _is_int(value, 2 if name == "taps" else 1, _MOST_DELTA):
                    raise ConfigError(
                        f"{name} of the linear attention must be a positive integer up to {_MOST_DELTA}, got {value!r}"
                    )
            if self.delta.value_heads % self.delta.key_heads:
                raise ConfigError(
                    f"{self.delta.value_heads} value heads cannot share {self.delta.key_heads} key heads of the linear "
                    "attention"
                )
            if not self.attention_layers:
                raise ConfigError("a model needs at least one layer of full attention")
        if self.sliding_window is not None and not _is_int(self.sliding_window, 1, _MOST_WINDOW):
            raise ConfigError(
                f"sliding_window must be a positive integer up to {_MOST_WINDOW} or null, got {self.sliding_window!r}"
            )
        if not _is_number(self.rms_norm_eps) or self.rms_norm_eps < 0:
            raise ConfigError(f"rms_norm_eps must be a number of at least 0, got {self.rms_norm_eps!r}")
        if not _is_number(self.rope_theta) or self.rope_theta <= 0:
            raise ConfigError(f"rope_theta must be a positive number, got {self.rope_theta!r}")
        if self.clip_qkv is not None and (not _is_number(self.clip_qkv) or self.clip_qkv <= 0):
            raise ConfigError(f"clip_qkv must be a positive number or null, got {self.clip_qkv!r}")
        if not all(_is_int(token) for token in self.eos_token_ids):
            raise ConfigError(f"eos_token_id must be an integer, a list of them or null, got {self.eos_token_ids!r}")
        if self.bos_token_id is not None and not _is_int(self.bos_token_id):
            raise ConfigError(f"bos_token_id must be an integer or null, got {self.bos_token_id!r}")

    @property
    def expert_params(self) -> int:
        """Parameters of one expert."""
        return 3 * self.hidden_size * self.moe_intermediate_size

    @property
    def expert_bytes_total(self) -> int:
        """Bytes of all experts of all layers."""
        return len(self.moe_layers) * self.num_experts * self.expert_params * self.dtype.itemsize

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Layers with experts. Whatever holds or places experts numbers these alone: its layer i is moe_layers[i]."""
        dense = frozenset(self.dense_layers)
        return tuple(layer for layer in range(self.num_layers) if layer not in dense)

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Layers with attention, which alone have a KV cache."""
        delta = frozenset(self.delta_layers)
        return tuple(layer for layer in range(self.num_layers) if layer not in delta)

    def matrices(self, layer: int) -> list[tuple[int, int]]:
        """Shapes [n, k] of a layer's matrices, as kernels multiply them, but for experts and a shared one's score."""
        h, heads = self.hidden_size, self.num_heads * self.head_dim
        if self.delta is not None and layer in self.delta_layers:
            shapes = [(self.delta.projected, h), (h, self.delta.value_size)]
        else:
            shapes = [(heads + 2 * self.num_kv_heads * self.head_dim, h), (h, heads)]
            shapes += [(heads, h)] if self.attention_gate else []
        dense = layer in self.dense_layers
        shapes += [] if dense else [(self.num_experts, h)]
        mlp = self.mlp_intermediate_size if dense else self.shared_intermediate_size
        return shapes + ([(2 * mlp, h), (h, mlp)] if mlp else [])

    @property
    def non_expert_bytes(self) -> int:
        """Bytes of all other matrices."""
        layers = sum(n * k for layer in range(self.num_layers) for n, k in self.matrices(layer))
        vocab = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return (layers + vocab) * self.dtype.itemsize

    @property
    def kv_bytes_per_token(self) -> int:
        """K and V of one token in all layers that have them."""
        return 2 * len(self.attention_layers) * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def state_bytes_per_sequence(self) -> int:
        """Recurrent states of one sequence, whatever its length: fp32, and the convolution's inputs."""
        if self.delta is None:
            return 0
        matrices = 4 * self.delta.value_heads * self.delta.key_dim * self.delta.value_dim
        return len(self.delta_layers) * (matrices + (self.delta.taps - 1) * self.delta.channels * self.dtype.itemsize)


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
    if not isinstance(arch, str) or arch not in ARCHITECTURES:
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
    except (TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ConfigError(f"{path}: a value has the wrong type ({error})") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object, got a {type(value).__name__}")
    return value


def _is_int(value: Any, least: float = -math.inf, most: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_number(value: Any) -> bool:
    """A finite number; JSON as Python reads it also knows NaN and Infinity, and integers that are no float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def layer_range(hf: Mapping[str, Any]) -> range:
    """The layers; none where their count is no integer, or none that can be meant: that is reported by its name."""
    layers = hf["num_hidden_layers"]
    return range(layers if _is_int(layers, 1, _MOST["num_layers"]) else 0)


def flag(hf: Mapping[str, Any], key: str, default: bool = False) -> bool:
    """A switch of config.json; null and a missing key mean `default`. Any other value than a boolean is refused."""
    value = hf.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ConfigError(f"{key} must be true or false, got {value!r}")
    return value


def mlp_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """dense_layers and their size, from mlp_only_layers, decoder_sparse_step and intermediate_size.

    As in transformers' modeling_qwen3_moe.py, a layer has experts if mlp_only_layers does not name it and its number,
    counted from 1, is a multiple of decoder_sparse_step; numbers of layers that do not exist mean nothing.
    """
    step, only = hf.get("decoder_sparse_step", 1), hf.get("mlp_only_layers")
    only = [] if only is None else only
    if not isinstance(only, list) or not all(_is_int(layer) for layer in only):
        raise ConfigError(f"mlp_only_layers must be a list of layer numbers or null, got {only!r}")
    if not _is_int(step, 1):
        raise ConfigError(f"decoder_sparse_step must be a positive integer, got {step!r}")
    named = frozenset(only)
    dense = tuple(layer for layer in layer_range(hf) if layer in named or (layer + 1) % step)
    return dict(dense_layers=dense, mlp_intermediate_size=hf["intermediate_size"] if dense else 0)


def common_fields(hf: Mapping[str, Any], partial_rotary: bool = False) -> dict[str, Any]:
    """The fields whose keys all architectures spell alike; both spellings of transformers 4 and 5.

    Where transformers' defaults differ between architectures, `hf` must already hold them. partial_rotary: whether
    partial_rotary_factor is known to the architecture.
    """
    quantization = hf.get("quantization_config")
    # By fluxmoe's name vLLM knows a packed checkpoint; all of its weights are as they were.
    if quantization and not (isinstance(quantization, dict) and quantization.get("quant_method") == "fluxmoe"):
        raise ConfigError("quantization_config is not supported; give the unquantized bfloat16 or float32 checkpoint")
    if hf.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ConfigError(f"hidden_act {hf['hidden_act']!r} is not supported; experts must use silu")
    name = str(hf.get("dtype") or hf.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(f"dtype {name} is not supported; convert the checkpoint to {' or '.join(DTYPES)}")
    theta, scaling, rotating = _rope(hf)
    if rotating != 1.0 and not partial_rotary:
        raise ConfigError("partial_rotary_factor other than 1 is not supported by this architecture")
    hidden, heads = hf["hidden_size"], hf["num_attention_heads"]
    kv_heads, head_dim, eos = hf.get("num_key_value_heads"), hf.get("head_dim"), hf.get("eos_token_id")
    if head_dim is None:
        if _is_int(hidden) and _is_int(heads) and heads > 0 and hidden % heads:
            raise ConfigError(f"hidden_size {hidden} is no multiple of num_attention_heads {heads}; give head_dim")
        # A count of heads that is no positive integer is reported by its own name, not as a division by it.
        head_dim = hidden // max(1, heads)
    if not _is_number(rotating) or not 0 < rotating <= 1:
        raise ConfigError(f"partial_rotary_factor is a share of each head, over 0 and at most 1; got {rotating!r}")
    return dict(
        vocab_size=hf["vocab_size"],
        hidden_size=hidden,
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=heads if kv_heads is None else kv_heads,
        head_dim=head_dim,
        rms_norm_eps=hf["rms_norm_eps"],
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=hf["max_position_embeddings"],
        tie_word_embeddings=flag(hf, "tie_word_embeddings"),
        dtype=DTYPES[name],
        eos_token_ids=() if eos is None else (tuple(eos) if isinstance(eos, list) else (eos,)),
        bos_token_id=hf.get("bos_token_id"),
        rotary_dim=int(head_dim * rotating) if partial_rotary and _is_int(head_dim) else None,
    )


def _rope(hf: Mapping[str, Any]) -> tuple[Any, RopeScaling | None, Any]:
    """rope_theta, the scaling and the share of each head that rotates, in transformers' order of precedence."""
    key = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    rope = hf.get(key) or {}
    if not isinstance(rope, dict):
        raise ConfigError(f"{key} must be an object or null, got {rope!r}")
    if any(isinstance(value, dict) for value in rope.values()):
        raise ConfigError(f"{key} differs by layer type, which is not supported by this architecture")
    rope = dict(rope)
    theta = rope.pop("rope_theta", hf["rope_theta"])
    old_kind = rope.pop("type", "default")
    kind = rope.pop("rope_type", old_kind)
    if not isinstance(kind, str):
        raise ConfigError(f"rope_type of {key} must be a string, got {kind!r}")
    rotating = rope.pop("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if hf.get("original_max_position_embeddings") is not None:
        rope["original_max_position_embeddings"] = hf["original_max_position_embeddings"]
    return theta, None if kind == "default" else RopeScaling(kind, rope), 1.0 if rotating is None else rotating
