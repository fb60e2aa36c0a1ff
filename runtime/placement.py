"""Placement: which tier holds each expert of each layer. Pure functions; experiments differ in one argument.

    resident   every expert on the device                                   vLLM
    offload    the last layers wholly in host memory                        vLLM-O (arXiv 2604.02715 §6.1)
    balanced   the same share of every layer in host memory                 FluxMoE (§4.2)
    host       every expert in host memory, all streamed                    α = 0
    disk       every expert in a file, all streamed

α is the share of experts that stay on the device. Inside a layer the experts with the highest ids stream: a
router has no order of preference among ids, so any fixed choice is as good until routing statistics say more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum

import numpy as np


class PlacementError(ValueError):
    """A policy or share that cannot be."""


class Tier(IntEnum):
    """Where an expert's bytes lie. Packed tiers join here; everything that branches on a tier is in store.py."""

    RESIDENT = 0
    HOST = 1
    DISK = 2


@dataclass(frozen=True, eq=False)
class Placement:
    """tiers int8 [L, E]: the Tier of every (layer, expert)."""

    name: str
    tiers: np.ndarray

    @property
    def alpha(self) -> float:
        """Share of experts on the device."""
        return float((self.tiers == Tier.RESIDENT).mean())

    def counts(self) -> dict[str, int]:
        """Experts by tier name."""
        return {tier.name.lower(): int((self.tiers == tier).sum()) for tier in Tier}

    def resident(self, layer: int) -> list[int]:
        return np.flatnonzero(self.tiers[layer] == Tier.RESIDENT).tolist()

    def streamed(self, layer: int) -> list[int]:
        """Experts of a layer that must cross a link before the layer runs, ascending."""
        return np.flatnonzero(self.tiers[layer] != Tier.RESIDENT).tolist()

    @property
    def streamed_layers(self) -> list[int]:
        return [layer for layer in range(len(self.tiers)) if self.streamed(layer)]

    @property
    def max_streamed(self) -> int:
        """Experts that stream in the layer where most do: the size of a slot."""
        return int((self.tiers != Tier.RESIDENT).sum(axis=1).max(initial=0))


def _spread(layers: int, experts: int, alpha: float, tier: Tier) -> np.ndarray:
    """round(α·L·E) residents; layers differ by at most one expert, the odd ones spread over the depth.

    Nested: what a share keeps, every greater share keeps too, so that a step of α moves no expert back and forth.
    """
    each, odd = divmod(round(alpha * layers * experts), layers)
    tiers = np.full((layers, experts), tier, dtype=np.int8)
    tiers[:, :each] = Tier.RESIDENT
    if odd:
        tiers[_scattered(layers)[:odd], each] = Tier.RESIDENT
    return tiers


def _scattered(layers: int) -> list[int]:
    """All layers, in an order of which every beginning lies spread over the depth (bits of the index reversed)."""
    bits = (layers - 1).bit_length()
    mirrored = (int(f"{i:0{bits}b}"[::-1], 2) for i in range(1 << bits))
    return [layer for layer in mirrored if layer < layers]


def _resident(layers: int, experts: int, alpha: float | None, bandwidths: Mapping[Tier, float] | None) -> np.ndarray:
    if alpha not in (None, 1.0):
        raise PlacementError(f"placement resident keeps every expert (alpha 1), got alpha {alpha}")
    return np.full((layers, experts), Tier.RESIDENT, dtype=np.int8)


def _offload(layers: int, experts: int, alpha: float | None, bandwidths: Mapping[Tier, float] | None) -> np.ndarray:
    # The paper's vLLM-O offloads the last 12.5 % of layers.
    alpha = 0.875 if alpha is None else alpha
    keep = min(round(alpha * layers), layers - 1) if alpha < 1 else layers
    tiers = np.full((layers, experts), Tier.RESIDENT, dtype=np.int8)
    tiers[keep:] = Tier.HOST
    return tiers


def _balanced(layers: int, experts: int, alpha: float | None, bandwidths: Mapping[Tier, float] | None) -> np.ndarray:
    if alpha is None:
        if not bandwidths:
            raise PlacementError("placement balanced needs alpha, or bandwidths to derive it from")
        if lacking := {Tier.RESIDENT, Tier.HOST} - bandwidths.keys():
            raise PlacementError(f"placement balanced needs a bandwidth of tier {min(lacking).name}, or alpha")
        # x_k = B_k / ΣB: all tiers are done with a layer at the same time (§4.2).
        alpha = bandwidths[Tier.RESIDENT] / (bandwidths[Tier.RESIDENT] + bandwidths[Tier.HOST])
    return _spread(layers, experts, alpha, Tier.HOST)


def _host(layers: int, experts: int, alpha: float | None, bandwidths: Mapping[Tier, float] | None) -> np.ndarray:
    return _spread(layers, experts, alpha or 0.0, Tier.HOST)


def _disk(layers: int, experts: int, alpha: float | None, bandwidths: Mapping[Tier, float] | None) -> np.ndarray:
    return _spread(layers, experts, alpha or 0.0, Tier.DISK)


Policy = Callable[[int, int, float | None, Mapping[Tier, float] | None], np.ndarray]
POLICIES: dict[str, Policy] = {
    "resident": _resident,
    "offload": _offload,
    "balanced": _balanced,
    "host": _host,
    "disk": _disk,
}


def place(
    policy: str,
    num_layers: int,
    num_experts: int,
    *,
    alpha: float | None = None,
    bandwidths: Mapping[Tier, float] | None = None,
) -> Placement:
    """Tier of every expert under `policy`.

    alpha: share of experts on the device, 0 to 1; None is the policy's own default. bandwidths: bytes/s at which
    RESIDENT and HOST deliver a layer (for `balanced` without alpha). Raises PlacementError.
    """
    if policy not in POLICIES:
        raise PlacementError(f"unknown placement {policy!r}; choose one of {', '.join(POLICIES)}")
    if num_layers < 1 or num_experts < 1:
        raise PlacementError(f"nothing to place: {num_layers} layers of {num_experts} experts")
    if alpha is not None and not 0 <= alpha <= 1:
        raise PlacementError(f"alpha is the share of experts on the device, from 0 to 1; got {alpha}")
    if bandwidths is not None and any(not (b > 0 and math.isfinite(b)) for b in bandwidths.values()):
        raise PlacementError(f"bandwidths must be positive, finite bytes per second, got {dict(bandwidths)}")
    tiers = POLICIES[policy](num_layers, num_experts, alpha, bandwidths)
    tiers.setflags(write=False)
    return Placement(policy, tiers)
