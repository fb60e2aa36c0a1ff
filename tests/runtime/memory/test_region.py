"""Regions: addresses stay, memory comes and goes, and what makes no sense is refused. Both kinds, one set of tests.

The CUDA kind runs on a stand-in for the driver that keeps its rules: what is mapped must exist and be mapped once,
addresses must be reserved, memory is released once, and never under a kernel.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fluxmoe.runtime.devices import HOST, device_of
from fluxmoe.runtime.memory.region import BLOCK_BYTES, MemfdPool, RegionError
from fluxmoe.runtime.memory.region_cuda import VmmPool
from hypothesis import given, settings
from hypothesis import strategies as st

MIB = 1 << 20


class FakeDriver:
    """The part of cuda.bindings.driver that regions use, over real memory of the host: what is not mapped faults.

    Strict where a GPU is: it fails when memory is unmapped or addresses are freed after a kernel was launched and
    before the device was waited for, and when it is asked whose memory an address is that is not mapped.
    """

    CUresult = SimpleNamespace(CUDA_SUCCESS=0)
    CUmemAllocationType = SimpleNamespace(CU_MEM_ALLOCATION_TYPE_PINNED=1)
    CUmemLocationType = SimpleNamespace(CU_MEM_LOCATION_TYPE_DEVICE=1)
    CUmemAllocationGranularity_flags = SimpleNamespace(CU_MEM_ALLOC_GRANULARITY_RECOMMENDED=1)
    CUmemAccess_flags = SimpleNamespace(CU_MEM_ACCESS_FLAGS_PROT_READWRITE=3)

    def __init__(self, memory_blocks: int = 64) -> None:
        self.memory = MemfdPool(memory_blocks * 2 * MIB, 2 * MIB)
        self.handles: set = set()
        self.ranges: dict = {}
        self.mapped: dict = {}
        self.running = False
        self.refuse: str | None = None

    @staticmethod
    def CUmemAllocationProp():
        return SimpleNamespace(type=None, location=SimpleNamespace(type=None, id=None))

    @staticmethod
    def CUmemAccessDesc():
        return SimpleNamespace(location=None, flags=None)

    def launch(self):
        """A kernel that may use any memory from now on."""
        self.running = True

    def synchronize(self, device):
        self.running = False

    def _refused(self, name: str):
        return (SimpleNamespace(name=f"CUDA_ERROR_{name}"),) if self.refuse == name else None

    def _place(self, address):
        base = next(a for a, region in self.ranges.items() if a <= address < a + region.nbytes)
        return self.ranges[base], (address - base) // (2 * MIB)

    def cuMemGetAllocationGranularity(self, properties, flag):
        assert (properties.type, properties.location.type, flag) == (1, 1, 1)
        return 0, 2 * MIB

    def cuPointerGetAttribute(self, address):
        assert any(a <= address < a + 2 * MIB for a in self.mapped), "whose is an address where nothing is mapped?"

    def cuMemAddressReserve(self, size, alignment, address, flags):
        assert size % (2 * MIB) == 0
        region = self.memory.reserve(size)
        self.ranges[region.address] = region
        return 0, region.address

    def cuMemAddressFree(self, address, size):
        assert not self.running, "addresses are freed under a kernel"
        assert self.ranges[address].nbytes == size
        assert not any(address <= a < address + size for a in self.mapped), "addresses are freed under a mapping"
        self.ranges.pop(address).close()
        return (0,)

    def cuMemCreate(self, size, properties, flags):
        assert size == 2 * MIB
        if refused := self._refused("cuMemCreate"):
            return (*refused, None)
        if self.memory.used_bytes == self.memory.max_blocks * 2 * MIB:
            return SimpleNamespace(name="CUDA_ERROR_OUT_OF_MEMORY"), None
        block = self.memory.alloc()
        self.handles.add(block)
        return 0, block

    def cuMemRelease(self, handle):
        assert handle not in self.mapped.values(), "a block is released under a mapping"
        self.handles.remove(handle)
        self.memory.free(handle)
        return (0,)

    def cuMemMap(self, address, size, offset, handle, flags):
        if refused := self._refused("cuMemMap"):
            return refused
        self._place(address)
        assert address not in self.mapped
        assert handle in self.handles
        self.mapped[address] = handle
        return (0,)

    def cuMemSetAccess(self, address, size, access, count):
        if refused := self._refused("cuMemSetAccess"):
            return refused
        assert (access[0].flags, count) == (3, 1)
        region, page = self._place(address)
        region.map(page, self.mapped[address])
        return (0,)

    def cuMemUnmap(self, address, size):
        assert not self.running, "memory is unmapped under a kernel"
        del self.mapped[address]
        region, page = self._place(address)
        if region.is_mapped(page):
            region.unmap(page, keep=True)
        return (0,)


def pool_of(kind: str, blocks: int = 16):
    if kind == "memfd":
        return MemfdPool(blocks * BLOCK_BYTES)
    driver = FakeDriver()
    return VmmPool(blocks * 2 * MIB, torch.device("cpu"), driver, driver.synchronize)


KINDS = ["memfd", "vmm"]


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_conserved_and_addresses_stay(kind):
    with pool_of(kind, 4) as pool:
        region = pool.reserve(6 * pool.block_bytes)
        address = region.address
        assert region.num_pages == 6
        for page in (5, 0, 3):
            region.map(page)
        assert pool.used_bytes == 3 * pool.block_bytes
        block = region.unmap(0, keep=True)
        assert pool.used_bytes == 3 * pool.block_bytes
        assert region.map(1, block) == block
        region.map(0)
        with pytest.raises(RegionError, match="all 4 blocks"):
            region.map(2)
        assert not region.is_mapped(2)
        assert region.address == address
        region.close()
        region.close()
        assert pool.used_bytes == 0
        if kind == "vmm":
            driver = pool.driver
            assert [len(left) for left in (driver.handles, driver.ranges, driver.mapped)] == [0, 0, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_what_makes_no_sense_is_refused(kind):
    with pool_of(kind) as pool:
        region = pool.reserve(4 * pool.block_bytes)
        region.map(1)
        for work, match in (
            (lambda: region.map(1), "page 1 is mapped already"),
            (lambda: region.unmap(0), "page 0 is not mapped"),
            (lambda: region.map(4), "outside a region of 4"),
            (lambda: region.unmap(-1), "outside"),
            (lambda: pool.free(9), "not handed out"),
            (lambda: region.check(0, 1), "page 0 is used, and is not mapped"),
            (lambda: region.check(pool.block_bytes, pool.block_bytes + 1), "page 2 is used"),
            (lambda: region.check(0, region.nbytes + 1), "outside a region"),
            (lambda: region.tensor(1, (2,), torch.float32), "does not lie"),
            (lambda: region.tensor(0, (region.nbytes + 1,), torch.uint8), "does not lie"),
        ):
            with pytest.raises(RegionError, match=match):
                work()
        region.check(pool.block_bytes, pool.block_bytes)
        region.close()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 7)), max_size=40))
def test_any_order_of_maps_and_unmaps(kind, steps):
    with pool_of(kind, 5) as pool:
        region = pool.reserve(8 * pool.block_bytes)
        model: set[int] = set()
        for up, page in steps:
            allowed = (page not in model and len(model) < 5) if up else page in model
            try:
                (region.map if up else region.unmap)(page)
                assert allowed
                model ^= {page}
            except RegionError:
                assert not allowed
            assert {p for p in range(8) if region.is_mapped(p)} == model
            assert pool.used_bytes == len(model) * pool.block_bytes
        region.close()


def test_refused_by_the_driver_nothing_changes():
    with pool_of("vmm") as pool:
        region = pool.reserve(2 * pool.block_bytes)
        for call in ("cuMemCreate", "cuMemMap", "cuMemSetAccess"):
            pool.driver.refuse = call
            with pytest.raises(RegionError, match=f"refused {call}: CUDA_ERROR"):
                region.map(0)
            assert pool.used_bytes == 0
            assert not pool.driver.handles | pool.driver.mapped.keys()
        region.close()


def test_tensors_over_addresses_where_nothing_is_mapped(monkeypatch):
    """Made before anything is mapped, from the address alone: the driver is not asked whose it is."""
    with pool_of("vmm") as pool:

        def as_tensor(data, **settings):
            pool.driver.cuPointerGetAttribute(data.__cuda_array_interface__["data"][0])

        monkeypatch.setattr(torch, "as_tensor", as_tensor)
        region = pool.reserve(3 * pool.block_bytes)
        tensor = region.tensor(pool.block_bytes, (4, 3), torch.bfloat16, (8, 1))
        assert tensor.data_ptr() == region.address + pool.block_bytes
        assert tensor.stride() == (8, 1)
        region.map(1)
        tensor.fill_(2)
        assert region.tensor(pool.block_bytes, (11,), torch.bfloat16).tolist() == [2, 2, 2, *[0] * 5, 2, 2, 2]
        region.close()
        assert pool.reserve(0).tensor(0, (0,), torch.uint8).numel() == 0


def test_nothing_is_unmapped_or_freed_under_a_kernel():
    with pool_of("vmm") as pool:
        driver = pool.driver
        region = pool.reserve(4 * pool.block_bytes)
        for page in range(4):
            region.map(page)
        driver.launch()
        region.unmap(3)
        driver.launch()
        region.unmap(2)
        driver.launch()
        with pytest.raises(AssertionError, match="unmapped under a kernel"):
            region.unmap(1, idle=True)  # it was not
        driver.launch()
        empty = pool.reserve(pool.block_bytes)
        empty.close()
        region.close()
        assert not driver.handles | driver.ranges.keys()


# With memory behind it.


@pytest.mark.parametrize("kind", KINDS)
def test_content_follows_the_block(kind):
    with pool_of(kind) as pool:
        region = pool.reserve(4 * pool.block_bytes)
        size = pool.block_bytes
        region.map(0), region.map(1)
        first = region.tensor(0, (size // 4,), torch.int32)
        first.copy_(torch.arange(size // 4))
        block = region.unmap(0, keep=True)
        region.map(3, block)
        moved = region.tensor(3 * size, (size // 4,), torch.int32)
        assert torch.equal(moved, torch.arange(size // 4, dtype=torch.int32))
        region.map(0)
        if kind == "memfd":  # a GPU's new memory holds anything
            assert int(first.abs().max()) == 0  # the same tensor, another block
        region.close()


@pytest.mark.parametrize("kind", KINDS)
def test_strided_views_share_the_memory(kind):
    with pool_of(kind) as pool:
        region = pool.reserve(2 * pool.block_bytes)
        region.map(0), region.map(1)
        per_page = pool.block_bytes // 2
        view = region.tensor(0, (2, 3, 5), torch.bfloat16, (per_page, 5, 1))
        view.copy_(torch.arange(30).view(2, 3, 5))
        assert region.tensor(pool.block_bytes, (15,), torch.bfloat16).tolist() == list(range(15, 30))
        region.close()


def resident_kib() -> int:
    text = Path("/proc/self/smaps_rollup").read_text()
    found = re.search(r"^Rss:\s+(\d+)", text, re.M)
    assert found is not None
    return int(found[1])


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's /proc to see resident memory")
def test_freed_memory_returns_to_the_system():
    memfd = MemfdPool(64 * MIB)
    with memfd as pool:
        region = pool.reserve(64 * MIB)
        before, kept = resident_kib(), pool.pages(16 * MIB)
        for page in range(region.num_pages):
            region.map(page)
        region.tensor(0, (64 * MIB,), torch.uint8).fill_(7)
        full, held = resident_kib(), os.fstat(memfd.file).st_blocks
        for page in range(kept, region.num_pages):
            region.unmap(page)
        assert full - before > 60 * 1024
        assert full - resident_kib() > 44 * 1024
        assert os.fstat(memfd.file).st_blocks * 512 == 16 * MIB < held * 512
        assert int(region.tensor(0, (16 * MIB,), torch.uint8).min()) == 7
        region.close()


def test_a_touched_unmapped_page_is_no_silent_read(tmp_path):
    """In a process of its own, which it ends."""
    import subprocess
    import sys

    code = (
        "import torch; from fluxmoe.runtime.memory.region import MemfdPool; r = MemfdPool(1 << 20).reserve(1 << 20); "
        "t = r.tensor(0, (4,), torch.uint8); r.map(0); print(int(t[0]), flush=True); r.unmap(0); print(int(t[0]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode < 0
    assert done.stdout == "0\n"


def test_pools_for_devices():
    with HOST.make_pool(MIB) as pool:
        assert isinstance(pool, MemfdPool)
    if not torch.cuda.is_available():
        with pytest.raises(RegionError, match=r"pip install cuda-bindings|need a CUDA device"):
            device_of("cuda").make_pool(MIB)
    with pytest.raises(RegionError, match="multiple of"):
        MemfdPool(MIB, block_bytes=1000)
