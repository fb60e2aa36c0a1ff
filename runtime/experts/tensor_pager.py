"""TensorPager: Algorithm 1 (arXiv 2604.02715 §4.1) over PagedTensors, for kernels that know of no table.

One loader thread a tensor type: load n, counted on for ever over the passes, maps its layer with the blocks of the
visit that it follows in the schedule of `slots`. Write after read: a block is unmapped only once its visit was
computed. Read after write: `layer` hands out views once all types are loaded. The caller never waits for the device; a
loader does, since to unmap under a kernel is an error.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count

import torch
from torch import Tensor

from ..devices import device_of
from ..memory.paged_tensor import PagedTensor
from ..memory.region import RegionError
from .slots import SlotSchedule

_POISON = 0xFF

Load = Callable[[int, Tensor], None]


class TensorPager:
    """Brings layer after layer of several PagedTensors, cyclically, ahead of whoever visits them in order.

    loads[d](layer, view) fills view [E, *shape] of tensor d, in its own thread; on CUDA on its own stream. poison:
    recycled blocks are filled with NaN first. An error of a load is raised by the visit that needs it.
    """

    def __init__(self, tensors: Sequence[PagedTensor], loads: Sequence[Load], poison: bool = False) -> None:
        self.tensors, self.loads, self.poison = tensors, loads, poison
        self._device = device_of(tensors[0].device)
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
            with self._device.own_stream() as finish:
                self._load_all(d, finish)
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _load_all(self, d: int, finish: Callable[[], None]) -> None:
        tensor, schedule = self.tensors[d], self.schedule
        for visit in range(schedule.layers) if schedule.keeps_all else count():
            layer, follows = schedule.rank(visit), schedule.follows(visit)
            with self._changed:
                self._changed.wait_for(partial(self._may_load, follows))
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
            finish()
            tensor.end_load(layer)
            with self._changed:
                self._loaded[d] = visit + 1
                self._changed.notify_all()

    def _may_load(self, follows: int) -> bool:
        """Whether the blocks of a load are free, or nothing will be loaded any more."""
        return self._closing or self._computed > follows

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
        event = self._device.now()
        with self._changed:
            if event is not None:
                for done in range(self._computed, visit + 1):
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
