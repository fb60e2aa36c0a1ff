"""Dynamic residency: moves of experts are applied while serving, and KV takes and gives the memory (PAPER §4.3).

Experts of the device tiers and KV blocks share one pool of physical blocks (`region`). What experts leave is mapped at
the end of the KV cache, and the scheduler admits more requests at once. The paper leaves that as future work.

    to HOST       a change of the layer's plan, since every expert has a copy in host memory
    to PACKED     a unit in the heap, a copy from host memory in the background, then the change of plan
    to RESIDENT   likewise; in a compressed store decoded from the packed block on the device

All changes happen between iterations, none of which waits for a copy. A move that cannot be made (no memory, KV blocks
in use, a copy that fails) leaves the old state, and says why in `refused`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import Tensor

from .budget import MemoryBudget
from .courier import Courier, StreamCourier, ThreadCourier
from .deployment import EXPERT_LINES
from .kv_cache import GrowableKVCache
from .moving_store import Copy, MovingStore, Where
from .placement import Tier
from .planner import Links, Move, Observation, Planner, PlannerError, choose_transfer, transfer_costs
from .region import BlockPool, RegionError
from .scheduler import Scheduler

# How much an expert's use in the window before counts beside the newest.
_MEMORY = 0.5


@dataclass(frozen=True)
class Seen:
    """An iteration, for the planner: seconds of compute and of loads, tokens in the pass, whether it prefilled none."""

    compute_s: float
    load_s: float
    tokens: int
    decode_only: bool = True


class ComputeProfile:
    """τ_comp where waiting cannot be told from computing, as on a GPU: the least that an iteration of about as many
    sequences has taken. It rises by a hundredth an iteration, so that longer contexts are learned in time."""

    def __init__(self) -> None:
        self._least: dict[int, float] = {}

    def compute_s(self, sequences: int, duration_s: float) -> float:
        """Ideal seconds of an iteration that took `duration_s`, its waiting included."""
        size = sequences.bit_length()
        self._least[size] = min(duration_s, 1.01 * self._least.get(size, duration_s))
        return self._least[size]


@dataclass
class _Arrival:
    """A move whose bytes are on their way into `unit`."""

    move: Move
    unit: int
    error: Exception | None = None

    @property
    def where(self) -> Where:
        return self.move.layer, self.move.expert


class Residency:
    """Applies moves between iterations, and shares the pool out between experts and KV.

    planner: decides every `every` iterations from the median of
    what they saw; None: only `request` moves experts. links: if given, the planner also chooses between whole and
    on-demand transfer. popularity: fp32 [L, E] on the device, to which every pass adds how many tokens each expert was
    routed; None: not counted. copy: how bytes reach the device, for tests that inject failures; courier: in what order.
    """

    def __init__(
        self, store: MovingStore, kv: GrowableKVCache, scheduler: Scheduler, budget: MemoryBudget, pool: BlockPool,
        planner: Planner | None = None, every: int = 8, grow_kv: bool = True, links: Links | None = None,
        popularity: Tensor | None = None,
        copy: Copy = lambda target, source: target.copy_(source, non_blocking=True), courier: Courier | None = None,
    ) -> None:  # fmt: skip
        self.store, self.kv, self.scheduler, self.budget, self.pool = store, kv, scheduler, budget, pool
        self.planner, self.every, self.links = planner, every, links
        self.popularity = popularity
        # What KV may take: all that it can use, or no more than it gave to experts that came.
        self._most_kv = kv.most_blocks if grow_kv else kv.num_blocks
        self._copy = copy
        self._courier = courier or (StreamCourier() if store.device.type == "cuda" else ThreadCourier())
        self._requested: list[Move] = []
        # On their way; nothing else moves before all of them have arrived.
        self._arrivals: list[_Arrival] = []
        self._window: list[Seen] = []
        # Tokens since the last plan; then how often each expert was used, and by how many tokens, older plans less.
        self._routed = 0
        self._used = np.zeros(store.layout.placement.tiers.shape)
        self._tokens = 0.0
        self.applied: Counter[str] = Counter()
        self.refused: list[str] = []
        self.last_reason = ""

    def request(self, moves: Iterable[Move]) -> None:
        """Moves to be made from the next iteration on: those to the host first, which make room for the others."""
        self._requested += moves

    @property
    def tiers(self) -> np.ndarray:
        """int8 [L, E]: where every expert is, or is going."""
        return self.store.layout.placement.tiers

    @property
    def busy(self) -> bool:
        """Whether moves are under way."""
        return bool(self._requested or self._arrivals)

    def between_iterations(self, seen: Seen | None = None) -> None:
        """Everything that may change, before the next pass begins. Never waits for a copy.

        seen: the iteration that has ended, from which the planner learns.
        """
        self._land()
        if self.planner is not None and seen is not None:
            self._plan(seen)
        if not self._arrivals:  # heaps must not move while a copy writes into them
            self._begin_requested()
        self._share_out()

    def _land(self) -> None:
        if not self._arrivals or not self._courier.arrived:
            return
        arrivals, self._arrivals = self._arrivals, []
        well = [arrival for arrival in arrivals if arrival.error is None]
        failed = [arrival for arrival in arrivals if arrival.error is not None]
        self.store.land(
            [(arrival.where, arrival.move.target, arrival.unit) for arrival in well],
            [(arrival.move.target, arrival.unit) for arrival in failed],
        )
        self.applied.update(f"to {Tier(arrival.move.target).name}" for arrival in well)
        self.refused += [f"{_name(a.move)} stays {_tier(a.move.source)}: {a.error}" for a in failed]

    def _begin_requested(self) -> None:
        moves, self._requested = self._requested, []
        arrivals: list[_Arrival] = []
        for move in sorted(moves, key=lambda move: move.target != Tier.HOST):
            where, tiers = (move.layer, move.expert), self.store.layout.placement.tiers
            tier = Tier(tiers[where])
            if tier != move.source or tier == move.target or any(a.where == where for a in arrivals):
                self.refused.append(f"{_name(move)} is {_tier(tier)}, or on its way")
            elif move.target == Tier.HOST:
                self._leave(move)
            elif move.target not in self.store.heaps or self._skips(move):
                self.refused.append(f"{_name(move)} cannot become {_tier(move.target)} from {_tier(tier)}")
            else:
                arrivals += self._reserve(move)
        if arrivals:
            self._courier.send([partial(self._bring, arrival) for arrival in arrivals])
            self._arrivals = arrivals

    def _skips(self, move: Move) -> bool:
        """Compressed experts in host memory become dense by way of the packed tier."""
        return move.source == Tier.HOST and move.target == Tier.RESIDENT and Tier.PACKED in self.store.heaps

    def _leave(self, move: Move) -> None:
        streamed = len(self.store.layout.placement.members(move.layer, Tier.HOST))
        if streamed >= self.store.most_streamed:
            self.refused.append(f"layer {move.layer} streams {streamed} experts already, all that a slot holds")
            return
        self.store.leave((move.layer, move.expert))
        self.applied["to HOST"] += 1

    def _reserve(self, move: Move) -> list[_Arrival]:
        heap = self.store.heaps[move.target]
        try:
            self._make_room(heap.unit_bytes)
            return [_Arrival(move, heap.reserve())]
        except RegionError as error:
            if move.source == Tier.RESIDENT:
                # No room for both of its forms; its copy in host memory is there already. Not now: units are reserved.
                self._requested.append(move._replace(target=Tier.HOST))
            else:
                self.refused.append(f"{_name(move)} stays {_tier(move.source)}: {error}")
            return []

    def _bring(self, arrival: _Arrival) -> None:
        try:
            self.store.fetch(arrival.where, arrival.move.target, arrival.unit, self._copy)
        except Exception as error:
            arrival.error = error

    def _make_room(self, nbytes: int) -> None:
        """Take KV quanta that hold nothing until the pool has `nbytes`. RegionError if they are in use."""
        while self.pool.free_blocks * self.pool.block_bytes < nbytes:
            if not self.kv.num_blocks or not self.scheduler.shrink(self.kv.quantum):
                raise RegionError("the KV blocks at the end of the cache are in use")
            self.kv.resize(self.kv.num_blocks - self.kv.quantum)

    def _share_out(self) -> None:
        """What experts left goes to KV, in whole quanta; then the ledger says who holds what."""
        spare = self.pool.free_blocks * self.pool.block_bytes
        # Units of experts on their way in are mapped already.
        quanta = min(spare // self.kv.quantum_bytes, (self._most_kv - self.kv.num_blocks) // self.kv.quantum)
        if quanta > 0 and not self._requested:
            more = quanta * self.kv.quantum
            try:
                self.kv.resize(self.kv.num_blocks + more)
                self.scheduler.grow(more)
            except RegionError as error:
                self.refused.append(f"the KV cache does not grow: {error}")
        held = {EXPERT_LINES[tier]: heap.nbytes for tier, heap in self.store.heaps.items()} | {
            "kv_cache": self.kv.nbytes
        }
        lines = self.budget.lines()
        for line, nbytes in held.items():
            if nbytes < lines.get(line, 0):
                self.budget.release(line, lines[line] - nbytes)
        for line, nbytes in held.items():
            if nbytes > lines.get(line, 0):
                self.budget.reserve(line, nbytes - lines.get(line, 0))

    # Planning.

    def _plan(self, seen: Seen) -> None:
        self._routed += seen.tokens
        if seen.decode_only:
            self._window.append(seen)
        if len(self._window) < self.every or self.busy:
            return
        compute_s, load_s, tokens = (
            float(np.median([getattr(one, name) for one in self._window])) for name in ("compute_s", "load_s", "tokens")
        )
        self._learn()
        self._window = []
        if self.links is not None:
            compute_s, load_s = self._choose_transfer(compute_s, load_s, tokens)
        per_block = self.kv.quantum_bytes // self.kv.quantum
        used, waiting = self.scheduler.blocks_used * per_block, self.scheduler.blocks_wanted * per_block
        try:
            plan = self.planner.decide(
                self.store.layout.placement.tiers,
                Observation(compute_s, load_s, used, waiting),
                self._used if self._tokens else None,
            )
        except PlannerError as error:
            self.last_reason = str(error)
            return
        self.last_reason = plan.reason
        self.request(plan.moves)

    def _learn(self) -> None:
        """Which experts tokens were routed to since the last plan."""
        if self.popularity is None:
            return
        counts = self.popularity.cpu().double().numpy()
        self.popularity.zero_()
        self._used = _MEMORY * self._used + counts
        self._tokens = _MEMORY * self._tokens + self._routed
        self._routed = 0

    def _choose_transfer(self, compute_s: float, load_s: float, tokens: float) -> tuple[float, float]:
        """Settle how host experts cross; returns compute and loads apart, whichever way is in use."""
        store = self.store
        host = store.layout.placement.tiers == Tier.HOST
        if not host.any() or not self._tokens:
            return compute_s, load_s
        chances = np.clip(self._used / self._tokens, 0, 1)
        size = store.layout.expert_bytes(store.format)
        if store.transfer == "on_demand":
            # Reads in place are part of what looks like compute.
            load_s = min(compute_s, transfer_costs(host, chances, tokens, size, self.links, 0.0)[1])
            compute_s -= load_s
        costs = transfer_costs(host, chances, tokens, size, self.links, compute_s)
        chosen = choose_transfer(costs, store.transfer)
        if chosen != store.transfer:
            store.set_transfer(chosen)
            self.applied[chosen] += 1
        return compute_s, load_s

    def close(self) -> None:
        """Give up experts on their way; then nothing is written to the device any more. Idempotent."""
        self._courier.close()


def _name(move: Move) -> str:
    return f"expert {move.expert} of layer {move.layer}"


def _tier(tier: Tier) -> str:
    return {Tier.RESIDENT: "dense", Tier.PACKED: "packed", Tier.HOST: "in host memory", Tier.DISK: "on disk"}[
        Tier(tier)
    ]
