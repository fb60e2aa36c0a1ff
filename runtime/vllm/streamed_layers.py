"""StreamedLayers: a model's experts as another's kernels read them, whole layers at a time under fixed addresses.

The paper's way (arXiv 2604.02715 §4.1) for experts that our kernels cannot read: whatever tensors vLLM's method for a
layer has made stay as they are, in host memory, and their parameters become views of the slot that the layer has for
ever. To store and streamer a layer is one expert, whose two blocks are its tensors one behind the other. Layer l is
loaded while those before it are computed.

    add     while a model is made: the number of a layer
    take    while it is loaded: a layer's tensors are ready; after the last, slots are allocated and loads begin
    begin   in a pass, before a layer's kernels: waits for its loads
    end     after them: its slot may be filled anew

Nothing here knows vLLM.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.util import Finalize
from typing import NamedTuple

import torch
from fluxmoe.kernels.expert_table import DOWN, GATE_UP
from fluxmoe.kernels.formats import DENSE
from torch import Tensor

from ..devices import device_of
from ..experts.config import SettingError
from ..experts.footprint import slot_schedule
from ..experts.layout import ExpertLayout
from ..experts.placement import Tier, place
from ..experts.static_store import StaticStore
from ..experts.streamer import Counters, Streamer
from ..experts.streamer_cuda import CudaStreamer
from ..memory.budget import BudgetError, format_bytes
from ..memory.check import FreeMemory
from ..memory.host_memory import HostMemory
from ..timeline import Timeline
from . import report
from .graph_passes import GraphPasses, with_graphs
from .metrics import Metrics
from .settings import PluginConfig

logger = logging.getLogger("vllm.fluxmoe")

# A layer's tensor that is smaller stays on the device: streaming it would free nothing worth a copy.
_LEAST_BYTES = 64 << 10
# Where tensors begin in a slot, as where torch allocates them on a GPU.
_ALIGNMENT = 512
_REPORT_EVERY_S = 60


class _Place(NamedTuple):
    """Where a tensor lies in the slot of its layer: which of the two buffers, its first byte there, and its form."""

    buffer: int
    begin: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


class StreamedLayers:
    """config: `slots` and `poison` count; device: of the model; follow: tells whoever captures graphs of the streamer,
    where there may be graphs. freed_bytes: as PagedModel's."""

    def __init__(
        self, config: PluginConfig, device: torch.device, follow: Callable[[CudaStreamer], GraphPasses] | None = None
    ) -> None:
        self.config, self.device, self._follow = config, device_of(device), follow
        self.layers = 0
        self._places: dict[str, _Place] = {}
        self._sizes = [0, 0]
        self._taken: dict[int, tuple[dict[str, torch.nn.Parameter], tuple[Tensor, Tensor]]] = {}
        self._memory = HostMemory(self.device.asynchronous)
        self._streamer: Streamer | None = None
        self._graphs: GraphPasses | None = None
        self.freed_bytes: int | None = None
        self._visiting = ExitStack()
        self._metrics, self._reported_s = Metrics(), time.monotonic()

    @property
    def opened(self) -> bool:
        return self._streamer is not None

    # Loading.

    def add(self) -> int:
        """The number of a new layer, which is called after those before it."""
        self.layers += 1
        return self.layers - 1

    def take(self, layer: int, weights: dict[str, torch.nn.Parameter]) -> None:
        """weights: of all experts, by name, in the form that kernels read, on any device. SettingError where layers are
        not alike, and nothing is large enough to stream; BudgetError and HostMemoryError where memory is short."""
        large = {name: weight for name, weight in weights.items() if weight.nbytes >= _LEAST_BYTES}
        places, sizes = _lay_out(large)
        if not self._taken:
            self._places, self._sizes = places, sizes
            self._check_room()
        if places != self._places:
            raise SettingError(f"vllm_kernels: layer {layer} with experts is unlike the others; all must be alike")
        blocks = self._memory.empty(sizes[GATE_UP]), self._memory.empty(sizes[DOWN])
        for name, weight in large.items():
            _view(blocks, places[name]).copy_(weight.data)
            weight.data = torch.empty(0, dtype=weight.dtype, device="cpu")
        self._taken[layer] = large, blocks
        if len(self._taken) == self.layers:
            self._open()

    def _check_room(self) -> None:
        if not self._places:
            raise SettingError(
                f"vllm_kernels: no layer has {format_bytes(_LEAST_BYTES)} of experts, less than is worth streaming; "
                "serve this model without fluxmoe"
            )
        slots = slot_schedule(self._layout(), self.config.slots, moves=False)[1].slots
        needed, free = slots * sum(self._sizes), FreeMemory.now(self.device).device_bytes
        if free is not None and needed > free:
            raise BudgetError(
                f"vllm_kernels: {slots} slots take {format_bytes(needed)}, and only {format_bytes(free)} are free; "
                "choose fewer slots, or give vLLM more memory"
            )

    def _layout(self) -> ExpertLayout:
        gate_up, down = self._sizes
        return ExpertLayout(place("host", self.layers, 1), {DENSE: (gate_up, down)})

    def _open(self) -> None:
        blocks = [self._taken[layer][1] for layer in range(self.layers)]
        store = StaticStore(self._layout(), self.device, host=blocks)
        store.seal()
        self._streamer = self.device.make_streamer(store, self.config, Timeline(enabled=False))
        for layer, (weights, _) in self._taken.items():
            for name, weight in weights.items():
                weight.data = _view(self._streamer.slot_of(layer), self._places[name])
        self._taken.clear()
        if self._follow is not None and isinstance(self._streamer, CudaStreamer):
            self._graphs = self._follow(self._streamer)
        logger.info("FluxMoE\n%s", self._table())
        whole = 0 if self.device.is_host else store.layout.tier_bytes(Tier.HOST)
        self.freed_bytes = whole - self._streamer.slot_bytes
        Finalize(self, _end, (self._streamer, self._graphs, self._memory), exitpriority=100)

    def _table(self) -> str:
        assert self._streamer is not None
        held, slots = self._streamer.slot_bytes, self._streamer.num_slots
        whole = self._streamer.store.layout.tier_bytes(Tier.HOST)
        freed = f"{format_bytes(whole - held)} of it are free" if whole > held else "no more of it is free"
        where = "; on a CPU both are one memory, and slots come on top" if self.device.is_host else ""
        return (
            f"vLLM's own kernels read {', '.join(self._places)} of {self.layers} layers, streamed from host memory\n"
            f"host memory {format_bytes(whole)}, {slots} slots {format_bytes(held)} of the device's, where "
            f"the experts would take {format_bytes(whole)}: {freed}{where}"
        )

    # Serving.

    def begin(self, layer: int) -> None:
        """Returns once the layer's tensors may be read, by kernels in the order of the current stream. StoreError
        where a load failed, GraphError inside a graph that cannot be right."""
        assert self._streamer is not None, "layers are called once all are taken"
        self._visiting.close()  # of a pass that an error ended
        if self._graphs is not None:
            self._graphs.begin()
        page = self._visiting.enter_context(self._streamer.layer(layer))
        for tensor_type in (GATE_UP, DOWN):
            page.wait(tensor_type)

    def end(self, layer: int) -> None:
        self._visiting.close()
        # On a GPU, counters wait for the device, and a pass may be a graph that is being captured.
        if layer == self.layers - 1 and self.device.is_host:
            self._metrics.update(self.counters)
            if time.monotonic() - self._reported_s >= _REPORT_EVERY_S:
                self._reported_s = time.monotonic()
                logger.info("FluxMoE: %s", report.served(self.counters()))

    def counters(self) -> Counters:
        assert self._streamer is not None, "there is something to count once all layers are taken"
        return with_graphs(self._streamer.counters(), self._graphs)


def _lay_out(weights: dict[str, torch.nn.Parameter]) -> tuple[dict[str, _Place], list[int]]:
    """Places of a layer's tensors by name, and the sizes of both buffers: by turns, so that both copy streams work.
    SettingError for a tensor that is not one piece of memory."""
    places, sizes = {}, [0, 0]
    for i, (name, weight) in enumerate(weights.items()):
        expected = 1
        for stride, size in sorted(zip(weight.stride(), weight.shape, strict=True)):
            if size > 1 and stride != expected:
                raise SettingError("vllm_kernels: vLLM's method made experts with gaps, which are not served")
            expected *= size
        places[name] = _Place(i % 2, sizes[i % 2], weight.shape, weight.stride(), weight.dtype)
        sizes[i % 2] += -(-weight.nbytes // _ALIGNMENT) * _ALIGNMENT
    return places, sizes


def _view(buffers: tuple[Tensor, Tensor], place: _Place) -> Tensor:
    """The tensor at a place in a pair of buffers."""
    nbytes = place.shape.numel() * place.dtype.itemsize
    flat = buffers[place.buffer][place.begin : place.begin + nbytes].view(place.dtype)
    return flat.as_strided(place.shape, place.stride)


def _end(streamer: Streamer, graphs: GraphPasses | None, memory: HostMemory) -> None:
    try:
        logger.info("FluxMoE: %s", report.served(with_graphs(streamer.counters(), graphs)))
    finally:
        streamer.close()
        streamer.store.close()
        memory.close()
