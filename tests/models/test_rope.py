"""RoPE tables against transformers' own initialisers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fluxmoe.models.config import ConfigError, RopeScaling
from fluxmoe.models.rope import rope_tables, rotary_order
from transformers import Qwen3MoeConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

ORIGINAL = {"original_max_position_embeddings": 256}


def ours(kind, params, head_dim=64, positions=1024):
    scaling = None if kind == "default" else RopeScaling(kind, params)
    config: Any = SimpleNamespace(
        head_dim=head_dim, rotary_dim=None, rope_theta=1e5, rope_scaling=scaling, max_position_embeddings=1024
    )  # fmt: skip
    return rope_tables(config, positions)


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        ("linear", {"factor": 3.0}),
        ("llama3", {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL}),
        ("yarn", {"factor": 4.0, **ORIGINAL}),
        ("yarn", {"factor": 4.0, "beta_fast": 16, "beta_slow": 2, "attention_factor": 0.7, **ORIGINAL}),
        ("yarn", {"factor": 16.0, "mscale": 0.7, "mscale_all_dim": 1.1, **ORIGINAL}),
        ("yarn", {"factor": 4.0, "truncate": False, **ORIGINAL}),
        ("yarn", {"factor": None, **ORIGINAL}),
        ("yarn", {"factor": 4.0}),
        ("llama3", {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
        ("dynamic", {"factor": 4.0}),
    ],
)
def test_matches_transformers(kind, params):
    sizes = dict[str, Any](head_dim=64, max_position_embeddings=1024)
    config = Qwen3MoeConfig(**sizes, rope_parameters={"rope_type": kind, "rope_theta": 1e5, **params})
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config)
    angles = torch.arange(1024.0)[:, None] * frequencies[None]
    cos, sin = ours(kind, params)
    torch.testing.assert_close(cos, angles.cos() * factor, rtol=0, atol=2e-4)
    torch.testing.assert_close(sin, angles.sin() * factor, rtol=0, atol=2e-4)


def test_dynamic_is_refused_where_it_would_depend_on_the_batch():
    with pytest.raises(ConfigError, match="1024; 1025 positions"):
        ours("dynamic", {"factor": 2.0}, positions=1025)


def test_default_is_the_definition():
    cos, sin = ours("default", {})
    angle = 37 * 1e5 ** (-2 * 5 / 64)
    assert cos[37, 5].item() == pytest.approx(torch.tensor(angle).cos().item(), abs=1e-5)
    assert sin[37, 5].item() == pytest.approx(torch.tensor(angle).sin().item(), abs=1e-5)


@pytest.mark.parametrize(
    ("kind", "params", "match"),
    [
        ("longrope", {}, "not supported; these are: default, dynamic, linear"),
        ("linear", {}, "factor is missing"),
        ("linear", {"factor": 0}, "factor must be a positive number, got 0"),
        ("linear", {"factor": "2"}, "factor must be a positive number, got '2'"),
        ("linear", {"factor": float("nan")}, "factor must be a positive number"),
        ("yarn", {}, "factor is missing"),
        ("yarn", {"factor": -2.0}, "factor must be a positive number"),
        ("yarn", {"factor": 2.0, "beta_fast": "x"}, "beta_fast"),
        ("yarn", {"factor": 2.0, "mscale": "x", "mscale_all_dim": 1.0}, "mscale"),
        ("llama3", {"factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}, "larger than low_freq_factor"),
        ("llama3", {"factor": 2.0}, "low_freq_factor"),
    ],
)
def test_unknown_or_incomplete_scaling_is_an_error(kind, params, match):
    with pytest.raises(ConfigError, match=match):
        ours(kind, params)


@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(8, 2), (20, 8), (16, 16), (64, 16)])
def test_a_part_of_each_head_rotates(head_dim, rotary_dim):
    """Our halves, on reordered rows, give the products of q and k that a partly rotated head gives."""
    config: Any = SimpleNamespace(head_dim=head_dim, rotary_dim=rotary_dim, rope_theta=1e4, rope_scaling=None)
    cos, sin = rope_tables(config, 40)
    assert cos.shape == sin.shape == (40, head_dim // 2)
    order = rotary_order(head_dim, rotary_dim)
    assert sorted(order.tolist()) == list(range(head_dim))
    angles = 1e4 ** (-torch.arange(0, rotary_dim, 2) / rotary_dim)

    def theirs(x, position):
        a, b = x[: rotary_dim // 2], x[rotary_dim // 2 : rotary_dim]
        c, s = (position * angles).cos(), (position * angles).sin()
        return torch.cat([a * c - b * s, b * c + a * s, x[rotary_dim:]])

    def ours_at(x, position):
        a, b = x[order].chunk(2)
        return torch.cat([a * cos[position] - b * sin[position], b * cos[position] + a * sin[position]])

    for q, k, i, j in ((torch.randn(head_dim), torch.randn(head_dim), 3, 39), (torch.ones(head_dim),) * 2 + (7, 7)):
        torch.testing.assert_close(ours_at(q, i) @ ours_at(k, j), theirs(q, i) @ theirs(k, j), rtol=1e-4, atol=1e-4)
