"""Host memory for what is large and read whole: weights, experts, KV. All of it comes from here."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

# Direct reads want offsets, lengths and addresses in multiples of the logical block size; 4096 suits all devices.
PAGE = 4096
_LARGE_PAGE = 2 << 20


def host_zeros(nbytes: int) -> Tensor:
    """uint8 [nbytes] of zeros in host memory, from the beginning of a page; a page takes memory once it is written.

    All of it but an end of less than 2 MiB asks the system for large pages (`transparent_hugepage`, which is mostly
    `madvise`): they are filled with fewer faults and read with fewer misses of the TLB. Nothing is held that lies
    outside. MemoryError where the system refuses.
    """
    if nbytes < _LARGE_PAGE:
        small = torch.zeros(nbytes + PAGE, dtype=torch.uint8, device="cpu")
        return _from_multiple(small, nbytes, PAGE)
    # Not from malloc, whose memory may have been touched, in small pages, and is aligned to those.
    try:
        mapping = mmap.mmap(-1, nbytes + _LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"cannot map {nbytes} bytes of host memory: {error.strerror}") from None
    memory = _from_multiple(torch.frombuffer(mapping, dtype=torch.uint8), nbytes, _LARGE_PAGE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        whole = nbytes // _LARGE_PAGE * _LARGE_PAGE
        ctypes.CDLL(None).madvise(ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(whole), mmap.MADV_HUGEPAGE)
    return memory


def _from_multiple(raw: Tensor, nbytes: int, multiple: int) -> Tensor:
    skip = -raw.data_ptr() % multiple
    return raw[skip : skip + nbytes]
