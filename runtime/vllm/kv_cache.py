"""What vLLM has made of the memory for KV cache, and what it would have had without us: a line at start.

Only a worker of vLLM knows, once it has measured what is left: so we look at which cache it is told to make.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import Any, Protocol
from weakref import WeakSet

from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

from . import report

logger = logging.getLogger("vllm.fluxmoe")


class Frees(Protocol):
    """A model that frees memory for KV. freed_bytes: None until it is loaded."""

    freed_bytes: int | None


# Of this process, a draft model too, until their worker has its cache.
_models: WeakSet[Frees] = WeakSet()


def tell(vllm_config: Any, model: Frees) -> None:
    """Say what `model` frees once the worker that makes it has its KV cache."""
    module, name = vllm_config.parallel_config.worker_cls.rsplit(".", 1)
    _listen(getattr(import_module(module), name))
    _models.add(model)


def _listen(worker: Any) -> None:
    if hasattr(worker, "fluxmoe_listens"):
        return
    make = worker.initialize_from_config

    def initialize_from_config(self: Any, kv_cache_config: Any) -> None:
        make(self, kv_cache_config)
        _say(self.vllm_config, kv_cache_config)

    worker.initialize_from_config, worker.fluxmoe_listens = initialize_from_config, True


def _say(vllm_config: Any, kv_cache_config: Any) -> None:
    loaded = [(model, model.freed_bytes) for model in _models if model.freed_bytes is not None]
    kv_bytes = sum(tensor.size for tensor in kv_cache_config.kv_cache_tensors)
    if loaded and kv_bytes:
        # As vLLM counts tokens: of requests as long as may be.
        most = get_max_concurrency_for_kv_cache_config(vllm_config, kv_cache_config)
        tokens, cache = int(most * vllm_config.model_config.max_model_len), vllm_config.cache_config
        fixed = cache.kv_cache_memory_bytes is not None or cache.num_gpu_blocks_override is not None
        logger.info("FluxMoE: %s", report.kv_cache(tokens, kv_bytes, sum(freed for _, freed in loaded), fixed))
    for model, _ in loaded:
        _models.discard(model)
