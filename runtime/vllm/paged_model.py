"""PagedModel: the layers with experts of one model in one process of vLLM, around one ExpertPager.

    add_layer   while vLLM makes the model: what a layer needs
    put         while it loads the checkpoint: the first expert opens the pager, so that nothing is allocated before
                the size of all is known
    loaded      when a layer has all: after the last, loads begin, and one small pass compiles what would otherwise be
                compiled under the first request. vLLM then measures what is left for KV.
    experts     in a pass, through `torch.ops.fluxmoe.experts`, which neither dynamo nor a graph looks into

Nothing here knows vLLM.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from multiprocessing.util import Finalize
from typing import Protocol

import torch
from fluxmoe.kernels.ops import ExpertDims, ExpertSizes
from torch import Tensor

from ..devices import device_of
from ..experts.config import PagingConfig, SettingError
from ..experts.footprint import Footprint, lay_out
from ..experts.pager import ExpertPager
from ..experts.streamer_cuda import CudaStreamer
from ..memory.budget import BudgetError, by_line, format_bytes
from ..memory.check import FreeMemory
from . import report
from .graph_passes import GraphPasses, with_graphs
from .kv_tokens import Room, described, least_paging
from .metrics import Metrics
from .settings import PluginConfig

logger = logging.getLogger("vllm.fluxmoe")


class RoomOf(Protocol):
    """What room a host has, told of the layers as they are made."""

    def see(self, layer: torch.nn.Module) -> None: ...
    def weigh(self) -> None: ...
    def grown_bytes(self) -> int | None: ...
    def __call__(self) -> Room: ...


# On a CPU a layer's weights are read once for so many tokens, where arithmetic is the limit: more would only take
# memory for the workspace, from KV. A GPU takes the largest pass at once.
_CPU_TOKENS = 1024
# vLLM's server kills its workers when it is told to stop, unless --shutdown-timeout gives them time: a line at the end
# alone would seldom be seen.
_REPORT_EVERY_S = 60


class PagedModel:
    """config: settings; device: of the model; max_tokens: of the largest pass; room: for experts and KV, asked for when
    the first expert comes, where config.kv_tokens chooses by it; follow: tells whoever captures graphs of the streamer,
    where there may be graphs.

    freed_bytes: once all is loaded, of the memory that KV is taken from, what dense experts would have taken more than
    ours and our code have; negative where it is less.
    """

    def __init__(
        self,
        config: PluginConfig,
        device: torch.device | str,
        max_tokens: int,
        room: RoomOf | None = None,
        follow: Callable[[CudaStreamer], GraphPasses] | None = None,
    ) -> None:
        self.config, self.device, self.room, self._follow = config, torch.device(device), room, follow
        self.freed_bytes: int | None = None
        self._graphs: GraphPasses | None = None
        self.max_tokens = min(max_tokens, _CPU_TOKENS) if device_of(self.device).is_host else max_tokens
        self.dims: ExpertDims | None = None
        self.layers = self._ready = 0
        self._pager: ExpertPager | None = None
        self._reported_s = time.monotonic()
        self._metrics = Metrics()

    @property
    def pager(self) -> ExpertPager:
        assert self._pager is not None, "there is a pager once the first expert has come"
        return self._pager

    @property
    def opened(self) -> bool:
        return self._pager is not None

    # Loading.

    def add_layer(self, dims: ExpertDims) -> int:
        """The number of a new layer. SettingError unless all layers are alike."""
        if self.dims not in (None, dims):
            raise SettingError(
                f"fluxmoe takes models whose layers have experts of one size, got {self.dims} and {dims}"
            )
        self.dims = dims
        self.layers += 1
        return self.layers - 1

    def put(self, layer: int, expert: int, gate_up: Tensor, down: Tensor) -> None:
        """One expert in whole; see `ExpertPager.put`. The first may raise what `_open` does."""
        if self._pager is None:
            self._pager = self._open()
        self._pager.put(layer, expert, gate_up, down)

    def _open(self) -> ExpertPager:
        """BudgetError for what does not fit the memory that is free, SettingError for placements that this device
        cannot serve inside vLLM, and what ExpertPager raises."""
        assert self.dims is not None
        if self.room is not None:
            self.room.weigh()
        config = self._chosen() if self.config.kv_tokens is not None else self.config
        pager = ExpertPager(self.dims, self.layers, config, self.device, self.max_tokens)
        try:
            if not pager.device.reads_disk and pager.placement.counts()["disk"]:
                raise SettingError(
                    f"placement {config.placement} keeps experts in files, which fluxmoe reads on the CPU only: choose "
                    "packed, balanced or host"
                )
            free, lines, host_lines = FreeMemory.now(pager.device), pager.lines(), pager.host_lines()
            for what, has, needed in (
                ("device", free.device_bytes, {**lines, **host_lines} if free.shared else lines),
                ("host", free.host_bytes, host_lines),
            ):
                if has is not None and sum(needed.values()) > has:
                    raise BudgetError(
                        f"experts take {format_bytes(sum(needed.values()))} of {what} memory ({by_line(needed)}), and "
                        f"only {format_bytes(has)} are free; choose another placement or expert_format for fluxmoe"
                    )
            pager.open()
        except BaseException:
            pager.close()
            raise
        return pager

    def _chosen(self) -> PagingConfig:
        """The least paging that leaves room for config.kv_tokens, which a line says. BudgetError where none does."""
        assert self.dims is not None
        assert self.room is not None, "who asks for tokens says what room there is"
        dims, device = self.dims, device_of(self.device)
        kernels: dict[frozenset[str], ExpertSizes] = {}

        def footprint(config: PagingConfig) -> Footprint:
            formats = frozenset(config.formats_met)
            if formats not in kernels:
                kernels[formats] = device.make_expert_ops(dims, self.max_tokens, config)
            ops = kernels[formats]
            return Footprint(lay_out(self.layers, config, ops, dict), config, ops)

        config, tokens = least_paging(self.config, self.room(), footprint)
        logger.info(
            "FluxMoE: kv_tokens %s: %s, which leaves room for about %s tokens of KV cache",
            f"{self.config.kv_tokens:,}", described(config), f"{tokens:,}",
        )  # fmt: skip
        return config

    def loaded(self) -> None:
        """One more layer has all of its experts. StoreError where one is missing."""
        self._ready += 1
        if self._ready < self.layers:
            return
        if self._pager is None:
            self._pager = self._open()
        self.pager.seal()
        if self._follow is not None and isinstance(streamer := self.pager.streamer, CudaStreamer) and streamer.order:
            self._graphs = self._follow(streamer)
        self._warm_up()
        logger.info("FluxMoE\n%s", report.placement_table(self.pager))
        grown = self.room.grown_bytes() if self.room is not None else None
        taken = report.taken_bytes(self.pager) if grown is None else grown
        self.freed_bytes = report.dense_bytes(self.pager) - taken
        # They know vLLM's configuration, which knows whose key we are kept under: it would never go.
        self.room = self._follow = None
        # When the model goes, or its process ends: unlike atexit, also one that multiprocessing has started.
        Finalize(self, _end, (self.pager, self._graphs), exitpriority=100)

    def _warm_up(self) -> None:
        """A pass of one token: compiles kernels and makes tables, none of which may happen under a request or a
        capture."""
        dims = self.pager.ops.dims
        x = torch.zeros(1, dims.hidden, dtype=dims.dtype, device=self.device)
        ids = torch.arange(dims.top_k, dtype=torch.int32, device=self.device)[None]
        for layer in range(self.layers):
            self.experts(layer, x, ids, torch.ones_like(ids, dtype=torch.float32))

    # Serving.

    def experts(self, layer: int, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """See `ExpertPager.experts`. GraphError inside a graph that cannot be right."""
        if self._graphs is not None:
            self._graphs.begin()
        y = self.pager.experts(layer, x, topk_ids, topk_weights)
        # On a GPU, counters wait for the device, and a pass may be a graph that is being captured.
        if layer == self.layers - 1 and self.pager.device.is_host:
            self._report()
        return y

    def _report(self) -> None:
        self._metrics.update(self.pager.counters)
        if time.monotonic() - self._reported_s >= _REPORT_EVERY_S:
            self._reported_s = time.monotonic()
            logger.info("FluxMoE: %s", report.served(self.pager.counters()))


def _end(pager: ExpertPager, graphs: GraphPasses | None) -> None:
    try:
        logger.info("FluxMoE: %s", report.served(with_graphs(pager.counters(), graphs)))
    finally:
        pager.close()
