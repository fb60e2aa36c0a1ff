"""Regions on a GPU: the CUDA driver's virtual memory management, through cuda-bindings.

A block is a handle of cuMemCreate, of the granularity that the driver recommends (2 MiB on the GPUs of today); pages
are mapped with cuMemMap and opened with cuMemSetAccess. Neither cuMemUnmap nor cuMemAddressFree waits for a kernel that
reads the page: the device is waited for first, unless the caller says that it has waited for the last such kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .region import BlockPool, Region, RegionError


def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError:
        raise RegionError("regions on a GPU need the package cuda-bindings (pip install cuda-bindings)") from None
    return driver


class VmmPool(BlockPool):
    """Blocks of memory of a CUDA device, by default the current one.

    driver, synchronize: cuda.bindings.driver and torch.cuda.synchronize, or stand-ins in tests, whose tensors are on
    `device` all the same.
    """

    def __init__(
        self, max_bytes: int, device: torch.device | None = None, driver: Any = None,
        synchronize: Callable[[torch.device], object] = torch.cuda.synchronize,
    ) -> None:  # fmt: skip
        self.driver, self._synchronize = driver or _driver(), synchronize
        if device is None or (device.index is None and device.type == "cuda"):
            if not torch.cuda.is_available():
                raise RegionError("pools of device memory need a CUDA device, and torch finds none here")
            device = torch.device("cuda", torch.cuda.current_device())
        d = self.driver
        self.device = device
        self.properties = d.CUmemAllocationProp()
        self.properties.type = d.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self.properties.location.type = d.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self.properties.location.id = device.index or 0
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

    def wait(self) -> None:
        """Until nothing runs on the device."""
        self._synchronize(self.device)

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


class VmmRegion(Region):
    """Pages under addresses of the device."""

    pool: VmmPool

    def _bytes(self) -> Tensor:
        # torch.as_tensor would ask the driver whose memory the address is, and be refused where nothing is mapped. A
        # storage is told its device and asks nobody; torch's own CUDA graph trees make theirs so.
        device, nbytes = self.pool.device, self.nbytes
        storage = torch._C._construct_storage_from_data_pointer(self.address, device, nbytes)
        return torch.empty(0, dtype=torch.uint8, device=device).set_(storage, 0, (nbytes,), (1,))

    def _map(self, page: int, block: int) -> None:
        pool, size = self.pool, self.pool.block_bytes
        address = self.address + page * size
        pool.call("cuMemMap", address, size, 0, pool.handles[block], 0)
        try:
            pool.call("cuMemSetAccess", address, size, [pool.access], 1)
        except RegionError:
            pool.call("cuMemUnmap", address, size)
            raise

    def _unmap(self, page: int, idle: bool) -> None:
        if not idle:
            self.pool.wait()
        self.pool.call("cuMemUnmap", self.address + page * self.pool.block_bytes, self.pool.block_bytes)

    def _unreserve(self) -> None:
        self.pool.wait()
        self.pool.call("cuMemAddressFree", self.address, max(1, self.num_pages) * self.pool.block_bytes)
