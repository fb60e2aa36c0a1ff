"""What we override and what vLLM calls have the same parameters: also where only a GPU would take the path."""

from __future__ import annotations

import inspect
import os

import pytest
import torch
from fluxmoe.runtime.vllm.config import FluxMoEConfig
from fluxmoe.runtime.vllm.features import FeatureError, check_features
from fluxmoe.runtime.vllm.method import FluxMoEMethod
from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe import MoERunner

from .sources import Sources


def parameters(function) -> list[str]:
    return [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]


WHEELS = [None, *filter(None, [os.environ.get("VLLM_WHEEL")])]


@pytest.fixture(scope="module", params=WHEELS, ids=["installed", "wheel"][: len(WHEELS)])
def sources(request) -> Sources:
    """vLLM as it is installed, and what VLLM_WHEEL names: another version, or a build for GPUs."""
    return Sources(request.param)


LAYERS = "model_executor/layers"
# By file and class of vLLM's: what we override of it.
OVERRIDDEN = {
    (f"{LAYERS}/fused_moe/fused_moe_method_base.py", "FusedMoEMethodBase"): (
        FluxMoEMethod.create_weights, FluxMoEMethod.apply, FluxMoEMethod.get_fused_moe_quant_config
    ),
    (f"{LAYERS}/quantization/base_config.py", "QuantizationConfig"): (
        FluxMoEConfig.get_quant_method, FluxMoEConfig.get_supported_act_dtypes
    ),
}  # fmt: skip


@pytest.mark.parametrize(("path", "cls"), OVERRIDDEN)
def test_what_we_override_has_the_same_parameters(sources, path, cls):
    for ours in OVERRIDDEN[path, cls]:
        assert parameters(ours) == sources.parameters(path, cls, ours.__name__), ours.__name__


def test_the_weight_loader(sources):
    loader = sources.parameters(f"{LAYERS}/fused_moe/routed_experts.py", "RoutedExperts", "weight_loader")
    assert ["self", *parameters(FluxMoEMethod._load)[1:]] == loader


# By file: classes and functions, and what we name of each.
MENTIONED = {
    f"{LAYERS}/fused_moe/routed_experts.py": {
        "RoutedExperts": "_map_global_expert_id_to_local_expert_id expert_map apply_router_weight_on_input moe_config "
        "_get_quant_method forward_modular forward_monolithic local_num_experts quant_method PluggableLayer",
    },
    f"{LAYERS}/fused_moe/config.py": {
        "FusedMoEConfig": "experts_per_token tp_rank tp_size has_bias swiglu_limit activation",
        "FusedMoEQuantConfig": "make",
    },
    f"{LAYERS}/quantization/__init__.py": {"register_quantization_config": "QUANTIZATION_METHODS"},
    f"{LAYERS}/attention_layer_base.py": {"AttentionLayerBase": "get_kv_cache_spec"},
    "model_executor/custom_op.py": {"PluggableLayer": "__new__"},
    "model_executor/model_loader/utils.py": {
        "device_loading_context": "target_device",
        "process_weights_after_loading": "requires_device_loading process_weights_after_loading",
    },
    "model_executor/offloader/base.py": {
        "NoopOffloader": "wrap_modules",
        "BaseOffloader": "sync_prev_onload join_after_forward",
        "get_offloader": "_instance",
        "set_offloader": "_instance",
    },
    "config/vllm.py": {
        "get_current_vllm_config_or_none": "_current_vllm_config",
        "VllmConfig": "quant_config lora_config offload_config additional_config device_config scheduler_config",
    },
    "config/parallel.py": {"ParallelConfig": "use_ubatching enable_eplb data_parallel_size worker_cls"},
    "config/model.py": {
        "ModelConfig": "is_moe enable_sleep_mode enforce_eager get_hidden_size get_vocab_size max_model_len"
    },
    "config/cache.py": {"CacheConfig": "kv_cache_memory_bytes gpu_memory_utilization num_gpu_blocks_override"},
    "config/offload.py": {
        "OffloadConfig": "uva prefetch",
        "UVAOffloadConfig": "cpu_offload_gb",
        "PrefetchOffloadConfig": "offload_group_size",
    },
    "config/compilation.py": {"CUDAGraphMode": "NONE PIECEWISE FULL_DECODE_ONLY FULL_AND_PIECEWISE"},
    "v1/kv_cache_interface.py": {
        "AttentionSpec": "page_size_bytes",
        "KVCacheConfig": "num_blocks kv_cache_tensors",
        "KVCacheTensor": "size",
    },
    "v1/core/kv_cache_utils.py": {"get_max_concurrency_for_kv_cache_config": "num_blocks"},
    "v1/worker/gpu_worker.py": {"Worker": "initialize_from_config vllm_config"},
    "forward_context.py": {
        "ForwardContext": "cudagraph_runtime_mode",
        "get_forward_context": "_forward_context",
        "is_forward_context_available": "_forward_context",
    },
}


@pytest.mark.parametrize(("path", "name"), [(path, name) for path, names in MENTIONED.items() for name in names])
def test_what_we_ask_for_is_there(sources, path, name):
    assert not set(MENTIONED[path][name].split()) - sources.says(path, name)


# By file: functions, and of their calls those that matter, in order.
ORDERS = {
    "compilation/cuda_graph.py": {
        "CUDAGraphWrapper.__call__": "CUDAGraph sync_prev_onload graph join_after_forward sync_prev_onload replay",
    },
    "compilation/backends.py": {"wrap_with_cudagraph_if_needed": "has_piecewise_cudagraphs"},
    "v1/worker/gpu/cudagraph_utils.py": {
        "CudaGraphManager.capture": "CUDAGraph sync_prev_onload graph join_after_forward",
        "CudaGraphManager.run_fullgraph": "sync_prev_onload replay",
    },
    # What is decided once weights are loaded is heard by all who ask for the mode of graphs.
    "v1/worker/gpu_model_runner.py": {
        "GPUModelRunner.load_model": "load_model has_full_cudagraphs",
        "GPUModelRunner.__init__": "set_offloader",
    },
    "v1/worker/gpu/model_runner.py": {"GPUModelRunner.__init__": "set_offloader"},
}


@pytest.mark.parametrize(("path", "name"), [(path, name) for path, names in ORDERS.items() for name in names])
def test_hooks_around_graphs_come_in_the_order_that_our_passes_were_tested_in(sources, path, name):
    """tests/runtime/vllm/test_graph_passes.py drives them so."""
    wanted = ORDERS[path][name].split()
    known = {*wanted, "sync_prev_onload", "join_after_forward"}
    calls = [call for call in sources.calls(path, *name.split(".")) if call in known]
    assert [call for i, call in enumerate(calls) if calls[i - 1 : i] != [call]] == wanted


def test_nothing_is_left_abstract():
    assert not inspect.isabstract(FluxMoEMethod)
    assert not inspect.isabstract(FluxMoEConfig)


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


@pytest.mark.parametrize(
    ("part", "field", "value", "sentence"),
    [
        ("parallel_config", "enable_dbo", True, "--enable-dbo"),
        ("parallel_config", "enable_eplb", True, "--enable-eplb"),
        ("parallel_config", "data_parallel_size", 2, "--data-parallel-size"),
        ("model_config", "enable_sleep_mode", True, "--enable-sleep-mode"),
    ],
)
def test_what_is_refused_is_looked_for_where_it_is(monkeypatch, part, field, value, sentence):
    """What vLLM's build for the CPU refuses before us, on a configuration of its own with all else by default but the
    model; see test_refused.py for the rest."""
    config = VllmConfig()

    class Model:
        is_moe, enable_sleep_mode = True, False

    monkeypatch.setattr(config, "model_config", Model)
    check_features(config)
    monkeypatch.setattr(getattr(config, part), field, value)
    with pytest.raises(FeatureError, match=sentence):
        check_features(config)
