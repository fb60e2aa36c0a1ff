"""Regions on a GPU: the CUDA driver's virtual memory management, through cuda-bindings.

A block is a handle of cuMemCreate, of the granularity that the driver recommends (2 MiB on the GPUs of today); pages
are mapped with cuMemMap and opened with cuMemSetAccess. cuMemUnmap must not happen under a running kernel: whoever
unmaps has waited for the event after the last one that reads the page.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .region import BlockPool, Region, RegionError


def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError:
        raise RegionError(
            "dynamic residency on a GPU needs the package cuda-bindings (pip install cuda-bindings)"
        ) from None
    return driver


class VmmPool(BlockPool):
    """Blocks of device memory. driver: cuda.bindings.driver, or a stand-in with the same functions in tests."""

    def __init__(self, max_bytes: int, device: int = 0, driver: Any = None) -> None:
        self.driver = driver or _driver()
        if driver is None:
            torch.cuda.init()
        d = self.driver
        self.device = device
        self.properties = d.CUmemAllocationProp()
        self.properties.type = d.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self.properties.location.type = d.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self.properties.location.id = device
        recommended = d.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
        granularity = self.call("cuMemGetAllocationGranularity", self.properties, recommended)
        super().__init__(int(granularity), max_bytes // int(granularity))
        self.access = d.CUmemAccessDesc()
        self.access.location = self.properties.location
        self.access.flags = d.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        self.handles: dict[int, Any] = {}

    def call(self, name: str, *arguments: Any) -> Any:
        """One driver call; its value, or RegionError with the driver's reason."""
        status, *values = getattr(self.driver, name)(*arguments)
        if status != self.driver.CUresult.CUDA_SUCCESS:
            reason = getattr(status, "name", status)
            raise RegionError(f"the CUDA driver refused {name}: {reason}")
        return values[0] if values else None

    def reserve(self, nbytes: int) -> Region:
        pages = self.pages(nbytes)
        size = max(1, pages) * self.block_bytes
        address = int(self.call("cuMemAddressReserve", size, self.block_bytes, 0, 0))
        return VmmRegion(self, address, pages)

    def _create(self, block: int) -> None:
        self.handles[block] = self.call("cuMemCreate", self.block_bytes, self.properties, 0)

    def _release(self, block: int) -> None:
        self.call("cuMemRelease", self.handles[block])
        del self.handles[block]

    def close(self) -> None:
        for block in list(self._taken):
            self.free(block)


class _DeviceBytes:
    """What torch.as_tensor reads a device pointer from."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 3, "strides": None,
        }  # fmt: skip


class VmmRegion(Region):
    """Pages under addresses of the device."""

    pool: VmmPool

    def _bytes(self) -> Tensor:
        return torch.as_tensor(_DeviceBytes(self.address, self.nbytes), device=f"cuda:{self.pool.device}")

    def _map(self, page: int, block: int) -> None:
        pool, size = self.pool, self.pool.block_bytes
        address = self.address + page * size
        pool.call("cuMemMap", address, size, 0, pool.handles[block], 0)
        try:
            pool.call("cuMemSetAccess", address, size, [pool.access], 1)
        except RegionError:
            pool.call("cuMemUnmap", address, size)
            raise

    def _unmap(self, page: int) -> None:
        self.pool.call("cuMemUnmap", self.address + page * self.pool.block_bytes, self.pool.block_bytes)

    def _unreserve(self) -> None:
        self.pool.call("cuMemAddressFree", self.address, max(1, self.num_pages) * self.pool.block_bytes)
