"""FluxMoEConfig: puts our method on the experts of a model, and leaves all other layers alone.

Every process of vLLM imports this module, whatever it serves, so kernels and all that needs them are imported where a
model is made.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from .features import check_features

if TYPE_CHECKING:
    from .paged_model import PagedModel


class FluxMoEConfig(QuantizationConfig):
    """The quantization method `fluxmoe`: experts as a checkpoint has them, without loss, paged."""

    def get_name(self) -> str:
        return "fluxmoe"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80  # Ampere: Triton's bf16

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> FluxMoEConfig:
        return cls()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """SettingError for settings that are not valid, and for features of vLLM that we cannot serve."""
        from vllm.config import get_current_vllm_config
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

        vllm_config = get_current_vllm_config()
        check_features(vllm_config)
        model = paged_model_of(self, vllm_config)
        if model.room is not None:
            model.room.see(layer)
        if isinstance(layer, RoutedExperts):
            from .method import FluxMoEMethod

            return FluxMoEMethod(layer.moe_config, prefix, model, vllm_config.model_config.model)
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


# What takes layers, by the configuration of the model that is being made.
_models: WeakKeyDictionary[FluxMoEConfig, PagedModel] = WeakKeyDictionary()


def paged_model_of(quant_config: FluxMoEConfig, vllm_config: Any) -> PagedModel:
    """Of the model that is being made; a draft model, made later, gets one of its own."""
    import psutil

    model = _models.get(quant_config)
    if model is None or model.opened:
        # Before our kernels are loaded, which on a CPU take of the same memory.
        before_bytes = psutil.Process().memory_info().rss
        model = _models[quant_config] = _make_model(vllm_config, before_bytes)
    return model


def _make_model(vllm_config: Any, before_bytes: int) -> PagedModel:
    from ..devices import device_of
    from ..experts.config import SettingError
    from .kv_cache import tell
    from .paged_model import PagedModel
    from .room import RoomInVllm
    from .settings import read_settings

    given = vllm_config.additional_config
    settings = read_settings(given.get("fluxmoe", {}) if isinstance(given, dict) else {}, os.environ)
    if settings.vllm_kernels:
        raise SettingError("vllm_kernels leaves vLLM's own method: leave out --quantization fluxmoe, or it")
    device, tokens = vllm_config.device_config.device, vllm_config.scheduler_config.max_num_batched_tokens
    if device_of(device).is_host and settings.threads is None:
        # Those that vLLM has bound this worker to; the main thread itself may be pinned to one core.
        settings = replace(settings, threads=torch.get_num_threads())
    follow = None
    if device_of(device).graphs:
        from .offloader import follow as follow_graphs

        follow = partial(follow_graphs, vllm_config)
    model = PagedModel(settings, device, tokens, RoomInVllm(vllm_config, before_bytes), follow)
    tell(vllm_config, model)
    return model
