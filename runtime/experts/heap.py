"""ExpertHeap: experts of one format on the device, in units of equal size without gaps.

Its region grows and shrinks. When an expert leaves, the last takes its unit and the heap's end is unmapped, so that
another region of the pool can have the memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..memory.region import BlockPool, GrowableRegion
from .store import Where


class ExpertHeap:
    """At most `most` experts of one format, in units of equal size without gaps, in a region that grows and shrinks.

    sizes, strides: bytes of the (GATE_UP, DOWN) blocks, and what they are rounded up to.
    """

    def __init__(self, pool: BlockPool, sizes: tuple[int, int], strides: tuple[int, int], most: int) -> None:
        self._sizes, self._down_at, self.unit_bytes = sizes, strides[0], sum(strides)
        self._region = GrowableRegion(pool.reserve(most * self.unit_bytes))
        self._units = self._region.region.tensor(0, (most, self.unit_bytes), torch.uint8)
        # None: reserved for an expert that is on its way.
        self._owners: list[Where | None] = []
        self._unit_of: dict[Where, int] = {}

    @property
    def nbytes(self) -> int:
        return self._region.nbytes

    def __contains__(self, where: Where) -> bool:
        return where in self._unit_of

    def __len__(self) -> int:
        return len(self._owners)

    def pair(self, unit: int) -> tuple[Tensor, Tensor]:
        """The (gate/up, down) blocks of a unit."""
        (gate_up, down), at = self._sizes, self._down_at
        return self._units[unit][:gate_up], self._units[unit][at : at + down]

    def pair_of(self, where: Where) -> tuple[Tensor, Tensor]:
        return self.pair(self._unit_of[where])

    def reserve(self) -> int:
        """A unit at the end. RegionError when there is no memory."""
        self._region.resize((len(self._owners) + 1) * self.unit_bytes)
        self._owners.append(None)
        return len(self._owners) - 1

    def settle(self, unit: int, where: Where) -> None:
        """A reserved unit holds the expert now."""
        assert self._owners[unit] is None
        self._owners[unit], self._unit_of[where] = where, unit

    def cancel(self, unit: int) -> Where | None:
        """Give up a reserved unit; returns the expert that moved into it."""
        assert self._owners[unit] is None
        return self._remove(unit)

    def remove(self, where: Where) -> Where | None:
        """Drop an expert; returns the one that moved into its unit."""
        return self._remove(self._unit_of.pop(where))

    def _remove(self, unit: int) -> Where | None:
        last, moved = len(self._owners) - 1, None
        if unit != last:
            # On CUDA in the order of the compute stream: behind the kernels that read both units.
            self._units[unit].copy_(self._units[last])
            moved = self._owners[unit] = self._owners[last]
            if moved is not None:
                self._unit_of[moved] = unit
        self._owners.pop()
        self._region.resize(len(self._owners) * self.unit_bytes)
        return moved

    def check_integrity(self, expected: set[Where]) -> None:
        """AssertionError unless exactly the experts `expected` are here, and the heap holds no page in vain."""
        assert self._unit_of == {owner: unit for unit, owner in enumerate(self._owners) if owner is not None}
        assert self._unit_of.keys() == expected, "the heap and the placement differ"
        pool = self._region.region.pool
        assert self.nbytes == pool.pages(len(self._owners) * self.unit_bytes) * pool.block_bytes

    def close(self) -> None:
        self._region.region.close()
