"""PagedTensor: expert tensors at addresses that never change, over a pool that holds a few layers (the paper's §4.1).

A tensor type of all experts, [L, E, n, k], is one region. Page (layer, expert) lies at

    address = base + (layer · E + expert) · σ        σ: an expert's bytes, rounded up to whole blocks

for ever; a fixed pool of S·E experts' blocks, S = 2 by default, goes round under it. So kernels that know of no table
run unchanged on `view(layer)`, an ordinary strided tensor [E, n, k] — torch's grouped_mm, say. What rounding wastes is
`padding_bytes`. Where kernels are ours, a table of addresses (ExpertTable) does the same without any mapping.

    Unmapped ─► Loading ─► Resident ─► Evicting ─► Unmapped
             map      loaded      computed      unmap

Who loads what, and when, is the affair of `experts.tensor_pager`.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from ..devices import device_of
from .region import BlockPool, RegionError


class PageState(IntEnum):
    """Of one (layer, expert)."""

    UNMAPPED = 0
    LOADING = 1
    RESIDENT = 2
    EVICTING = 3


_ALLOWED = {
    PageState.UNMAPPED: PageState.LOADING,
    PageState.LOADING: PageState.RESIDENT,
    PageState.RESIDENT: PageState.EVICTING,
    PageState.EVICTING: PageState.UNMAPPED,
}


class PagedTensor:
    """One tensor type [L, E, *shape] of `dtype`; blocks for `slots` layers. Not thread-safe: its loader moves pages."""

    def __init__(
        self, num_layers: int, num_experts: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device,
        slots: int = 2, pool: BlockPool | None = None,
    ) -> None:  # fmt: skip
        if slots < 2:
            raise RegionError(f"paging needs blocks for at least 2 layers (one loads while one is read), got {slots}")
        self.num_layers, self.num_experts, self.shape, self.dtype = num_layers, num_experts, tuple(shape), dtype
        self.device, self.slots = device, min(slots, num_layers)
        self.expert_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        # 64 KiB are the least block of any kind: a pool of one expert's bytes rounded to that holds it on a CPU.
        self.pool = pool or device_of(device).make_pool(self._pool_bytes(num_experts))
        self.pages_each = self.pool.pages(self.expert_bytes)
        self.stride = self.pages_each * self.pool.block_bytes
        self.region = self.pool.reserve(num_layers * num_experts * self.stride)
        self.states = np.zeros((num_layers, num_experts), dtype=np.int8)

    def _pool_bytes(self, experts: int) -> int:
        # Granularity is the pool's own affair; 2 MiB is the largest of any.
        rounding = 2 << 20
        return self.slots * experts * -(-self.expert_bytes // rounding) * rounding

    @property
    def padding_bytes(self) -> int:
        """Bytes that rounding an expert up to whole blocks wastes, of each expert."""
        return self.stride - self.expert_bytes

    def address(self, layer: int, expert: int) -> int:
        return self.region.address + (layer * self.num_experts + expert) * self.stride

    def view(self, layer: int) -> Tensor:
        """[E, *shape]: the layer's experts, to be read while all of them are resident."""
        begin = layer * self.num_experts * self.stride
        inner = torch.empty(self.shape, device="meta").stride()
        stride = (self.stride // self.dtype.itemsize, *inner)
        return self.region.tensor(begin, (self.num_experts, *self.shape), self.dtype, stride)

    def _turn(self, layer: int, expert: int, to: PageState) -> None:
        state = PageState(self.states[layer, expert])
        if _ALLOWED[state] != to:
            raise RegionError(f"expert {expert} of layer {layer} is {state.name}, and cannot become {to.name}")
        self.states[layer, expert] = to

    def _pages(self, layer: int, expert: int) -> range:
        first = (layer * self.num_experts + expert) * self.pages_each
        return range(first, first + self.pages_each)

    def begin_load(self, layer: int, instead_of: int | None = None) -> None:
        """Map the layer: with the blocks of layer `instead_of`, whose kernels are done, or with new ones."""
        for expert in range(self.num_experts):
            blocks: list[int | None] = [None] * self.pages_each
            if instead_of is not None:
                self._turn(instead_of, expert, PageState.EVICTING)
                blocks = [self.region.unmap(page, keep=True, idle=True) for page in self._pages(instead_of, expert)]
                self._turn(instead_of, expert, PageState.UNMAPPED)
            for page, block in zip(self._pages(layer, expert), blocks, strict=True):
                self.region.map(page, block)
            self._turn(layer, expert, PageState.LOADING)

    def end_load(self, layer: int) -> None:
        for expert in range(self.num_experts):
            self._turn(layer, expert, PageState.RESIDENT)

    def check(self, layer: int) -> None:
        """RegionError unless the layer may be read now."""
        if (self.states[layer] != PageState.RESIDENT).any():
            expert = int(np.flatnonzero(self.states[layer] != PageState.RESIDENT)[0])
            raise RegionError(
                f"expert {expert} of layer {layer} is read while {PageState(self.states[layer, expert]).name}"
            )
        self.region.check(layer * self.num_experts * self.stride, self.num_experts * self.stride)

    def close(self) -> None:
        self.region.close()
        self.pool.close()
