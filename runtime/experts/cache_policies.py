"""Which experts a cache keeps: policies as pure functions of what has been used, shared with replays of recordings.

Layers are visited cyclically, pass after pass; a visit uses some of its layer's experts. Where one must make room, the
expert with the lowest score leaves. An expert that was used lately is not one that comes soon: in a pass every layer is
between, and with many tokens nearly all of a layer's experts come once a pass, so that what LRU keeps is what comes
last (it misses 97 % where 670 experts scan through 560 places).

    static       the most used of all, for ever: needs to be told (`popularity`); the others pass through
    lru          used last
    lfu          used most, old uses counting less
    next_use     expected to be used soonest: visits until the layer's turn, and passes until a use at its rate
    learned      as next_use, with how much more often than at their rate experts of their kind were used at their next
                 turn: kinds are turns since the last use, and rates
    least_stale  missed the fewest of its layer's turns since its last use; of equals, whose turn comes first
    lirs         whose longest gap of late, between its last two uses or since the last, is shortest; equals keep a
                 fixed order, so that a scan through more than there is room for keeps a part of it

Sources: least_stale follows the idea of SpecMD's Least-Stale (arXiv 2602.03921: leftovers of earlier passes go first,
then by the order of layers), as its abstract gives it; lirs is what Jiang and Zhang (SIGMETRICS 2002) rank by, the
reuse distance instead of the last use, which resists scans, without their stack. Belady's rule, which knows the future,
is the bound (`belady`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

# Weight of the newest pass in an expert's rate of use: some twenty passes are remembered.
_NEWEST = 0.05
# Below this a rate says nothing: once in a thousand passes.
_LEAST_RATE = 1e-3
# Kinds of experts: upper ends of turns since the last use, and of rates.
_TURNS, _RATES = np.array([1, 2, 4, 8, 16, 32]), np.array([0.01, 0.03, 0.1, 0.3])
# As many uses of a kind say that its experts are used at their rates, until there are more.
_PRIOR = 8.0
# Turns: more than any run has, yet few enough to be added to.
_NEVER = 1 << 40


class Uses:
    """What has been used, by expert [L, E]: int64, the visit of the last use (-1: none); its layer's turns since, 0
    where the last turn used it, and between the last two uses (_NEVER where there were none); float64, the share of
    passes that used it."""

    def __init__(self, layers: int, experts: int) -> None:
        self.visit, self.layer = -1, -1
        # How much more, or less, the last visit used than was to be expected: passes differ in their tokens.
        self.surprise = 1.0
        self.last = np.full((layers, experts), -1, np.int64)
        self.since = np.full((layers, experts), _NEVER, np.int64)
        self.gap = self.since.copy()
        self.rate = np.zeros((layers, experts))
        # By kind: uses at the next turn, and those that the rates said.
        self._found, self._said = np.zeros((2, (len(_TURNS) + 1) * (len(_RATES) + 1)))

    def note(self, layer: int, experts: np.ndarray) -> None:
        """A visit of `layer` uses `experts`."""
        self.visit, self.layer = self.visit + 1, layer
        self.surprise = len(experts) / max(self.chance(layer).sum(), _LEAST_RATE)
        kinds, size = self._kinds(layer), len(self._found)
        self._found += np.bincount(kinds[experts], minlength=size)
        self._said += np.bincount(kinds, self.rate[layer], minlength=size)
        self.last[layer, experts] = self.visit
        self.since[layer] += 1
        self.gap[layer, experts] = np.minimum(self.since[layer, experts], _NEVER)
        self.since[layer, experts] = 0
        self.rate[layer] *= 1 - _NEWEST
        self.rate[layer, experts] += _NEWEST

    def _kinds(self, layers: int | slice) -> np.ndarray:
        """The kind of each expert of some layers."""
        since, rate = self.since[layers], self.rate[layers]
        return np.searchsorted(_TURNS, since, "right") * (len(_RATES) + 1) + np.searchsorted(_RATES, rate, "right")

    def chance(self, layers: int | slice = slice(None)) -> np.ndarray:
        """float64 [L, E], or [E] of a layer: how likely its next turn uses each expert, by its rate and its kind."""
        lift = (self._found + _PRIOR) / (self._said + _PRIOR)
        return np.minimum(self.rate[layers] * lift[self._kinds(layers)], 1.0)

    def chance_now(self, layer: int) -> np.ndarray:
        """float64 [E]: the same, of the layer whose turn comes next in a pass of as many tokens as this one."""
        return np.minimum(self.chance(layer) * self.surprise, 1.0)

    def until_turn(self) -> np.ndarray:
        """int64 [L]: visits until each layer's turn comes again; that of the layer which runs is a whole pass away."""
        layers = len(self.last)
        return (np.arange(layers) - self.layer - 1) % layers + 1


# Uses → float64 [L, E]: experts of the lowest score leave first.
Policy = Callable[[Uses], np.ndarray]


def lru(uses: Uses) -> np.ndarray:
    return uses.last.astype(np.float64)


def lfu(uses: Uses) -> np.ndarray:
    return uses.rate


def next_use(uses: Uses) -> np.ndarray:
    """Minus the expected visits until the next use: the layer's turn, then a geometric number of passes."""
    return _soonest(uses, uses.rate)


def learned(uses: Uses) -> np.ndarray:
    return _soonest(uses, uses.chance())


def _soonest(uses: Uses, chance: np.ndarray) -> np.ndarray:
    passes = 1 / np.maximum(chance, _LEAST_RATE) - 1
    return -(uses.until_turn()[:, None] + len(uses.rate) * passes)


def least_stale(uses: Uses) -> np.ndarray:
    layers = len(uses.rate)
    return -(uses.since + uses.until_turn()[:, None] / (layers + 1))


def lirs(uses: Uses) -> np.ndarray:
    experts = uses.rate.shape[1]
    return -(np.maximum(uses.gap, uses.since) + np.arange(experts) / experts)


def static(popularity: np.ndarray) -> Policy:
    """popularity [L, E]: how often each expert is used, in all."""
    scores = popularity.astype(np.float64)
    return lambda uses: scores


STATIC = "static"
# Those that need nothing but what was used.
POLICIES: dict[str, Policy] = {
    "next_use": next_use, "learned": learned, "lru": lru, "lfu": lfu, "least_stale": least_stale, "lirs": lirs,
}  # fmt: skip


class Replayed(NamedTuple):
    hits: int
    misses: int

    @property
    def hit_rate(self) -> float:
        return self.hits / max(1, self.hits + self.misses)


def replay(
    visits: Sequence[tuple[int, np.ndarray]], shape: tuple[int, int], places: int, policy: Policy, warm: int = 0
) -> Replayed:
    """Hits and misses of a cache of `places` experts over (layer, experts used) visits; shape: (L, E); warm: visits at
    the beginning that are not counted."""
    uses, held = Uses(*shape), np.zeros(shape, bool)
    hits = misses = 0
    for layer, experts in visits:
        uses.note(layer, experts)
        missing = experts[~held[layer, experts]]
        if uses.visit >= warm:
            hits, misses = hits + len(experts) - len(missing), misses + len(missing)
        held[layer, experts] = True
        if (excess := int(held.sum()) - places) > 0:
            scores = np.where(held, policy(uses), np.inf)
            # What this visit uses stays until it is over, as far as there are places.
            if places >= len(experts):
                scores[layer, experts] = np.inf
            held.flat[np.argpartition(scores.ravel(), excess - 1)[:excess]] = False
    return Replayed(hits, misses)


def resident(visits: Sequence[tuple[int, np.ndarray]], kept: np.ndarray, warm: int = 0) -> Replayed:
    """The same where the experts `kept` bool [L, E] stay for ever, and others pass through slots beside them."""
    counted = visits[warm:]
    hits = sum(int(kept[layer, experts].sum()) for layer, experts in counted)
    return Replayed(hits, sum(len(experts) for _, experts in counted) - hits)


def belady(visits: Sequence[tuple[int, np.ndarray]], shape: tuple[int, int], places: int, warm: int = 0) -> Replayed:
    """The same by the rule that knows what comes: the expert that is used again last leaves (Belady 1966)."""
    uses_of: dict[tuple[int, int], list[int]] = {}
    for at, (layer, experts) in enumerate(visits):
        for expert in experts.tolist():
            uses_of.setdefault((layer, expert), []).append(at)
    following = np.full(shape, np.inf)
    for key, times in uses_of.items():
        uses_of[key] = times[::-1]
        following[key] = times[0]

    def farthest(uses: Uses) -> np.ndarray:
        for layer, expert in np.argwhere(following <= uses.visit).tolist():
            times = uses_of[layer, expert]
            while times and times[-1] <= uses.visit:
                times.pop()
            following[layer, expert] = times[-1] if times else np.inf
        return -following

    return replay(visits, shape, places, farthest, warm)
