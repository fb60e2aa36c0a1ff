"""The residency planner: which experts should change tier now. A pure controller (arXiv 2604.02715 §4.3).

Experts of a layer are dense (x), packed (y) or in host memory (z), x + y + z = 1; α = x + y. From what was measured in
the last iterations the planner derives

    ρ = τ_comp / τ_load      compute of an iteration over what its loads take

and decides by these rules, in this order:

    1. hard limit   bytes of experts ≤ budget - KV in use. KV always wins; moves of this rule know no other bound.
    2. KV pressure  requests wait for KV and loads hide (ρ > 1): lower α. With `eager`, the paper's rule, ρ > 1 is
                    enough.
    3. loads show   ρ < θ: raise α, as far as the hard limit and the waiting requests allow.
    4. idle memory  nothing waits and memory is free: packed experts become dense, host experts packed.
    5. otherwise    nothing: θ ≤ ρ ≤ 1 is a dead zone.

A step moves `step` experts a layer, one by default, spread over all layers, so that they stay balanced (`spread=False`
takes the same number of experts layer by layer from the end: the paper's ablation). Noise moves nothing: ρ is smoothed;
a lowering whose predicted ρ would be under θ is not made; once loads have shown, that many experts are not sent to the
host again until compute has grown by a tenth; and after a move the planner waits until what it measures is of the new
state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from .placement import DEVICE_TIERS, Tier


class PlannerError(ValueError):
    """What was asked of the planner cannot be."""


class Move(NamedTuple):
    """One expert changes tier."""

    layer: int
    expert: int
    source: Tier
    target: Tier


@dataclass(frozen=True)
class Observation:
    """What an iteration, or the mean of a few, looked like. Seconds and bytes.

    compute_s: time of the passes without waiting; load_s: time that their loads took, hidden or not; kv_used_bytes: of
    running requests; kv_waiting_bytes: what requests that wait would need at once.
    """

    compute_s: float
    load_s: float
    kv_used_bytes: int
    kv_waiting_bytes: int = 0


@dataclass(frozen=True)
class Plan:
    """Moves to make now, why, and ρ as it was judged (inf: nothing is loaded)."""

    moves: tuple[Move, ...]
    reason: str
    rho: float


@dataclass(frozen=True)
class PlannerConfig:
    """expert_bytes: device bytes of an expert in each device tier that it may have; budget_bytes: for experts and KV.

    theta: lower end of the dead zone; step: experts a layer in one decision; spread: over all layers, or from the last
    ones; eager: lower α whenever ρ > 1, as the paper does, or only when KV is wanted; densify: whether packed experts
    become dense where memory is idle; smoothing: weight of the newest ρ; settle: decisions skipped after a move;
    reserve_bytes: kept free beside KV when experts come back; least_alpha: never less on the device.
    """

    expert_bytes: Mapping[Tier, int]
    budget_bytes: int
    theta: float = 0.9
    step: int = 1
    spread: bool = True
    eager: bool = False
    densify: bool = False
    smoothing: float = 0.5
    settle: int = 2
    reserve_bytes: int = 0
    least_alpha: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.theta <= 1:
            raise PlannerError(f"theta is the lower end of the dead zone, over 0 and at most 1; got {self.theta}")
        if self.step < 1:
            raise PlannerError(f"step must be at least 1 expert a layer, got {self.step}")
        if not 0 < self.smoothing <= 1:
            raise PlannerError(
                f"smoothing is the weight of the newest value, over 0 and at most 1; got {self.smoothing}"
            )
        if not 0 <= self.least_alpha <= 1:
            raise PlannerError(f"least_alpha is a share of experts, from 0 to 1; got {self.least_alpha}")
        if not self.expert_bytes or not self.expert_bytes.keys() <= set(DEVICE_TIERS):
            raise PlannerError("expert_bytes must name device tiers, at least one: RESIDENT, PACKED")


@dataclass
class Planner:
    """Decides from one observation to the next. Whoever applies a plan hands the new tiers to the next `decide`."""

    config: PlannerConfig
    _rho: float | None = field(default=None, init=False)
    _wait: int = field(default=0, init=False)
    # Experts in host memory when loads last showed, and the compute of that time.
    _shown: tuple[int, float] | None = field(default=None, init=False)

    def bytes_of(self, tiers: np.ndarray) -> int:
        """Device bytes of all experts."""
        return sum(int((tiers == tier).sum()) * each for tier, each in self.config.expert_bytes.items())

    def decide(self, tiers: np.ndarray, seen: Observation, popularity: np.ndarray | None = None) -> Plan:
        """The plan for experts in `tiers`, int8 [L, E].

        popularity: int or float [L, E], how often each expert was routed to: the least used leave first; None: the
        highest ids. PlannerError where KV in use leaves no room for the experts that must stay.
        """
        config = self.config
        rho = self._smoothed(seen)
        room = config.budget_bytes - seen.kv_used_bytes
        least = self._least_bytes(tiers)
        if room < least:
            raise PlannerError(
                f"KV holds {seen.kv_used_bytes} of {config.budget_bytes} bytes, which leaves {room} for experts, of "
                f"which at least {least} must stay; preempt requests or lower least_alpha"
            )
        held = self.bytes_of(tiers)
        if held > room:
            self._settle()
            return Plan(self._shrink(tiers, held - room, popularity), "hard limit: KV needs the memory", rho)
        if self._wait:
            self._wait -= 1
            return Plan((), "settling after the last move", rho)
        moves, reason = self._steer(tiers, seen, rho, room - held, popularity)
        if moves:
            self._settle()
        return Plan(moves, reason, rho)

    def _steer(
        self, tiers: np.ndarray, seen: Observation, rho: float, free: int, popularity: np.ndarray | None
    ) -> tuple[tuple[Move, ...], str]:
        config, wanted = self.config, max(0, seen.kv_waiting_bytes - free)
        if rho > 1 and (wanted or config.eager):
            moves = self._step(tiers, down=True, popularity=popularity)
            if not moves:
                return (), "KV is short, and no expert may leave the device"
            if self._predicted(tiers, moves, seen, rho) < config.theta or self._showed(tiers, moves, seen):
                return (), "KV is short, but a step would show the loads"
            return moves, "loads hide: memory of experts goes to KV"
        spare = free - config.reserve_bytes - seen.kv_waiting_bytes
        if rho < config.theta:
            self._shown = int((tiers == Tier.HOST).sum()), seen.compute_s
            moves = self._affordable(self._step(tiers, down=False, popularity=popularity), spare)
            return moves, "loads show: experts come back" if moves else "loads show, and no memory is free"
        if not seen.kv_waiting_bytes and not config.eager:
            moves = self._affordable(self._step(tiers, down=False, popularity=popularity), spare)
            if moves:
                return moves, "memory is idle: experts come back"
        return (), "nothing to gain"

    def _smoothed(self, seen: Observation) -> float:
        if seen.load_s <= 0:
            self._rho = None
            return math.inf
        rho = seen.compute_s / seen.load_s
        self._rho = rho if self._rho is None else (1 - self.config.smoothing) * self._rho + self.config.smoothing * rho
        return self._rho

    def _settle(self) -> None:
        self._wait, self._rho = self.config.settle, None

    def _predicted(self, tiers: np.ndarray, moves: tuple[Move, ...], seen: Observation, rho: float) -> float:
        """ρ after the moves: loads are in proportion to the experts in host memory."""
        host = int((tiers == Tier.HOST).sum())
        if not host or seen.load_s <= 0:
            return math.inf  # nothing is loaded yet, so nothing is known of how long it takes: try
        return rho * host / (host + _to_host(moves))

    def _showed(self, tiers: np.ndarray, moves: tuple[Move, ...], seen: Observation) -> bool:
        """Whether as many experts in host memory have been tried, with no less compute to hide them."""
        if self._shown is None:
            return False
        host, compute_s = self._shown
        return int((tiers == Tier.HOST).sum()) + _to_host(moves) >= host and seen.compute_s < 1.1 * compute_s

    def _least_bytes(self, tiers: np.ndarray) -> int:
        cheapest = min(self.config.expert_bytes.values())
        return math.ceil(self.config.least_alpha * tiers.size) * cheapest

    def _shrink(self, tiers: np.ndarray, excess: int, popularity: np.ndarray | None) -> tuple[Move, ...]:
        """Moves that free at least `excess` bytes, layer by layer in turns."""
        moves: dict[tuple[int, int], Move] = {}
        state, freed = tiers.copy(), 0
        while freed < excess:
            step = self._step(state, down=True, popularity=popularity)
            assert step, "the least that must stay was checked before"
            for move in step:
                if freed >= excess:
                    break
                freed += self._bytes(move.source) - self._bytes(move.target)
                state[move.layer, move.expert] = move.target
                # An expert that leaves in two steps, dense to packed to host, leaves at once.
                first = moves.get((move.layer, move.expert))
                source = first.source if first else move.source
                moves[move.layer, move.expert] = Move(move.layer, move.expert, source, move.target)
        return tuple(moves.values())

    def _bytes(self, tier: Tier) -> int:
        return 0 if tier == Tier.HOST else self.config.expert_bytes[tier]

    def _affordable(self, moves: tuple[Move, ...], spare: int) -> tuple[Move, ...]:
        """As many whole moves as `spare` bytes allow, but all layers or none where moves are spread."""
        cost = [self._bytes(move.target) - self._bytes(move.source) for move in moves]
        if self.config.spread:
            return moves if sum(cost) <= spare else ()
        count = int(np.searchsorted(np.cumsum(cost), spare, side="right")) if cost else 0
        return moves[:count]

    def _step(self, tiers: np.ndarray, down: bool, popularity: np.ndarray | None) -> tuple[Move, ...]:
        """One step of every layer (or as many moves in the last layers): the least used leave, the most used return."""
        layers = tiers.shape[0]
        total = self.config.step * layers
        order = range(layers - 1, -1, -1)
        if down:
            allowed = int(np.isin(tiers, DEVICE_TIERS).sum()) - math.ceil(self.config.least_alpha * tiers.size)
        moves: list[Move] = []
        for layer in order:
            each = self.config.step if self.config.spread else total - len(moves)
            for source, target in self._ladder(down):
                members = np.flatnonzero(tiers[layer] == source)
                ranked = self._ranked(layer, members, popularity)
                chosen = (ranked[::-1] if down else ranked)[: each - sum(m.layer == layer for m in moves)]
                moves += [Move(layer, int(expert), source, target) for expert in chosen]
        if down:
            leaving = [move for move in moves if move.target == Tier.HOST]
            kept = set(leaving[: max(0, allowed)])
            moves = [move for move in moves if move.target != Tier.HOST or move in kept]
        return tuple(moves[:total])

    def _ladder(self, down: bool) -> list[tuple[Tier, Tier]]:
        """Which tiers give and take, in order: dense experts are packed before packed ones leave."""
        chain = [tier for tier in (Tier.RESIDENT, Tier.PACKED) if tier in self.config.expert_bytes] + [Tier.HOST]
        if down:
            return list(pairwise(chain))
        ups = list(pairwise(chain[::-1]))
        return ups if self.config.densify else ups[:1]

    @staticmethod
    def _ranked(layer: int, members: np.ndarray, popularity: np.ndarray | None) -> np.ndarray:
        """Most used first; lower ids first among equals."""
        if popularity is None:
            return members
        return members[np.argsort(-popularity[layer, members], kind="stable")]


def _to_host(moves: tuple[Move, ...]) -> int:
    return sum(move.target == Tier.HOST for move in moves)


def distinct_experts(tokens: float, probabilities: np.ndarray) -> float:
    """Expected number of experts that `tokens` reach: Σ 1 - (1 - p_e)^tokens; p_e: chance that a token chooses e."""
    return float((1 - (1 - np.clip(probabilities, 0, 1)) ** tokens).sum())


@dataclass(frozen=True)
class Links:
    """Bytes/s between host and device: copies, and kernels that read host memory in place."""

    copy: float
    read: float


def transfer_costs(
    host: np.ndarray, probabilities: np.ndarray, tokens: float, expert_bytes: int, links: Links, compute_s: float
) -> tuple[float, float]:
    """Seconds that a pass loses to its host experts: (whole, on_demand).

    whole: all of them are copied before the router is known, and compute_s of that is hidden. on_demand: only those
    that one of `tokens` was routed to cross, after the router, and nothing of that is hidden.
    host bool [L, E]; probabilities [L, E]: the chance that a token chooses the expert (uniform: top_k / E).
    """
    whole_s = max(0.0, int(host.sum()) * expert_bytes / links.copy - compute_s)
    return whole_s, distinct_experts(tokens, probabilities[host]) * expert_bytes / links.read


def choose_transfer(costs: tuple[float, float], current: str, margin: float = 0.1) -> str:
    """`whole` or `on_demand`, whichever costs less; the current one unless the other saves `margin` of its cost."""
    whole_s, on_demand_s = costs
    if current == "whole":
        return "on_demand" if on_demand_s < (1 - margin) * whole_s else "whole"
    return "whole" if whole_s < (1 - margin) * on_demand_s else "on_demand"


def knee(compute_s: float, layer_bytes: float, layers: int, host_bandwidth: float) -> float:
    """The least α at which loads still hide: τ_load(α) = (1 - α)·bytes / bandwidth = τ_comp (the paper's Fig. 6)."""
    all_s = layers * layer_bytes / host_bandwidth
    return max(0.0, 1 - compute_s / all_s) if all_s else 0.0
