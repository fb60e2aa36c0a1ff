"""Counters at vLLM's /metrics, where its processes share theirs.

The server answers in a process without experts. It adds up what all processes write into the directory that
PROMETHEUS_MULTIPROC_DIR names: vLLM does so with --api-server-count above 1, or where a user sets the variable.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any

from ..experts.streamer import Counters

# Name (of which prometheus makes …_total), what it says, and where it comes from.
_METRICS: tuple[tuple[str, str, Callable[[Counters], float]], ...] = (
    ("fluxmoe_host_bytes", "Bytes of experts loaded from host memory", lambda c: c.host_bytes),
    ("fluxmoe_disk_bytes", "Bytes of experts loaded from files", lambda c: c.disk_bytes),
    ("fluxmoe_in_place_bytes", "Bytes of experts that kernels read in host memory", lambda c: c.on_demand_bytes),
    ("fluxmoe_cache_hits", "Routed experts of files that were in the cache", lambda c: c.cache_hits),
    ("fluxmoe_cache_misses", "Routed experts of files that were read for a pass", lambda c: c.cache_misses),
    ("fluxmoe_load_seconds", "Time that loads took", lambda c: c.transfer_ns / 1e9),
    ("fluxmoe_stall_seconds", "Time that passes waited for loads", lambda c: c.stall_ns / 1e9),
)


@cache
def _counters() -> list[Any]:
    """Once a process: the registry refuses a name that it has."""
    from prometheus_client import Counter

    return [Counter(name, text) for name, text, _ in _METRICS]


class Metrics:
    """What one pager has added to the counters of its process, if these are shared."""

    def __init__(self) -> None:
        self._counters = _counters() if os.environ.get("PROMETHEUS_MULTIPROC_DIR") else []
        self._last = [0.0] * len(_METRICS)

    def update(self, totals: Callable[[], Counters]) -> None:
        """Add what has come since the last call; `totals` is asked only where somebody will see it."""
        if self._counters:
            counters = totals()
            now = [value(counters) for _, _, value in _METRICS]
            for counter, value, last in zip(self._counters, now, self._last, strict=True):
                counter.inc(value - last)
            self._last = now
