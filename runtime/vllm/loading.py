"""Experts, put together from the matrices that a checkpoint's loader brings one by one, in any order."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from fluxmoe.kernels.ops import ExpertDims
from torch import Tensor

from ..experts.disk import StoreError

# vLLM's names: gate, down, up.
MATRICES = ("w1", "w2", "w3")
_DTYPES = (torch.bfloat16, torch.float32)

Put = Callable[[int, Tensor, Tensor], None]


class _Parts(NamedTuple):
    gate_up: Tensor
    down: Tensor
    missing: set[str]


class Assembly:
    """One layer's experts on their way to `put(expert, gate_up, down)`, which gets each as soon as it is whole: at once
    where a checkpoint stores them one by one, after the last of its tensors where that holds a matrix of all.

    name: of the layer, for errors. rank, shares: which of how many equal shares of the intermediate size is ours
    (tensor parallelism); `dims` are those of a share.
    """

    def __init__(self, name: str, dims: ExpertDims, put: Put, rank: int = 0, shares: int = 1) -> None:
        self.name, self.dims, self.rank, self.shares, self._put = name, dims, rank, shares, put
        self._waiting: dict[int, _Parts] = {}

    def add(self, expert: int, matrix: str, weight: Tensor) -> None:
        """weight: a whole matrix in bf16 or fp32, w1 and w3 [n·I, H], w2 [H, n·I]; copied. StoreError for others."""
        size, dtype = self.dims.intermediate, self.dims.dtype
        if matrix not in MATRICES:
            raise StoreError(f"{self.name}: expert {expert} has a {matrix}; fluxmoe takes {', '.join(MATRICES)}")
        if weight.dtype not in _DTYPES:
            raise StoreError(
                f"{self.name}: {matrix} of expert {expert} is {weight.dtype}; fluxmoe takes bf16 or fp32 experts"
            )
        whole, hidden = self.shares * size, self.dims.hidden
        dim, shape = (1, [hidden, whole]) if matrix == "w2" else (0, [whole, hidden])
        if list(weight.shape) != shape:
            raise StoreError(f"{self.name}: {matrix} of expert {expert} has shape {list(weight.shape)}, not {shape}")
        parts = self._waiting.get(expert)
        if parts is None:
            gate_up, down = (torch.empty(shape, dtype=dtype, device="cpu") for shape in self.dims.shapes)
            parts = self._waiting[expert] = _Parts(gate_up, down, set(MATRICES))
        target = parts.down if matrix == "w2" else parts.gate_up[size * (matrix == "w3") :][:size]
        target.copy_(weight.narrow(dim, self.rank * size, size))
        parts.missing.discard(matrix)
        if not parts.missing:
            del self._waiting[expert]
            self._put(expert, parts.gate_up, parts.down)

    def finish(self) -> None:
        """The checkpoint has no more. StoreError if an expert is not whole."""
        if self._waiting:
            expert, parts = min(self._waiting.items())
            raise StoreError(f"{self.name}: the checkpoint lacks {', '.join(sorted(parts.missing))} of expert {expert}")
