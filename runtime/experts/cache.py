"""ExpertCache: experts that live in files and come when tokens are routed to them; they stay while there is room.

    need(layer, experts)   reads what is missing, gate_up of all before down of all, several reads at a time
    ready(tensor_type)     experts in the order in which they are there: kernels start on those, while others come

A place, a slab of a pool, holds one expert of any layer. Which one leaves says a policy (`cache_policies`); those that
the layer which runs needs do not, and neither do those that are on their way. Between passes places come and go as KV,
which has slabs of the same pool, leaves them. While the disk would be idle, what the next layer is likely to lack is
read ahead (`read_ahead`), over the end of a pass too.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Set
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import NamedTuple

import numpy as np
import torch
from fluxmoe.kernels.expert_table import DOWN, GATE_UP, ExpertTable
from fluxmoe.kernels.packing.expert_file import PAGE
from torch import Tensor

from ..memory.slabs import SlabPool
from ..timeline import COMPUTE, DISK, Timeline
from .cache_policies import Policy, Uses
from .config import Delay
from .disk import DiskTier
from .layout import TENSOR_NAMES, ExpertLayout
from .placement import Tier
from .read_ahead import ReadAhead

# The holder of slabs, and its line in the ledger.
CACHE_LINE = "expert_cache"
Where = tuple[int, int]


class _Turn(NamedTuple):
    """Of a layer: when it began, what the disk had read by then and in how much time, and what the layer waits for."""

    layer: int
    begin_ns: int
    busy_ns: int
    read_bytes: int
    asked_bytes: int


class ExpertCache:
    """Experts of a layout's DISK tier, all in one format that kernels read in place, one in each of `places` slabs of
    `pool`, which hold one from any page on. For the thread that runs passes, and not thread-safe.

    link_bandwidth: bytes/s that reads take no more of; delay: seconds before a read, for tests.
    """

    def __init__(
        self, layout: ExpertLayout, disk: DiskTier, pool: SlabPool, places: int, policy: Policy,
        link_bandwidth: float | None = None, delay: Delay | None = None, timeline: Timeline | None = None,
    ) -> None:  # fmt: skip
        self.layout, self.disk, self.pool, self._policy = layout, disk, pool, policy
        self._delay, self._link = delay, _Link(link_bandwidth)
        self.timeline = timeline or Timeline(enabled=False)
        self._members = layout.placement.tiers == Tier.DISK
        self.layers = np.flatnonzero(self._members.any(axis=1)).tolist()
        self.uses = Uses(*self._members.shape)
        name = layout.stored(Tier.DISK)
        self._sizes, self._strides = layout.sizes[name], (layout.stride(name, GATE_UP), layout.stride(name, DOWN))
        # By place, the number of its slab.
        self._owners: dict[int, Where | None] = {}
        self._place_of: dict[Where, int] = {}
        # By place: its two reads, until both are known to be done.
        self._reads: dict[int, tuple[Future[int], Future[int]]] = {}
        self.ahead = ReadAhead(layout.num_layers, sum(self._sizes))
        # Experts that were read ahead and not used yet.
        self._unused: set[Where] = set()
        self._turn = _Turn(0, 0, 0, 0, 0)
        self._closing = threading.Event()
        # Of experts that were needed: those that were here, and those that were not, unless they were read ahead.
        self.hits = self.misses = self.read_bytes = self.stall_ns = 0
        for _ in range(places):
            self.grow()

    @property
    def places(self) -> int:
        return len(self._owners)

    def grow(self) -> None:
        """Take a slab. SlabError, and nothing is changed, if none is free."""
        self._owners[self.pool.take(CACHE_LINE)] = None

    def shrink(self, count: int) -> None:
        """Give so many slabs back, between passes: empty ones, then those whose experts the policy lets go."""
        self._settle()
        for place in self._make_room(count, frozenset()):
            del self._owners[place]
            self.pool.give(place)

    @staticmethod
    def least_places(layout: ExpertLayout, layers: int) -> int:
        """As many as `layers` layers may need: one runs while the next are read."""
        counts = (layout.placement.tiers == Tier.DISK).sum(axis=1)
        return int(min(counts.sum(), layers * counts.max(initial=0)))

    @property
    def nbytes(self) -> int:
        return self.places * self.pool.slab_bytes

    def pair(self, place: int) -> tuple[Tensor, Tensor]:
        """The (gate_up, down) blocks of a place."""
        gate_up, down = (block[:size] for block, size in zip(self._blocks(place), self._sizes, strict=True))
        return gate_up, down

    def any_pair(self) -> tuple[Tensor, Tensor]:
        """Blocks that may be anything."""
        return self.pair(next(iter(self._owners)))

    def _blocks(self, place: int) -> tuple[Tensor, Tensor]:
        """Whole pages of a slab, as direct reads need them, for the (gate_up, down) blocks."""
        slab, (gate_up, down) = self.pool.memory[place], self._strides
        return slab[(begin := -slab.data_ptr() % PAGE) : begin + gate_up], slab[begin + gate_up :][:down]

    def need(self, layer: int, experts: np.ndarray, table: ExpertTable) -> CachedExperts:
        """The layer runs now, and tokens are routed to `experts`; their places go into its table."""
        self._settle()
        self.uses.note(layer, experts)
        wanted = [int(expert) for expert in experts if self._members[layer, expert]]
        pinned = {(layer, expert) for expert in wanted}
        missing = [where for where in pinned if where not in self._place_of]
        came_ahead = self._unused & pinned
        self._unused -= came_ahead
        lacked = len(missing) + len(came_ahead)
        self.hits, self.misses = self.hits + len(wanted) - lacked, self.misses + lacked
        self.ahead.used(lacked, len(came_ahead))
        self._begin_turn(layer, len(missing) + sum(self._place_of[where] in self._reads for where in came_ahead))
        self._read(self._make_room(len(missing), pinned), sorted(missing))
        if self.layout.formats.ahead:
            self._read_ahead(layer, pinned)
        places = {expert: self._place_of[layer, expert] for expert in wanted}
        for expert, place in places.items():
            table.replace(expert, self.pair(place))
        return CachedExperts(self, layer, places, self._members.shape[1])

    def _begin_turn(self, layer: int, waits_for: int) -> None:
        """The turn before is over; this one waits for so many experts."""
        now, last = time.perf_counter_ns(), self._turn
        read_bytes, busy_ns = self.disk.read_so_far()
        if last.begin_ns:
            seconds, busy_s = (now - last.begin_ns) / 1e9, (busy_ns - last.busy_ns) / 1e9
            self.ahead.ran(last.layer, seconds, busy_s, read_bytes - last.read_bytes, last.asked_bytes)
        self._turn = _Turn(layer, now, busy_ns, read_bytes, waits_for * sum(self._sizes))

    def _read_ahead(self, layer: int, pinned: set[Where]) -> None:
        following = self.layers[(self.layers.index(layer) + 1) % len(self.layers)]
        if following == layer:
            return
        members = np.flatnonzero(self._members[following]).tolist()
        absent = [expert for expert in members if (following, expert) not in self._place_of]
        coming = (self._owners[place] for place in self._reads)
        others = sum(owner is not None and owner[0] != following and owner not in pinned for owner in coming)
        idle = self.places - len(pinned) - (len(members) - len(absent)) - others
        chosen = self.ahead.choose(layer, self.uses.chance_now(following)[absent], idle)
        if likely := [(following, absent[at]) for at in chosen]:
            keep = pinned | {where for where in self._place_of if where[0] == following}
            self._unused.update(likely)
            self._read(self._make_room(len(likely), keep), likely)

    def _make_room(self, count: int, pinned: Set[Where]) -> list[int]:
        """`count` places that hold nothing: empty ones, then those of experts with the lowest scores."""
        if not count:
            return []
        free = self._empty()[:count]
        if len(free) == count:
            return free
        while True:
            idle = [
                (owner, place)
                for place, owner in self._owners.items()
                if owner is not None and owner not in pinned and place not in self._reads
            ]
            if len(free) + len(idle) >= count:
                break
            # What is read ahead is in the way: a batch has changed.
            ahead = [
                future for place, pair in self._reads.items() if self._owners[place] not in pinned for future in pair
            ]
            assert ahead, f"{count} experts are needed at a time, the cache has {self.places} places"
            wait(ahead, return_when=FIRST_COMPLETED)
            self._settle(pinned)
            free = self._empty()[:count]
        scores = self._policy(self.uses)
        idle.sort(key=lambda entry: (scores[entry[0]], entry[0]))
        for owner, place in idle[: count - len(free)]:
            self._forget(owner, place)
            free.append(place)
        return free

    def _empty(self) -> list[int]:
        return [place for place, owner in self._owners.items() if owner is None]

    def _forget(self, where: Where, place: int) -> None:
        self._owners[place] = None
        del self._place_of[where]
        self._unused.discard(where)

    def _read(self, places: list[int], wheres: list[Where]) -> None:
        """Begin to read experts into places, gate_up of all before down of all."""
        pairs = list(zip(places, wheres, strict=True))
        reads = [[self._submit(place, where, d) for place, where in pairs] for d in (GATE_UP, DOWN)]
        for (place, where), gate_up, down in zip(pairs, *reads, strict=True):
            self._owners[place], self._place_of[where] = where, place
            self._reads[place] = gate_up, down

    def _submit(self, place: int, where: Where, tensor_type: int) -> Future[int]:
        (layer, expert), target = where, self._blocks(place)[tensor_type]
        began: list[tuple[str, int]] = []

        def begin() -> bool:
            """Wait as settings say; whether to give up."""
            if self._delay is not None:
                self._closing.wait(self._delay(layer, tensor_type))
            self._closing.wait(self._link.wait_s(self._sizes[tensor_type]))
            began.append((f"{DISK} {threading.current_thread().name.rpartition('_')[2]}", time.perf_counter_ns()))
            return self._closing.is_set()

        def record(read: Future[int]) -> None:
            if not read.cancelled() and read.exception() is None and (nbytes := read.result()):
                (track, start), end = began[0], time.perf_counter_ns()
                name = f"{TENSOR_NAMES[tensor_type]} {layer}"
                self.timeline.add(track, name, "load", start, end, layer=layer, expert=expert, experts=1, bytes=nbytes)

        read = self.disk.submit(layer, expert, tensor_type, target, begin)
        if self.timeline.enabled:
            read.add_done_callback(record)
        return read

    def _settle(self, pinned: Set[Where] = frozenset()) -> None:
        """Reads that are done count, but for those of `pinned`; experts whose read has failed are not here."""
        for place, pair in list(self._reads.items()):
            owner = self._owners[place]
            assert owner is not None, "a place that is read into has an owner"
            if owner in pinned or not all(read.done() for read in pair):
                continue
            del self._reads[place]
            if any(read.cancelled() or read.exception() is not None for read in pair):
                self._forget(owner, place)
            else:
                self.read_bytes += sum(read.result() for read in pair)

    def _give_up(self) -> None:
        """After a read has failed: no other is left for a later pass to be told of. What has not begun does not."""
        reads = [read for pair in self._reads.values() for read in pair]
        for read in reads:
            read.cancel()
        wait(reads)
        self._settle()

    def close(self) -> None:
        """Reads that have not begun are given up. Idempotent."""
        self._closing.set()


class CachedExperts:
    """The experts that a layer needs, in `places`: {expert: place}; see ExpertCache.need."""

    def __init__(self, cache: ExpertCache, layer: int, places: dict[int, int], num_experts: int) -> None:
        self._cache, self._layer, self._places, self._num_experts = cache, layer, places, num_experts

    def ready(self, tensor_type: int) -> Iterator[Tensor]:
        """Masks uint8 [E] of experts, those that are here first, then as they come; each once. StoreError when a read
        fails."""
        cache, layer = self._cache, self._layer
        coming = [(expert, place) for expert, place in self._places.items() if place in cache._reads]
        reads = {cache._reads[place][tensor_type]: expert for expert, place in coming}
        come = [future for future in reads if future.done()]
        mask = torch.ones(self._num_experts, dtype=torch.uint8, device="cpu")
        mask[[expert for future, expert in reads.items() if not future.done()]] = 0
        pending = set(reads) - set(come)
        while True:
            for future in come:
                if (error := future.exception()) is not None:
                    cache._give_up()
                    raise error
            yield mask
            if not pending:
                return
            begin = time.perf_counter_ns()
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            end = time.perf_counter_ns()
            cache.stall_ns += end - begin
            cache.timeline.add(COMPUTE, f"wait {TENSOR_NAMES[tensor_type]} {layer}", "wait", begin, end, layer=layer)
            come = list(done)
            mask = torch.zeros(self._num_experts, dtype=torch.uint8, device="cpu")
            mask[[reads[future] for future in come]] = 1


class _Link:
    """No more bytes/s than `bandwidth`, whoever reads."""

    def __init__(self, bandwidth: float | None) -> None:
        self._bandwidth, self._free_s, self._lock = bandwidth, 0.0, threading.Lock()

    def wait_s(self, nbytes: int) -> float:
        """Seconds until so many bytes will have had their turn."""
        if self._bandwidth is None:
            return 0.0
        with self._lock:
            now = time.monotonic()
            self._free_s = max(now, self._free_s) + nbytes / self._bandwidth
            return self._free_s - now
