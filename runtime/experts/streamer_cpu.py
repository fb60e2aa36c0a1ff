"""ThreadStreamer: loads on a copy thread, a condition variable in the place of events."""

from __future__ import annotations

import threading
import time
from collections import Counter
from functools import partial
from itertools import count

from fluxmoe.kernels.expert_table import DOWN, GATE_UP

from ..timeline import COMPUTE, COPY, Timeline
from .config import Delay
from .disk import StoreError
from .layout import TENSOR_NAMES
from .placement import Tier
from .store import ExpertStore
from .streamer import Counters, Streamer


class ThreadStreamer(Streamer):
    """Loads on a copy thread. A load that fails is an error of the reader that needs it, and is tried again."""

    staged = Tier.DISK  # it decodes straight from its host tier

    def __init__(
        self,
        store: ExpertStore,
        slots: int,
        poison: bool = False,
        timeline: Timeline | None = None,
        delay: Delay | None = None,
        link_bandwidth: float | None = None,
    ) -> None:
        super().__init__(store, slots, poison)
        self._timeline = timeline or Timeline(enabled=False)
        self._delay, self._link_bandwidth = delay, link_bandwidth
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._loaded = [0, 0]  # loads done, by tensor type
        self._computed = 0  # visits computed or given up
        self._error: BaseException | None = None
        # By field of Counters.
        self._totals: Counter[str] = Counter()
        self._thread: threading.Thread | None = None
        if self.order:
            self._thread = threading.Thread(target=self._run, name="expert-copy", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        for load in range(len(self.order)) if self.keeps_all else count():
            follows = self.schedule.follows(load)
            layer = self._layer_of(load)
            with self._changed, self._timeline.span(COPY, f"wait slot {layer}", "wait", layer=layer):
                self._changed.wait_for(partial(self._may_load, follows))
            while not self._closing.is_set():
                try:
                    self._load(load)
                    break
                except Exception as error:
                    with self._changed:
                        self._error = error
                        self._changed.notify_all()
                        # Tried again when a reader goes on: what failed a disk may have passed.
                        self._changed.wait_for(lambda: self._error is None or self._closing.is_set())
            if self._closing.is_set():
                return

    def _may_load(self, follows: int) -> bool:
        """Whether the slot of a load is free, or nothing will be loaded any more."""
        return self._computed > follows or self._closing.is_set()

    def _load(self, visit: int) -> None:
        layer, slot, load_plan = self._layer_of(visit), self._slot_of(visit), self._load_plan_of(visit)
        for d in (GATE_UP, DOWN):
            begin = time.perf_counter_ns()
            if self._delay is not None and self._closing.wait(self._delay(layer, d)):
                return
            host, disk = self.store.read_into(load_plan, d, slot[d], self._staging[d], cancelled=self._closing.is_set)
            if self._link_bandwidth:
                # Each tier has a way of its own.
                least_s = max(host, disk) / self._link_bandwidth
                self._closing.wait(max(0.0, least_s - (time.perf_counter_ns() - begin) / 1e9))
            if self._closing.is_set():
                return  # perhaps cut short: never to be taken for loaded
            end = time.perf_counter_ns()
            with self._changed:
                self._timeline.add(
                    COPY, f"{TENSOR_NAMES[d]} {layer}", "load", begin, end, layer=layer,
                    experts=len(load_plan.streamed), bytes=host + disk,
                )  # fmt: skip
                self._totals.update(host_bytes=host, disk_bytes=disk, transfer_ns=end - begin, loads=1)
                self._loaded[d] = visit + 1
                self._changed.notify_all()

    def _begin(self, visit: int) -> None:
        if self._error is not None:
            with self._changed:
                self._error = None
                self._changed.notify_all()
        if visit > self._computed and not self.keeps_all:
            self._finish(visit - 1)  # those of a pass that was given up: nobody will read them

    def _wait(self, visit: int, tensor_type: int) -> None:
        if self._loaded[tensor_type] > visit:
            return
        begin = time.perf_counter_ns()
        with self._changed:
            self._changed.wait_for(
                lambda: self._loaded[tensor_type] > visit or self._error is not None or self._closing.is_set()
            )
        end = time.perf_counter_ns()
        self._totals["stall_ns"] += end - begin
        layer = self._layer_of(visit)
        self._timeline.add(COMPUTE, f"wait {TENSOR_NAMES[tensor_type]} {layer}", "wait", begin, end, layer=layer)
        if self._loaded[tensor_type] > visit:
            return
        if self._error is None:
            raise StoreError("the streamer was closed while a layer waited for its experts")
        if isinstance(self._error, StoreError):
            raise self._error
        raise StoreError(f"loading layer {layer} failed: {self._error}") from self._error

    def _is_loaded(self, visit: int) -> bool:
        return min(self._loaded) > visit

    def _finish(self, visit: int) -> None:
        with self._changed:
            self._computed = max(self._computed, visit + 1)
            self._changed.notify_all()

    def counters(self) -> Counters:
        with self._changed:
            return Counters(**self._totals)

    def close(self) -> None:
        """Stop the copy thread; a load under way ends with its chunk (milliseconds). Idempotent."""
        self._closing.set()
        with self._changed:
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
