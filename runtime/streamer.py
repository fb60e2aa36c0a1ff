"""Streaming slots and the streamer: Algorithm 1 of the paper (arXiv 2604.02715 §4.1).

Layers are visited cyclically, 0 … L-1, iteration after iteration. The visits that need a load are numbered: job n
brings layer order[n mod len(order)] into slot n mod S. Two dependencies make that safe:

    write after read    job n may overwrite its slot once job n - S was computed
    read after write    the kernels of job n run once its tensors were loaded, gate/up before down

so loads run ahead of compute by S - 1 layers, under attention and experts of earlier layers, and wrap around into
the next iteration. With no more streamed layers than slots each layer keeps its slot and is loaded once.

A pass may be given up at any layer (an exception, a keyboard interrupt): the next pass begins at the first layer
again, and the jobs between count as computed.

Poison mode fills every slot with NaN when it is made and again when it is given back, both on the reader's side:
from then until the load is done the slot holds nothing that could pass for weights, so a missed wait always shows.

    ThreadStreamer   CPU: one copy thread, a condition variable in the place of events
    CudaStreamer     CUDA: one copy stream a tensor type, events, no wait of the host anywhere
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import NamedTuple

import torch
from fluxmoe.kernels.expert_table import DOWN, GATE_UP, ExpertTable
from torch import Tensor

from .layout import ExpertLayout
from .placement import Tier
from .store import TENSOR_NAMES, ExpertStore, LayerPlan, StoreError, aligned_empty
from .timeline import Timeline

Delay = Callable[[int, int], float]
# NaN in bf16 and in fp32.
_POISON = 0xFF


class Counters(NamedTuple):
    """Totals since construction: bytes copied, ns that the reader waited for loads, ns spent loading, loads."""

    streamed_bytes: int
    stall_ns: int
    transfer_ns: int
    loads: int


def slots_used(layout: ExpertLayout, slots: int) -> int:
    """Slots that a layout needs: no more than it has streamed layers."""
    if slots < 2:
        raise StoreError(f"streaming needs at least 2 slots (one loads while one is read), got {slots} slots")
    return min(slots, len(layout.streamed_layers))


# Tiers whose compressed blocks wait in device memory until they are decoded. A CPU decodes straight from its host tier.
_STAGED = {"cpu": (Tier.DISK,), "cuda": (Tier.HOST,)}


def slot_bytes(layout: ExpertLayout, slots: int, device: torch.device) -> int:
    """Device bytes of all slots, and of what is staged beside them, for the ledger."""
    used, staged = slots_used(layout, slots), _STAGED[device.type]
    return sum(used * layout.slot_bytes(d) + layout.staging_bytes(d, staged) for d in (GATE_UP, DOWN))


class LayerPage:
    """The experts of the layer that runs now (kernels.ops.LayerExperts)."""

    def __init__(self, table: ExpertTable, wait: Callable[[int], None]) -> None:
        self.table, self.wait = table, wait


class Streamer:
    """Jobs, slots and tables: what both kinds of streamer share. Layers must be visited in order."""

    kind: str

    def __init__(self, store: ExpertStore, slots: int, poison: bool = False) -> None:
        self.store, self.poison = store, poison
        layout = store.layout
        # Where experts move, any layer may come to stream.
        self.order = list(range(layout.num_layers)) if store.moves else layout.streamed_layers
        self.num_slots = slots if store.moves else slots_used(layout, slots)
        # Every streamed layer has a slot of its own: one load each, for ever.
        self.keeps_all = not store.moves and len(self.order) == self.num_slots
        self._slots = [
            tuple(aligned_empty(store.slot_bytes(d), store.device) for d in (GATE_UP, DOWN))
            for _ in range(self.num_slots)
        ]
        # One a tensor type for all loads: those of a type come one after the other.
        staging = [layout.staging_bytes(d, _STAGED[self.kind]) for d in (GATE_UP, DOWN)]
        self._staging = [aligned_empty(nbytes, store.device) for nbytes in staging]
        for slot in self._slots if poison else ():
            self._spoil(slot)
        self._tables: dict[tuple[int, int], tuple[LayerPlan, int, ExpertTable]] = {}
        # What each load brings that was begun or is read; settled by whoever of loader and reader comes first.
        self._plans: dict[int, LayerPlan] = {}
        self._planning = threading.Lock()
        self._rank = {layer: rank for rank, layer in enumerate(self.order)}
        self._next_job = 0

    @property
    def slot_bytes(self) -> int:
        return sum(buffer.nbytes for pair in (*self._slots, self._staging) for buffer in pair)

    @staticmethod
    def _spoil(slot: tuple[Tensor, ...]) -> None:
        for buffer in slot:
            buffer.fill_(_POISON)

    def _job_of(self, layer: int) -> int:
        """The job that loads `layer` for the visit that begins now."""
        rank = self._rank[layer]
        if self.keeps_all:
            return rank
        if rank == 0:
            self._next_job = self._first_job()
        expected = self._layer_of(self._next_job)
        assert layer == expected, f"layer {layer} visited out of order, expected {expected}"
        return self._next_job

    def _first_job(self) -> int:
        """The job that the next pass begins with: whatever the one before it did not visit is skipped."""
        return -(-self._next_job // len(self.order)) * len(self.order)

    def _layer_of(self, job: int) -> int:
        return self.order[job % len(self.order)]

    def _plan_of(self, job: int) -> LayerPlan:
        with self._planning:
            return self._plans.setdefault(job, self.store.plans[self._layer_of(job)])

    def _forget(self, job: int) -> None:
        """Drop the plans of `job` and of those before it, which nobody reads any more."""
        if not self.keeps_all:
            with self._planning:
                self._plans = {j: plan for j, plan in self._plans.items() if j > job}

    def _table(self, plan: LayerPlan, slot: int) -> ExpertTable:
        """Addresses of the layer's experts while it is in `slot` (-1: no expert streams); made again when they move."""
        key = (plan.layer, slot)
        known = self._tables.get(key)
        if known is None or known[0] is not plan or known[1] != self.store.epochs[plan.layer]:
            blocks = self.store.blocks_in_place(plan.layer)
            if slot >= 0:
                blocks |= self.store.slot_blocks(plan, self._slots[slot])
            ordered = [blocks[expert] for expert in sorted(blocks)]
            pairs, formats = [block.pair for block in ordered], [block.table_format for block in ordered]
            known = plan, self.store.epochs[plan.layer], ExpertTable.from_blocks(pairs, self.store.device, formats)
            self._tables[key] = known
        return known[2]

    @contextmanager
    def layer(self, index: int) -> Iterator[LayerPage]:
        """Experts of layer `index`; leaving the context lets its slot be recycled."""
        if index not in self._rank:
            yield LayerPage(self._table(self.store.plans[index], -1), _no_wait)
            return
        job = self._job_of(index)
        self._begin(job)
        try:
            yield LayerPage(self._table(self._plan_of(job), job % self.num_slots), lambda d: self._wait(job, d))
        finally:
            if self.poison and not self.keeps_all:
                self._spoil(self._slots[job % self.num_slots])
            self._finish(job)
            self._forget(job)
            self._next_job = job + 1

    def _begin(self, job: int) -> None: ...
    def _wait(self, job: int, tensor_type: int) -> None: ...
    def _finish(self, job: int) -> None: ...
    def counters(self) -> Counters: ...
    def close(self) -> None: ...


def _no_wait(tensor_type: int) -> None:
    pass


class ThreadStreamer(Streamer):
    """Loads on a copy thread. An error in the thread is raised by the reader that needs the load."""

    kind = "cpu"

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
        self._loaded = [0, 0]  # jobs loaded, by tensor type
        self._computed = 0  # jobs whose slot may be overwritten
        self._error: BaseException | None = None
        self._bytes = self._stall_ns = self._transfer_ns = self._loads = 0
        self._thread: threading.Thread | None = None
        if self.order:
            self._thread = threading.Thread(target=self._run, name="expert-copy", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        try:
            for job in range(len(self.order)) if self.keeps_all else count():
                with self._changed:
                    self._changed.wait_for(lambda j=job: self._computed > j - self.num_slots or self._closing.is_set())
                if self._closing.is_set():
                    return
                self._load(job)
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _load(self, job: int) -> None:
        layer, slot, plan = self._layer_of(job), self._slots[job % self.num_slots], self._plan_of(job)
        for d in (GATE_UP, DOWN):
            begin = time.perf_counter_ns()
            if self._delay is not None and self._closing.wait(self._delay(layer, d)):
                return
            copied = self.store.read_into(plan, d, slot[d], self._staging[d], self._closing.is_set)
            if self._link_bandwidth:
                self._closing.wait(max(0.0, copied / self._link_bandwidth - (time.perf_counter_ns() - begin) / 1e9))
            if self._closing.is_set():
                return  # perhaps cut short: never to be taken for loaded
            end = time.perf_counter_ns()
            self._timeline.add(f"load {TENSOR_NAMES[d]}", f"layer {layer}", begin, end)
            with self._changed:
                self._bytes += copied
                self._transfer_ns += end - begin
                self._loads += 1
                self._loaded[d] = job + 1
                self._changed.notify_all()

    def _begin(self, job: int) -> None:
        if job > self._computed and not self.keeps_all:
            self._finish(job - 1)  # jobs of a pass that was given up: nobody will read them

    def _wait(self, job: int, tensor_type: int) -> None:
        if self._loaded[tensor_type] > job:
            return
        begin = time.perf_counter_ns()
        with self._changed:
            self._changed.wait_for(
                lambda: self._loaded[tensor_type] > job or self._error is not None or self._closing.is_set()
            )
        end = time.perf_counter_ns()
        self._stall_ns += end - begin
        self._timeline.add("wait", f"layer {self._layer_of(job)} {TENSOR_NAMES[tensor_type]}", begin, end)
        if self._loaded[tensor_type] > job:
            return
        if self._error is None:
            raise StoreError("the streamer was closed while a layer waited for its experts")
        if isinstance(self._error, StoreError):
            raise self._error
        raise StoreError(f"loading layer {self._layer_of(job)} failed: {self._error}") from self._error

    def _finish(self, job: int) -> None:
        with self._changed:
            self._computed = max(self._computed, job + 1)
            self._changed.notify_all()

    def counters(self) -> Counters:
        with self._changed:
            return Counters(self._bytes, self._stall_ns, self._transfer_ns, self._loads)

    def close(self) -> None:
        """Stop the copy thread; a load under way ends with its chunk (milliseconds). Idempotent."""
        self._closing.set()
        with self._changed:
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None


class CudaStreamer(Streamer):
    """Loads on two copy streams, one a tensor type. The host only enqueues: it never waits for a copy.

    A pass can be part of a CUDA graph, copies included: `capture` makes the visits of one pass a graph of their own,
    which begins where both copy streams and the compute stream meet and ends where they meet again; the loads that
    run ahead into the next pass are inside. `replay` surrounds each launch of such a graph. Which slot a layer uses
    differs from pass to pass: a graph is right for the `phase` in which it was captured, and for no other.

    `cuda` is torch.cuda, or a recorder with the same Stream, Event and current_stream in tests. Stalls happen on
    the device and are not counted here.
    """

    kind = "cuda"

    def __init__(self, store: ExpertStore, slots: int, poison: bool = False, cuda=torch.cuda) -> None:
        super().__init__(store, slots, poison)
        self._cuda = cuda
        self._streams = [cuda.Stream() for _ in (GATE_UP, DOWN)]
        self._make_events()
        # The first loads too have something to wait for: kernels that used this memory before it became a slot.
        for event in self._computed:
            event.record(cuda.current_stream())
        self._issued = self._bytes = 0
        # While a graph is captured: the events recorded in it. Others lie before it, and are waited for outside.
        self._captured: set | None = None

    def _make_events(self) -> None:
        self._loaded = [[self._cuda.Event() for _ in (GATE_UP, DOWN)] for _ in range(self.num_slots)]
        self._computed = [self._cuda.Event() for _ in range(self.num_slots)]

    @property
    def phase(self) -> int:
        """The slot that the next pass begins with: passes of one phase use the same addresses."""
        return 0 if self.keeps_all else self._first_job() % self.num_slots

    @property
    def steady(self) -> bool:
        """Whether exactly those loads have been issued that a pass finds issued when the one before it was whole."""
        ahead = len(self.order) if self.keeps_all else self._first_job() + self.num_slots - 1
        return self._issued == ahead

    @contextmanager
    def capture(self) -> Iterator[None]:
        """While one whole pass is captured on the current stream. Nothing runs, so nothing here moves on."""
        assert self.steady, "a graph begins where a whole pass has ended"
        outside = (self._loaded, self._computed, self._issued, self._bytes, self._next_job)
        self._make_events()
        self._captured = set()
        self._fork()
        try:
            yield
        finally:
            self._join()
            self._captured = None
            self._loaded, self._computed, self._issued, self._bytes, self._next_job = outside

    @contextmanager
    def replay(self) -> Iterator[None]:
        """While a captured pass is launched on the current stream."""
        assert self.steady, "a graph begins where a whole pass has ended"
        current = self._cuda.current_stream()
        for event in (event for pair in self._loaded for event in pair):
            current.wait_event(event)
        yield
        # The graph joined the copy streams: from here on all of its loads, and all use of the slots, are done.
        for event in (*self._computed, *(event for pair in self._loaded for event in pair)):
            event.record(current)
        if not self.keeps_all:
            begin = self._first_job()
            self._next_job = begin + len(self.order)
            for job in range(self._issued, self._issued + len(self.order)):
                self._plan_of(job)
            self._issued += len(self.order)
            self._forget(self._next_job - 1)
            plans = [self.store.plans[layer] for layer in self.order]
            self._bytes += sum(plan.host_bytes(d) for plan in plans for d in (GATE_UP, DOWN))

    def _fork(self) -> None:
        event = self._cuda.Event()
        event.record(self._cuda.current_stream())
        for stream in self._streams:
            stream.wait_event(event)

    def _join(self) -> None:
        for stream in self._streams:
            event = self._cuda.Event()
            event.record(stream)
            self._cuda.current_stream().wait_event(event)

    def _record(self, event, stream) -> None:
        event.record(stream)
        if self._captured is not None:
            self._captured.add(event)

    def _wait_event(self, stream, event) -> None:
        if self._captured is None or event in self._captured:
            stream.wait_event(event)

    def _begin(self, job: int) -> None:
        last = len(self.order) - 1 if self.keeps_all else job + self.num_slots - 1
        while self._issued <= last:
            self._issue(self._issued)
            self._issued += 1

    def _issue(self, job: int) -> None:
        plan, slot = self._plan_of(job), job % self.num_slots
        for d, stream in enumerate(self._streams):
            self._wait_event(stream, self._computed[slot])
            with self._cuda.stream(stream):
                self._load(plan, d, self._slots[slot][d])
            self._record(self._loaded[slot][d], stream)
            self._bytes += plan.host_bytes(d)

    def _load(self, plan: LayerPlan, tensor_type: int, buffer: Tensor) -> None:
        """Copies and decoders of one load, in the order of the current stream."""
        store, staging = self.store, self._staging[tensor_type]
        staged = store.layout.decodes(Tier.HOST)
        for source, at in plan.host_runs[tensor_type]:
            target = staging[: source.numel()] if staged else buffer[at : at + source.numel()]
            self._copy(target, source)
        for step in store.decodes(plan, tensor_type, {Tier.HOST: staging}):
            store.decode(step.expert_format, tensor_type, step.block, buffer[step.begin : step.end], step.recipe)

    def _copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def _wait(self, job: int, tensor_type: int) -> None:
        self._wait_event(self._cuda.current_stream(), self._loaded[job % self.num_slots][tensor_type])

    def _finish(self, job: int) -> None:
        self._record(self._computed[job % self.num_slots], self._cuda.current_stream())

    def counters(self) -> Counters:
        return Counters(self._bytes, 0, 0, 2 * self._issued)

    def close(self) -> None:
        for stream in self._streams:
            stream.synchronize()


def make_streamer(
    store: ExpertStore,
    slots: int,
    device: torch.device,
    *,
    poison: bool = False,
    timeline: Timeline | None = None,
    delay: Delay | None = None,
    link_bandwidth: float | None = None,
) -> Streamer:
    """The streamer for a device. poison: NaN in recycled slots; on the CPU, delay: seconds before a load, for tests;
    link_bandwidth: bytes/s that copies do not pass."""
    if device.type == "cuda":
        return CudaStreamer(store, slots, poison)
    return ThreadStreamer(store, slots, poison, timeline, delay, link_bandwidth)
