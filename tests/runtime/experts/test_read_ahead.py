"""Reading ahead: no more than the disk has time for, little in vain, nothing where the disk is never idle."""

from __future__ import annotations

import numpy as np
import pytest
from fluxmoe.runtime.experts.cache_policies import Uses, learned
from fluxmoe.runtime.experts.read_ahead import WASTE, ReadAhead, likeliest
from hypothesis import given
from hypothesis import strategies as st

SIZE = 10


@given(st.lists(st.floats(0, 1), max_size=30), st.floats(-50, 500))
def test_the_likeliest_as_far_as_bytes_and_waste_allow(chances, most_bytes):
    given_chances = np.array(chances)
    chosen = likeliest(given_chances, SIZE, most_bytes)
    assert len(set(chosen.tolist())) == len(chosen)
    assert len(chosen) * SIZE <= max(0, most_bytes)
    used, left = given_chances[chosen].sum(), np.delete(given_chances, chosen)
    assert len(chosen) - used <= WASTE * used + 1e-9
    assert not len(chosen) or not len(left) or given_chances[chosen].min() >= left.max()
    if len(left) and (len(chosen) + 1) * SIZE <= most_bytes:
        used += left.max()
        assert len(chosen) + 1 - used > WASTE * used - 1e-9


def test_by_hand():
    sure, half = np.full(4, 1.0), np.full(4, 0.5)
    assert likeliest(sure, SIZE, 35).tolist() == [0, 1, 2]
    assert likeliest(half, SIZE, 1000).tolist() == []
    assert likeliest(np.array([0.5, 0.99, 1.0]), SIZE, 1000).tolist() == [2, 1]
    # With three that are sure, 0.15 in vain of 3.85 used is little enough, 0.2 of 3.8 is not.
    assert likeliest(np.array([0.8, 1.0, 0.8, 1.0, 1.0]), SIZE, 1000).tolist() == [1, 3, 4]
    assert len(likeliest(np.array([0.85, *[1.0] * 3]), SIZE, 1000)) == 4


class Machine:
    """A cache of `places` experts over a disk and kernels, on a virtual clock: all reads of a layer, then its compute,
    in which the disk reads ahead."""

    def __init__(self, layers: int, experts: int, places: int, bytes_per_s: float) -> None:
        self.uses, self.ahead = Uses(layers, experts), ReadAhead(layers, SIZE)
        self.places, self.rate = places, bytes_per_s
        self.held = np.zeros((layers, experts), bool)
        self.unused = self.held.copy()
        self.read = self.lacked = self.came_ahead = 0
        self.time_s = 0.0
        self.last: tuple[int, float, float, int, int] | None = None
        # Bytes still to be read of those ahead.
        self.pending = 0.0

    def visit(self, layer: int, experts: np.ndarray, compute_s: float) -> float:
        """Seconds of the layer's turn."""
        if self.last is not None:
            self.ahead.ran(*self.last)
        self.uses.note(layer, experts)
        came = experts[self.unused[layer, experts]]
        missing = experts[~self.held[layer, experts]]
        self.unused[layer, came] = False
        self.ahead.used(len(missing) + len(came), len(came))
        self.lacked += len(missing) + len(came)
        self.came_ahead += len(came)
        asked = self.pending + len(missing) * SIZE
        following = (layer + 1) % len(self.held)
        self._hold(layer, missing, pinned=np.array([layer]))
        absent = np.flatnonzero(~self.held[following])
        room = self.ahead._rooms[:, layer].min()
        chosen = self.ahead.choose(layer, self.uses.chance_now(following)[absent], len(absent))
        assert len(chosen) * SIZE <= room
        self._hold(following, absent[chosen], pinned=np.array([layer, following]))
        self.unused[following, absent[chosen]] = True
        seconds = asked / self.rate + compute_s
        read = min(compute_s * self.rate, len(chosen) * SIZE)
        self.pending = len(chosen) * SIZE - read
        self.read += (len(missing) + len(chosen)) * SIZE
        self.last = layer, seconds, (asked + read) / self.rate, int(asked + read), int(np.ceil(asked))
        self.time_s += seconds
        return seconds

    def _hold(self, layer: int, experts: np.ndarray, pinned: np.ndarray) -> None:
        self.held[layer, experts] = True
        if (excess := int(self.held.sum()) - self.places) > 0:
            scores = np.where(self.held, learned(self.uses), np.inf)
            scores[pinned] = np.inf
            self.held.flat[np.argpartition(scores.ravel(), excess - 1)[:excess]] = False
            self.unused &= self.held


def drive(machine: Machine, batches: list[int], compute_s: float, seed: int = 0, top_k: int = 2) -> Machine:
    rng = np.random.default_rng(seed)
    layers, experts = machine.held.shape
    for batch in batches:
        for layer in range(layers):
            used = np.unique([rng.choice(experts, top_k, replace=False) for _ in range(batch)])
            machine.visit(layer, used, compute_s)
    return machine


@given(st.lists(st.sampled_from([1, 2, 8, 40]), min_size=1, max_size=6), st.floats(0, 5), st.integers(0, 99))
def test_bytes_in_vain_stay_within_their_share_whatever_comes(batches, compute_s, seed):
    """Batches change every eight passes; at each turn the bound holds for all so far."""
    machine = Machine(4, 16, places=40, bytes_per_s=50.0)
    for batch in batches:
        for number in range(8):
            drive(machine, [batch], compute_s, seed + number)
            assert machine.read == machine.lacked * SIZE + machine.ahead.unused_bytes
            assert machine.ahead.unused_bytes <= WASTE * machine.lacked * SIZE


def test_a_disk_that_is_never_idle_reads_nothing_ahead():
    machine = drive(Machine(4, 16, places=40, bytes_per_s=50.0), [40] * 40, compute_s=0.0)
    assert machine.came_ahead == 0 == machine.ahead.unused_bytes


@pytest.mark.parametrize("compute_s", [0.4, 3.0])
def test_many_tokens_have_whole_layers_read_ahead_as_far_as_there_is_time(compute_s):
    """At 0.2 s an expert a layer lacks more than two seconds' worth: nearly all hides in three, some in 0.4."""
    machine = drive(Machine(4, 16, places=40, bytes_per_s=50.0), [40] * 20, compute_s)
    before, lacked, came = machine.time_s, machine.lacked, machine.came_ahead
    drive(machine, [40] * 20, compute_s)
    lacked, came = machine.lacked - lacked, machine.came_ahead - came
    waited = machine.time_s - before - 80 * compute_s
    could = min(lacked * SIZE / 50.0, 80 * compute_s)
    assert came * SIZE / 50.0 > 0.7 * could
    assert waited < lacked * SIZE / 50.0 - 0.7 * could


def test_one_token_has_nothing_read_ahead():
    machine = drive(Machine(4, 16, places=40, bytes_per_s=50.0), [1] * 60, compute_s=3.0, top_k=2)
    assert machine.came_ahead <= 0.05 * machine.lacked
