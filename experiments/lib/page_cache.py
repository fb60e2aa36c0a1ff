"""What the page cache has of files, and how to have it drop them. Light, since what runs behind a wall imports it."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path


def files_of(paths: Sequence[Path]) -> list[Path]:
    """`paths`, and in the stead of folders the files in them."""
    found = [sorted(path.iterdir()) if path.is_dir() else [path] for path in paths]
    return [path for each in found for path in each if not path.is_dir()]


def drop_cached(paths: Sequence[Path]) -> None:
    """Drop files, or those in folders, from the page cache, once they are on the disk, where the system can."""
    for path in files_of(paths):
        file = os.open(path, os.O_RDONLY)
        try:
            with suppress(OSError):  # some file systems that are only read know no such call
                os.fdatasync(file)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def cached_bytes(path: Path) -> int:
    """What the page cache has of a file; 0 where the system does not say, as of files that one may not write."""
    size = path.stat().st_size
    if not size or not os.access(path, os.W_OK):
        return 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapping:
        there = (ctypes.c_char * -(-size // mmap.PAGESIZE))()
        first = ctypes.c_char.from_buffer(mapping)
        failed = ctypes.CDLL(None).mincore(ctypes.byref(first), ctypes.c_size_t(size), there)
        del first  # a mapping is not closed while somebody points into it
    return 0 if failed else there.raw.count(1) * mmap.PAGESIZE
