"""Placement: which tier holds each expert of each layer. Pure functions; experiments differ in one argument.

    resident     every expert on the device, dense                                  vLLM
    packed       every expert on the device, compressed                             FluxMoE with α = 1
    offload      the last layers wholly in host memory, the rest dense              vLLM-O (arXiv 2604.02715 §6.1)
    hybrid       the last layers wholly in host memory, the rest compressed         FluxMoE-H (§6.1)
    balanced     the same share of every layer in host memory                       FluxMoE (§4.2)
    three_tiers  the same shares of every layer in host memory and in files         §4.2 over three backends
    host         every expert in host memory, all streamed                          α = 0
    disk         every expert in a file, all streamed

α is the share of experts that stay on the device. Inside a layer the experts with the highest ids stream: a
router has no order of preference among ids, so any fixed choice is as good until routing statistics say more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise

import numpy as np


class PlacementError(ValueError):
    """A policy or share that cannot be."""


class Tier(IntEnum):
    """Where an expert's bytes lie: dense on the device, in host memory, in a file, compressed on the device."""

    RESIDENT = 0
    HOST = 1
    DISK = 2
    PACKED = 3


DEVICE_TIERS = (Tier.RESIDENT, Tier.PACKED)


@dataclass(frozen=True, eq=False)
class Placement:
    """tiers int8 [L, E]: the Tier of every (layer, expert); L counts the layers with experts alone."""

    name: str
    tiers: np.ndarray

    @property
    def alpha(self) -> float:
        """Share of experts on the device."""
        return float(np.isin(self.tiers, DEVICE_TIERS).mean())

    def counts(self) -> dict[str, int]:
        """Experts by tier name."""
        return {tier.name.lower(): int((self.tiers == tier).sum()) for tier in Tier}

    def members(self, layer: int, tier: Tier) -> list[int]:
        """Experts of a layer in a tier, ascending."""
        return np.flatnonzero(self.tiers[layer] == tier).tolist()


@dataclass(frozen=True)
class _Request:
    """What a policy is asked: sizes, α, the tier of experts that stay on the device, bytes/s by tier, the share in
    files."""

    layers: int
    experts: int
    alpha: float | None
    device_tier: Tier
    bandwidths: Mapping[Tier, float] | None
    disk: float | None = None

    def all(self, tier: Tier) -> np.ndarray:
        return np.full((self.layers, self.experts), tier, dtype=np.int8)


def _spread(request: _Request, alpha: float, tier: Tier) -> np.ndarray:
    """round(α·L·E) on the device; layers differ by at most one expert, the odd ones spread over the depth.

    Nested: what a share keeps, every greater share keeps too, so that a step of α moves no expert back and forth.
    """
    each, odd = divmod(round(alpha * request.layers * request.experts), request.layers)
    tiers = request.all(tier)
    tiers[:, :each] = request.device_tier
    if odd:
        tiers[_scattered(request.layers)[:odd], each] = request.device_tier
    return tiers


def _scattered(layers: int) -> list[int]:
    """All layers, in an order of which every beginning lies spread over the depth (bits of the index reversed)."""
    bits = (layers - 1).bit_length()
    mirrored = (int(f"{i:0{bits}b}"[::-1], 2) for i in range(1 << bits))
    return [layer for layer in mirrored if layer < layers]


def _whole(name: str, tier: Tier) -> Policy:
    def policy(request: _Request) -> np.ndarray:
        if request.alpha not in (None, 1.0):
            raise PlacementError(f"placement {name} keeps every expert (alpha 1), got alpha {request.alpha}")
        return request.all(tier)

    return policy


def _last_layers(tier: Tier) -> Policy:
    def policy(request: _Request) -> np.ndarray:
        # The paper's baselines offload the last 12.5 % of layers.
        alpha = 0.875 if request.alpha is None else request.alpha
        keep = min(round(alpha * request.layers), request.layers - 1) if alpha < 1 else request.layers
        tiers = request.all(tier)
        tiers[keep:] = Tier.HOST
        return tiers

    return policy


def _balanced(name: str, *far: Tier) -> Policy:
    """The same shares of every layer on the device and in each of `far`."""

    def policy(request: _Request) -> np.ndarray:
        given = {request.device_tier: request.alpha, Tier.DISK: request.disk}
        shares = _shares(name, {tier: given.get(tier) for tier in (request.device_tier, *far)}, request.bandwidths)
        nearer, tiers = 1.0, request.all(far[-1])
        # What is nearer than a tier overwrites it, down to the device.
        for farther, tier in pairwise((*far[::-1], request.device_tier)):
            nearer = max(0.0, nearer - shares[farther])
            tiers[_spread(request, nearer, farther) == request.device_tier] = tier
        return tiers

    return policy


def _shares(
    name: str, given: Mapping[Tier, float | None], bandwidths: Mapping[Tier, float] | None
) -> dict[Tier, float]:
    """Shares of all tiers; those that are not given divide the rest, x_k = B_k / ΣB: they are done with a layer at the
    same time (§4.2)."""
    fixed = {tier: share for tier, share in given.items() if share is not None}
    free = [tier for tier in given if tier not in fixed]
    left = 1 - sum(fixed.values())
    if left < -1e-9:
        raise PlacementError(f"placement {name}: shares of {_names(fixed)} add up to {1 - left:g}, more than 1")
    left = max(0.0, left)
    if len(free) == 1:
        return fixed | {free[0]: left}
    if lacking := set(free) - (bandwidths or {}).keys():
        raise PlacementError(
            f"placement {name} needs a bandwidth of tier {_names(sorted(lacking))} to share a layer by: give "
            "--profile, or the shares themselves (--alpha, --disk-share)"
        )
    assert bandwidths is not None, "none is lacking"
    total = sum(bandwidths[tier] for tier in free)
    return fixed | {tier: left * bandwidths[tier] / total for tier in free}


def _names(tiers: Iterable[Tier]) -> str:
    return " and ".join(tier.name for tier in tiers)


Policy = Callable[[_Request], np.ndarray]
POLICIES: dict[str, Policy] = {
    "resident": _whole("resident", Tier.RESIDENT),
    "packed": _whole("packed", Tier.PACKED),
    "offload": _last_layers(Tier.RESIDENT),
    "hybrid": _last_layers(Tier.PACKED),
    "balanced": _balanced("balanced", Tier.HOST),
    "three_tiers": _balanced("three_tiers", Tier.HOST, Tier.DISK),
    "host": lambda request: _spread(request, request.alpha or 0.0, Tier.HOST),
    "disk": lambda request: _spread(request, request.alpha or 0.0, Tier.DISK),
}
# Policies that hold every expert on the device.
WHOLLY_ON_DEVICE = ("resident", "packed")
# Policies that hold compressed experts on the device, whatever they are asked.
COMPRESSING = ("packed", "hybrid")
# Policies that hold experts in files, and those that share layers by bandwidth.
IN_FILES = ("three_tiers", "disk")
BY_BANDWIDTH = ("balanced", "three_tiers")


def place(
    policy: str,
    num_layers: int,
    num_experts: int,
    *,
    alpha: float | None = None,
    disk: float | None = None,
    dense: float = 0.0,
    device_tier: Tier = Tier.RESIDENT,
    bandwidths: Mapping[Tier, float] | None = None,
) -> Placement:
    """Tier of every expert under `policy`.

    alpha: share of experts on the device, 0 to 1; None is the policy's own default. device_tier: RESIDENT or PACKED,
    where balanced, three_tiers, host and disk keep that share; disk: the share in files of three_tiers; dense: the
    share of all experts that lies on the device dense even so (x of the paper's x dense + y packed + z host, §4.3).
    bandwidths: bytes/s at which the tiers deliver a layer, for shares that are not given. Raises PlacementError.
    """
    if policy not in POLICIES:
        raise PlacementError(f"unknown placement {policy!r}; choose one of {', '.join(POLICIES)}")
    if num_layers < 1 or num_experts < 1:
        raise PlacementError(f"nothing to place: {num_layers} layers of {num_experts} experts")
    for name, share, where in (("alpha", alpha, "on the device"), ("dense", dense, "on the device"),
                               ("disk", disk, "in files")):  # fmt: skip
        if share is not None and not 0 <= share <= 1:
            raise PlacementError(f"{name} is a share of experts {where}, from 0 to 1; got {share}")
    if disk is not None and policy != "three_tiers":
        raise PlacementError(f"a share in files is for placement three_tiers: it has no effect on {policy}")
    if bandwidths is not None and any(not (b > 0 and math.isfinite(b)) for b in bandwidths.values()):
        raise PlacementError(f"bandwidths must be positive, finite bytes per second, got {dict(bandwidths)}")
    request = _Request(num_layers, num_experts, alpha, device_tier, bandwidths, disk)
    tiers = POLICIES[policy](request)
    if dense:
        keep = _spread(_Request(num_layers, num_experts, dense, Tier.RESIDENT, None), dense, Tier.HOST)
        tiers[(keep == Tier.RESIDENT) & (tiers == Tier.PACKED)] = Tier.RESIDENT
    tiers.setflags(write=False)
    return Placement(policy, tiers)
