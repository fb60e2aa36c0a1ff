"""Paged KV cache: who owns which block (BlockAllocator), how blocks lie (KVLayout), their memory (PagedKVCache).

A block holds `block_size` tokens of one sequence in every layer, K and V (PagedAttention, arXiv 2309.06180 §4). Blocks
lie in the slabs of a pool. A slab is a row of units, a unit is one layer's K, or V, of one block; with n blocks a slab:

    slab    K of layer 0: n units | V of layer 0 | K of layer 1 | …         what is left over at its end is wasted

The id of a block, in block tables and slot mappings, is the number of its first unit in the whole arena. Seen from
2·layer·n units on, the arena is therefore a K cache [ids, *k_shape] to any kernel, from (2·layer + 1)·n on a V cache,
wherever slabs lie: attention multiplies ids by one stride, as ever. A cache that never grows is one slab: its ids are
0 … n - 1, and a layer's K is contiguous.

Example: 2 layers, 3 blocks a slab of 13 units: slab 1 has blocks 13, 14, 15; V of layer 1 of block 14 is unit 14 + 9.

What lies inside a unit belongs to the backend: `ops.kv_block_shape`.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass
from heapq import heappop, heappush
from math import prod
from operator import attrgetter
from typing import Protocol

import torch
from fluxmoe.kernels.ops import OpSizes
from torch import Tensor

from ..devices import device_of
from ..memory.host_memory import HostMemory
from ..memory.slabs import SlabPool

# The holder of slabs, and its line in the ledger.
KV_LINE = "kv_cache"
# Of units and slabs: what blocks of experts, which lie in slabs too, need.
_ALIGNMENT = 64

_start = attrgetter("start")


class Lender(Protocol):
    """Whoever has memory that KV takes as it needs it."""

    @property
    def most_blocks(self) -> int:
        """As many as the allocator can come to have: `lend` never fails below."""

    def lend(self, blocks: int) -> bool:
        """Have so many free; False, and nothing is changed, where these would be too many."""


class BlockAllocator:
    """Hands out numbers of blocks, which come and go in runs: ranges, the blocks of a slab.

    Runs with blocks in use are used up first, so that others stay whole and can be taken away; the lowest run, and in
    it the lowest block first, so that runs of a program repeat exactly. A run with one block in use stays.
    Handing out too many, freeing twice and freeing a foreign block are bugs of the caller: AssertionError.
    """

    def __init__(self, num_blocks: int = 0) -> None:
        if num_blocks < 0:
            raise ValueError(f"a pool cannot have {num_blocks} blocks; give 0 or more")
        self.lender: Lender | None = None
        self._run_of: dict[int, range] = {}
        self._owned: set[int] = set()
        # Free blocks by run, heaps; runs that are wholly free, and that are so in part, ascending.
        self._free: dict[range, list[int]] = {}
        self._whole: list[range] = []
        self._part: list[range] = []
        if num_blocks:
            self.add(range(num_blocks))

    @property
    def num_blocks(self) -> int:
        return len(self._run_of)

    @property
    def most_blocks(self) -> int:
        """Those that there are, or can come to be."""
        return self.num_blocks if self.lender is None else self.lender.most_blocks

    @property
    def num_used(self) -> int:
        return len(self._owned)

    @property
    def num_free(self) -> int:
        return len(self._run_of) - len(self._owned)

    @property
    def runs_used(self) -> int:
        """Runs of which a block is in use."""
        return len(self._free) - len(self._whole)

    def __contains__(self, block: int) -> bool:
        return block in self._run_of

    def add(self, run: range) -> None:
        """More free blocks; the memory behind them must exist by then."""
        assert not any(block in self._run_of for block in run), f"blocks of {run} are there already"
        self._free[run] = list(run)
        self._run_of |= dict.fromkeys(run, run)
        insort(self._whole, run, key=_start)

    def remove(self) -> range | None:
        """Drop the last of the runs that are wholly free; None if there is none."""
        if not self._whole:
            return None
        run = self._whole.pop()
        del self._free[run]
        for block in run:
            del self._run_of[block]
        return run

    def has(self, n: int) -> bool:
        """Whether so many are free, after a loan where it takes one."""
        return n <= self.num_free or (self.lender is not None and self.lender.lend(n))

    def allocate(self, n: int) -> list[int]:
        assert 0 <= n <= self.num_free, f"asked for {n} blocks, {self.num_free} are free"
        blocks: list[int] = []
        while len(blocks) < n:
            run = (self._part or self._whole)[0]
            before, free = self._shelf(run), self._free[run]
            blocks += [heappop(free) for _ in range(min(n - len(blocks), len(free)))]
            self._put_away(run, before)
        self._owned.update(blocks)
        return blocks

    def free(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            assert block in self._run_of, f"block {block} is none of the {self.num_blocks} of this pool"
            assert block in self._owned, f"block {block} is already free"
            run = self._run_of[block]
            before = self._shelf(run)
            self._owned.remove(block)
            heappush(self._free[run], block)
            self._put_away(run, before)

    def free_all(self) -> None:
        self.free(list(self._owned))

    def _shelf(self, run: range) -> list[range] | None:
        """The list that a run belongs to."""
        free = len(self._free[run])
        return self._whole if free == len(run) else self._part if free else None

    def _put_away(self, run: range, before: list[range] | None) -> None:
        after = self._shelf(run)
        if after is before:
            return
        if before is not None:
            del before[bisect_left(before, run.start, key=_start)]
        if after is not None:
            insort(after, run, key=_start)

    def check_integrity(self, owned: Iterable[int]) -> None:
        """AssertionError unless `owned` and the free blocks are exactly all blocks, each once."""
        owned = list(owned)
        free = [block for blocks in self._free.values() for block in blocks]
        assert sorted(owned + free) == sorted(self._run_of), (
            f"{len(owned)} owned and {len(free)} free blocks are not {self.num_blocks} distinct ones"
        )
        assert self._owned == set(owned), "a block in use is marked free, or a free one as owned"
        for shelf in (self._whole, self._part):
            assert shelf == sorted((run for run in self._free if self._shelf(run) is shelf), key=_start)


@dataclass(frozen=True)
class KVLayout:
    """How the blocks of a cache lie in slabs. k_shape, v_shape: one layer's K and V of a block."""

    num_layers: int
    k_shape: tuple[int, ...]
    v_shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(
        cls, ops: OpSizes, num_layers: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> KVLayout:
        if num_layers < 1:
            raise ValueError(f"a KV cache needs num_layers of at least 1, got {num_layers}")
        return cls(num_layers, *ops.kv_block_shape(block_size, kv_heads, head_dim), dtype)

    @property
    def unit_bytes(self) -> int:
        """Of the larger of K and V, aligned."""
        largest = max(prod(self.k_shape), prod(self.v_shape)) * self.dtype.itemsize
        return -(-largest // _ALIGNMENT) * _ALIGNMENT

    @property
    def block_bytes(self) -> int:
        """Of one block, K and V of all layers, padding included."""
        return 2 * self.num_layers * self.unit_bytes

    def slab_bytes(self, at_least: int, whole: bool = False) -> int:
        """Of slabs that hold `at_least` bytes, an expert, and a block; with `whole` blocks up to their end.

        An odd number of units: an even one, most of all a power of two, would put the blocks of many slabs into the
        same sets of a cache.
        """
        each = 2 * self.num_layers
        units = max(-(-at_least // self.unit_bytes), each)
        return ((-(-units // each) * each if whole else units) | 1) * self.unit_bytes

    def run(self, slab: int, slab_bytes: int) -> range:
        """The ids of a slab's blocks."""
        first = slab * (slab_bytes // self.unit_bytes)
        return range(first, first + slab_bytes // self.block_bytes)


class PagedKVCache:
    """KV blocks on the device, in slabs that are taken from a pool one by one, and a swap pool on the host.

    All start as zeros: a kernel may read positions of a block that were never written, at weight 0, and 0 · NaN
    would be NaN. `pin` page-locks the swap pool (needs CUDA), without which its copies block the host.
    blocks: the allocator of what is there. Raises ValueError on sizes that make no cache.

    A slab is given back once none of its blocks is in use; one block in use keeps its whole slab.
    """

    def __init__(self, layout: KVLayout, pool: SlabPool, host_blocks: int = 0, pin: bool = False) -> None:
        if host_blocks < 0:
            raise ValueError(f"a KV cache needs host_blocks of at least 0, got {host_blocks}")
        device = pool.memory.device
        if pin and not device_of(device).asynchronous:
            raise ValueError(f"a pinned swap pool needs a CUDA device, got {device}; leave pin off")
        assert not pool.slab_bytes % layout.unit_bytes, f"slabs of {pool.slab_bytes} bytes are no whole units"
        self.layout, self.pool, self.host_blocks, self._pin = layout, pool, host_blocks, pin
        self.blocks = BlockAllocator()
        self.blocks_per_slab = pool.slab_bytes // layout.block_bytes
        self._layers = [(self._view(2 * i, layout.k_shape), self._view(2 * i + 1, layout.v_shape))
                        for i in range(layout.num_layers)]  # fmt: skip
        self._memory = HostMemory(pin)
        shape = (host_blocks, 2 * layout.num_layers, layout.unit_bytes)
        try:
            self.host = self._memory.empty(prod(shape)).zero_().view(shape)
        except BaseException:
            self.close()
            raise

    def _view(self, part: int, shape: tuple[int, ...]) -> Tensor:
        """[ids, *shape]: the arena from the units of a layer's K or V on."""
        flat = self.pool.memory.view(-1).view(self.layout.dtype)
        stride = self.layout.unit_bytes // self.layout.dtype.itemsize
        # Beyond these there is no room for the last part of a block.
        ids = len(flat) // stride - (2 * self.layout.num_layers - 1) * self.blocks_per_slab
        inner = torch.empty(shape, device="meta").stride()
        return flat[part * self.blocks_per_slab * stride :].as_strided((ids, *shape), (stride, *inner))

    @property
    def num_blocks(self) -> int:
        return self.blocks.num_blocks

    @property
    def num_slabs(self) -> int:
        return self.num_blocks // self.blocks_per_slab

    @property
    def nbytes(self) -> int:
        """Of the slabs that the cache holds."""
        return self.pool.bytes_of(KV_LINE)

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """(k [ids, *k_shape], v [ids, *v_shape]) of one layer, as views of the arena, to be read at ids of blocks."""
        return self._layers[layer]

    def grow(self) -> None:
        """Take a slab. SlabError, and nothing is changed, if none is free."""
        self.blocks.add(self.layout.run(self.pool.take(KV_LINE, zeroed=True), self.pool.slab_bytes))

    def shrink(self) -> bool:
        """Give a slab back; False if each has a block in use."""
        run = self.blocks.remove()
        if run is None:
            return False
        self.pool.give(run.start * self.layout.unit_bytes // self.pool.slab_bytes)
        return True

    def swap_out(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Copy device block → host block for every (device, host) pair.

        On CUDA the copies are queued on the current stream (with a device temporary of one block): run it on the
        stream that computes, and what reuses the device block afterwards is ordered behind them.
        """
        for device_block, host_block in pairs:
            block, host = self._pair(device_block, host_block)
            host.copy_(block, non_blocking=self._pin)

    def swap_in(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Copy host block → device block for every (host, device) pair; ordering as in `swap_out`."""
        for host_block, device_block in pairs:
            block, host = self._pair(device_block, host_block)
            block.copy_(host, non_blocking=self._pin)

    def _pair(self, device_block: int, host_block: int) -> tuple[Tensor, Tensor]:
        """uint8 [2 · layers, unit_bytes] each: the units of a block, n apart in its slab, and its place in the host."""
        # A negative number would silently count from the end.
        assert device_block in self.blocks, f"no device block {device_block}"
        assert 0 <= host_block < self.host_blocks, f"no host block {host_block} of {self.host_blocks}"
        units = self.pool.memory.view(-1, self.layout.unit_bytes)
        last = device_block + 2 * self.layout.num_layers * self.blocks_per_slab
        return units[device_block : last : self.blocks_per_slab], self.host[host_block]

    def close(self) -> None:
        """Give a page-locked swap pool back; the cache cannot be used any more. Idempotent."""
        self._memory.close()
