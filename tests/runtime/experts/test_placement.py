"""Placements: every expert in one tier, exact shares, balance, monotony."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fluxmoe.runtime.experts.placement import POLICIES, PlacementError, Tier, place
from hypothesis import given
from hypothesis import strategies as st

LAYERS, EXPERTS = st.integers(1, 12), st.integers(1, 20)
SHARES = st.floats(0, 1)


@given(LAYERS, EXPERTS, SHARES)
def test_balanced_is_exact_and_even(layers, experts, alpha):
    placement = place("balanced", layers, experts, alpha=alpha)
    resident = (placement.tiers == Tier.RESIDENT).sum(axis=1)
    assert resident.sum() == round(alpha * layers * experts)
    assert resident.max() - resident.min() <= 1


@given(LAYERS, EXPERTS, SHARES, SHARES, st.sampled_from(["offload", "balanced", "host", "disk"]))
def test_more_alpha_keeps_what_less_alpha_kept(layers, experts, a, b, policy):
    less, more = (place(policy, layers, experts, alpha=x).tiers == Tier.RESIDENT for x in sorted((a, b)))
    assert (less <= more).all()


@given(st.integers(2, 64), st.data())
def test_odd_experts_are_spread_over_the_depth(layers, data):
    """Between two of the layers that keep one expert more lie at most four times as many as if perfectly even."""
    odd = data.draw(st.integers(1, layers - 1))
    resident = place("balanced", layers, 1, alpha=odd / layers).tiers[:, 0] == Tier.RESIDENT
    assert resident.sum() == odd
    gaps = np.diff(np.flatnonzero(resident), prepend=-1, append=layers)
    assert gaps.max() <= 4 * layers / odd


@given(LAYERS, EXPERTS, st.sampled_from(sorted(POLICIES)))
def test_counts_and_lists_agree(layers, experts, policy):
    bandwidths = {Tier.RESIDENT: 3.0, Tier.HOST: 1.0, Tier.DISK: 0.5}
    placement = place(policy, layers, experts, bandwidths=bandwidths)
    assert placement.tiers.shape == (layers, experts)
    assert sum(placement.counts().values()) == layers * experts
    for layer in range(layers):
        members = [expert for tier in Tier for expert in placement.members(layer, tier)]
        assert sorted(members) == list(range(experts))


@given(LAYERS, EXPERTS, SHARES, SHARES, st.sampled_from(["balanced", "host", "disk"]))
def test_the_dense_share_is_taken_from_the_device(layers, experts, alpha, dense, policy):
    """x dense + y packed + z host = 1 (arXiv 2604.02715 §4.3): z does not depend on x."""
    packed = place(policy, layers, experts, alpha=alpha, device_tier=Tier.PACKED)
    mixed = place(policy, layers, experts, alpha=alpha, dense=dense, device_tier=Tier.PACKED)
    assert mixed.alpha == packed.alpha
    wanted = min(round(dense * layers * experts), round(alpha * layers * experts))
    assert mixed.counts()["resident"] == wanted


@given(LAYERS, EXPERTS, SHARES, SHARES)
def test_three_tiers_are_exact_even_and_nested(layers, experts, alpha, disk):
    if alpha + disk > 1:
        alpha, disk = 1 - alpha, 1 - disk
    tiers = place("three_tiers", layers, experts, alpha=alpha, disk=disk).tiers
    for tier, share in ((Tier.RESIDENT, alpha), (Tier.DISK, disk), (Tier.HOST, 1 - alpha - disk)):
        counts = (tiers == tier).sum(axis=1)
        assert abs(counts.sum() - share * layers * experts) <= 1
        assert counts.max() - counts.min() <= 2
    more = place("three_tiers", layers, experts, alpha=alpha, disk=disk / 2).tiers
    assert ((tiers == Tier.RESIDENT) == (more == Tier.RESIDENT)).all()
    assert ((tiers == Tier.HOST) <= (more == Tier.HOST)).all()


def test_three_tiers_follow_bandwidth():
    """x_k = B_k / ΣB over three backends, and over those whose share is not given (arXiv 2604.02715 §4.2)."""
    rates = {Tier.RESIDENT: 30e9, Tier.HOST: 8e9, Tier.DISK: 2e9, Tier.PACKED: 30e9}
    shares = dict[str, dict[str, Any]](free={}, device={"alpha": 0.5}, files={"disk": 0.24})
    counts = {name: place("three_tiers", 5, 40, bandwidths=rates, **given).counts() for name, given in shares.items()}
    assert counts["free"] == {"resident": 150, "host": 40, "disk": 10, "packed": 0}
    assert counts["device"] == {"resident": 100, "host": 80, "disk": 20, "packed": 0}
    assert counts["files"] == {"resident": 120, "host": 32, "disk": 48, "packed": 0}
    packed = place("three_tiers", 5, 40, device_tier=Tier.PACKED, dense=0.25, bandwidths=rates)
    assert packed.counts() == {"resident": 50, "host": 40, "disk": 10, "packed": 100}


def test_policies_do_what_they_say():
    assert place("resident", 4, 8).alpha == place("packed", 4, 8).alpha == 1
    assert place("packed", 4, 8).counts()["packed"] == 32
    assert place("host", 4, 8).counts() == {"resident": 0, "host": 32, "disk": 0, "packed": 0}
    assert place("disk", 4, 8).counts()["disk"] == 32
    for policy, kept in (("offload", Tier.RESIDENT), ("hybrid", Tier.PACKED)):
        sixteen, four = place(policy, 16, 8).tiers, place(policy, 4, 8).tiers
        assert (sixteen[:14] == kept).all()
        assert (sixteen[14:] == Tier.HOST).all()  # the paper's 12.5 %
        assert (four[3] == Tier.HOST).all()  # at least one layer
        assert place(policy, 4, 8, alpha=1.0).alpha == 1


def test_balanced_follows_bandwidth():
    """x_k = B_k / ΣB (arXiv 2604.02715 §4.2)."""
    placement = place("balanced", 6, 40, bandwidths={Tier.RESIDENT: 30e9, Tier.HOST: 10e9})
    assert placement.alpha == 0.75
    assert np.unique((placement.tiers == Tier.HOST).sum(axis=1)).tolist() == [10]
    bandwidths = {Tier.RESIDENT: 30e9, Tier.HOST: 10e9, Tier.PACKED: 30e9}
    packed = place("balanced", 6, 40, device_tier=Tier.PACKED, bandwidths=bandwidths)
    assert packed.counts() == {"resident": 0, "host": 60, "disk": 0, "packed": 180}


@pytest.mark.parametrize(
    ("policy", "settings", "match"),
    [
        ("nowhere", {}, "balanced"),
        ("balanced", {}, "bandwidth of tier RESIDENT and HOST"),
        ("three_tiers", {"bandwidths": {Tier.RESIDENT: 1.0, Tier.HOST: 1.0}}, "bandwidth of tier DISK"),
        ("three_tiers", {"alpha": 0.5}, "bandwidth of tier HOST and DISK"),
        ("three_tiers", {"alpha": 0.7, "disk": 0.4}, "RESIDENT and DISK add up to 1.1"),
        ("three_tiers", {"disk": 2.0}, "disk is a share of experts in files, from 0 to 1"),
        ("balanced", {"disk": 0.5}, "for placement three_tiers"),
        ("balanced", {"alpha": 1.01}, "0 to 1"),
        ("balanced", {"alpha": float("nan")}, "0 to 1"),
        ("balanced", {"bandwidths": {Tier.RESIDENT: 0.0, Tier.HOST: 1.0}}, "positive"),
        ("balanced", {"bandwidths": {Tier.RESIDENT: float("inf"), Tier.HOST: 1.0}}, "finite"),
        ("balanced", {"bandwidths": {Tier.RESIDENT: 1.0}}, "tier HOST"),
        ("resident", {"alpha": 0.5}, "every expert"),
        ("packed", {"alpha": 0.5}, "every expert"),
        ("host", {"dense": -0.1}, "dense is a share"),
    ],
)
def test_errors(policy, settings, match):
    with pytest.raises(PlacementError, match=match):
        place(policy, 4, 8, **settings)


def test_a_placement_cannot_be_edited():
    with pytest.raises(ValueError, match="read-only"):
        place("host", 2, 2).tiers[0, 0] = Tier.RESIDENT
