"""StreamedLayers: a model's experts as another's kernels read them, whole layers at a time under fixed addresses.

The paper's own mechanism (arXiv 2604.02715 §4.1), and the only one for experts that our kernels cannot read: whatever
tensors vLLM's method for a layer has made stay as they are, in host memory, and their parameters become views of
PagedTensors, under which blocks for `slots` layers go round. Layer l is loaded while those before it are computed.

    add     while a model is made: the number of a layer
    take    while it is loaded: a layer's tensors are ready; after the last, blocks are allocated and loads begin
    begin   in a pass, before a layer's kernels: waits for its loads
    end     after them: its blocks may be recycled

Nothing here knows vLLM.
"""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from multiprocessing.util import Finalize

import torch
from torch import Tensor

from ..devices import device_of
from ..experts.config import SettingError
from ..experts.streamer import Counters
from ..experts.tensor_pager import TensorPager
from ..memory.budget import BudgetError, format_bytes
from ..memory.check import FreeMemory
from ..memory.paged_tensor import PagedTensor
from . import report
from .metrics import Metrics
from .settings import PluginConfig

logger = logging.getLogger("vllm.fluxmoe")

# A tensor of a layer that is smaller than a block stays on the device: paging it would free nothing.
_BLOCK_BYTES = {"cpu": 64 << 10, "cuda": 2 << 20}
_REPORT_EVERY_S = 60


class StreamedLayers:
    """config: `slots` and `poison` count; device: of the model."""

    def __init__(self, config: PluginConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.layers = 0
        self._taken: dict[int, dict[str, torch.nn.Parameter]] = {}
        self._pager: TensorPager | None = None
        self._visiting = ExitStack()
        self._tally = _Tally()
        self._metrics, self._reported_s = Metrics(), time.monotonic()

    @property
    def opened(self) -> bool:
        return self._pager is not None

    # Loading.

    def add(self) -> int:
        """The number of a new layer, which is called after those before it."""
        self.layers += 1
        return self.layers - 1

    def take(self, layer: int, weights: dict[str, torch.nn.Parameter]) -> None:
        """weights: of all experts, by name, in the form that kernels read. SettingError where layers are not alike, and
        nothing is large enough to stream; BudgetError where slots do not fit."""
        least = _BLOCK_BYTES[self.device.type]
        self._taken[layer] = {name: weight for name, weight in weights.items() if weight.nbytes >= least}
        for weight in self._taken[layer].values():
            if not weight.is_contiguous():
                raise SettingError("vllm_kernels: vLLM's method made experts with gaps, which are not served")
            if self.device.type != "cpu":
                weight.data = weight.data.cpu().pin_memory()
        if len(self._taken) == self.layers:
            self._open()

    def _open(self) -> None:
        first = {name: (weight.shape, weight.dtype) for name, weight in self._taken[0].items()}
        for layer, weights in self._taken.items():
            if {name: (weight.shape, weight.dtype) for name, weight in weights.items()} != first:
                raise SettingError(f"vllm_kernels: layer {layer} with experts is unlike the first; all must be alike")
        if not first:
            raise SettingError(
                f"vllm_kernels: no layer has {format_bytes(_BLOCK_BYTES[self.device.type])} of experts, less than is "
                "worth streaming; serve this model without fluxmoe"
            )
        slots = min(self.config.slots, self.layers)
        needed = slots * sum(weight.nbytes for weight in self._taken[0].values())
        free = FreeMemory.now(device_of(self.device)).device_bytes
        if free is not None and needed > free:
            raise BudgetError(
                f"vllm_kernels: {slots} slots take {format_bytes(needed)}, and only {format_bytes(free)} are free; "
                "choose fewer slots, or give vLLM more memory"
            )
        tensors = []
        for name, (shape, dtype) in first.items():
            # A page is a whole layer, so that a view is contiguous, as kernels expect.
            tensor = PagedTensor(self.layers, 1, shape, dtype, self.device, self.config.slots)
            parameters = [self._taken[layer][name] for layer in range(self.layers)]
            self._tally.transfers.append(_Transfer([parameter.data for parameter in parameters]))
            tensors.append(tensor)
            for layer, parameter in enumerate(parameters):
                parameter.data = tensor.view(layer)[0]
        self._taken.clear()
        self._pager = TensorPager(tensors, self._tally.transfers, self.config.poison)
        logger.info("FluxMoE\n%s", self._table(list(first)))
        Finalize(self, _end, (self._pager, self._tally), exitpriority=100)

    def _table(self, names: list[str]) -> str:
        assert self._pager is not None
        tensors = self._pager.tensors
        held = sum(tensor.slots * tensor.stride for tensor in tensors)
        whole = sum(transfer.nbytes for transfer in self._tally.transfers)
        freed = f"{format_bytes(whole - held)} of it are free" if whole > held else "no more of it is free"
        where = "; on a CPU both are one memory, and slots come on top" if self.device.type == "cpu" else ""
        return (
            f"vLLM's own kernels read {', '.join(names)} of {self.layers} layers, streamed from host memory\n"
            f"host memory {format_bytes(whole)}, {tensors[0].slots} slots {format_bytes(held)} of the device's, where "
            f"the experts would take {format_bytes(whole)}: {freed}{where}"
        )

    # Serving.

    def begin(self, layer: int) -> None:
        """Returns once the layer's tensors may be read, by kernels in the order of the current stream. RegionError
        where a load failed."""
        assert self._pager is not None, "layers are called once all are taken"
        self._visiting.close()  # of a pass that an error ended
        start = time.perf_counter_ns()
        self._visiting.enter_context(self._pager.layer(layer))
        self._tally.stall_ns += time.perf_counter_ns() - start

    def end(self, layer: int) -> None:
        self._visiting.close()
        if layer == self.layers - 1:
            self._metrics.update(self._tally.counters)
            if time.monotonic() - self._reported_s >= _REPORT_EVERY_S:
                self._reported_s = time.monotonic()
                logger.info("FluxMoE: %s", report.served(self._tally.counters()))

    def counters(self) -> Counters:
        return self._tally.counters()


class _Transfer:
    """Loads of one tensor type: its layers in host memory, and what was copied from there."""

    def __init__(self, sources: list[Tensor]) -> None:
        self.sources = sources
        self.nbytes = sum(source.nbytes for source in sources)
        self.loads = self.loaded_bytes = self.took_ns = 0

    def __call__(self, layer: int, view: Tensor) -> None:
        start = time.perf_counter_ns()
        view[0].copy_(self.sources[layer], non_blocking=True)
        self.loads += 1
        self.loaded_bytes += view.nbytes
        self.took_ns += time.perf_counter_ns() - start


class _Tally:
    """What was loaded, and how long passes waited for it."""

    def __init__(self) -> None:
        self.transfers: list[_Transfer] = []
        self.stall_ns = 0

    def counters(self) -> Counters:
        return Counters(
            host_bytes=sum(each.loaded_bytes for each in self.transfers),
            stall_ns=self.stall_ns,
            transfer_ns=sum(each.took_ns for each in self.transfers),
            loads=sum(each.loads for each in self.transfers),
        )


def _end(pager: TensorPager, tally: _Tally) -> None:
    logger.info("FluxMoE: %s", report.served(tally.counters()))
    pager.close()
    for tensor in pager.tensors:
        tensor.close()
