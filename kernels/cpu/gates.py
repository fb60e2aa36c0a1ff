"""Gates of activations on the CPU, each element by itself.

torch's own compute the ends of each thread's share with another exp than its middle, so that a row's bits would depend
on its batch and on the number of threads.
"""

from __future__ import annotations

from numba import prange, types
from torch import Tensor

from ..numba_cache import cached_njit
from .simd import exp_f32

# error_model numpy: numba's check for a division by zero, which cannot be, would keep the loops from being vectorised.


@cached_njit(nogil=True, error_model="numpy")
def sigmoid(x):
    """1 / (1 + e^-x) in fp32, of any x."""
    return types.float32(1.0) / (types.float32(1.0) + exp_f32(-x))


@cached_njit(parallel=True, nogil=True, error_model="numpy")
def _swiglu(gate_up, intermediate):
    for t in prange(gate_up.shape[0]):
        for i in range(intermediate):
            gate_up[t, i] = gate_up[t, i] * sigmoid(gate_up[t, i]) * gate_up[t, intermediate + i]


@cached_njit(parallel=True, nogil=True, error_model="numpy")
def _scale(x, gate):
    for t in prange(x.shape[0]):
        for i in range(x.shape[1]):
            x[t, i] *= sigmoid(gate[t, i])


@cached_njit(parallel=True, nogil=True, error_model="numpy")
def _add_scaled(residual, x, score):
    for t in prange(x.shape[0]):
        scale = sigmoid(score[t, 0])
        for i in range(x.shape[1]):
            residual[t, i] += scale * x[t, i]


def swiglu(gate_up: Tensor, intermediate: int) -> Tensor:
    """silu(gate) · up, [T, I], written over gate; gate_up: gate | up in the first 2I columns of fp32 [T, ≥ 2I]."""
    _swiglu(gate_up.numpy(), intermediate)
    return gate_up[:, :intermediate]


def scale(x: Tensor, gate: Tensor) -> Tensor:
    """x *= sigmoid(gate), both fp32 [T, N]; returns x."""
    _scale(x.numpy(), gate.numpy())
    return x


def add_scaled(residual: Tensor, x: Tensor, score: Tensor) -> Tensor:
    """residual += sigmoid(score) · x, fp32 [T, H], score [T, 1]; returns residual."""
    _add_scaled(residual.numpy(), x.numpy(), score.numpy())
    return residual
