"""Regions: stable virtual addresses under which physical blocks are mapped and unmapped (arXiv 2604.02715 §4.1).

    BlockPool   a bounded number of physical blocks of one size
    Region      a reserved range of addresses; each of its pages holds a block of the pool, or nothing

A page that is unmapped keeps its address; a block that is freed gives its memory back to the system. A block is under
one page at a time. Two kinds with one interface, each in a pool of its own:

    MemfdPool   CPU: a memfd, its parts mapped with mmap(MAP_FIXED); freed parts are punched out of the file
    VmmPool     CUDA (region_cuda.py): the driver's virtual memory management

    pool = device_of(device).make_pool(max_bytes)
    region = pool.reserve(nbytes)
    region.map(0)                                  # a block of the pool under the first page
    weights = region.tensor(0, (E, n, k), torch.bfloat16)
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

# Of the CPU's pools: a multiple of any page size in use, small enough for small models. Larger pools have larger
# blocks, for a process may have no more than 65,530 mappings.
BLOCK_BYTES, _MOST_BLOCKS = 64 << 10, 32_768


class RegionError(ValueError):
    """Memory that cannot be had or mapped here, or a map or unmap that makes no sense."""


class BlockPool(ABC):
    """At most `max_blocks` blocks of `block_bytes`, handed out by number. Every block is free or under one page."""

    def __init__(self, block_bytes: int, max_blocks: int) -> None:
        self.block_bytes, self.max_blocks = block_bytes, max_blocks
        # Ascending from the end, so that pop gives the lowest: a pool that shrinks is free at its end.
        self._free = list(range(max_blocks - 1, -1, -1))
        self._taken: set[int] = set()

    @property
    def used_bytes(self) -> int:
        """Bytes of the blocks that are handed out: what the ledger is charged."""
        return len(self._taken) * self.block_bytes

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    def alloc(self) -> int:
        """A block. RegionError when none is left or the system refuses; the pool is then as it was."""
        if not self._free:
            raise RegionError(f"all {self.max_blocks} blocks of {self.block_bytes} bytes are in use")
        block = self._free[-1]
        self._create(block)
        self._free.pop()
        self._taken.add(block)
        return block

    def free(self, block: int) -> None:
        """Give a block's memory back. RegionError if it is not handed out."""
        if block not in self._taken:
            raise RegionError(f"block {block} is freed, and was not handed out (twice freed?)")
        self._release(block)
        self._taken.remove(block)
        self._free.append(block)

    def pages(self, nbytes: int) -> int:
        """Pages that hold `nbytes`."""
        return -(-nbytes // self.block_bytes)

    @abstractmethod
    def reserve(self, nbytes: int) -> Region:
        """A region of at least `nbytes`, nothing mapped."""

    @abstractmethod
    def _create(self, block: int) -> None: ...
    @abstractmethod
    def _release(self, block: int) -> None: ...
    @abstractmethod
    def close(self) -> None:
        """Give everything back; regions of the pool must be closed before. Idempotent."""

    def __enter__(self) -> BlockPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Region(ABC):
    """`num_pages` pages at addresses that never change. Not thread-safe: one thread maps and unmaps."""

    def __init__(self, pool: BlockPool, address: int, num_pages: int) -> None:
        self.pool, self.address, self.num_pages = pool, address, num_pages
        self._blocks: dict[int, int] = {}

    @property
    def nbytes(self) -> int:
        return self.num_pages * self.pool.block_bytes

    @property
    def mapped_bytes(self) -> int:
        return len(self._blocks) * self.pool.block_bytes

    def is_mapped(self, page: int) -> bool:
        return page in self._blocks

    def map(self, page: int, block: int | None = None) -> int:
        """Put a block under a page: `block`, that another page gave up, or a new one. Returns it.

        RegionError if the page has one or lies outside, or if memory runs out; the region is then as it was.
        """
        self._inside(page)
        if page in self._blocks:
            raise RegionError(f"page {page} is mapped already, to block {self._blocks[page]}")
        mapped = self.pool.alloc() if block is None else block
        try:
            self._map(page, mapped)
        except BaseException:
            if block is None:
                self.pool.free(mapped)
            raise
        self._blocks[page] = mapped
        return mapped

    def unmap(self, page: int, keep: bool = False, idle: bool = False) -> int:
        """Take a page's block away; free it, or `keep` it for another page; returns it. RegionError without one.

        On a GPU waits for all that runs there, unless the caller has waited for what uses the page (`idle`).
        """
        self._inside(page)
        if page not in self._blocks:
            raise RegionError(f"page {page} is not mapped (twice unmapped?)")
        block = self._blocks[page]
        self._unmap(page, idle)
        del self._blocks[page]
        if not keep:
            self.pool.free(block)
        return block

    def check(self, begin: int, nbytes: int) -> None:
        """RegionError unless every page of the bytes is mapped: what lies there may be read and written."""
        if begin < 0 or begin + nbytes > self.nbytes:
            raise RegionError(f"bytes {begin} to {begin + nbytes} lie outside a region of {self.nbytes}")
        size = self.pool.block_bytes
        for page in range(begin // size, -(-(begin + nbytes) // size)):
            if page not in self._blocks:
                raise RegionError(f"page {page} is used, and is not mapped")

    def tensor(
        self, begin: int, shape: Sequence[int], dtype: torch.dtype, stride: Sequence[int] | None = None
    ) -> Tensor:
        """A tensor over the region's bytes from `begin` on, whether they are mapped now or not; nothing is copied.

        It may be used while all of its pages are mapped (see `check`), and not after `close`.
        """
        itemsize = dtype.itemsize
        if stride is None:
            extent = math.prod(shape)
        else:
            extent = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if math.prod(shape) else 0
        if begin < 0 or begin % itemsize or begin + extent * itemsize > self.nbytes:
            raise RegionError(
                f"a tensor of {list(shape)} {dtype} from byte {begin} does not lie in a region of {self.nbytes} bytes"
            )
        flat = self._bytes()[begin : begin + extent * itemsize].view(dtype)
        return flat.view(*shape) if stride is None else flat.as_strided(tuple(shape), tuple(stride))

    @abstractmethod
    def _bytes(self) -> Tensor:
        """uint8 [nbytes] over all of the region."""

    @abstractmethod
    def _map(self, page: int, block: int) -> None: ...
    @abstractmethod
    def _unmap(self, page: int, idle: bool) -> None: ...
    @abstractmethod
    def _unreserve(self) -> None: ...

    def close(self) -> None:
        """Unmap and free all pages, give the addresses back. Idempotent."""
        for page in list(self._blocks):
            self.unmap(page)
        if self.address:
            self._unreserve()
            self.address = 0

    def _inside(self, page: int) -> None:
        if not 0 <= page < self.num_pages:
            raise RegionError(f"page {page} lies outside a region of {self.num_pages}")


# The CPU's kind.

_PROT_NONE, _MAP_FIXED, _MAP_NORESERVE = 0, 0x10, 0x4000
_PUNCH_HOLE, _KEEP_SIZE = 0x02, 0x01
_FAILED = ctypes.c_void_p(-1).value


def _libc() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
    library.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    library.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return library


class MemfdPool(BlockPool):
    """Blocks are parts of one anonymous file in memory. Linux only."""

    def __init__(self, max_bytes: int, block_bytes: int | None = None) -> None:
        if not hasattr(os, "memfd_create"):
            raise RegionError("regions on a CPU need Linux (memfd_create); page through tables of addresses")
        if block_bytes is None:
            block_bytes = BLOCK_BYTES
            while max_bytes // block_bytes > _MOST_BLOCKS:
                block_bytes *= 2
        if block_bytes % mmap.PAGESIZE:
            raise RegionError(f"a block must be a multiple of {mmap.PAGESIZE} bytes, got {block_bytes}")
        super().__init__(block_bytes, max_bytes // block_bytes)
        self._libc = _libc()
        self.file = os.memfd_create("fluxmoe")
        os.ftruncate(self.file, self.max_blocks * block_bytes)

    def reserve(self, nbytes: int) -> Region:
        pages = self.pages(nbytes)
        return MemfdRegion(self, self._mmap(None, pages, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), pages)

    def _mmap(self, address: int | None, pages: int, protection: int, flags: int, offset: int = 0) -> int:
        file = -1 if flags & mmap.MAP_ANONYMOUS else self.file
        size = max(1, pages) * self.block_bytes
        got = self._libc.mmap(address, size, protection, flags | _MAP_NORESERVE, file, offset)
        if got == _FAILED:
            raise RegionError(f"mmap of {size} bytes failed: {os.strerror(ctypes.get_errno())}")
        return got

    def _create(self, block: int) -> None:
        # Here, where it is one error, and not at first touch, where it is a SIGBUS.
        try:
            os.posix_fallocate(self.file, block * self.block_bytes, self.block_bytes)
        except OSError as error:
            raise RegionError(f"no memory for a block of {self.block_bytes} bytes: {error.strerror}") from None

    def _release(self, block: int) -> None:
        mode = _PUNCH_HOLE | _KEEP_SIZE
        if self._libc.fallocate(self.file, mode, block * self.block_bytes, self.block_bytes):
            raise RegionError(f"block {block} cannot be given back: {os.strerror(ctypes.get_errno())}")

    def close(self) -> None:
        if self.file >= 0:
            os.close(self.file)
            self.file = -1


class MemfdRegion(Region):
    """Unmapped pages are PROT_NONE: to touch one ends the process, which no stale pointer survives unseen."""

    pool: MemfdPool

    def _bytes(self) -> Tensor:
        return torch.frombuffer((ctypes.c_uint8 * self.nbytes).from_address(self.address), dtype=torch.uint8)

    def _map(self, page: int, block: int) -> None:
        size = self.pool.block_bytes
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        self.pool._mmap(self.address + page * size, 1, protection, mmap.MAP_SHARED | _MAP_FIXED, block * size)

    def _unmap(self, page: int, idle: bool) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
        self.pool._mmap(self.address + page * self.pool.block_bytes, 1, _PROT_NONE, flags)

    def _unreserve(self) -> None:
        self.pool._libc.munmap(self.address, max(1, self.num_pages) * self.pool.block_bytes)
