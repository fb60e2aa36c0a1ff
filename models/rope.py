"""Rotary position embeddings (RoFormer, arXiv 2104.09864) and the scalings that these families use."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import ConfigError, ModelConfig


def rope_tables(config: ModelConfig, max_positions: int) -> tuple[Tensor, Tensor]:
    """cos, sin fp32 [max_positions, head_dim/2] with the scaling's attention factor folded in.

    Where only a part of each head rotates, the angles of the rest are 0. Kernels rotate dimension d with d + head_dim/2
    all the same: `rotary_order` says how the rows of q and k must be put for that.

    Raises ConfigError on a scaling that is not known or whose numbers cannot be meant: ignoring it would give wrong
    tokens without a sign. Dynamic NTK is the default up to max_position_embeddings, as in transformers, and refused
    beyond: there every angle changes with the longest sequence of the batch, also those of keys already cached.
    """
    frequencies, factor = _frequencies(config, max_positions)
    angles = torch.arange(max_positions, dtype=torch.float32)[:, None] * frequencies[None]
    still = config.head_dim // 2 - len(frequencies)
    cos, sin = F.pad(angles.cos() * factor, (0, still), value=1.0), F.pad(angles.sin() * factor, (0, still))
    return cos.contiguous(), sin.contiguous()


def rotary_order(head_dim: int, rotary_dim: int | None) -> Tensor:
    """int64 [head_dim]: which dimension of a checkpoint's head comes where, so that those which rotate together
    (d and d + rotary_dim/2) lie head_dim/2 apart."""
    rotating = rotary_dim or head_dim
    turn, still = torch.arange(rotating).chunk(2), torch.arange(rotating, head_dim).chunk(2)
    if rotating == head_dim:
        return torch.arange(head_dim)
    return torch.cat([turn[0], still[0], turn[1], still[1]])


def _frequencies(config: ModelConfig, max_positions: int) -> tuple[Tensor, float]:
    """Angular frequencies fp32 [rotary_dim/2] and the factor on cos and sin."""
    rotating = config.rotary_dim or config.head_dim
    exponents = torch.arange(0, rotating, 2, dtype=torch.float32) / rotating
    base = 1.0 / float(config.rope_theta) ** exponents
    if config.rope_scaling is None:
        return base, 1.0
    kind, params = config.rope_scaling.kind, config.rope_scaling.params
    if kind == "dynamic":
        if max_positions > config.max_position_embeddings:
            raise ConfigError(
                f"config.json: rope scaling 'dynamic' is not supported beyond max_position_embeddings, which is "
                f"{config.max_position_embeddings}; {max_positions} positions were asked for"
            )
        return base, 1.0
    if kind not in _SCALINGS:
        known = ", ".join(["default", "dynamic", *_SCALINGS])
        raise ConfigError(f"config.json: rope scaling {kind!r} is not supported; these are: {known}")
    try:
        return _SCALINGS[kind](config, params, base)
    except (ConfigError, ArithmeticError) as error:
        raise ConfigError(f"config.json: rope scaling {kind!r}: {error}") from None


def _positive(params: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A positive number of the scaling; null and a missing key mean `default`, where there is one."""
    value = default if params.get(key) is None else params[key]
    if value is None:
        raise ConfigError(f"{key} is missing")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ConfigError(f"{key} must be a positive number, got {value!r}")
    return float(value)


def _original_positions(config: ModelConfig, params: Mapping[str, Any]) -> float:
    """The context length that the model was trained at, before it was extended."""
    return _positive(params, "original_max_position_embeddings", config.max_position_embeddings)


def _linear(config: ModelConfig, params: Mapping[str, Any], base: Tensor) -> tuple[Tensor, float]:
    """Position interpolation (arXiv 2306.15595): positions divided by `factor`."""
    return base / _positive(params, "factor"), 1.0


def _llama3(config: ModelConfig, params: Mapping[str, Any], base: Tensor) -> tuple[Tensor, float]:
    """Llama 3.1: long waves divided by `factor`, short ones kept, a ramp between."""
    low, high = _positive(params, "low_freq_factor"), _positive(params, "high_freq_factor")
    if high <= low:
        raise ConfigError(f"high_freq_factor must be larger than low_freq_factor, got {high} and {low}")
    turns = _original_positions(config, params) * base / (2 * math.pi)
    ramp = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - ramp) * base / _positive(params, "factor") + ramp * base, 1.0


def _yarn(config: ModelConfig, params: Mapping[str, Any], base: Tensor) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071): interpolate the dimensions that turn less than beta_slow times, keep those above
    beta_fast, and scale attention by 0.1·ln(factor) + 1.
    """
    original = _original_positions(config, params)
    # A factor of null means the ratio of the lengths; a factor that is not there at all is a mistake.
    factor = _positive(params, "factor", config.max_position_embeddings / original if "factor" in params else None)
    dims = config.rotary_dim or config.head_dim

    def dimension_of(turns: float) -> float:
        return dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = dimension_of(_positive(params, "beta_fast", 32)), dimension_of(_positive(params, "beta_slow", 1))
    if params.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    steps = torch.arange(dims // 2, dtype=torch.float32)
    keep = 1 - ((steps - low) / (high - low if high != low else 0.001)).clamp(0, 1)

    def attention_scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    inferred = attention_scale(1.0)
    # Both are needed; transformers takes a zero, too, for one that is not there.
    if params.get("mscale") and params.get("mscale_all_dim"):
        inferred = attention_scale(_positive(params, "mscale")) / attention_scale(_positive(params, "mscale_all_dim"))
    return (1 - keep) * base / factor + keep * base, float(_positive(params, "attention_factor", inferred))


_SCALINGS: dict[str, Callable[[ModelConfig, Mapping[str, Any], Tensor], tuple[Tensor, float]]] = {
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
