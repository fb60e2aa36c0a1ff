"""Rotary position embeddings (RoFormer, arXiv 2104.09864) and the scalings that these families use."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .config import ConfigError, ModelConfig


def rope_tables(config: ModelConfig, max_positions: int) -> tuple[Tensor, Tensor]:
    """cos, sin fp32 [max_positions, head_dim/2] with the scaling's attention factor folded in.

    Raises ConfigError on a scaling that is not known: ignoring it would give wrong tokens without a sign.
    """
    frequencies, factor = _frequencies(config)
    angles = torch.arange(max_positions, dtype=torch.float32)[:, None] * frequencies[None]
    return (angles.cos() * factor).contiguous(), (angles.sin() * factor).contiguous()


def _frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Angular frequencies fp32 [head_dim/2] and the factor on cos and sin."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    base = 1.0 / config.rope_theta**exponents
    if config.rope_scaling is None:
        return base, 1.0
    kind, params = config.rope_scaling.kind, config.rope_scaling.params
    if kind not in _SCALINGS:
        known = ", ".join(["default", *_SCALINGS])
        raise ConfigError(f"config.json: rope scaling {kind!r} is not supported; these are: {known}")
    try:
        return _SCALINGS[kind](config, params, base)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"config.json: rope scaling {kind!r} lacks or misspells {error}") from None


def _linear(config: ModelConfig, params: Mapping[str, Any], base: Tensor) -> tuple[Tensor, float]:
    """Position interpolation (arXiv 2306.15595): positions divided by `factor`."""
    return base / params["factor"], 1.0


def _llama3(config: ModelConfig, params: Mapping[str, Any], base: Tensor) -> tuple[Tensor, float]:
    """Llama 3.1: long waves divided by `factor`, short ones kept, a ramp between."""
    low, high = params["low_freq_factor"], params["high_freq_factor"]
    turns = params["original_max_position_embeddings"] * base / (2 * math.pi)
    ramp = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - ramp) * base / params["factor"] + ramp * base, 1.0


def _yarn(config: ModelConfig, params: Mapping[str, Any], base: Tensor) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071): interpolate the dimensions that turn less than beta_slow times, keep those above
    beta_fast, and scale attention by 0.1·ln(factor) + 1.
    """
    original = params.get("original_max_position_embeddings") or config.max_position_embeddings
    factor = params["factor"]
    dims = config.head_dim

    def dimension_of(turns: float) -> float:
        return dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = dimension_of(params.get("beta_fast") or 32), dimension_of(params.get("beta_slow") or 1)
    if params.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    steps = torch.arange(dims // 2, dtype=torch.float32)
    keep = 1 - ((steps - low) / (high - low if high != low else 0.001)).clamp(0, 1)

    def attention_scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention = params.get("attention_factor")
    if attention is None:
        attention = attention_scale(1.0)
        if params.get("mscale") and params.get("mscale_all_dim"):
            attention = attention_scale(params["mscale"]) / attention_scale(params["mscale_all_dim"])
    return (1 - keep) * base / factor + keep * base, float(attention)


_SCALINGS: dict[str, Callable[[ModelConfig, Mapping[str, Any], Tensor], tuple[Tensor, float]]] = {
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
