"""Residency: experts and KV share one pool of slabs while serving, and a planner moves experts (PAPER §4.3).

KV takes the slabs that experts leave, and the scheduler admits more requests at once. The paper leaves that as future
work. How experts move is the pager's affair (`experts.mover`); what room they get is decided here. All changes happen
between iterations, none of which waits for a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..experts.cache import CACHE_LINE
from ..experts.footprint import EXPERT_LINES
from ..experts.pager import ExpertPager
from ..experts.placement import Tier
from ..experts.planner import Links, Move, Observation, Planner, PlannerError, choose_transfer, transfer_costs
from ..memory.budget import MemoryBudget
from ..memory.slabs import FREE, SlabError
from .kv_cache import KV_LINE, PagedKVCache
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


class PlannerDriver:
    """Asks the planner for moves after every `every` iterations that only decoded, by the median of what they took."""

    def __init__(self, planner: Planner, every: int) -> None:
        self.planner, self._every = planner, every
        self._window: list[Seen] = []
        self.last_reason = ""

    def see(self, seen: Seen) -> None:
        if seen.decode_only:
            self._window.append(seen)

    @property
    def due(self) -> bool:
        return len(self._window) >= self._every

    def medians(self) -> tuple[float, float, float]:
        """Of compute_s, load_s and tokens; a new window begins."""
        rows = [(seen.compute_s, seen.load_s, seen.tokens) for seen in self._window]
        self._window = []
        compute_s, load_s, tokens = (float(median) for median in np.median(rows, axis=0))
        return compute_s, load_s, tokens

    def moves(self, tiers: np.ndarray, seen: Observation, used: np.ndarray | None = None) -> Sequence[Move]:
        """See Planner.decide; none where nothing can be done. `last_reason` says why."""
        try:
            plan = self.planner.decide(tiers, seen, used)
        except PlannerError as error:
            self.last_reason = str(error)
            return ()
        self.last_reason = plan.reason
        return plan.moves


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


class Sharing:
    """Experts and KV take slabs of one pool, and the ledger says who holds what. The simulator's too.

    kv_slabs: of what KV holds, the least that it keeps, so that requests which have yet to come can be accepted, and
    the most that it may take.
    """

    def __init__(
        self, kv: PagedKVCache, scheduler: Scheduler, budget: MemoryBudget, kv_slabs: tuple[int, int]
    ) -> None:  # fmt: skip
        self.pool, self.kv, self.scheduler, self.budget = kv.pool, kv, scheduler, budget
        self.least_kv, self.most_kv = kv_slabs

    def make_room(self, slabs: int) -> None:
        """Have so many slabs free: KV gives those that hold nothing. SlabError where too many have a block in use."""
        while self.pool.num_free < slabs:
            spare = self.kv.num_slabs > self.least_kv and self.scheduler.can_spare(self.kv.blocks_per_slab)
            if not spare or not self.kv.shrink():
                raise SlabError("KV has blocks in use in all of its slabs, or no more slabs than one request may need")

    def share_out(self, grow: bool = True) -> None:
        """Free slabs go to KV, if it may `grow`; then the ledger follows."""
        while grow and self.pool.num_free and self.kv.num_slabs < self.most_kv:
            self.kv.grow()
        self.budget.settle({line: self.pool.bytes_of(line) for line in (*EXPERT_LINES.values(), KV_LINE, FREE)})

    def kv_bytes(self) -> tuple[int, int]:
        """Bytes of slabs that KV keeps, most of all those with a block in use, and of those that waiting requests
        want."""
        used = max(self.least_kv, self.kv.blocks.runs_used)
        wanted = -(-self.scheduler.blocks_wanted // self.kv.blocks_per_slab)
        return used * self.pool.slab_bytes, wanted * self.pool.slab_bytes


class Lent(Protocol):
    """Of an ExpertCache, what KV takes slabs of."""

    @property
    def places(self) -> int: ...
    def grow(self) -> None: ...
    def shrink(self, count: int) -> None: ...


class Lending:
    """A cache of experts has the slabs that KV does not need; KV takes them when a request needs blocks, so that none
    is refused or preempted before the cache is as small as works, and gives them back when they hold nothing. The
    simulator's too.

    kv_slabs: the least that KV keeps and the most that it may take; most_cached: experts that the cache has use for.
    """

    def __init__(
        self, kv: PagedKVCache, cache: Lent, budget: MemoryBudget, kv_slabs: tuple[int, int], most_cached: int
    ) -> None:  # fmt: skip
        self.pool, self.kv, self.cache, self.budget = kv.pool, kv, cache, budget
        self._least, self._most = kv_slabs
        self._most_cached = most_cached
        kv.blocks.lender = self
        self.take_back()

    @property
    def most_blocks(self) -> int:
        return self._most * self.kv.blocks_per_slab

    def lend(self, blocks: int) -> bool:
        """Between passes: have so many KV blocks free. Waits for reads that are in the way."""
        slabs = -(-(blocks - self.kv.blocks.num_free) // self.kv.blocks_per_slab)
        if self.kv.num_slabs + slabs > self._most:
            return False
        self.cache.shrink(max(0, slabs - self.pool.num_free))
        for _ in range(slabs):
            self.kv.grow()
        self._settle()
        return True

    def take_back(self) -> None:
        """Between passes: KV keeps what is in use, the cache has the rest."""
        while self.kv.num_slabs > self._least and self.kv.shrink():
            pass
        while self.pool.num_free and self.cache.places < self._most_cached:
            self.cache.grow()
        self._settle()

    def _settle(self) -> None:
        self.budget.settle({line: self.pool.bytes_of(line) for line in (CACHE_LINE, KV_LINE, FREE)})


class Residency:
    """Lets the planner move the pager's experts, in slabs that they share with KV.

    driver: of the planner; None: only `pager.request` moves experts. links: if given, the planner also chooses between
    whole and on-demand transfer.
    """

    def __init__(
        self, pager: ExpertPager, sharing: Sharing, driver: PlannerDriver | None = None, links: Links | None = None
    ) -> None:
        self.pager, self.sharing = pager, sharing
        assert pager.mover is not None, "experts of an adaptive pager move"
        assert pager.store is not None, "the pager is open"
        self._mover, self._store = pager.mover, pager.store
        self.driver, self.links = driver, links
        # Tokens since the last plan; then how often each expert was used, and by how many tokens, older plans less.
        self._routed = 0
        self._used = np.zeros(pager.tiers.shape)
        self._tokens = 0.0

    def between_iterations(self, seen: Seen | None = None) -> None:
        """Everything that may change, before the next pass begins. Never waits for a copy.

        seen: the iteration that has ended, from which the planner learns.
        """
        if self.driver is not None and seen is not None:
            self._plan(self.driver, seen)
        self.pager.apply_moves(self.sharing.make_room)
        self.sharing.share_out(grow=not self._mover.waits)

    # Planning.

    def _plan(self, driver: PlannerDriver, seen: Seen) -> None:
        self._routed += seen.tokens
        driver.see(seen)
        if not driver.due or self._mover.busy:
            return
        compute_s, load_s, tokens = driver.medians()
        self._learn()
        if self.links is not None:
            compute_s, load_s = self._choose_transfer(self.links, compute_s, load_s, tokens)
        observed = Observation(compute_s, load_s, *self.sharing.kv_bytes())
        self.pager.request(driver.moves(self.pager.tiers, observed, self._used if self._tokens else None))

    def _learn(self) -> None:
        """Which experts tokens were routed to since the last plan."""
        popularity = self.pager.popularity
        if popularity is None:
            return
        counts = popularity.cpu().double().numpy()
        popularity.zero_()
        self._used = _MEMORY * self._used + counts
        self._tokens = _MEMORY * self._tokens + self._routed
        self._routed = 0

    def _choose_transfer(self, links: Links, compute_s: float, load_s: float, tokens: float) -> tuple[float, float]:
        """Settle how host experts cross; returns compute and loads apart, whichever way is in use."""
        pager = self.pager
        host = pager.tiers == Tier.HOST
        if not host.any() or not self._tokens:
            return compute_s, load_s
        chances = np.clip(self._used / self._tokens, 0, 1)
        layout = self._store.layout
        size = layout.expert_bytes(layout.stored(Tier.HOST))
        if pager.transfer == "on_demand":
            # Reads in place are part of what looks like compute.
            load_s = min(compute_s, transfer_costs(host, chances, tokens, size, links, 0.0)[1])
            compute_s -= load_s
        costs = transfer_costs(host, chances, tokens, size, links, compute_s)
        chosen = choose_transfer(costs, pager.transfer)
        if chosen != pager.transfer:
            pager.set_transfer(chosen)
            self._mover.applied[chosen] += 1
        return compute_s, load_s
