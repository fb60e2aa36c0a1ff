"""Recurrent states of layers without a KV cache (Gated DeltaNet): one slot a running sequence, of a size that does not
depend on its length.

    conv       [layers, slots, taps - 1, channels]                  the activations' dtype
    recurrent  [layers, slots, value_heads, key_dim, value_dim]     fp32

The scheduler hands out slots 0 … max_batch - 1. Nothing is cleared: a sequence that begins reads no state. A sequence
that is swapped out leaves its state in host memory, under its order of arrival; one that is to be computed again has
none.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from fluxmoe.kernels.ops import DeltaNetDims
from torch import Tensor


class StateCache:
    """States of `layers` layers for `slots` sequences, and those of swapped sequences."""

    def __init__(self, dims: DeltaNetDims, layers: int, slots: int, dtype: torch.dtype, device: torch.device) -> None:
        self.conv = torch.zeros(layers, slots, dims.taps - 1, dims.channels, dtype=dtype, device=device)
        self.recurrent = torch.zeros(
            layers, slots, dims.value_heads, dims.key_dim, dims.value_dim, dtype=torch.float32, device=device
        )
        self._swapped: dict[int, tuple[Tensor, Tensor]] = {}

    @staticmethod
    def bytes_of(dims: DeltaNetDims, layers: int, slots: int, dtype: torch.dtype) -> int:
        """Device bytes, for the ledger."""
        matrices = dims.value_heads * dims.key_dim * dims.value_dim * 4
        return layers * slots * ((dims.taps - 1) * dims.channels * dtype.itemsize + matrices)

    @property
    def nbytes(self) -> int:
        return self.conv.nbytes + self.recurrent.nbytes

    @property
    def num_swapped(self) -> int:
        return len(self._swapped)

    def keep_swapped(self, orders: Collection[int]) -> None:
        """Drop the states in host memory of all sequences but these."""
        self._swapped = {order: state for order, state in self._swapped.items() if order in orders}

    def swap_out(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Keep the state of each (slot, order) in host memory."""
        for slot, order in pairs:
            self._swapped[order] = (
                self.conv[:, slot].to("cpu", copy=True),
                self.recurrent[:, slot].to("cpu", copy=True),
            )

    def swap_in(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Bring the state of each (order, slot) back."""
        for order, slot in pairs:
            conv, recurrent = self._swapped.pop(order)
            self.conv[:, slot].copy_(conv)
            self.recurrent[:, slot].copy_(recurrent)
