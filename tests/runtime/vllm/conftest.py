"""vLLM, as far as the plug-in meets it: the few classes that it derives from or asks, so that its own code runs."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

# Ours that import vLLM.
OURS = ("config", "kv_cache", "method", "offloader", "room")
METHODS = "vllm.model_executor.layers.quantization"


class RoutedExperts(torch.nn.Module):
    """vLLM's layer, made as vLLM makes it: the method's `create_weights` first, then its loader, then `apply`.

    expert_map: int64 [experts of all ranks], local ids, -1 for those of others; None where all are here.
    """

    def __init__(self, quant_config, name: str, moe_config, expert_map: torch.Tensor | None = None) -> None:
        super().__init__()
        self.moe_config, self.expert_map = moe_config, expert_map
        self.apply_router_weight_on_input = False
        self.quant_method = quant_config.get_quant_method(self, name)
        self.quant_method.create_weights(
            layer=self,
            num_experts=moe_config.num_local_experts,
            hidden_size=moe_config.hidden_dim,
            unpadded_hidden_size=moe_config.hidden_dim,
            intermediate_size_per_partition=moe_config.intermediate_size_per_partition,
            params_dtype=moe_config.in_dtype,
            weight_loader=None,
            global_num_experts=moe_config.num_experts,
        )

    def _map_global_expert_id_to_local_expert_id(self, expert_id: int) -> int:
        return expert_id if self.expert_map is None else int(self.expert_map[expert_id])


class LinearBase(torch.nn.Module):
    pass


class UnquantizedLinearMethod:
    pass


class FusedMoEMethodBase:
    def __init__(self, moe) -> None:
        self.moe = moe


class FusedMoEQuantConfig:
    @classmethod
    def make(cls):
        return cls()


class QuantizationConfig:
    pass


class CUDAGraphMode(Enum):
    NONE = 0
    PIECEWISE = 1
    FULL_DECODE_ONLY = (2, 0)
    FULL_AND_PIECEWISE = (2, 1)


class NoopOffloader:
    def sync_prev_onload(self) -> None:
        pass

    def join_after_forward(self) -> None:
        pass


def make_worker() -> type:
    """The class of vLLM's worker, which is told how much KV cache to make."""

    class Worker:
        def __init__(self, vllm_config) -> None:
            self.vllm_config, self.made = vllm_config, 0

        def initialize_from_config(self, kv_cache_config) -> None:
            self.made = kv_cache_config.num_blocks

    return Worker


def moe_config(**changes) -> SimpleNamespace:
    """vLLM's FusedMoEConfig of a small layer."""
    values = dict[str, Any](
        num_experts=4, num_local_experts=4, experts_per_token=2, hidden_dim=128, intermediate_size_per_partition=128,
        in_dtype=torch.bfloat16, activation=SimpleNamespace(value="silu"), has_bias=False, swiglu_limit=None,
        tp_rank=0, tp_size=1,
    )  # fmt: skip
    return SimpleNamespace(**values | changes)


def vllm_config(**changes) -> SimpleNamespace:
    """vLLM's VllmConfig; changes: by the name of a field, wherever it lies, and `fluxmoe`: our settings."""
    offload = SimpleNamespace(
        uva=SimpleNamespace(cpu_offload_gb=0), prefetch=SimpleNamespace(offload_group_size=0)
    )  # fmt: skip
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(
            use_ubatching=False, enable_eplb=False, data_parallel_size=1, worker_cls="vllm.v1.worker.Worker"
        ),
        model_config=SimpleNamespace(is_moe=True, enable_sleep_mode=False, model="no/directory", max_model_len=64),
        cache_config=SimpleNamespace(kv_cache_memory_bytes=None, num_gpu_blocks_override=None),
        offload_config=offload,
        lora_config=None,
        device_config=SimpleNamespace(device=torch.device("cpu")),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=32),
        compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE),
        additional_config={"fluxmoe": changes.pop("fluxmoe", {})},
    )
    places = (
        config,
        config.parallel_config,
        config.model_config,
        config.cache_config,
        config.scheduler_config,
        config.compilation_config,
        offload.uva,
        offload.prefetch,
    )
    for name, value in changes.items():
        setattr(next(place for place in places if hasattr(place, name)), name, value)
    return config


@pytest.fixture(autouse=True)
def _models_of_tests_before_are_gone(request) -> None:
    """Where a test listens: they say a last word when they go."""
    if "caplog" in request.fixturenames:
        gc.collect()


@pytest.fixture
def vllm(monkeypatch) -> Iterator[SimpleNamespace]:
    """`vllm` while a test runs; `config`: what get_current_vllm_config says; `forward`: the forward context, if any;
    `offloader`: whose hooks are called around graphs; `worker`: the class of its worker."""
    world = SimpleNamespace(
        config=vllm_config(), methods=["fp8"], registered={}, forward=None, offloader=NoopOffloader(),
        worker=make_worker(),
    )  # fmt: skip

    def register_quantization_config(name):
        def register(cls):
            assert issubclass(cls, QuantizationConfig)
            world.methods.append(name)
            world.registered[name] = cls
            return cls

        return register

    def set_weight_attrs(tensor, attrs):
        for each in attrs.items():
            setattr(tensor, *each)

    contents: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.config": {
            "get_current_vllm_config": lambda: world.config, "CUDAGraphMode": CUDAGraphMode,
            "get_layers_from_vllm_config": None,
        },
        "vllm.forward_context": {
            "get_forward_context": lambda: world.forward, "is_forward_context_available": lambda: bool(world.forward)
        },
        "vllm.model_executor.offloader": {},
        "vllm.model_executor.offloader.base": {
            "NoopOffloader": NoopOffloader, "get_offloader": lambda: world.offloader,
            "set_offloader": lambda offloader: setattr(world, "offloader", offloader),
        },
        "vllm.model_executor": {},
        "vllm.model_executor.layers": {},
        "vllm.model_executor.layers.attention_layer_base": {"AttentionLayerBase": object},
        METHODS: {"QUANTIZATION_METHODS": world.methods, "register_quantization_config": register_quantization_config},
        f"{METHODS}.base_config": {"QuantizationConfig": QuantizationConfig},
        "vllm.model_executor.layers.fused_moe": {
            "RoutedExperts": RoutedExperts, "FusedMoEMethodBase": FusedMoEMethodBase,
            "FusedMoEQuantConfig": FusedMoEQuantConfig,
        },
        "vllm.model_executor.layers.linear": {
            "LinearBase": LinearBase, "UnquantizedLinearMethod": UnquantizedLinearMethod
        },
        "vllm.model_executor.models": {},
        "vllm.model_executor.models.utils": {
            "extract_layer_index": lambda name: next(int(part) for part in name.split(".") if part.isdigit())
        },
        "vllm.v1": {},
        "vllm.v1.core": {},
        "vllm.v1.core.kv_cache_utils": {
            "get_max_concurrency_for_kv_cache_config": lambda config, cache: cache.num_blocks / 4
        },
        "vllm.v1.kv_cache_interface": {"AttentionSpec": object},
        "vllm.v1.worker": {"Worker": world.worker},
        "vllm.model_executor.utils": {"set_weight_attrs": set_weight_attrs},
    }  # fmt: skip
    for name, values in contents.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    # Ours that import vLLM were never imported before, and will not be after.
    for name in OURS:
        monkeypatch.delitem(sys.modules, f"fluxmoe.runtime.vllm.{name}", raising=False)
    yield world
    for name in OURS:
        sys.modules.pop(f"fluxmoe.runtime.vllm.{name}", None)
