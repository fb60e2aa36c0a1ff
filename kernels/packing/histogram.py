"""How often each exponent occurs: what every encoder starts with."""

from __future__ import annotations

import numpy as np
from numba import prange, types

from ..numba_cache import cached_njit

# Weights a task: some tens of µs of work, and enough tasks that two uneven cores share one large weight.
_PART = 1 << 18


@cached_njit(parallel=True, nogil=True)
def _count(bits, part, counts):
    experts, size = bits.shape
    parts = counts.shape[0] // experts
    for task in prange(experts * parts):
        weights = bits[task // parts]
        first = task % parts * part
        # Four tables: neighbours that share an exponent would wait for each other's store.
        local = np.zeros((4, 256), dtype=np.uint32)
        last = min(size, first + part)
        whole = first + (last - first) // 4 * 4
        for i in range(first, whole, 4):
            local[0, (weights[i] >> 7) & 255] += types.uint32(1)
            local[1, (weights[i + 1] >> 7) & 255] += types.uint32(1)
            local[2, (weights[i + 2] >> 7) & 255] += types.uint32(1)
            local[3, (weights[i + 3] >> 7) & 255] += types.uint32(1)
        for i in range(whole, last):
            local[0, (weights[i] >> 7) & 255] += types.uint32(1)
        for e in range(256):
            counts[task, e] = np.int64(local[0, e]) + local[1, e] + local[2, e] + local[3, e]


def exponent_histogram(bits: np.ndarray) -> np.ndarray:
    """bits uint16 [E, n], n > 0 → int64 [E, 256], how often each biased exponent occurs in each expert."""
    experts, size = bits.shape
    parts = -(-size // _PART)
    counts = np.empty((experts * parts, 256), dtype=np.int64)
    _count(bits, _PART, counts)
    return counts.reshape(experts, parts, 256).sum(axis=1)
