"""RMSNorm on the CPU."""

from __future__ import annotations

from numba import prange, types
from torch import Tensor

from ..numba_cache import cached_njit
from .simd import FEW, address_of, floats


@cached_njit(nogil=True, fastmath={"reassoc", "contract"})
def rms_scale(row, eps):
    """1 / sqrt(mean(row²) + eps); the sum's order depends on the row's length alone."""
    total = types.float32(0.0)
    for i in range(row.shape[0]):
        total += row[i] * row[i]
    return types.float32(1.0) / types.float32((total / types.float32(row.shape[0]) + eps) ** 0.5)


@cached_njit(nogil=True)
def _norm_row(x, weight, eps, out):
    scale = rms_scale(x, eps)
    for h in range(x.shape[0]):
        out[h] = x[h] * scale * weight[h]


@cached_njit(parallel=True, nogil=True)
def _rms_norm(x_address, weight_address, eps, out_address, tokens, hidden):
    x, out = floats(x_address, tokens, hidden), floats(out_address, tokens, hidden)
    weight = floats(weight_address, 1, hidden)[0]
    if x.size <= FEW:
        for t in range(tokens):
            _norm_row(x[t], weight, eps, out[t])
    else:
        for t in prange(tokens):
            _norm_row(x[t], weight, eps, out[t])


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> Tensor:
    """out = x / rms(x) * weight; x, out fp32 [T, H], weight fp32 [H]."""
    _rms_norm(address_of(x), address_of(weight), eps, address_of(out), *x.shape)
    return out
