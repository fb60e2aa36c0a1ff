"""Host memory that a GPU copies from, and whose bytes its kernels may read in place: page-locked, in whole pages.

torch's allocator of pinned memory rounds to a power of two: a host tier of 144 GiB would take 256. Here a mapping is as
large as what it holds, up to a page, and registered with the driver (cudaHostRegister).
"""

from __future__ import annotations

import ctypes
import mmap
from contextlib import ExitStack

import torch
from torch import Tensor

from ..devices import HOST
from .budget import format_bytes

# For all contexts, and mapped: kernels read the memory under the host's own addresses.
_PORTABLE, _MAPPED = 1, 2


class HostMemoryError(ValueError):
    """Host memory that cannot be had, or not be page-locked."""


class HostMemory:
    """Owns host memory. Without `pin` it is torch's, pageable, and lives as long as its tensors do.

    With `pin`, tensors must not be used after `close`, which waits for the device, unregisters and unmaps. cuda:
    torch.cuda, or a stand-in with `cudart` and `synchronize` in tests.
    """

    def __init__(self, pin: bool, cuda=torch.cuda) -> None:
        self.pin, self._cuda = pin, cuda
        self._mappings = ExitStack()

    def empty(self, nbytes: int) -> Tensor:
        """uint8 [nbytes] of anything, from the beginning of a page. HostMemoryError leaves nothing behind."""
        if not self.pin or not nbytes:
            try:
                return HOST.empty(nbytes)
            except (RuntimeError, MemoryError):
                raise HostMemoryError(f"cannot allocate {format_bytes(nbytes)} of host memory") from None
        with ExitStack() as undo:
            size = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
            try:
                mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            except OSError:
                raise HostMemoryError(f"cannot allocate {format_bytes(nbytes)} of host memory") from None
            undo.callback(mapping.close)
            address = ctypes.addressof(ctypes.c_uint8.from_buffer(mapping))
            cudart = self._cuda.cudart()
            status = cudart.cudaHostRegister(address, size, _PORTABLE | _MAPPED)
            if int(status):
                raise HostMemoryError(
                    f"cannot page-lock {format_bytes(nbytes)} of host memory: {cudart.cudaGetErrorString(status)}; "
                    "ulimit -l, or a container's limit, may be lower"
                )
            undo.callback(self._unregister, address)
            tensor = torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype=torch.uint8)
            self._mappings.push(undo.pop_all())
        return tensor

    def _unregister(self, address: int) -> None:
        cudart = self._cuda.cudart()
        if int(status := cudart.cudaHostUnregister(address)):
            raise HostMemoryError(f"host memory cannot be given back: {cudart.cudaGetErrorString(status)}")

    def close(self) -> None:
        """Give pinned memory back, once no copy or kernel uses it. Idempotent."""
        with self._mappings.pop_all():
            if self.pin:
                self._cuda.synchronize()
