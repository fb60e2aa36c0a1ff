"""What we override and what vLLM calls have the same parameters: also where only a GPU would take the path."""

from __future__ import annotations

import inspect

import pytest
import torch
from fluxmoe.runtime.vllm.config import FluxMoEConfig
from fluxmoe.runtime.vllm.features import check_features
from fluxmoe.runtime.vllm.method import FluxMoEMethod
from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, MoERunner, RoutedExperts
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig


def parameters(function) -> list[str]:
    return [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]


@pytest.mark.parametrize("name", ["create_weights", "apply", "get_fused_moe_quant_config"])
def test_methods(name):
    assert parameters(getattr(FluxMoEMethod, name)) == parameters(getattr(FusedMoEMethodBase, name))


def test_nothing_is_left_abstract():
    assert not inspect.isabstract(FluxMoEMethod)
    assert not inspect.isabstract(FluxMoEConfig)
    assert parameters(FluxMoEConfig.get_quant_method) == parameters(QuantizationConfig.get_quant_method)


def test_the_weight_loader():
    assert parameters(FluxMoEMethod._load) == parameters(RoutedExperts.weight_loader)


def test_a_layer_on_a_gpu_is_one_operation_of_vllms(monkeypatch):
    """Which its graphs hold whole; ours is inside."""
    from vllm.model_executor.layers.fused_moe.runner import moe_runner

    class Gpu:
        is_tpu = is_cpu = staticmethod(lambda: False)

    monkeypatch.setattr(moe_runner, "current_platform", Gpu)
    runner = MoERunner.__new__(MoERunner)
    torch.nn.Module.__init__(runner)
    runner._shared_experts = None
    assert runner._select_forward() is torch.ops.vllm.moe_forward


def test_what_is_refused_is_looked_for_where_it_is():
    """On a configuration of vLLM's own, with all as vLLM has it by default but the model."""
    config = VllmConfig()

    class Model:
        is_moe, enable_sleep_mode = True, False

    config.model_config = Model  # type: ignore[assignment]
    check_features(config)
