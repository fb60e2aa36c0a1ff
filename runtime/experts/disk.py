"""DiskTier: experts in files, one a layer, read several at a time; the file itself is `kernels.packing.expert_file`.

The files are those of a packed checkpoint, or of a folder that was filled once and is used again, or, where nobody
names a folder, files without a name that go with the process.

Threads read, with preadv, and not io_uring: with eight reads in flight both give the same bytes/s, beside busy cores
too, and what threads cost beside a ring, 0.01 s of a core a GB, is a seventh of what summing up costs with either. The
binding that is kept for Python, liburing, holds the GIL while it waits and reads to a bytearray alone.
"""

from __future__ import annotations

import errno
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from fluxmoe.kernels.ops import Recipes
from fluxmoe.kernels.packing import PackingError
from fluxmoe.kernels.packing.expert_file import Check, ExpertFile, ExpertFileHeader, expert_file_name, pages
from torch import Tensor

from ..memory.budget import format_bytes
from ..memory.machine import lies_in_memory

# Reads in flight. A disk that gives 1.1 GB/s to one read of 8 MiB at a time gives 2.35 GB/s to four; and what is read
# waits for a core to sum it up, most of all beside kernels, so that with four the disk would wait too: LOG.md.
READERS = 8
# Written experts that may be lost with a crash, and must be packed again.
_UNCOMMITTED_BYTES = 256 << 20


class StoreError(ValueError):
    """Experts could not be stored or read back."""


class DiskTier:
    """Experts `members` of each layer in files of `folder`, or in nameless ones in `spill_dir`.

    A file that lacks some is open for adding them until `flush`. check: asked of every block that is read. StoreError
    for files of other experts, a folder in memory, or too little room.
    """

    def __init__(
        self, header: ExpertFileHeader, members: Mapping[int, Sequence[int]], folder: Path | None, spill_dir: Path,
        check: Check,
    ) -> None:  # fmt: skip
        self._files: dict[int, ExpertFile] = {}
        self._pending = 0
        # Bytes that were read, and nanoseconds during which at least one read was under way.
        self._read_bytes, self._busy_ns, self._under_way, self._since_ns = 0, 0, 0, 0
        self._counting = threading.Lock()
        self._readers = ThreadPoolExecutor(READERS, "expert-read")
        self.header, self._check = header, check
        try:
            # Before any file is made: what is refused leaves none.
            missing = sum(_missing(header, layer, experts, folder) for layer, experts in members.items())
            _require_room(folder or spill_dir, missing * sum(map(pages, header.sizes)))
            for layer, experts in members.items():
                self._files[layer] = _open(header, layer, experts, folder, spill_dir)
        except (PackingError, OSError) as error:
            self.close()
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise StoreError(f"experts cannot be kept in {folder or spill_dir}: {reason}") from None
        except BaseException:
            self.close()
            raise

    def has(self, layer: int, expert: int) -> bool:
        return layer in self._files and self._files[layer].has(expert)

    def recipes(self, layer: int, expert: int) -> Recipes:
        """What `decode_expert` needs beside the blocks. StoreError if the file is damaged."""
        try:
            return self._files[layer].recipes(expert)
        except PackingError as error:
            raise StoreError(str(error)) from None

    def put(self, layer: int, expert: int, blocks: Sequence[Tensor], recipes: Recipes) -> None:
        """Add an expert, host blocks. StoreError when the disk fails."""
        try:
            self._files[layer].put(expert, blocks, recipes)
            self._pending += sum(self.header.sizes)
            if self._pending >= _UNCOMMITTED_BYTES:
                self._commit()
        except OSError as error:
            raise StoreError(f"writing experts to {self._files[layer].path} failed: {error.strerror}") from None

    def _commit(self) -> None:
        for file in self._files.values():
            file.commit()
        self._pending = 0

    def flush(self) -> None:
        """All that was put is on the disk and no longer in the page cache; nothing more comes. StoreError."""
        try:
            self._commit()
        except OSError as error:
            raise StoreError(f"writing experts to disk failed: {error.strerror}") from None
        for file in self._files.values():
            file.drop_cache()
            file.unlock()

    def submit(
        self, layer: int, expert: int, tensor_type: int, target: Tensor, cancelled: Callable[[], bool] = lambda: False
    ) -> Future[int]:
        """Read a block into `target`, uint8 in host memory, in a thread of its own; bytes read, 0 once `cancelled`. The
        future has StoreError when the disk fails or the block is not what was written."""
        return self._readers.submit(self._read, layer, expert, tensor_type, target, cancelled)

    def _read(self, layer: int, expert: int, tensor_type: int, target: Tensor, cancelled: Callable[[], bool]) -> int:
        size = 0
        self._count(1)
        try:
            if cancelled():
                return 0
            self._files[layer].read(expert, tensor_type, target, self._check)
            size = self.header.sizes[tensor_type]
        except PackingError as error:
            raise StoreError(f"layer {layer}: {error}") from None
        finally:
            self._count(-1, size)
        return size

    def _count(self, more: int, nbytes: int = 0) -> None:
        """So many more reads are under way, after `nbytes` were read."""
        with self._counting:
            now = time.perf_counter_ns()
            if self._under_way:
                self._busy_ns += now - self._since_ns
            self._under_way, self._since_ns = self._under_way + more, now
            self._read_bytes += nbytes

    def read_so_far(self) -> tuple[int, int]:
        """Bytes that were read, and nanoseconds during which at least one read was under way, waiting for a link that
        is held to a rate included."""
        self._count(0)
        return self._read_bytes, self._busy_ns

    def begin(
        self, layer: int, tensor_type: int, targets: Sequence[tuple[int, Tensor]], cancelled: Callable[[], bool]
    ) -> Callable[[], int]:
        """Begin to read several experts' blocks at once. What is returned waits for all of them, and must be called:
        bytes read, fewer once `cancelled` says so, or StoreError."""
        reads = [self.submit(layer, expert, tensor_type, target, cancelled) for expert, target in targets]

        def finish() -> int:
            # All are waited for, whichever fails: none may write to a slot that its reader has given up.
            errors = [error for read in reads if (error := read.exception()) is not None]
            if errors:
                raise errors[0]
            return sum(read.result() for read in reads)

        return finish

    def close(self) -> None:
        """Wait for reads under way, drop the others, close the files. Idempotent."""
        self._readers.shutdown(cancel_futures=True)
        for file in self._files.values():
            file.close()
        self._files = {}


def _missing(header: ExpertFileHeader, layer: int, experts: Sequence[int], folder: Path | None) -> int:
    """How many experts of a layer its file lacks. PackingError."""
    path = None if folder is None else folder / expert_file_name(layer)
    if path is None or not path.exists():
        return len(experts)
    file = ExpertFile(path, header)
    try:
        return sum(not file.has(expert) for expert in experts)
    finally:
        file.close()


def _open(
    header: ExpertFileHeader, layer: int, experts: Sequence[int], folder: Path | None, spill_dir: Path
) -> ExpertFile:
    """PackingError, OSError."""
    if folder is None:
        return ExpertFile.temporary(spill_dir, header)
    path = folder / expert_file_name(layer)
    if path.exists():
        file = ExpertFile(path, header)
        if all(map(file.has, experts)):
            return file  # perhaps on a disk that nobody may write to, or in use by others
        file.close()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return ExpertFile.create(path, header)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise OSError(error.errno, f"{error.strerror}; name a directory that can be written (--disk-dir)") from None
        raise


def _require_room(directory: Path, nbytes: int) -> None:
    """StoreError unless so much can be written to a disk there."""
    if not nbytes:
        return
    made = next((each for each in (directory, *directory.parents) if each.exists()), directory)
    if lies_in_memory(made):
        raise StoreError(f"{directory} lies in memory, not on a disk; name a directory on a disk (--disk-dir)")
    free = shutil.disk_usage(made).free
    if nbytes > free:
        raise StoreError(
            f"{format_bytes(nbytes)} of experts do not fit {directory}, where {format_bytes(free)} are free; name "
            "another directory (--disk-dir)"
        )
