"""CudaStreamer: loads on CUDA streams, alone or as part of a captured graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from fluxmoe.kernels.expert_table import DOWN, GATE_UP
from torch import Tensor

from ..timeline import COMPUTE, COPY, Timeline
from .layout import TENSOR_NAMES
from .placement import Tier
from .store import Cancelled, ExpertStore
from .streamer import Counters, Streamer


class CudaStreamer(Streamer):
    """Loads on two copy streams, one a tensor type. The host only enqueues: it never waits for a copy.

    A pass can be part of a CUDA graph, copies included: `capture` makes the visits of one pass a graph of their own,
    which begins where both copy streams and the compute stream meet and ends where they meet again; the loads that
    run ahead into the next pass are inside. `replay` surrounds each launch of such a graph, or `settle` comes before
    it, where the host that launches it says no more. Slots and tables are at the same addresses in every pass;
    `prepare` brings the tables up to date before a pass, and says whether graphs that were captured before are still
    right.

    `cuda` is torch.cuda, or a recorder with what is asked of it here in tests. Stalls happen
    on the device and are not counted here; a timeline of CUDA's clock shows them.
    """

    staged = Tier.HOST

    def __init__(
        self, store: ExpertStore, slots: int, poison: bool = False, timeline: Timeline | None = None, cuda=torch.cuda
    ) -> None:
        self._cuda, self._timeline = cuda, timeline or Timeline(enabled=False)
        super().__init__(store, slots, poison)
        self._streams = [cuda.Stream() for _ in (GATE_UP, DOWN)]
        self._loaded, self._computed = self._make_events()
        # The first loads too have something to wait for: kernels that used this memory before it became a slot.
        for event in self._computed:
            event.record(cuda.current_stream())
        self._issued = self._bytes = 0
        # The events recorded in the graph that is being captured. Others lie before it, and are waited for outside.
        self._captured: set = set()
        # Whether graphs may have been launched since the events were recorded.
        self._settled = False
        # What the host has chosen for the launches of each layer, and how often that has changed.
        self._chosen: list[tuple] = []
        self._changes = 0
        # The store's epochs for which all tables are right, once no load of an older load plan is under way.
        self._prepared: list[int] | None = None

    def _make_events(self) -> tuple[list, list]:
        """(by slot and tensor type, by slot): recorded after loads, and after the kernels that read them."""
        slots = range(self.num_slots)
        return [[self._cuda.Event() for _ in (GATE_UP, DOWN)] for _ in slots], [self._cuda.Event() for _ in slots]

    def prepare(self) -> int:
        """Before a pass that is captured or replayed: bring all tables up to date, in the order of the current stream.

        Returns how often what a graph has fixed has changed: the copies of the pass's loads, and which kernels read the
        layers. Graphs captured at another count are wrong; new addresses of experts alone leave it as it is.
        """
        epochs = list(self.store.epochs)
        if epochs == self._prepared:
            return self._changes
        begin, chosen, settled = self.schedule.next_pass(self._next_visit), [], True
        for layer, next_load in enumerate(self.store.load_plans):
            rank = self._rank.get(layer)
            # The load plan that the pass reads may be older than the one that it begins.
            load_plan = next_load if rank is None else self._load_plan_of(rank if self.keeps_all else begin + rank)
            chosen.append((self._table(load_plan).compressed, load_plan.copies(), next_load.copies()))
            settled &= load_plan is next_load
        if chosen != self._chosen:
            self._chosen, self._changes = chosen, self._changes + 1
        self._prepared = epochs if settled else None
        return self._changes

    @property
    def steady(self) -> bool:
        """Whether exactly those loads have been issued that a pass finds issued when the one before it was whole."""
        if self.keeps_all:
            return self._issued == len(self.order)
        begin = self.schedule.next_pass(self._next_visit)
        return begin > 0 and self._issued == self.schedule.loads_after_pass(begin)

    @property
    def in_capture(self) -> bool:
        """Whether the current stream is being captured, by whomever."""
        return self._cuda.is_current_stream_capturing()

    @property
    def whole(self) -> bool:
        """Whether the last pass was visited to its end."""
        return self._next_visit == self.schedule.next_pass(self._next_visit)

    @property
    def pass_bytes(self) -> int:
        """What the loads of a whole pass bring from host memory, now."""
        if self.keeps_all:
            return 0
        return sum(self.store.load_plans[layer].host_bytes(d) for layer in self.order for d in (GATE_UP, DOWN))

    def settle(self) -> None:
        """Before whole passes are captured or launched as graphs on the current stream, by a host that may say no more
        of it; for a store whose experts stay where they are.

        Loads that a pass which was given up has left out are issued, and the stream waits for all. The schedule is
        periodic and a graph ends as it began, so a launch need not be counted. But it reads and fills slots, of which
        the events here tell nothing: the next visit outside of a graph records them anew.
        """
        self._leave_graphs()
        if not self.keeps_all:
            # Before the first pass: as if that had been given up.
            self._next_visit = self.schedule.next_pass(self._next_visit) or len(self.order)
        self.prepare()
        self._issue_until(len(self.order) if self.keeps_all else self.schedule.loads_after_pass(self._next_visit))
        for event in (event for pair in self._loaded for event in pair):
            self._cuda.current_stream().wait_event(event)
        self._settled = True

    def _leave_graphs(self) -> None:
        """Order all that follows after the graphs launched since `settle`."""
        if not self._settled:
            return
        current, self._settled = self._cuda.current_stream(), False
        for event in (*self._computed, *(event for pair in self._loaded for event in pair)):
            current.wait_event(event)  # recorded on another stream, perhaps
            event.record(current)

    @contextmanager
    def capture(self) -> Iterator[None]:
        """While one whole pass is captured on the current stream. Nothing runs, so nothing here moves on, whatever is
        raised."""
        assert self.steady, "a graph begins where a whole pass has ended"
        outside = (self._loaded, self._computed, self._issued, self._bytes, self._next_visit, dict(self._load_plans))
        try:
            self._loaded, self._computed = self._make_events()
            self._capturing = True
            try:
                self._fork()
                yield
            except BaseException:
                # A capture can only be ended, and the streams used again, once all have met.
                with suppress(Exception):
                    self._join()
                raise
            self._join()
        finally:
            self._capturing = False
            self._captured = set()
            self._loaded, self._computed, self._issued, self._bytes, self._next_visit, self._load_plans = outside

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
            begin = self.schedule.next_pass(self._next_visit)
            self._next_visit = begin + len(self.order)
            for visit in range(self._issued, self._issued + len(self.order)):
                self._load_plan_of(visit)
            self._issued += len(self.order)
            self._forget(self._next_visit - 1)
            self._bytes += self.pass_bytes

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
        if self._capturing:
            self._captured.add(event)

    def _wait_event(self, stream, event) -> None:
        if not self._capturing or event in self._captured:
            stream.wait_event(event)

    def _begin(self, visit: int) -> None:
        if not self._capturing:
            self._leave_graphs()
        self._issue_until(self.schedule.loads_by(visit))

    def _issue_until(self, loads: int) -> None:
        while self._issued < loads:
            self._issue(self._issued)
            self._issued += 1

    def _issue(self, visit: int) -> None:
        load_plan, buffers, slot = self._load_plan_of(visit), self._slot_of(visit), self.schedule.slot(visit)
        layer, experts = load_plan.layer, len(load_plan.streamed)
        for d, stream in enumerate(self._streams):
            track, name = f"{COPY} {TENSOR_NAMES[d]}", f"{TENSOR_NAMES[d]} {layer}"
            with self._cuda.stream(stream):
                with self._timeline.span(track, f"wait slot {layer}", "wait", layer=layer):
                    self._wait_event(stream, self._computed[slot])
                nbytes = load_plan.host_bytes(d)
                with self._timeline.span(track, name, "load", layer=layer, experts=experts, bytes=nbytes):
                    self._bytes += self.store.read_into(load_plan, d, buffers[d], self._staging[d], self._copy)[0]
            self._record(self._loaded[slot][d], stream)

    def _copy(self, target: Tensor, source: Tensor, cancelled: Cancelled) -> int:
        target.copy_(source, non_blocking=True)
        return source.numel()

    def _wait(self, visit: int, tensor_type: int) -> None:
        layer, loaded = self._layer_of(visit), self._loaded[self.schedule.slot(visit)][tensor_type]
        with self._timeline.span(COMPUTE, f"wait {TENSOR_NAMES[tensor_type]} {layer}", "wait", layer=layer):
            self._wait_event(self._cuda.current_stream(), loaded)

    def _finish(self, visit: int) -> None:
        self._record(self._computed[self.schedule.slot(visit)], self._cuda.current_stream())

    def counters(self) -> Counters:
        return Counters(self._bytes, loads=2 * self._issued)

    def close(self) -> None:
        for stream in self._streams:
            stream.synchronize()
