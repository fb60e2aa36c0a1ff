"""What vLLM can do and FluxMoE inside it cannot: refused before any weight is read."""

from __future__ import annotations

from typing import Any


class FeatureError(ValueError):
    """vLLM was asked for something that cannot be served with `--quantization fluxmoe`."""


def check_features(vllm_config: Any, flag: str = "--quantization fluxmoe") -> None:
    """vllm_config: vLLM's VllmConfig; flag: what switched us on. FeatureError for the first that cannot be served."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    offload = vllm_config.offload_config
    refused = (
        (not model.is_moe, f"this model has no experts: serve it without {flag}"),
        (
            parallel.use_ubatching,
            "micro-batches (--enable-dbo) run layers out of the order in which experts are loaded",
        ),
        (parallel.enable_eplb, "--enable-eplb moves experts, which fluxmoe places itself"),
        (parallel.data_parallel_size > 1, "--data-parallel-size above 1 is not served; start one server a replica"),
        (model.enable_sleep_mode, "--enable-sleep-mode cannot put fluxmoe's memory to sleep"),
        (vllm_config.lora_config is not None, "--enable-lora is not served"),
        (
            offload.uva.cpu_offload_gb > 0 or offload.prefetch.offload_group_size > 0,
            "vLLM's own offloading (--cpu-offload-gb, --offload-group-size) is not served beside it: choose a "
            "placement of fluxmoe, such as balanced or host",
        ),
    )
    for asked, sentence in refused:
        if asked:
            raise FeatureError(f"{flag}: {sentence}")
