"""SlabPool: one arena of equal slabs that experts and KV take and give back; nothing is mapped, unmapped or moved.

Each slab is free or has one holder, who is a line of the ledger. What an expert leaves is a free slab, KV grows by
taking it, and the other way round; addresses never change, so a captured CUDA graph stays right.
"""

from __future__ import annotations

from collections import Counter
from heapq import heappop, heappush

from torch import Tensor

# The line of what nobody holds: on a GPU the arena takes its memory all the same.
FREE = "free_slabs"
# NaN in all floating-point dtypes.
_POISON = 0xFF


class SlabError(ValueError):
    """No slab is free, or there is no memory for them."""


class SlabPool:
    """Slabs of `memory`, uint8 [num_slabs, slab_bytes] of zeros, handed out by number, lowest first.

    poison: debug: slabs that are given back are filled with NaN. Host bookkeeping but for zeros and poison, which are
    queued on the current stream. Not thread-safe.
    """

    def __init__(self, memory: Tensor, poison: bool = False) -> None:
        self.memory, self._poison = memory, poison
        self.num_slabs, self.slab_bytes = memory.shape
        self._free = list(range(self.num_slabs))
        self._holders: dict[int, str] = {}
        self._counts: Counter[str] = Counter()
        self._dirty: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, holder: str, zeroed: bool = False) -> int:
        """The lowest free slab, of anything or of zeros. SlabError if there is none."""
        if not self._free:
            raise SlabError(f"none of the {self.num_slabs} slabs of {self.slab_bytes} bytes is free")
        slab = heappop(self._free)
        if zeroed and slab in self._dirty:
            self.memory[slab].zero_()
        self._dirty.add(slab)
        self._holders[slab] = holder
        self._counts[holder] += 1
        return slab

    def give(self, slab: int) -> None:
        """Free a slab, which nothing may read or write any more but what was queued before."""
        assert slab in self._holders, f"slab {slab} is given back, and nobody holds it"
        self._counts[self._holders.pop(slab)] -= 1
        if self._poison:
            self.memory[slab].fill_(_POISON)
        heappush(self._free, slab)

    def held(self, holder: str) -> list[int]:
        """The slabs of a holder."""
        return [slab for slab, name in self._holders.items() if name == holder]

    def bytes_of(self, holder: str) -> int:
        """Bytes that a holder has, or that are FREE: a line of the ledger."""
        return (self.num_free if holder == FREE else self._counts[holder]) * self.slab_bytes

    def check_integrity(self) -> None:
        """AssertionError unless every slab is free or held, once."""
        assert sorted([*self._free, *self._holders]) == list(range(self.num_slabs)), "slabs are lost or held twice"
        assert +self._counts == Counter(self._holders.values()), "slabs are miscounted"
