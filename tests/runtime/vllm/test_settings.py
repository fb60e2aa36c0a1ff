"""Settings from --additional-config and the environment, and what of vLLM's is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from fluxmoe.runtime.experts.config import SettingError
from fluxmoe.runtime.vllm.features import FeatureError, check_features
from fluxmoe.runtime.vllm.settings import NAMES, PluginConfig, read_settings

from .conftest import vllm_config


def test_experts_are_packed_unless_told_otherwise():
    assert read_settings({}, {}) == PluginConfig(placement="packed")


@pytest.mark.parametrize(
    ("given", "environ", "settings"),
    [
        ({"placement": "host", "slots": 3}, {}, dict(placement="host", slots=3)),
        ({"placement": "balanced", "alpha": 1}, {}, dict(placement="balanced", alpha=1.0)),
        ({"placement": "disk", "disk_dir": "/x"}, {}, dict(placement="disk", disk_dir=Path("/x"))),
        ({"alpha": None}, {}, dict(placement="packed")),
        ({}, {"FLUXMOE_PLACEMENT": "host", "FLUXMOE_SLOTS": "4"}, dict(placement="host", slots=4)),
        ({}, {"FLUXMOE_POISON": "true", "FLUXMOE_ALPHA": "1"}, dict(placement="packed", poison=True, alpha=1.0)),
        ({}, {"FLUXMOE_DISK_DIR": "/y", "OTHER": "x"}, dict(placement="packed", disk_dir=Path("/y"))),
        ({"kv_tokens": 9, "slots": 3}, {}, dict(kv_tokens=9, placement="balanced", slots=3)),
        ({"placement": "host"}, {"FLUXMOE_PLACEMENT": "disk"}, dict(placement="host")),
    ],
)
def test_names_are_those_of_the_settings(given, environ, settings):
    assert read_settings(given, environ) == PluginConfig(**settings)


@pytest.mark.parametrize(
    ("given", "environ", "sentence"),
    [
        ({"place": "host"}, {}, "fluxmoe.place in --additional-config: there is no such setting .*placement, alpha"),
        ({"kv_tokens": 0}, {}, "kv_tokens must be at least 1, got 0"),
        ({"kv_tokens": 9, "placement": "host", "alpha": 0.5}, {}, "leave out placement, alpha, or kv_tokens"),
        ({"kv_tokens": 9}, {"FLUXMOE_DENSE_SHARE": "0.5"}, "leave out dense_share, or kv_tokens"),
        ({"adaptive": True}, {}, "fluxmoe.adaptive .*no such setting inside vLLM"),
        ({}, {"FLUXMOE_PLACE": "host"}, "FLUXMOE_PLACE: there is no such setting"),
        ({"slots": "two"}, {}, "fluxmoe.slots in --additional-config: .*integer.* got 'two'"),
        ({}, {"FLUXMOE_ALPHA": "half"}, "FLUXMOE_ALPHA: .*number.* got 'half'"),
        ({"expert_format": "zip"}, {}, "expert_format must be one of dense"),
        ({"placement": "resident", "expert_format": "planar12"}, {}, "placement resident holds experts dense"),
        ("host", {}, "fluxmoe in --additional-config must be a table of settings, got 'host'"),
    ],
)
def test_settings_that_are_not_valid(given, environ, sentence):
    with pytest.raises(SettingError, match=sentence):
        read_settings(given, environ)


def test_no_setting_is_offered_that_does_nothing_here():
    assert not {"adaptive", "planning", "least_alpha", "profile", "load_delay"}.intersection(NAMES)


def test_a_model_with_experts_and_nothing_special_is_served():
    check_features(vllm_config())


@pytest.mark.parametrize(
    ("feature", "sentence"),
    [
        (dict(is_moe=False), "no experts: serve it without --quantization fluxmoe"),
        (dict(use_ubatching=True), "--enable-dbo"),
        (dict(enable_eplb=True), "--enable-eplb"),
        (dict(data_parallel_size=2), "--data-parallel-size"),
        (dict(enable_sleep_mode=True), "--enable-sleep-mode"),
        (dict(lora_config=SimpleNamespace()), "--enable-lora"),
        (dict(cpu_offload_gb=1.5), "--cpu-offload-gb"),
        (dict(offload_group_size=4), "--offload-group-size"),
    ],
    ids=str,
)
def test_what_cannot_be_served_is_refused(feature, sentence):
    with pytest.raises(FeatureError, match=f"^--quantization fluxmoe: .*{sentence}"):
        check_features(vllm_config(**feature))
