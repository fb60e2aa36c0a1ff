"""RMSNorm on the CPU."""

from __future__ import annotations

from numba import njit, prange, types
from torch import Tensor


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def rms_scale(row, eps):
    """1 / sqrt(mean(row²) + eps); the sum's order depends on the row's length alone."""
    total = types.float32(0.0)
    for i in range(row.shape[0]):
        total += row[i] * row[i]
    return types.float32(1.0) / types.float32((total / types.float32(row.shape[0]) + eps) ** 0.5)


@njit(parallel=True, nogil=True, cache=True)
def _rms_norm(x, weight, eps, out):
    for t in prange(x.shape[0]):
        scale = rms_scale(x[t], eps)
        for h in range(x.shape[1]):
            out[t, h] = x[t, h] * scale * weight[h]


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> Tensor:
    """out = x / rms(x) * weight; x, out fp32 [T, H], weight fp32 [H]."""
    _rms_norm(x.numpy(), weight.numpy(), eps, out.numpy())
    return out
