"""Paged KV cache: who owns which block (BlockAllocator), and the memory of the blocks (PagedKVCache).

A block holds `block_size` tokens of one sequence in every layer, K and V (PagedAttention, arXiv 2309.06180 §4).
The layout inside one layer's share of a block belongs to the backend: `ops.kv_block_shape`.

    k       [L, num_blocks, *k_shape]    device; k[layer] is what an attention kernel reads
    v       [L, num_blocks, *v_shape]    device
    host_k  [host_blocks, L, *k_shape]   swap pool; block-major, so that a block crosses the link as one copy
    host_v  [host_blocks, L, *v_shape]
"""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heapify, heappop, heappush
from math import gcd, lcm, prod

import torch
from fluxmoe.kernels.ops import OpSizes
from torch import Tensor

from ..devices import device_of
from ..memory.host_memory import HostMemory
from ..memory.region import BlockPool, GrowableRegion, RegionError


class BlockAllocator:
    """Hands out block numbers 0 … num_blocks - 1, lowest first.

    Lowest first keeps a lightly used cache at the start of its range, and makes runs repeat exactly.
    Handing out too many, freeing twice and freeing a foreign block are bugs of the caller: AssertionError.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 0:
            raise ValueError(f"a pool cannot have {num_blocks} blocks; give 0 or more")
        self._free = list(range(num_blocks))
        self._owned = bytearray(num_blocks)

    @property
    def num_blocks(self) -> int:
        return len(self._owned)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return len(self._owned) - len(self._free)

    def allocate(self, n: int) -> list[int]:
        """The `n` lowest free blocks, ascending."""
        assert 0 <= n <= len(self._free), f"asked for {n} blocks, {len(self._free)} are free"
        blocks = [heappop(self._free) for _ in range(n)]
        for block in blocks:
            self._owned[block] = 1
        return blocks

    def free(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            assert 0 <= block < len(self._owned), f"block {block} is none of the {len(self._owned)} of this pool"
            assert self._owned[block], f"block {block} is already free"
            self._owned[block] = 0
            heappush(self._free, block)

    def grow(self, n: int) -> None:
        """Add `n` free blocks at the end of the range; the memory behind them must exist by then."""
        assert n >= 0, f"cannot grow by {n} blocks"
        # Larger than every number in the heap, hence still a heap when appended in order.
        self._free.extend(range(len(self._owned), len(self._owned) + n))
        self._owned.extend(bytes(n))

    def shrink(self, n: int) -> bool:
        """Drop the `n` last blocks, if all of them are free; whether it did."""
        assert 0 <= n <= len(self._owned), f"cannot shrink {len(self._owned)} blocks by {n}"
        left = len(self._owned) - n
        if any(self._owned[left:]):
            return False
        self._free = [block for block in self._free if block < left]
        heapify(self._free)
        del self._owned[left:]
        return True

    def check_integrity(self, owned: Iterable[int]) -> None:
        """AssertionError unless `owned` and the free blocks are exactly all blocks, each once."""
        owned = list(owned)
        seen = sorted(owned + self._free)
        assert seen == list(range(len(self._owned))), (
            f"{len(owned)} owned and {len(self._free)} free blocks are not {len(self._owned)} distinct ones"
        )
        assert all(self._owned[block] for block in owned), "a block in use is marked free"
        assert sum(self._owned) == len(owned), "a free block is marked as owned"


class PagedKVCache:
    """Memory of the KV blocks on the device, and of the swap pool on the host.

    Both start as zeros: a kernel may read positions of a block that were never written, at weight 0, and 0 · NaN
    would be NaN. `pin` page-locks the swap pool (needs CUDA), without which its copies block the host.
    Raises ValueError on sizes that make no cache.
    """

    def __init__(
        self,
        ops: OpSizes,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        host_blocks: int = 0,
        pin: bool = False,
    ) -> None:
        for name, value, least in (
            ("num_layers", num_layers, 1),
            ("num_blocks", num_blocks, 1),
            ("host_blocks", host_blocks, 0),
        ):
            if value < least:
                raise ValueError(f"a KV cache needs {name} of at least {least}, got {value}")
        self.device = torch.device(device)
        if pin and not device_of(self.device).asynchronous:
            raise ValueError(f"a pinned swap pool needs a CUDA device, got {self.device}; leave pin off")
        self.num_layers, self.num_blocks, self.host_blocks = num_layers, num_blocks, host_blocks
        self.block_size = block_size
        self._non_blocking = pin
        k_shape, v_shape = ops.kv_block_shape(block_size, kv_heads, head_dim)
        self.k = torch.zeros((num_layers, num_blocks, *k_shape), dtype=dtype, device=self.device)
        self.v = torch.zeros((num_layers, num_blocks, *v_shape), dtype=dtype, device=self.device)
        self._memory = HostMemory(pin)
        try:
            self.host_k, self.host_v = (
                self._memory.empty(prod(shape) * dtype.itemsize).zero_().view(dtype).view(shape)
                for shape in ((host_blocks, num_layers, *k_shape), (host_blocks, num_layers, *v_shape))
            )
        except BaseException:
            self.close()
            raise

    @staticmethod
    def bytes_per_block(
        ops: OpSizes, num_layers: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> int:
        """Bytes of one block, K and V of all layers, padding of the backend's layout included."""
        k_shape, v_shape = ops.kv_block_shape(block_size, kv_heads, head_dim)
        return num_layers * (prod(k_shape) + prod(v_shape)) * dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes

    @property
    def host_nbytes(self) -> int:
        return self.host_k.nbytes + self.host_v.nbytes

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """(k [num_blocks, *k_shape], v [num_blocks, *v_shape]) of one layer, as views."""
        return self.k[layer], self.v[layer]

    def swap_out(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Copy device block → host block for every (device, host) pair.

        On CUDA the copies are queued on the current stream (with a device temporary of one block): run it on the
        stream that computes, and what reuses the device block afterwards is ordered behind them.
        """
        for device_block, host_block in pairs:
            self._check(device_block, host_block)
            self.host_k[host_block].copy_(self.k[:, device_block], non_blocking=self._non_blocking)
            self.host_v[host_block].copy_(self.v[:, device_block], non_blocking=self._non_blocking)

    def swap_in(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Copy host block → device block for every (host, device) pair; ordering as in `swap_out`."""
        for host_block, device_block in pairs:
            self._check(device_block, host_block)
            self.k[:, device_block].copy_(self.host_k[host_block], non_blocking=self._non_blocking)
            self.v[:, device_block].copy_(self.host_v[host_block], non_blocking=self._non_blocking)

    def close(self) -> None:
        """Give a page-locked swap pool back; the cache cannot be used any more. Idempotent."""
        self._memory.close()

    def _check(self, device_block: int, host_block: int) -> None:
        # A negative number would silently count from the end.
        assert 0 <= device_block < self.num_blocks, f"no device block {device_block} of {self.num_blocks}"
        assert 0 <= host_block < self.host_blocks, f"no host block {host_block} of {self.host_blocks}"


class GrowableKVCache(PagedKVCache):
    """A PagedKVCache of at most `most_blocks`, whose memory is mapped from a pool, `quantum` blocks at a time."""

    def __init__(
        self, ops: OpSizes, num_layers: int, most_blocks: int, block_size: int, kv_heads: int, head_dim: int,
        dtype: torch.dtype, device: torch.device, pool: BlockPool, host_blocks: int = 0, pin: bool = False,
    ) -> None:  # fmt: skip
        self._layers: list[tuple[GrowableRegion, int]] = []
        super().__init__(ops, num_layers, 1, block_size, kv_heads, head_dim, dtype, device, host_blocks, pin)
        sizes = [t[0, 0].numel() * dtype.itemsize for t in (self.k, self.v)]
        shapes = [tuple(t.shape[2:]) for t in (self.k, self.v)]
        self.quantum = self.quantum_for(ops, block_size, kv_heads, head_dim, dtype, pool.block_bytes)
        self.most_blocks = -(-most_blocks // self.quantum) * self.quantum
        tensors = []
        for size, shape in zip(sizes, shapes, strict=True):
            region = [pool.reserve(self.most_blocks * size) for _ in range(num_layers)]
            self._layers += [(GrowableRegion(each), size) for each in region]
            tensors.append([each.tensor(0, (self.most_blocks, *shape), dtype) for each in region])
        # Of the block that the parent has made, only the shape was of use.
        del self.k, self.v
        self._k_layers, self._v_layers = tensors
        self.num_blocks, self._zeroed = 0, pool.zeroed
        self.quantum_bytes = self.quantum * num_layers * sum(sizes)

    @staticmethod
    def quantum_for(
        ops: OpSizes, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype, page_bytes: int
    ) -> int:
        """The fewest blocks whose K and whose V fill whole pages."""
        sizes = [prod(shape) * dtype.itemsize for shape in ops.kv_block_shape(block_size, kv_heads, head_dim)]
        return lcm(*(page_bytes // gcd(page_bytes, size) for size in sizes))

    @property
    def nbytes(self) -> int:
        return sum(region.nbytes for region, _ in self._layers)

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        return self._k_layers[layer], self._v_layers[layer]

    def resize(self, num_blocks: int) -> None:
        """Hold `num_blocks`, whole quanta. RegionError when memory runs out; the cache is then as it was."""
        assert num_blocks % self.quantum == 0, f"{num_blocks} blocks are not whole quanta of {self.quantum}"
        done: list[tuple[GrowableRegion, int]] = []
        try:
            for region, size in self._layers:
                before = region.nbytes
                region.resize(num_blocks * size)
                done.append((region, before))
        except RegionError:
            for region, before in done:
                region.resize(before)
            raise
        if not self._zeroed and num_blocks > self.num_blocks:
            for tensors in (self._k_layers, self._v_layers):
                for tensor in tensors:
                    tensor[self.num_blocks : num_blocks].zero_()
        self.num_blocks = num_blocks

    def swap_out(self, pairs) -> None:
        for device_block, host_block in pairs:
            self._check(device_block, host_block)
            for layer in range(self.num_layers):
                self.host_k[host_block, layer].copy_(self._k_layers[layer][device_block])
                self.host_v[host_block, layer].copy_(self._v_layers[layer][device_block])

    def swap_in(self, pairs) -> None:
        for host_block, device_block in pairs:
            self._check(device_block, host_block)
            for layer in range(self.num_layers):
                self._k_layers[layer][device_block].copy_(self.host_k[host_block, layer])
                self._v_layers[layer][device_block].copy_(self.host_v[host_block, layer])

    def close(self) -> None:
        super().close()
        for region, _ in self._layers:
            region.region.close()
