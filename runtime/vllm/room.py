"""What vLLM has for experts and KV cache together, known when the first expert comes: after the model is made, before
any of its weights has taken memory on a CPU."""

from __future__ import annotations

import math
from typing import Any
from weakref import WeakSet

import psutil
import torch
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.kv_cache_interface import AttentionSpec

from ..devices import HOST, device_of
from ..experts.config import SettingError
from ..memory.budget import BudgetError
from .kv_tokens import Room

# What no size tells: code that is compiled, threads, allocators, and on a GPU captured graphs. On a CPU 144 MiB were
# the most that was seen (0.4 GB of dense experts, with and without torch.compile); on a GPU nothing was yet.
_UNFORESEEN_BYTES = {"cpu": 192 << 20, "cuda": 1 << 30}
# Tensors of [tokens, hidden] that a pass holds at once outside the experts, and copies of a pass's logits in fp32.
_ACTIVATIONS, _LOGITS = 12, 3


class RoomInVllm:
    """Of the model that is being made. `see` is told of its layers, so that their weights can be counted.

    before_bytes: the resident memory of this process before anything of ours was loaded, mapped files too, which vLLM
    on a CPU takes from what KV gets.
    """

    def __init__(self, vllm_config: Any, before_bytes: int) -> None:
        self._config, self._device = vllm_config, device_of(vllm_config.device_config.device)
        self._layers: WeakSet[torch.nn.Module] = WeakSet()
        self._taken_bytes, self._weight_bytes = before_bytes if self._device.is_host else 0, 0

    def see(self, layer: torch.nn.Module) -> None:
        self._layers.add(layer)

    def weigh(self) -> None:
        """Once all layers are made, before vLLM brings weights into other forms: those of all layers but the experts,
        which are on the meta device; norms are too small to matter."""
        weights = (weight for layer in self._layers for weight in layer.parameters(recurse=False))
        sizes = {weight.data_ptr(): weight.nbytes for weight in weights if not weight.is_meta}
        self._weight_bytes = sum(sizes.values())

    def grown_bytes(self) -> int | None:
        """Resident memory that has come with our code and experts; None on a GPU, of which we know what we take."""
        if not self._device.is_host:
            return None
        return psutil.Process().memory_info().rss - self._taken_bytes - self._weight_bytes

    def __call__(self) -> Room:
        """Once they are weighed. SettingError where paging does not decide how much KV there is."""
        config, device = self._config, self._device
        if config.cache_config.kv_cache_memory_bytes is not None:
            raise SettingError(
                "kv_tokens chooses paging by what it leaves for KV, and --kv-cache-memory-bytes or "
                "VLLM_CPU_KVCACHE_SPACE fixes KV: give one of them"
            )
        requested = math.ceil(self._total_bytes() * config.cache_config.gpu_memory_utilization)
        others = self._taken_bytes + self._weight_bytes + self._pass_bytes() + _UNFORESEEN_BYTES[device.kind]
        try:
            host = HOST.free_bytes()
        except BudgetError:
            host = None
        return Room(requested - others, host, device.is_host, self._token_bytes(), device.reads_disk)

    def _total_bytes(self) -> int:
        """As vLLM counts it: on a CPU of the memory node that the worker runs on."""
        if not self._device.is_host:
            return self._device.total_bytes()
        from vllm.utils.cpu_resource_utils import get_allowed_cpu_list, get_memory_node_info

        return get_memory_node_info(get_allowed_cpu_list()[0].numa_node).total_memory

    def _pass_bytes(self) -> int:
        scheduler, model = self._config.scheduler_config, self._config.model_config
        activations = scheduler.max_num_batched_tokens * model.get_hidden_size() * model.dtype.itemsize
        logits = scheduler.max_num_seqs * model.get_vocab_size() * 4
        return _ACTIVATIONS * activations + _LOGITS * logits

    def _token_bytes(self) -> int:
        layers = get_layers_from_vllm_config(self._config, AttentionLayerBase).values()
        specs = [spec for layer in layers if (spec := layer.get_kv_cache_spec(self._config)) is not None]
        if not specs or not all(isinstance(spec, AttentionSpec) for spec in specs):
            raise SettingError("kv_tokens is for models whose layers all keep keys and values; give a placement")
        return sum(math.ceil(spec.page_size_bytes / spec.block_size) for spec in specs)
