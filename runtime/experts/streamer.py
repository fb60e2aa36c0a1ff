"""Streaming slots and the streamer: Algorithm 1 of the paper (arXiv 2604.02715 §4.1), whose schedule is `slots`.

Poison mode fills every slot with NaN when it is made and again when it is given back, both on the reader's side:
from then until the load is done the slot holds nothing that could pass for weights, so a missed wait always shows.

    ThreadStreamer   CPU (streamer_cpu.py): one copy thread, a condition variable in the place of events
    CudaStreamer     CUDA (streamer_cuda.py): one copy stream a tensor type, events, no wait of the host anywhere
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from fluxmoe.kernels.expert_table import DOWN, GATE_UP, ExpertTable
from torch import Tensor

from .cache import CachedExperts
from .footprint import slot_schedule
from .placement import Tier
from .store import ExpertStore, LoadPlan

# NaN in bf16 and in fp32.
_POISON = 0xFF


class Counters(NamedTuple):
    """Totals since `seal`: bytes that crossed to the device, whole from the host's and the disk's tier, on demand (of
    experts that kernels read in host memory, each once a pass), and with moves; ns that passes waited for loads, and
    that loads took (0 on CUDA, where both happen on the device); loads, two a layer; experts that came on demand from
    files and were in the cache, and those that were not."""

    host_bytes: int = 0
    disk_bytes: int = 0
    on_demand_bytes: int = 0
    moved_bytes: int = 0
    stall_ns: int = 0
    transfer_ns: int = 0
    loads: int = 0
    cache_hits: int = 0
    cache_misses: int = 0

    @property
    def streamed_bytes(self) -> int:
        """Brought by loads."""
        return self.host_bytes + self.disk_bytes


class LayerPage:
    """The experts of the layer that runs now (kernels.ops.LayerExperts)."""

    def __init__(
        self,
        table: ExpertTable,
        wait: Callable[[int], None] | None,
        find: Callable[[np.ndarray], CachedExperts] | None = None,
    ) -> None:
        self.table, self._find = table, find
        self.wait = wait or _no_wait
        self.in_place = wait is None and find is None
        self._cached: CachedExperts | None = None

    def need(self, experts: np.ndarray) -> None:
        if self._find is not None:
            self._cached = self._find(experts)

    def ready(self, tensor_type: int) -> Iterable[Tensor | None]:
        self.wait(tensor_type)
        if self._find is None:
            return (None,)
        assert self._cached is not None, "experts that come on demand are asked for before they are used"
        return self._cached.ready(tensor_type)


class _Known(NamedTuple):
    """A layer's table, and what it was made from."""

    load_plan: LoadPlan
    epoch: int
    table: ExpertTable


class Streamer(ABC):
    """Slots, tables and the order of visits: what both kinds share. Layers must be visited in order."""

    # The tier whose compressed blocks wait in device memory until they are decoded.
    staged: Tier

    def __init__(self, store: ExpertStore, slots: int, poison: bool = False) -> None:
        self.store, self.poison = store, poison
        layout = store.layout
        self.order, self.schedule = slot_schedule(layout, slots, store.moves)
        self.num_slots = self.schedule.slots if self.order else 0
        self._slots = [
            (store.device.empty(store.slot_bytes(GATE_UP)), store.device.empty(store.slot_bytes(DOWN)))
            for _ in range(self.num_slots)
        ]
        # One a tensor type for all loads: those of a type come one after the other.
        self._staging = [
            {self.staged: store.device.empty(layout.staging_bytes(d, self.staged))} for d in (GATE_UP, DOWN)
        ]
        for slot in self._slots if poison else ():
            self._spoil(slot)
        self._tables: dict[int, _Known] = {}
        # What each load brings that was begun or is read; settled by whoever of loader and reader comes first.
        self._load_plans: dict[int, LoadPlan] = {}
        self._planning = threading.Lock()
        self._rank = {layer: rank for rank, layer in enumerate(self.order)}
        self._next_visit = 0
        self._capturing = False

    @property
    def keeps_all(self) -> bool:
        """Whether every streamed layer has a slot of its own: one load each, for ever."""
        return self.schedule.keeps_all

    def slot_of(self, layer: int) -> tuple[Tensor, Tensor]:
        """uint8 buffers of both tensor types in which a streamed layer is read in every pass."""
        return self._slots[self.schedule.slot(self._rank[layer])]

    @property
    def slot_bytes(self) -> int:
        slots, staging = (sum(self._slots, ()), [staging[self.staged] for staging in self._staging])
        return sum(buffer.nbytes for buffer in (*slots, *staging))

    def _spoil(self, slot: tuple[Tensor, ...]) -> None:
        for buffer in slot:
            buffer.fill_(_POISON)

    def _visit_of(self, layer: int) -> int:
        """The visit of `layer` that begins now."""
        rank = self._rank[layer]
        if self.keeps_all:
            return rank
        if rank == 0:
            self._next_visit = self.schedule.next_pass(self._next_visit)
        expected = self._layer_of(self._next_visit)
        assert layer == expected, f"layer {layer} visited out of order, expected {expected}"
        return self._next_visit

    def _layer_of(self, visit: int) -> int:
        return self.order[self.schedule.rank(visit)]

    def _slot_of(self, visit: int) -> tuple[Tensor, Tensor]:
        return self._slots[self.schedule.slot(visit)]

    def _load_plan_of(self, visit: int) -> LoadPlan:
        with self._planning:
            return self._load_plans.setdefault(visit, self.store.load_plans[self._layer_of(visit)])

    def _forget(self, visit: int) -> None:
        """Drop the load plans of `visit` and of those before it, which nobody reads any more."""
        if not self.keeps_all:
            with self._planning:
                self._load_plans = {v: plan for v, plan in self._load_plans.items() if v > visit}

    def _table(self, load_plan: LoadPlan) -> ExpertTable:
        """Addresses of the experts of the load plan's layer, its slot holding what that brings.

        One table a layer for ever, updated in place when experts have moved.
        """
        layer, epoch = load_plan.layer, self.store.epochs[load_plan.layer]
        known = self._tables.get(layer)
        if known is not None and known.load_plan is load_plan and known.epoch == epoch:
            return known.table
        assert not self._capturing, "tables must be prepared before a capture: a graph would keep what they are now"
        blocks = self.store.blocks_in_place(layer)
        if layer in self._rank:
            blocks |= self.store.slot_blocks(load_plan, self._slot_of(self._rank[layer]))
        ordered = [blocks[expert] for expert in sorted(blocks)]
        pairs, formats = [block.pair for block in ordered], [block.expert_format for block in ordered]
        if known is None:
            table = ExpertTable.from_blocks(pairs, self.store.device.torch, formats)
        else:
            table = known.table
            table.update(pairs, formats)
        self._tables[layer] = _Known(load_plan, epoch, table)
        return table

    @contextmanager
    def layer(self, index: int) -> Iterator[LayerPage]:
        """Experts of layer `index`; leaving the context lets its slot be recycled."""
        if index not in self._rank:
            table = self._table(self.store.load_plans[index])
            yield LayerPage(table, None, self._find(index, table))
            return
        visit = self._visit_of(index)
        self._begin(visit)
        try:
            table = self._table(self._load_plan_of(visit))
            yield LayerPage(table, lambda d: self._wait(visit, d), self._find(index, table))
        finally:
            if self.poison and not self.keeps_all and self._is_loaded(visit):
                self._spoil(self._slot_of(visit))
            self._finish(visit)
            self._forget(visit)
            self._next_visit = visit + 1

    def _find(self, layer: int, table: ExpertTable) -> Callable[[np.ndarray], CachedExperts] | None:
        """What brings the layer's experts on demand, if any come so."""
        cache = self.store.cache
        if cache is None or layer not in cache.layers:
            return None
        return lambda experts: cache.need(layer, experts, table)

    def _is_loaded(self, visit: int) -> bool:
        """Whether nothing writes to the slot of a visit, which may have been left before its loads were done."""
        return True

    @abstractmethod
    def _begin(self, visit: int) -> None:
        """The visit begins; visits before it that were skipped count as computed."""

    @abstractmethod
    def _wait(self, visit: int, tensor_type: int) -> None:
        """Return, or order the stream, once a tensor type of the visit is loaded."""

    @abstractmethod
    def _finish(self, visit: int) -> None:
        """The visit is computed, or in the order of the stream will be: its slot may be overwritten."""

    @abstractmethod
    def counters(self) -> Counters:
        """What loads have done; the rest is 0."""

    @abstractmethod
    def close(self) -> None:
        """Stop loading. Idempotent."""


def _no_wait(tensor_type: int) -> None:
    pass
