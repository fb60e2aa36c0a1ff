"""Mover: experts change tier between passes, none of which waits for a copy (PAPER §4.3).

    to HOST       a change of the layer's load plan, since every expert has a copy in host memory
    to PACKED     a slab of the pool, a copy from host memory in the background, then the change of load plan
    to RESIDENT   likewise; in a compressed store decoded from the packed block on the device

A move that cannot be made (no slab, a slot that is full, a copy that fails) leaves the old state, and says why in
`refused`. Bytes are brought in the background by a Courier, one batch of moves at a time: on a CPU in a thread, on CUDA
on a stream, where the host enqueues copies and asks later whether they are done.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ..memory.slabs import SlabError
from ..timeline import MOVES, Timeline
from .moving_store import Copy, MovingStore, Slabs
from .placement import Tier
from .planner import Move
from .store import Where

MakeRoom = Callable[[int], None]
Task = Callable[[], None]


class Courier(ABC):
    """Runs a batch of tasks, which must not raise, behind all work that was enqueued before."""

    @abstractmethod
    def send(self, tasks: Sequence[Task]) -> None:
        """Begin a batch; the one before it must have arrived."""

    @property
    @abstractmethod
    def arrived(self) -> bool:
        """Whether the last batch is done; never waits."""

    @abstractmethod
    def close(self) -> None:
        """Give up tasks that have not begun, and return once nothing is written any more. Idempotent."""


class ThreadCourier(Courier):
    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()

    def send(self, tasks: Sequence[Task]) -> None:
        assert self.arrived, "one batch at a time"
        self._thread = threading.Thread(target=self._run, args=(tasks,), name="expert-arrivals", daemon=True)
        self._thread.start()

    def _run(self, tasks: Sequence[Task]) -> None:
        for task in tasks:
            if self._closing.is_set():
                return
            task()

    @property
    def arrived(self) -> bool:
        return self._thread is None or not self._thread.is_alive()

    def close(self) -> None:
        self._closing.set()
        if self._thread is not None:
            self._thread.join()


class StreamCourier(Courier):
    """cuda: torch.cuda, or a recorder with the same Stream, Event, stream and current_stream in tests.

    The stream is made once: torch hands out a few dozen in turn, so one made for each batch would soon be the stream
    of something else.
    """

    def __init__(self, cuda=torch.cuda) -> None:
        self._cuda, self._stream = cuda, cuda.Stream()
        self._before, self._done = cuda.Event(), cuda.Event()
        self._sent = False

    def send(self, tasks: Sequence[Task]) -> None:
        assert self.arrived, "one batch at a time"
        self._before.record(self._cuda.current_stream())
        self._stream.wait_event(self._before)
        try:
            with self._cuda.stream(self._stream):
                for task in tasks:
                    task()
        finally:
            self._done.record(self._stream)
            self._sent = True

    @property
    def arrived(self) -> bool:
        return not self._sent or self._done.query()

    def close(self) -> None:
        self._stream.synchronize()


@dataclass
class _Arrival:
    """A move whose bytes are on their way into `slabs`."""

    move: Move
    slabs: Slabs
    copied_bytes: int = 0
    error: Exception | None = None

    @property
    def where(self) -> Where:
        return self.move.layer, self.move.expert


class Mover:
    """Applies moves to a store. copy: how bytes reach the device, for tests that inject failures; courier: in what
    order.

    applied: moves made, by `to TIER`; refused: why others were not; copied_bytes: that they brought from host memory.
    """

    def __init__(
        self, store: MovingStore, courier: Courier,
        copy: Copy = lambda target, source: target.copy_(source, non_blocking=True), timeline: Timeline | None = None,
    ) -> None:  # fmt: skip
        self.store, self.courier, self.copy = store, courier, copy
        self._timeline = timeline or Timeline(enabled=False)
        self._requested: list[Move] = []
        # On their way; nothing else moves before all of them have arrived.
        self._arrivals: list[_Arrival] = []
        self.applied: Counter[str] = Counter()
        self.refused: list[str] = []
        self.copied_bytes = 0

    def request(self, moves: Iterable[Move]) -> None:
        """Moves to be made from the next `apply` on: those to the host first, which make room for the others."""
        self._requested += moves

    @property
    def waits(self) -> bool:
        """Whether moves wait for others to arrive."""
        return bool(self._requested)

    @property
    def busy(self) -> bool:
        """Whether moves wait or are under way."""
        return bool(self._requested or self._arrivals)

    def apply(self, make_room: MakeRoom | None = None) -> None:
        """Between passes: what has arrived is read from the next pass on, what was requested begins. Never waits.

        make_room: gives the pool so many free slabs, or raises SlabError; None: it has what it has.
        """
        if self._arrivals and self.courier.arrived:
            self._land()
        if not self._arrivals:  # one batch at a time
            self._begin(make_room)

    def _land(self) -> None:
        arrivals, self._arrivals = self._arrivals, []
        for arrival in arrivals:
            move = arrival.move
            if arrival.error is None:
                self.copied_bytes += arrival.copied_bytes
                self.store.land(arrival.where, move.target, arrival.slabs)
                self.applied[f"to {Tier(move.target).name}"] += 1
            else:
                self.store.give(arrival.slabs)
                self.refused.append(f"{_name(move)} stays {_tier(move.source)}: {arrival.error}")

    def _begin(self, make_room: MakeRoom | None) -> None:
        moves, self._requested = self._requested, []
        arrivals: list[_Arrival] = []
        device = self.store.layout.moving_tiers
        for move in sorted(moves, key=lambda move: move.target != Tier.HOST):
            where = (move.layer, move.expert)
            tier = self.store.tier_of(*where)
            if tier != move.source or tier == move.target or any(a.where == where for a in arrivals):
                self.refused.append(f"{_name(move)} is {_tier(tier)}, or on its way")
            elif move.target == Tier.HOST:
                self._leave(move)
            elif move.target not in device or (tier == Tier.HOST and move.target != device[-1]):
                # Compressed experts in host memory become dense by way of the packed tier.
                self.refused.append(f"{_name(move)} cannot become {_tier(move.target)} from {_tier(tier)}")
            else:
                arrivals += self._reserve(move, make_room)
        if arrivals:
            self.courier.send([partial(self._bring, arrival) for arrival in arrivals])
            self._arrivals = arrivals

    def _leave(self, move: Move) -> None:
        streamed = len(self.store.layout.placement.members(move.layer, Tier.HOST))
        if streamed >= self.store.most_streamed:
            self.refused.append(f"layer {move.layer} streams {streamed} experts already, all that a slot holds")
            return
        self.store.land((move.layer, move.expert), Tier.HOST)
        self.applied["to HOST"] += 1

    def _reserve(self, move: Move, make_room: MakeRoom | None) -> list[_Arrival]:
        try:
            if make_room is not None:
                make_room(self.store.layout.slabs_each(move.target, self.store.pool.slab_bytes))
            return [_Arrival(move, self.store.reserve(move.target))]
        except SlabError as error:
            if move.source == Tier.RESIDENT:
                # No room for both of its forms; its copy in host memory is there already. Not now: units are reserved.
                self._requested.append(move._replace(target=Tier.HOST))
            else:
                self.refused.append(f"{_name(move)} stays {_tier(move.source)}: {error}")
            return []

    def _bring(self, arrival: _Arrival) -> None:
        (layer, expert), target = arrival.where, arrival.move.target
        nbytes = self.store.fetched_bytes(target)
        try:
            with self._timeline.span(
                MOVES, f"move {layer}", "load", layer=layer, expert=expert, experts=1, bytes=nbytes
            ):
                self.store.fetch(arrival.where, target, arrival.slabs, self.copy)
            arrival.copied_bytes = nbytes
        except Exception as error:
            arrival.error = error

    def close(self) -> None:
        """Give up experts on their way; then nothing is written to the device any more. Idempotent."""
        self.courier.close()


def _name(move: Move) -> str:
    return f"expert {move.expert} of layer {move.layer}"


def _tier(tier: Tier) -> str:
    names = {Tier.RESIDENT: "dense", Tier.PACKED: "packed", Tier.HOST: "in host memory", Tier.DISK: "on disk"}
    return names[Tier(tier)]
