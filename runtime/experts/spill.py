"""SpillFile: the DISK tier's file, unlinked as soon as it is open, so that nothing is left whatever happens."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from ..devices import PAGE
from ..memory.budget import format_bytes
from .layout import ExpertLayout
from .placement import Tier


class StoreError(ValueError):
    """Experts could not be stored or read back."""


def spill_offsets(layout: ExpertLayout) -> tuple[list[tuple[int, int]], int]:
    """Where each (layer, tensor type) of the DISK tier begins in the spill file, at pages; the bytes of the file."""
    offsets, end = [], 0
    for layer in range(layout.num_layers):
        begins = []
        for d in (0, 1):
            begins.append(end)
            if members := len(layout.placement.members(layer, Tier.DISK)):
                end += -(-members * layout.stride(layout.stored(Tier.DISK), d) // PAGE) * PAGE
        offsets.append((begins[0], begins[1]))
    return offsets, end


class SpillFile:
    """`nbytes` in a file without a name in `directory`; reads past the page cache where the file system can.

    StoreError, which leaves nothing behind, where there is no such directory or no room.
    """

    def __init__(self, directory: Path, nbytes: int) -> None:
        self.nbytes, self.direct_io = nbytes, False
        self._file: int | None = None
        self._direct: int | None = None
        try:
            self._file, self.name = tempfile.mkstemp(prefix="fluxmoe-experts-", dir=directory)
        except OSError as error:
            raise StoreError(f"cannot create a spill file for experts in {directory}: {error.strerror}") from None
        try:
            if hasattr(os, "O_DIRECT"):
                try:
                    self._direct = os.open(self.name, os.O_RDONLY | os.O_DIRECT)
                    self.direct_io = True
                except OSError:
                    pass  # tmpfs and others have no direct reads: the page cache will serve them
            os.posix_fallocate(self._handle(), 0, nbytes)
        except OSError as error:
            self.close()
            raise StoreError(
                f"no room for {format_bytes(nbytes)} of experts in {directory}: {error.strerror}"
            ) from None
        finally:
            os.unlink(self.name)

    def _handle(self, direct: bool = False) -> int:
        handle = self._direct if direct else self._file
        assert handle is not None, "the spill file is closed"
        return handle

    def write(self, block: Tensor, offset: int) -> None:
        """All of a block in host memory. StoreError when the disk fails."""
        view = block.numpy().data
        while len(view):
            try:
                written = os.pwrite(self._handle(), view, offset)
            except OSError as error:
                raise StoreError(f"writing experts to {self.name} failed: {error.strerror}") from None
            view, offset = view[written:], offset + written

    def flush(self) -> None:
        """Everything is on the disk, and no longer in the page cache. StoreError when the disk fails."""
        try:
            os.fsync(self._handle())
        except OSError as error:
            raise StoreError(f"writing experts to {self.name} failed: {error.strerror}") from None
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._handle(), 0, 0, os.POSIX_FADV_DONTNEED)

    def read(self, target: Tensor, offset: int, what: str, chunk: int, cancelled: Callable[[], bool]) -> int:
        """Fill `target` from `offset` on, at most `chunk` bytes a call of the system; returns how many bytes were read,
        fewer once `cancelled` says so. StoreError naming `what` when the disk fails."""
        view = target.numpy().data
        while len(view):
            if cancelled():
                break
            address = target.data_ptr() + target.numel() - len(view)
            direct = self.direct_io and len(view) >= PAGE and address % PAGE == 0
            part = view[: min(len(view) // PAGE * PAGE if direct else len(view), chunk)]
            try:
                got = os.preadv(self._handle(direct), [part], offset)
            except OSError as error:
                if direct and error.errno == errno.EINVAL:
                    self.direct_io = False  # some file systems take the flag and refuse the read
                    continue
                raise StoreError(f"reading {what} from {self.name} failed: {error.strerror}") from None
            if got == 0:
                raise StoreError(f"reading {what} from {self.name} failed: the file ends {len(view)} bytes early")
            view, offset = view[got:], offset + got
        return target.numel() - len(view)

    def close(self) -> None:
        """Idempotent."""
        for name in ("_file", "_direct"):
            handle = getattr(self, name)
            if handle is not None:
                os.close(handle)
                setattr(self, name, None)
