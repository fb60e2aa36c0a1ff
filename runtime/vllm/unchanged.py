"""StreamedExperts: vLLM's layer with experts and its own method, over tensors that are streamed.

Experts are made and stay in host memory, one layer at a time is brought to the device for what the method does with
them once they are loaded, and a pass begins and ends each layer around the method's own call.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.model_loader.utils import device_loading_context

from ..devices import device_of
from ..experts.config import SettingError
from .features import check_features
from .kv_cache import tell
from .operation import handle_of
from .settings import read_settings
from .streamed_layers import StreamedLayers

_FLAG = '--additional-config \'{"fluxmoe": {"vllm_kernels": true}}\''


def class_for(cls: type, vllm_config: Any) -> type:
    """What vLLM makes in the place of a layer of class `cls`, with settings of ours and without our method.
    SettingError and FeatureError for what cannot be served."""
    settings = read_settings(vllm_config.additional_config["fluxmoe"], os.environ)
    if not settings.vllm_kernels:
        raise SettingError(
            "fluxmoe in --additional-config does nothing alone: give --quantization fluxmoe, or vllm_kernels there"
        )
    check_features(vllm_config, _FLAG)
    return StreamedExperts if cls is RoutedExperts else cls


# Of the model that is being made, and its configuration.
_making: tuple[Any, ref[StreamedLayers] | None] = (None, None)


def streamed_layers_of(vllm_config: Any) -> StreamedLayers:
    """Of the model that is being made; a draft model, made later, gets one of its own."""
    global _making
    model = _making[1]() if _making[1] is not None and _making[0]() is vllm_config else None
    if model is None or model.opened:
        settings = read_settings(vllm_config.additional_config["fluxmoe"], os.environ)
        device, follow = torch.device(vllm_config.device_config.device), None
        if device_of(device).graphs:
            from .offloader import follow as follow_graphs

            follow = partial(follow_graphs, vllm_config)
        model = StreamedLayers(settings, device, follow)
        tell(vllm_config, model)
        _making = ref(vllm_config), ref(model)
    return model


class StreamedExperts(RoutedExperts):
    """As its parent, whose arguments it has."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        handle = handle_of(self._streamed, self._streamed.add())
        self.register_buffer("fluxmoe_handle", handle, persistent=False)

    def _get_quant_method(self, *args: Any, **kwargs: Any) -> Any:
        """The method that the layer would have, which makes its weights in host memory and hands them over."""
        method = super()._get_quant_method(*args, **kwargs)
        self._streamed = streamed_layers_of(get_current_vllm_config())
        create, process = method.create_weights, method.process_weights_after_loading

        def create_weights(*args: Any, **kwargs: Any) -> None:
            with torch.device("cpu"):
                create(*args, **kwargs)

        def process_weights_after_loading(layer: StreamedExperts) -> None:
            with device_loading_context(layer, layer._streamed.device.torch):
                process(layer)
            layer._hand_over()

        method.create_weights, method.process_weights_after_loading = create_weights, process_weights_after_loading
        method.requires_device_loading = False
        return method

    def _hand_over(self) -> None:
        parameters = self.named_parameters(recurse=False)
        weights = {name: each for name, each in parameters if each.dim() and each.shape[0] == self.local_num_experts}
        self._streamed.take(int(self.fluxmoe_handle[1]), weights)

    def forward_modular(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        torch.ops.fluxmoe.begin_layer(x, self.fluxmoe_handle)
        y = super().forward_modular(x, *args, **kwargs)
        torch.ops.fluxmoe.end_layer(y, self.fluxmoe_handle)
        return y

    def forward_monolithic(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        torch.ops.fluxmoe.begin_layer(x, self.fluxmoe_handle)
        y = super().forward_monolithic(x, *args, **kwargs)
        torch.ops.fluxmoe.end_layer(y, self.fluxmoe_handle)
        return y
