"""What we override and what vLLM calls have the same parameters: also where only a GPU would take the path."""

from __future__ import annotations

import inspect
import os

import pytest
import torch
from fluxmoe.runtime.vllm.config import FluxMoEConfig
from fluxmoe.runtime.vllm.features import check_features
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
BASE = f"{LAYERS}/quantization/base_config.py"
OURS = [
    (f"{LAYERS}/fused_moe/fused_moe_method_base.py", "FusedMoEMethodBase", FluxMoEMethod.create_weights),
    (f"{LAYERS}/fused_moe/fused_moe_method_base.py", "FusedMoEMethodBase", FluxMoEMethod.apply),
    (f"{LAYERS}/fused_moe/fused_moe_method_base.py", "FusedMoEMethodBase", FluxMoEMethod.get_fused_moe_quant_config),
    (BASE, "QuantizationConfig", FluxMoEConfig.get_quant_method),
    (BASE, "QuantizationConfig", FluxMoEConfig.get_supported_act_dtypes),
]


@pytest.mark.parametrize(("path", "cls", "ours"), OURS, ids=[ours.__name__ for *_, ours in OURS])
def test_what_we_override_has_the_same_parameters(sources, path, cls, ours):
    assert parameters(ours) == sources.parameters(path, cls, ours.__name__)


def test_the_weight_loader(sources):
    loader = sources.parameters(f"{LAYERS}/fused_moe/routed_experts.py", "RoutedExperts", "weight_loader")
    assert ["self", *parameters(FluxMoEMethod._load)[1:]] == loader


MENTIONED = [
    (f"{LAYERS}/fused_moe/routed_experts.py", "RoutedExperts",
     "_map_global_expert_id_to_local_expert_id expert_map apply_router_weight_on_input moe_config "
     "_get_quant_method forward_modular forward_monolithic local_num_experts quant_method PluggableLayer"),
    ("model_executor/custom_op.py", "PluggableLayer", "__new__"),
    ("model_executor/model_loader/utils.py", "device_loading_context", "target_device"),
    ("model_executor/model_loader/utils.py", "process_weights_after_loading",
     "requires_device_loading process_weights_after_loading"),
    ("config/vllm.py", "get_current_vllm_config_or_none", "_current_vllm_config"),
    (f"{LAYERS}/fused_moe/config.py", "FusedMoEConfig",
     "experts_per_token tp_rank tp_size has_bias swiglu_limit activation"),
    (f"{LAYERS}/fused_moe/config.py", "FusedMoEQuantConfig", "make"),
    (f"{LAYERS}/quantization/__init__.py", "register_quantization_config", "QUANTIZATION_METHODS"),
    (f"{LAYERS}/attention_layer_base.py", "AttentionLayerBase", "get_kv_cache_spec"),
    ("config/parallel.py", "ParallelConfig", "use_ubatching enable_eplb data_parallel_size"),
    ("config/model.py", "ModelConfig", "is_moe enable_sleep_mode enforce_eager get_hidden_size get_vocab_size"),
    ("config/cache.py", "CacheConfig", "kv_cache_memory_bytes gpu_memory_utilization"),
    ("config/offload.py", "OffloadConfig", "uva prefetch"),
    ("config/offload.py", "UVAOffloadConfig", "cpu_offload_gb"),
    ("config/offload.py", "PrefetchOffloadConfig", "offload_group_size"),
    ("config/vllm.py", "VllmConfig",
     "quant_config lora_config offload_config additional_config device_config scheduler_config"),
    ("v1/kv_cache_interface.py", "AttentionSpec", "page_size_bytes"),
    ("config/compilation.py", "CUDAGraphMode", "NONE PIECEWISE FULL_DECODE_ONLY FULL_AND_PIECEWISE"),
    ("forward_context.py", "ForwardContext", "cudagraph_runtime_mode"),
    ("forward_context.py", "get_forward_context", "_forward_context"),
    ("forward_context.py", "is_forward_context_available", "_forward_context"),
    ("model_executor/offloader/base.py", "NoopOffloader", "wrap_modules"),
    ("model_executor/offloader/base.py", "BaseOffloader", "sync_prev_onload join_after_forward"),
    ("model_executor/offloader/base.py", "get_offloader", "_instance"),
    ("model_executor/offloader/base.py", "set_offloader", "_instance"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "cls", "names"), MENTIONED, ids=[cls for _, cls, _ in MENTIONED])
def test_what_we_ask_for_is_there(sources, path, cls, names):
    assert not set(names.split()) - sources.says(path, cls)


GPU_RUNNER = "v1/worker/gpu_model_runner.py"
ORDERS = {
    "V1 graphs": ("compilation/cuda_graph.py", "CUDAGraphWrapper", "__call__",
        "CUDAGraph sync_prev_onload graph join_after_forward sync_prev_onload replay"),
    "V2 capture": ("v1/worker/gpu/cudagraph_utils.py", "CudaGraphManager", "capture",
        "CUDAGraph sync_prev_onload graph join_after_forward"),
    "V2 launch": ("v1/worker/gpu/cudagraph_utils.py", "CudaGraphManager", "run_fullgraph", "sync_prev_onload replay"),
    # What is decided once weights are loaded is heard by all who ask for the mode of graphs.
    "V1 loading": (GPU_RUNNER, "GPUModelRunner", "load_model", "load_model has_full_cudagraphs"),
    "V1 offloader": (GPU_RUNNER, "GPUModelRunner", "__init__", "set_offloader"),
    "V2 offloader": ("v1/worker/gpu/model_runner.py", "GPUModelRunner", "__init__", "set_offloader"),
    "pieces": ("compilation/backends.py", "wrap_with_cudagraph_if_needed", "has_piecewise_cudagraphs"),
}  # fmt: skip


@pytest.mark.parametrize("where", ORDERS.values(), ids=ORDERS)
def test_hooks_around_graphs_come_in_the_order_that_our_passes_were_tested_in(sources, where):
    """tests/runtime/vllm/test_graph_passes.py drives them so."""
    *names, order = where
    wanted = order.split()
    calls = [name for name in sources.calls(*names) if name in {*wanted, "sync_prev_onload", "join_after_forward"}]
    assert [name for i, name in enumerate(calls) if calls[i - 1 : i] != [name]] == wanted


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


def test_what_is_refused_is_looked_for_where_it_is():
    """On a configuration of vLLM's own, with all as vLLM has it by default but the model."""
    config = VllmConfig()

    class Model:
        is_moe, enable_sleep_mode = True, False

    config.model_config = Model  # type: ignore[assignment]
    check_features(config)
