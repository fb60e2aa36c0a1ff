"""Bandwidths that placement needs, measured on this machine in a fraction of a second."""

from __future__ import annotations

import time

import torch

from .placement import Tier

_PROBE_BYTES = 128 << 20
_REPEATS = 3


def measure_bandwidths(device: torch.device) -> dict[Tier, float]:
    """Bytes per second at which a layer's experts reach the compute units from each tier (best of 3).

    RESIDENT: reads of device memory. HOST: copies from host memory to the device (pinned on CUDA). The balanced
    placement gives each tier a share proportional to its bandwidth (arXiv 2604.02715 §4.2).
    """
    source = torch.ones(_PROBE_BYTES // 8, dtype=torch.int64, device=device)
    host = torch.ones(_PROBE_BYTES // 8, dtype=torch.int64, pin_memory=device.type == "cuda")
    target = torch.empty_like(source)
    return {
        Tier.RESIDENT: _PROBE_BYTES / _best_seconds(lambda: source.sum(), device),
        Tier.HOST: _PROBE_BYTES / _best_seconds(lambda: target.copy_(host, non_blocking=True), device),
    }


def _best_seconds(work, device: torch.device) -> float:
    best = float("inf")
    for _ in range(_REPEATS + 1):
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return best
