"""One packed weight in one file, little endian:

    magic "FLUXPACK" | version u32 | header bytes u32 | crc32 of the header u32 | header, JSON | zeros to 4096
    each plane at a multiple of 4096 bytes, in order; the file ends with the last plane

The header has format, shape, metadata and planes, a list of {name, dtype, offset, nbytes, crc32}.
"""

from __future__ import annotations

import json
import os
import struct
import tempfile
import zlib
from contextlib import suppress
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from .codec import Packed, PackingError

MAGIC = b"FLUXPACK"
VERSION = 1
PAGE = 4096
_PREFIX = struct.Struct("<8sIII")
DTYPES = {"uint8": torch.uint8, "int16": torch.int16, "int32": torch.int32}
# A header of a few planes takes some hundred bytes; more than this is garbage, not a reason to allocate.
_MAX_HEADER = 1 << 20


class _Entry(TypedDict):
    """A plane, as the header has it."""

    name: str
    dtype: str
    offset: int
    nbytes: int
    crc32: int


def _pages(size: int) -> int:
    return -(-size // PAGE) * PAGE


def save(packed: Packed, path: Path) -> None:
    """Write `packed` (from any device) to `path`: a temporary file beside it, then renamed."""
    arrays = {name: plane.cpu().numpy() for name, plane in packed.planes.items()}
    entries: list[_Entry] = []
    header, first = b"", PAGE
    # Offsets are in the header and depend on its length, which is a page in all but absurd cases.
    while not header or _pages(_PREFIX.size + len(header)) > first:
        first = max(first, _pages(_PREFIX.size + len(header)))
        offset, entries = first, []
        for name, array in arrays.items():
            crc = zlib.crc32(array.view(np.uint8).data)
            entries.append(
                {"name": name, "dtype": str(array.dtype), "offset": offset, "nbytes": array.nbytes, "crc32": crc}
            )
            offset += _pages(array.nbytes)
        fields = {"format": packed.format, "shape": packed.shape, "metadata": packed.metadata, "planes": entries}
        header = json.dumps(fields).encode()
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(_PREFIX.pack(MAGIC, VERSION, len(header), zlib.crc32(header)) + header)
            for entry, array in zip(entries, arrays.values(), strict=True):
                file.write(bytes(entry["offset"] - file.tell()))
                file.write(array.view(np.uint8).data)
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _read_header(path: Path) -> dict:
    """The header, once magic, version and sum are right."""
    with path.open("rb") as file:
        prefix = file.read(_PREFIX.size)
        if prefix[: len(MAGIC)] != MAGIC[: len(prefix)] or not prefix:
            raise PackingError(f"{path}: not a packed weight, it does not begin with {MAGIC.decode()}")
        if len(prefix) < _PREFIX.size:
            raise PackingError(f"{path}: truncated, its header needs {_PREFIX.size} bytes, the file has {len(prefix)}")
        _, version, size, crc = _PREFIX.unpack(prefix)
        if version != VERSION:
            raise PackingError(f"{path}: file version {version}, this program reads version {VERSION}")
        header = file.read(size) if size <= _MAX_HEADER else b""
    if len(header) < size <= _MAX_HEADER:
        raise PackingError(f"{path}: truncated in its header, which has {len(header)} of {size} bytes")
    if zlib.crc32(header) != crc:
        raise PackingError(f"{path}: corrupt header, its sum is wrong")
    fields = json.loads(header)
    if not isinstance(fields, dict) or not {"format", "shape", "metadata", "planes"} <= fields.keys():
        raise PackingError(f"{path}: its header lacks format, shape, metadata or planes")
    return fields


def load(path: Path, mmap: bool = False, verify: bool = True) -> Packed:
    """See `Packed.load`."""
    header = _read_header(path)
    size = path.stat().st_size
    for entry in header["planes"]:
        if entry["offset"] + entry["nbytes"] > size:
            raise PackingError(
                f"{path}: truncated in plane {entry['name']!r}, which ends at byte "
                f"{entry['offset'] + entry['nbytes']} of {size}"
            )
    # Copy on write: torch wants memory that it may write to, the file stays as it is.
    mapped = torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="c")) if mmap else None
    planes = {entry["name"]: _plane(path, entry, mapped, verify) for entry in header["planes"]}
    return Packed(header["format"], tuple(header["shape"]), planes, header["metadata"])


def _plane(path: Path, entry: _Entry, mapped: Tensor | None, verify: bool) -> Tensor:
    offset, nbytes = entry["offset"], entry["nbytes"]
    if mapped is None:
        data = torch.from_numpy(np.fromfile(path, dtype=np.uint8, count=nbytes, offset=offset))
    else:
        data = mapped[offset : offset + nbytes]
    if verify and zlib.crc32(data.numpy().data) != entry["crc32"]:
        raise PackingError(f"{path}: corrupt plane {entry['name']!r}, its sum is wrong")
    dtype = DTYPES[entry["dtype"]]
    # An empty array of numpy has stride 0, which torch does not view as another type.
    return data.view(dtype) if nbytes else torch.empty(0, dtype=dtype)
