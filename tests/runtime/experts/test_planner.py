"""The planner on simulated plants: it converges, stands still in the dead zone, and never passes the hard limit."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from fluxmoe.runtime.experts.placement import Tier, place
from fluxmoe.runtime.experts.planner import (
    Links,
    Observation,
    Planner,
    PlannerConfig,
    PlannerError,
    choose_transfer,
    distinct_experts,
    knee,
    transfer_costs,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

DENSE, PACKED = 16, 12
BYTES = {Tier.RESIDENT: DENSE, Tier.PACKED: PACKED}


def config(budget=10**9, **changes) -> PlannerConfig:
    return PlannerConfig(**{"expert_bytes": BYTES, "budget_bytes": budget, "settle": 0, "smoothing": 1.0, **changes})


def applied(tiers: np.ndarray, plan) -> np.ndarray:
    """The tiers after a plan, whose moves must be possible, each expert once."""
    tiers = tiers.copy()
    assert len({(m.layer, m.expert) for m in plan.moves}) == len(plan.moves)
    for move in plan.moves:
        assert tiers[move.layer, move.expert] == move.source != move.target
        tiers[move.layer, move.expert] = move.target
    return tiers


def host_share(tiers: np.ndarray) -> float:
    return float((tiers == Tier.HOST).mean())


TIERS = st.integers(1, 6).flatmap(
    lambda layers: st.integers(1, 8).flatmap(
        lambda experts: st.lists(
            st.sampled_from([Tier.RESIDENT, Tier.PACKED, Tier.HOST]),
            min_size=layers * experts,
            max_size=layers * experts,
        ).map(lambda flat: np.array(flat, dtype=np.int8).reshape(layers, experts))
    )
)
SEEN = st.builds(Observation, st.floats(0.001, 10), st.floats(0, 10), st.integers(0, 400), st.integers(0, 400))


@given(TIERS, SEEN, st.integers(0, 1200), st.booleans(), st.booleans(), st.booleans(), st.integers(1, 3))
def test_no_plan_passes_the_hard_limit(tiers, seen, budget, spread, eager, densify, step):
    planner = Planner(config(budget, spread=spread, eager=eager, densify=densify, step=step))
    room = budget - seen.kv_used_bytes
    if room < 0:
        with pytest.raises(PlannerError, match="preempt requests"):
            planner.decide(tiers, seen)
        return
    plan = planner.decide(tiers, seen)
    after = applied(tiers, plan)
    assert planner.bytes_of(after) <= max(room, 0)
    if planner.bytes_of(tiers) <= room:
        assert len(plan.moves) <= step * len(tiers)
        if spread:
            assert max(np.bincount([m.layer for m in plan.moves], minlength=1)) <= step


# By the first rule no more leaves than must: less than a whole step, which requests that wait would have sent away.
ALL_STAY_OR_STEP = np.array([[0, 0], [0, 0], [0, 0], [3, 3], [3, 1], [1, 1]], np.int8)


@given(TIERS, SEEN, st.integers(0, 1200), st.integers(0, 300))
@example(ALL_STAY_OR_STEP, Observation(1.0, 0.0, 0, 1), 132, 1)
def test_more_kv_in_use_never_leaves_more_expert_bytes_by_one_rule(tiers, seen, budget, more):
    after, forced = [], []
    for used in (seen.kv_used_bytes, seen.kv_used_bytes + more):
        planner = Planner(config(budget))
        try:
            plan = planner.decide(tiers, replace(seen, kv_used_bytes=used))
        except PlannerError:
            return
        after.append(planner.bytes_of(applied(tiers, plan)))
        forced.append(planner.bytes_of(tiers) > budget - used)
    assert after[1] <= after[0] or forced == [False, True]


@given(TIERS, SEEN, st.integers(0, 400))
def test_more_requests_that_wait_never_leave_more_expert_bytes(tiers, seen, more):
    after = []
    for waiting in (seen.kv_waiting_bytes, seen.kv_waiting_bytes + more):
        planner = Planner(config(1200))
        try:
            plan = planner.decide(tiers, replace(seen, kv_waiting_bytes=waiting))
        except PlannerError:
            return
        after.append(planner.bytes_of(applied(tiers, plan)))
    assert after[1] <= after[0]


@given(TIERS, st.floats(0.9, 1), st.booleans())
def test_the_dead_zone_moves_nothing(tiers, rho, eager):
    held = Planner(config()).bytes_of(tiers)
    planner = Planner(config(held + 100, eager=eager))
    plan = planner.decide(tiers, Observation(rho, 1.0, kv_used_bytes=90, kv_waiting_bytes=50))
    assert plan.moves == ()


class Plant:
    """A machine whose loads take time in proportion to the experts in host memory, and never-ending demand for KV."""

    def __init__(self, layers: int, experts: int, full_load_s: float, noise: float, seed: int) -> None:
        self.tiers = place("packed", layers, experts).tiers.copy()
        self.full_load_s, self.noise, self.rng = full_load_s, noise, np.random.default_rng(seed)
        self.compute_s = 1.0

    def observe(self, budget: int, planner: Planner) -> Observation:
        jitter = lambda: 1 + self.noise * self.rng.uniform(-1, 1)  # noqa: E731
        used = budget - planner.bytes_of(self.tiers)
        return Observation(self.compute_s * jitter(), self.full_load_s * host_share(self.tiers) * jitter(), used, 10**6)


@settings(max_examples=40)
@given(st.integers(1, 8), st.integers(4, 40), st.floats(0.5, 20), st.integers(0, 1000))
def test_it_converges_to_the_knee_and_stays_under_noise(layers, experts, full_load_s, seed):
    plant = Plant(layers, experts, full_load_s, 0.05, seed)
    budget = layers * experts * PACKED
    planner = Planner(config(budget, smoothing=0.5, settle=2))
    shares = []
    for _ in range(4 * experts + 100):
        plan = planner.decide(plant.tiers, plant.observe(budget, planner))
        plant.tiers = applied(plant.tiers, plan)
        shares.append(host_share(plant.tiers))
    wanted = min(1.0, 1 / full_load_s)  # loads take as long as compute
    step = 1 / experts
    assert shares[-1] <= wanted * 1.06 / 0.9 + step
    # Not short of the knee by more than what a step overshoots, the zone and the noise allow.
    assert shares[-1] >= min(1.0, wanted * 0.9) - 2 * step
    tail = shares[-60:]
    assert len(set(tail)) <= 2, "it oscillates"
    assert sum(a != b for a, b in pairwise(tail)) <= 1


def test_experts_come_back_when_memory_is_idle():
    tiers = place("host", 3, 4).tiers
    planner = Planner(config(12 * DENSE, densify=True))
    for _ in range(20):
        tiers = applied(tiers, planner.decide(tiers, Observation(1.0, 0.5, 0, 0)))
    assert (tiers == Tier.RESIDENT).all()
    planner = Planner(config(12 * DENSE, densify=True, reserve_bytes=6 * DENSE))
    tiers = place("host", 3, 4).tiers
    for _ in range(20):
        tiers = applied(tiers, planner.decide(tiers, Observation(1.0, 0.5, 0, 0)))
    assert planner.bytes_of(tiers) <= 6 * DENSE


def test_spread_and_unspread_steps():
    tiers = place("packed", 4, 8).tiers
    seen = Observation(1.0, 0.0, 0, 10**9)
    spread = Planner(config(32 * PACKED)).decide(tiers, seen).moves
    assert sorted(m.layer for m in spread) == [0, 1, 2, 3]
    assert {m.expert for m in spread} == {7}
    last = Planner(config(32 * PACKED, spread=False)).decide(tiers, seen).moves
    assert [(m.layer, m.expert) for m in last] == [(3, 7), (3, 6), (3, 5), (3, 4)]


def test_the_least_used_leave_first_and_the_most_used_return_first():
    popularity = np.array([[5, 1, 9, 3]])
    tiers = place("packed", 1, 4).tiers
    down = Planner(config(4 * PACKED)).decide(tiers, Observation(1, 0, 0, 10**9), popularity)
    assert [m.expert for m in down.moves] == [1]
    up = Planner(config()).decide(place("host", 1, 4).tiers, Observation(0.1, 1, 0, 0), popularity)
    assert [m.expert for m in up.moves] == [2]


def test_dense_experts_are_packed_before_packed_ones_leave():
    tiers = place("resident", 1, 3).tiers
    planner = Planner(config(3 * DENSE))
    moves = []
    for _ in range(6):
        plan = planner.decide(tiers, Observation(1, 1e-9, 3 * DENSE - planner.bytes_of(tiers), 10**9))
        moves += [(m.source, m.target) for m in plan.moves]
        tiers = applied(tiers, plan)
    assert moves == [(Tier.RESIDENT, Tier.PACKED)] * 3 + [(Tier.PACKED, Tier.HOST)] * 3


def test_the_paper_lowers_alpha_even_without_demand():
    tiers = place("packed", 2, 8).tiers.copy()
    tiers[:, 7] = Tier.HOST
    seen = Observation(1.0, 0.2, 0, 0)
    assert Planner(config(14 * PACKED)).decide(tiers, seen).moves == ()
    assert all(m.target == Tier.HOST for m in Planner(config(14 * PACKED, eager=True)).decide(tiers, seen).moves)


def test_least_alpha_is_kept():
    tiers = place("packed", 2, 4).tiers
    planner = Planner(config(8 * PACKED, least_alpha=0.5))
    for _ in range(9):
        used = 8 * PACKED - planner.bytes_of(tiers)
        tiers = applied(tiers, planner.decide(tiers, Observation(1, 0, used, 10**9)))
    assert host_share(tiers) == 0.5
    with pytest.raises(PlannerError, match="at least 48 must stay"):
        planner.decide(tiers, Observation(1, 0, 8 * PACKED - 47, 0))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"theta": 0}, "dead zone"),
        ({"theta": 1.1}, "dead zone"),
        ({"step": 0}, "at least 1 expert"),
        ({"smoothing": 0}, "newest value"),
        ({"least_alpha": 2}, "share of experts"),
        ({"expert_bytes": {}}, "at least one"),
        ({"expert_bytes": {Tier.HOST: 1}}, "must name device tiers"),
    ],
)
def test_settings_that_cannot_be_meant(change, match):
    with pytest.raises(PlannerError, match=match):
        config(**change)


@given(st.integers(0, 50), st.integers(1, 64), st.integers(1, 8))
def test_distinct_experts_of_uniform_routing(tokens, experts, top_k):
    p = min(1.0, top_k / experts)
    expected = experts * (1 - (1 - p) ** tokens)
    assert distinct_experts(tokens, np.full(experts, p)) == pytest.approx(expected)


def test_few_tokens_read_on_demand_and_many_stream_whole():
    host = np.zeros((4, 128), dtype=bool)
    host[:, 64:] = True
    uniform, links = np.full((4, 128), 8 / 128), Links(copy=50e9, read=35e9)

    def chosen(tokens, compute_s, current="whole"):
        return choose_transfer(transfer_costs(host, uniform, tokens, 10**7, links, compute_s), current)

    assert chosen(1, 0.004) == "on_demand"
    assert chosen(256, 0.004) == "whole"
    assert chosen(1, 1.0) == "whole"  # the copies hide
    # Where one is hardly better, what is stays.
    assert {chosen(t, 0.0, "whole") for t in range(1, 64)} == {"whole", "on_demand"}
    for tokens in range(1, 64):
        if chosen(tokens, 0.0, "whole") == "on_demand":
            assert chosen(tokens, 0.0, "on_demand") == "on_demand"


def test_dense_stores_have_one_device_tier():
    planner = Planner(config(4 * DENSE, expert_bytes={Tier.RESIDENT: DENSE}))
    plan = planner.decide(place("resident", 2, 2).tiers, Observation(1, 0, 4 * DENSE, 10**9), None)
    assert {(m.source, m.target) for m in plan.moves} == {(Tier.RESIDENT, Tier.HOST)}


def test_knee():
    """Ten layers of 1 GB over 10 GB/s take a second: half a second of compute hides half of them."""
    assert knee(0.5, 1e9, 10, 10e9) == 0.5
    assert knee(2.0, 1e9, 10, 10e9) == 0.0
    assert math.isclose(knee(0.0, 1e9, 10, 10e9), 1.0)
