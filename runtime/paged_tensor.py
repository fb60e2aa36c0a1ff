"""PagedTensor: expert tensors at addresses that never change, over a pool that holds a few layers (the paper's §4.1).

A tensor type of all experts, [L, E, n, k], is one region. Page (layer, expert) lies at

    address = base + (layer · E + expert) · σ        σ: an expert's bytes, rounded up to whole blocks

for ever; a fixed pool of S·E experts' blocks, S = 2 by default, goes round under it. So kernels that know of no table
run unchanged on `view(layer)`, an ordinary strided tensor [E, n, k] — torch's grouped_mm, say. What rounding wastes is
`padding_bytes`. Where kernels are ours, a table of addresses (ExpertTable) does the same without any mapping.

Algorithm 1, one loader thread a tensor type: load n, counted on for ever over the passes, maps its layer with the
blocks of the visit that it follows in the schedule of `slots`.

    Unmapped ─► Loading ─► Resident ─► Evicting ─► Unmapped
             map      loaded      computed      unmap

Write after read: a block is unmapped only once its visit was computed. Read after write: `layer` hands out views once
all types are loaded. The caller never waits for the device; a loader does, since to unmap under a kernel is an error.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from itertools import count

import numpy as np
import torch
from torch import Tensor

from .region import BlockPool, RegionError, make_pool
from .slots import SlotSchedule

_POISON = 0xFF


class PageState(IntEnum):
    """Of one (layer, expert)."""

    UNMAPPED = 0
    LOADING = 1
    RESIDENT = 2
    EVICTING = 3


_ALLOWED = {
    PageState.UNMAPPED: PageState.LOADING,
    PageState.LOADING: PageState.RESIDENT,
    PageState.RESIDENT: PageState.EVICTING,
    PageState.EVICTING: PageState.UNMAPPED,
}


class PagedTensor:
    """One tensor type [L, E, *shape] of `dtype`; blocks for `slots` layers. Not thread-safe: its loader moves pages."""

    def __init__(
        self, num_layers: int, num_experts: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device,
        slots: int = 2, pool: BlockPool | None = None,
    ) -> None:  # fmt: skip
        if slots < 2:
            raise RegionError(f"paging needs blocks for at least 2 layers (one loads while one is read), got {slots}")
        self.num_layers, self.num_experts, self.shape, self.dtype = num_layers, num_experts, tuple(shape), dtype
        self.device, self.slots = device, min(slots, num_layers)
        self.expert_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        # 64 KiB are the least block of any kind: a pool of one expert's bytes rounded to that holds it on a CPU.
        self.pool = pool or make_pool(device, self._pool_bytes(num_experts))
        self.pages_each = self.pool.pages(self.expert_bytes)
        self.stride = self.pages_each * self.pool.block_bytes
        self.region = self.pool.reserve(num_layers * num_experts * self.stride)
        self.states = np.zeros((num_layers, num_experts), dtype=np.int8)

    def _pool_bytes(self, experts: int) -> int:
        # Granularity is the pool's own affair; 2 MiB is the largest of any.
        rounding = 2 << 20
        return self.slots * experts * -(-self.expert_bytes // rounding) * rounding

    @property
    def padding_bytes(self) -> int:
        """Bytes that rounding an expert up to whole blocks wastes, of each expert."""
        return self.stride - self.expert_bytes

    def address(self, layer: int, expert: int) -> int:
        return self.region.address + (layer * self.num_experts + expert) * self.stride

    def view(self, layer: int) -> Tensor:
        """[E, *shape]: the layer's experts, to be read while all of them are resident."""
        begin = layer * self.num_experts * self.stride
        inner = torch.empty(self.shape, device="meta").stride()
        stride = (self.stride // self.dtype.itemsize, *inner)
        return self.region.tensor(begin, (self.num_experts, *self.shape), self.dtype, stride)

    def _turn(self, layer: int, expert: int, to: PageState) -> None:
        state = PageState(self.states[layer, expert])
        if _ALLOWED[state] != to:
            raise RegionError(f"expert {expert} of layer {layer} is {state.name}, and cannot become {to.name}")
        self.states[layer, expert] = to

    def _pages(self, layer: int, expert: int) -> range:
        first = (layer * self.num_experts + expert) * self.pages_each
        return range(first, first + self.pages_each)

    def begin_load(self, layer: int, instead_of: int | None = None) -> None:
        """Map the layer: with the blocks of layer `instead_of`, whose kernels are done, or with new ones."""
        for expert in range(self.num_experts):
            blocks: list[int | None] = [None] * self.pages_each
            if instead_of is not None:
                self._turn(instead_of, expert, PageState.EVICTING)
                blocks = [self.region.unmap(page, keep=True, idle=True) for page in self._pages(instead_of, expert)]
                self._turn(instead_of, expert, PageState.UNMAPPED)
            for page, block in zip(self._pages(layer, expert), blocks, strict=True):
                self.region.map(page, block)
            self._turn(layer, expert, PageState.LOADING)

    def end_load(self, layer: int) -> None:
        for expert in range(self.num_experts):
            self._turn(layer, expert, PageState.RESIDENT)

    def check(self, layer: int) -> None:
        """RegionError unless the layer may be read now."""
        if (self.states[layer] != PageState.RESIDENT).any():
            expert = int(np.flatnonzero(self.states[layer] != PageState.RESIDENT)[0])
            raise RegionError(
                f"expert {expert} of layer {layer} is read while {PageState(self.states[layer, expert]).name}"
            )
        self.region.check(layer * self.num_experts * self.stride, self.num_experts * self.stride)

    def close(self) -> None:
        self.region.close()
        self.pool.close()


Load = Callable[[int, Tensor], None]


class Pager:
    """Brings layer after layer of several PagedTensors, cyclically, ahead of whoever visits them in order.

    loads[d](layer, view) fills view [E, *shape] of tensor d, in its own thread; on CUDA on its own stream. poison:
    recycled blocks are filled with NaN first. An error of a load is raised by the visit that needs it.
    """

    def __init__(self, tensors: Sequence[PagedTensor], loads: Sequence[Load], poison: bool = False) -> None:
        self.tensors, self.loads, self.poison = tensors, loads, poison
        layers, slots = tensors[0].num_layers, min(tensor.slots for tensor in tensors)
        # With blocks for all layers each is loaded once and stays.
        self.schedule = SlotSchedule(layers, slots, keeps_all=slots >= layers)
        self._changed = threading.Condition()
        self._loaded = [0] * len(tensors)
        self._computed = 0
        self._events: dict[int, torch.cuda.Event] = {}
        self._visit = 0
        self._error: BaseException | None = None
        self._closing = False
        self._threads = [
            threading.Thread(target=self._run, args=(d,), name=f"pager-{d}", daemon=True) for d in range(len(tensors))
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, d: int) -> None:
        try:
            if self.tensors[d].device.type == "cuda":
                stream = torch.cuda.Stream()
                with torch.cuda.stream(stream):
                    self._load_all(d, stream)
            else:
                self._load_all(d, None)
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _load_all(self, d: int, stream: torch.cuda.Stream | None) -> None:
        tensor, schedule = self.tensors[d], self.schedule
        for visit in range(schedule.layers) if schedule.keeps_all else count():
            layer, follows = schedule.rank(visit), schedule.follows(visit)
            with self._changed:
                self._changed.wait_for(lambda v=follows: self._closing or self._computed > v)
                if self._closing:
                    return
                event = self._events.get(follows)
            if event is not None:
                event.synchronize()
            tensor.begin_load(layer, schedule.rank(follows) if follows >= 0 else None)
            view = tensor.view(layer)
            if self.poison:
                view.view(torch.uint8).fill_(_POISON)
            self.loads[d](layer, view)
            if stream is not None:
                stream.synchronize()
            tensor.end_load(layer)
            with self._changed:
                self._loaded[d] = visit + 1
                self._changed.notify_all()

    @contextmanager
    def layer(self, layer: int) -> Iterator[tuple[Tensor, ...]]:
        """Views [E, *shape] of one layer, one a tensor; leaving lets its blocks be recycled. Layers come in order."""
        schedule = self.schedule
        if schedule.keeps_all:
            visit = layer
        else:
            visit = self._visit if layer else schedule.next_pass(self._visit)
            assert layer == schedule.rank(visit), f"layer {layer} visited out of order"
            self._end(visit - 1)  # those of a pass that was given up count as computed
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or self._closing or min(self._loaded) > visit)
            if min(self._loaded) <= visit:
                raise RegionError(
                    f"loading layer {layer} failed: {self._error or 'the pager was closed'}"
                ) from self._error
        for tensor in self.tensors:
            tensor.check(layer)
        try:
            yield tuple(tensor.view(layer) for tensor in self.tensors)
        finally:
            if not schedule.keeps_all:
                self._visit = visit + 1
                self._end(visit)

    def _end(self, visit: int) -> None:
        """The kernels of visits up to `visit` are in the order of the current stream; those that never began count."""
        if visit < self._computed:
            return
        event = None
        if self.tensors[0].device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
        with self._changed:
            for done in range(self._computed, visit + 1) if event is not None else ():
                self._events[done] = event
                self._events.pop(done - 2 * self.schedule.layers, None)
            self._computed = visit + 1
            self._changed.notify_all()

    def close(self) -> None:
        """Stop the loaders; the tensors can be closed afterwards. Idempotent."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
