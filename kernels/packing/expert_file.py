"""The experts of one layer in one file, as the kernels of a backend read them: a tier of memory on a disk.

    magic "FLUXEXPT" | version u32 | header bytes u32 | xxh3 of the header u64 | header, JSON | zeros to a page
    records [E, 2]   512 bytes each: xxh3 of block and recipe u64 (0: not here yet) | recipe bytes u32 | recipe, JSON
    blocks  [E, 2]   each at a multiple of 4096 bytes: gate_up, then down, of expert after expert

All places follow from the header's sizes, none is read from the file. The file has its whole length from the beginning,
with holes where nothing was written, so experts may come in any order and at any time; an expert counts as here once
its records are written, which is after its bytes (`commit`). Whatever stops a writer, a reader sees whole experts or
none.
Integers are little endian. Sums are of xxHash (xxhash.com), 64 bits, which runs as fast as memory.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import os
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor

from ..expert_table import DOWN, GATE_UP
from ..host_memory import PAGE
from .codec import MAX_SIZE, Packed, PackingError

MAGIC = b"FLUXEXPT"
VERSION = 1
# (format, tensor type, block, recipe) → PackingError unless it is safe to use the block: `ExpertBlocks.check_expert`.
Check = Callable[[str, int, Tensor, Packed | None], None]
_PREFIX = struct.Struct("<8sIIQ")
_RECORD, _RECORD_BYTES = struct.Struct("<QI"), 512
# A block comes in such parts, which are summed up while they are in a core's cache.
_PART = 512 << 10
# A header takes some hundred bytes; more than this is garbage, not a reason to allocate.
_MAX_HEADER = 1 << 16
# Of madvise since Linux 5.14; Python has no name for it.
_POPULATE_READ = 22
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class ExpertFileHeader:
    """What the experts of a file are. backend: whose kernels read the blocks (cpu, triton, torch); sizes: bytes of a
    (gate_up, down) block; content: digest of the model that they come from."""

    backend: str
    format: str
    dtype: str
    hidden: int
    intermediate: int
    experts: int
    sizes: tuple[int, int]
    content: str

    def __post_init__(self) -> None:
        sizes = (self.hidden, self.intermediate, self.experts, *self.sizes)
        if not all(type(n) is int and 0 < n < MAX_SIZE for n in sizes) or len(self.sizes) != 2:
            raise PackingError(f"sizes of an expert file must be positive integers, got {sizes}")
        if not all(isinstance(name, str) for name in (self.backend, self.format, self.dtype, self.content)):
            raise PackingError("backend, format, dtype and content of an expert file must be strings")


def expert_file_name(layer: int) -> str:
    """Of a layer's experts in a folder; layers without experts are not counted."""
    return f"experts-{layer:04d}.flux"


def pages(nbytes: int) -> int:
    """Up to a whole page."""
    return -(-nbytes // PAGE) * PAGE


class ExpertFile:
    """A layer's experts, open for reading, or for adding to. PackingError if the file is not what `header` says.

    Reads go past the page cache where the file system can, and may come from several threads at once.
    """

    def __init__(self, path: Path, header: ExpertFileHeader, writable: bool = False) -> None:
        try:
            file = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
        except OSError as error:
            raise PackingError(f"{path} cannot be read: {error.strerror}") from None
        self._open(file, path, header, writable)

    def _open(self, file: int, path: Path, header: ExpertFileHeader, writable: bool) -> None:
        """Take an open file over; it is closed where it is not what `header` says."""
        self.path, self.header, self.direct_io = path, header, False
        self._file: int | None = file
        self._direct: int | None = None
        self._mapping: Tensor | None = None
        self._written: set[int] = set()
        try:
            if writable:
                _lock(file, path)
            found, self._records_at = _read_header(path, file)
            if found != header:
                raise PackingError(f"{path} holds other experts: {_difference(found, header)}")
            size = os.fstat(file).st_size
            if size != self.nbytes(header):
                raise PackingError(f"{path} is truncated or damaged: {size} bytes, not {self.nbytes(header)}")
            raw = os.pread(file, header.experts * 2 * _RECORD_BYTES, self._records_at)
            self._records = np.frombuffer(bytearray(raw), np.uint8).reshape(header.experts, 2, _RECORD_BYTES)
            with suppress(OSError, AttributeError):  # tmpfs and others have no direct reads
                self._direct = os.open(f"/proc/self/fd/{file}", os.O_RDONLY | os.O_DIRECT)
                self.direct_io = True
        except OSError as error:
            self.close()
            raise PackingError(f"{path} cannot be read: {error.strerror}") from None
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(cls, path: Path, header: ExpertFileHeader) -> ExpertFile:
        """Open a file to add experts to; made first, without any, if there is none. PackingError, OSError."""
        if not path.exists():
            file, name = _nameless(path.parent, header)
            try:
                # Whoever comes second leaves the first one's file as it is. (A descriptor makes Python follow links.)
                with suppress(FileExistsError):
                    os.link(name, path, src_dir_fd=file, follow_symlinks=True)
            finally:
                os.close(file)
                if not name.startswith("/proc"):
                    os.unlink(name)
        return cls(path, header, writable=True)

    @classmethod
    def temporary(cls, directory: Path, header: ExpertFileHeader) -> ExpertFile:
        """A file without a name in `directory`, gone when it is closed, whatever happens. PackingError, OSError."""
        file, name = _nameless(directory, header)
        if not name.startswith("/proc"):
            os.unlink(name)
        made = cls.__new__(cls)
        made._open(file, directory, header, writable=True)
        return made

    @staticmethod
    def nbytes(header: ExpertFileHeader) -> int:
        """Length of the file; what is not written yet takes no room."""
        each = sum(map(pages, header.sizes))
        return _blocks_at(header) + header.experts * each

    def has(self, expert: int) -> bool:
        return all(_RECORD.unpack_from(self._records[expert, d])[0] for d in (GATE_UP, DOWN))

    @property
    def is_whole(self) -> bool:
        return all(map(self.has, range(self.header.experts)))

    def recipe(self, expert: int, tensor_type: int) -> Packed | None:
        """What `decode_expert` must be told beside the block. PackingError if the record is damaged."""
        record = self._records[expert, tensor_type]
        length = _RECORD.unpack_from(record)[1]
        if not length:
            return None
        try:
            return Packed.from_recipe(record[_RECORD.size : _RECORD.size + length].tobytes())
        except PackingError:
            raise PackingError(f"{self.path}: the record of {_name(expert, tensor_type)} is damaged") from None

    def recipes(self, expert: int) -> tuple[Packed | None, Packed | None]:
        """Those of its (gate_up, down) blocks."""
        return self.recipe(expert, GATE_UP), self.recipe(expert, DOWN)

    def place(self, expert: int, tensor_type: int) -> int:
        """Byte at which a block begins."""
        gate_up, down = map(pages, self.header.sizes)
        return _blocks_at(self.header) + expert * (gate_up + down) + (gate_up if tensor_type == DOWN else 0)

    # Writing.

    def put(self, expert: int, blocks: Sequence[Tensor], recipes: Sequence[Packed | None]) -> None:
        """Write an expert's blocks, uint8 in host memory; it is here after `commit`. OSError when the disk fails."""
        for d, (block, recipe) in enumerate(zip(blocks, recipes, strict=True)):
            assert block.numel() == self.header.sizes[d], "blocks are as the header says"
            text = b"" if recipe is None else recipe.recipe_text
            assert len(text) <= _RECORD_BYTES - _RECORD.size, "recipes are small"
            data = block.contiguous().numpy()
            _pwrite(self._handle(), data.data, self.place(expert, d))
            record = _RECORD.pack(_sum(data, text), len(text)) + text
            self._records[expert, d] = 0
            self._records[expert, d, : len(record)] = np.frombuffer(record, np.uint8)
        self._written.add(expert)

    def commit(self) -> None:
        """All that was put is on the disk, and counts. OSError when the disk fails."""
        if not self._written:
            return
        os.fdatasync(self._handle())
        for expert in sorted(self._written):
            _pwrite(self._handle(), self._records[expert].data, self._records_at + expert * 2 * _RECORD_BYTES)
        os.fsync(self._handle())
        self._written.clear()

    # Reading.

    def mapped(self, expert: int) -> tuple[Tensor, Tensor]:
        """Its (gate_up, down) blocks where the page cache has them, uint8, for as long as the tensors live; of use once
        they have been the targets of `read`. The file must not change from then on. OSError where it cannot be mapped.
        """
        if self._mapping is None:
            # Private and writable, as torch wants memory to be: whoever writes to it by mistake changes no file.
            self._mapping = torch.frombuffer(mmap.mmap(self._handle(), 0, flags=mmap.MAP_PRIVATE), dtype=torch.uint8)
        places = (self.place(expert, d) for d in (GATE_UP, DOWN))
        gate_up, down = (self._mapping[at : at + size] for at, size in zip(places, self.header.sizes, strict=True))
        return gate_up, down

    def read(
        self, expert: int, tensor_type: int, target: Tensor, check: Check | None = None, cached: bool = False
    ) -> None:
        """Fill the beginning of `target`, uint8 in host memory, with a block. Releases the GIL.

        Where `target` begins at a page and holds whole pages, the read goes past the page cache; not with `cached`,
        for what is read at each start of a program: it is as fast as memory from the second on. What is `mapped` is
        not copied. PackingError naming file and expert when the disk fails, the sum is wrong, or `check` refuses the
        block.
        """
        what, size = _name(expert, tensor_type), self.header.sizes[tensor_type]
        total, text = _RECORD.unpack_from(self._records[expert, tensor_type])
        if not total:
            raise PackingError(f"{self.path}: {what} is not there")
        place, digest = self.place(expert, tensor_type), xxhash.xxh3_64()
        try:
            if self._mapping is not None and target.data_ptr() == self._mapping.data_ptr() + place:
                self._bring(place, size)
                digest.update(target.numpy().data)
            else:
                self._copy(place, size, target, cached, digest)
        except OSError as error:
            raise PackingError(f"reading {what} from {self.path} failed: {error.strerror}") from None
        digest.update(self._records[expert, tensor_type, _RECORD.size : _RECORD.size + text].data)
        if _not_nothing(digest) != total:
            raise PackingError(f"{self.path}: {what} is corrupt, its sum is wrong; pack the checkpoint again")
        if check is not None:
            recipe = self.recipe(expert, tensor_type)
            try:
                check(self.header.format, tensor_type, target[:size], recipe)
            except PackingError as error:
                raise PackingError(f"{self.path}: {what} is damaged: {error}; pack the checkpoint again") from None

    def _copy(self, place: int, size: int, target: Tensor, cached: bool, digest: xxhash.xxh3_64) -> None:
        """Read a block, and sum it up. OSError."""
        past_cache = not cached and target.data_ptr() % PAGE == 0 and target.numel() >= pages(size)
        view, done = target.numpy(), 0
        while done < size:
            direct = self.direct_io and past_cache
            part = view[done : min(pages(size) if direct else size, done + _PART)]
            try:
                got = os.preadv(self._handle(direct), [part.data], place + done)
            except OSError as error:
                if direct and error.errno == errno.EINVAL:
                    self.direct_io = False  # some file systems take the flag and refuse the read
                    continue
                raise
            if got == 0:
                raise OSError(errno.EIO, "the file ends early")
            digest.update(view[done : min(size, done + got)].data)
            done += got

    def _bring(self, place: int, size: int) -> None:
        """Have a block of the mapping in the page cache, read in one go. OSError, where touching it would be SIGBUS."""
        assert self._mapping is not None, "what is mapped is brought"
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._handle(), place, size, os.POSIX_FADV_WILLNEED)
        address = self._mapping.data_ptr() + place
        failed = _LIBC.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), _POPULATE_READ)
        if failed and ctypes.get_errno() == errno.EFAULT:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def drop_cache(self) -> None:
        """What was read or written through the page cache need not stay in it."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._handle(), 0, 0, os.POSIX_FADV_DONTNEED)

    def unlock(self) -> None:
        """Nothing more is put: others may."""
        fcntl.flock(self._handle(), fcntl.LOCK_UN)

    def close(self) -> None:
        """Idempotent; what was put and not committed is lost."""
        for name in ("_file", "_direct"):
            handle = getattr(self, name)
            if handle is not None:
                os.close(handle)
                setattr(self, name, None)

    def _handle(self, direct: bool = False) -> int:
        handle = self._direct if direct else self._file
        assert handle is not None, "the file is closed"
        return handle

    def __enter__(self) -> ExpertFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _blocks_at(header: ExpertFileHeader) -> int:
    return _records_at(len(json.dumps(asdict(header)).encode())) + pages(header.experts * 2 * _RECORD_BYTES)


def _records_at(header_bytes: int) -> int:
    return pages(_PREFIX.size + header_bytes)


def _name(expert: int, tensor_type: int) -> str:
    return f"{('gate_up', 'down')[tensor_type]} of expert {expert}"


def _sum(data: np.ndarray, recipe: bytes) -> int:
    digest = xxhash.xxh3_64(data.data)
    digest.update(recipe)
    return _not_nothing(digest)


def _not_nothing(digest: xxhash.xxh3_64) -> int:
    return digest.intdigest() or 1  # 0 says that nothing is here


def _nameless(directory: Path, header: ExpertFileHeader) -> tuple[int, str]:
    """A new file of no experts, open, and a name under which it can be linked: in no folder where the file system can,
    so that a process that is killed leaves nothing. OSError."""
    text = json.dumps(asdict(header)).encode()
    prefix = _PREFIX.pack(MAGIC, VERSION, len(text), xxhash.xxh3_64_intdigest(text))
    try:
        file = os.open(directory, os.O_TMPFILE | os.O_RDWR, 0o666)
        name = f"/proc/self/fd/{file}"
    except (OSError, AttributeError):
        name = str(directory / f".fluxmoe-experts-{os.getpid()}-{os.urandom(4).hex()}")
        file = os.open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
    try:
        _pwrite(file, memoryview(prefix + text), 0)
        os.ftruncate(file, ExpertFile.nbytes(header))
    except BaseException:
        os.close(file)
        if not name.startswith("/proc"):
            os.unlink(name)
        raise
    return file, name


def _lock(file: int, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise PackingError(f"{path} is being written by another process; wait for it, or give another place") from None


def _pwrite(file: int, view: memoryview, offset: int) -> None:
    view = view.cast("B")
    while len(view):
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written


def _read_header(path: Path, file: int) -> tuple[ExpertFileHeader, int]:
    """The header, and where the records begin."""
    prefix = os.pread(file, _PREFIX.size, 0)
    if len(prefix) < _PREFIX.size or prefix[: len(MAGIC)] != MAGIC:
        raise PackingError(f"{path} is no file of experts: it does not begin with {MAGIC.decode()}")
    _, version, size, total = _PREFIX.unpack(prefix)
    if version != VERSION:
        raise PackingError(f"{path} is of version {version}, this program reads version {VERSION}; pack it again")
    text = os.pread(file, size, _PREFIX.size) if size <= _MAX_HEADER else b""
    if len(text) != size or xxhash.xxh3_64_intdigest(text) != total:
        raise PackingError(f"{path} is damaged: its header's sum is wrong")
    try:
        fields = json.loads(text)
        header = ExpertFileHeader(**{**fields, "sizes": tuple(fields["sizes"])})
    except (ValueError, KeyError, TypeError, RecursionError):
        raise PackingError(f"{path} is damaged: its header is not valid") from None
    # All places follow from the header's length.
    if text != json.dumps(asdict(header)).encode():
        raise PackingError(f"{path} is damaged: its header is not as this program writes it")
    return header, _records_at(size)


def _difference(found: ExpertFileHeader, wanted: ExpertFileHeader) -> str:
    ours, theirs = asdict(wanted), asdict(found)
    return ", ".join(f"{key} is {theirs[key]}, not {ours[key]}" for key in ours if ours[key] != theirs[key])
