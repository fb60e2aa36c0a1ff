"""ExpertStore: the bytes of every expert, in the tier that placement chose.

    RESIDENT  one device arena a layer and tensor type; kernels read it in place
    HOST      one host arena a layer and tensor type (pinned for CUDA): a layer's load is one copy a type
    DISK      one spill file, unlinked as soon as it is open, so that nothing is left whatever happens

Blocks are packed by the backend and opaque here. A block starts every `stride` bytes, a multiple of 64; the
ledger counts strides. A streamed layer fills its slot with its HOST experts, then its DISK experts, ids ascending
(`slot_order`). A packed tier would be one more arena here and one more format in the layer's table.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from fluxmoe.kernels.cpu.copy import stream_copy
from fluxmoe.kernels.expert_table import FORMAT_DENSE
from torch import Tensor

from .budget import format_bytes
from .placement import Placement, Tier

TENSOR_NAMES = ("gate_up", "down")
_ALIGNMENT = 64
# O_DIRECT wants offsets, lengths and addresses in multiples of the logical block size; 4096 suits all devices.
PAGE = 4096
# Between chunks a load can be given up. 32 MiB are 2 ms of memory and 20 ms of a fast disk: quick enough to close,
# and rare enough that the copy thread seldom has to ask for the GIL.
_CHUNK = 32 << 20


class StoreError(ValueError):
    """Experts could not be stored or read back."""


def strides(tensor_bytes: Sequence[int]) -> tuple[int, int]:
    """Distance of blocks of each tensor type inside an arena or a slot."""
    gate_up, down = (-(-n // _ALIGNMENT) * _ALIGNMENT for n in tensor_bytes)
    return gate_up, down


def aligned_empty(nbytes: int, device: torch.device, pin: bool = False) -> Tensor:
    """uint8 [nbytes]; on the CPU it starts at a page boundary, as direct reads need."""
    if device.type == "cuda":
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    raw = torch.empty(nbytes + PAGE, dtype=torch.uint8, pin_memory=pin)
    skip = -raw.data_ptr() % PAGE
    return raw[skip : skip + nbytes]


class ExpertStore:
    """Holds every expert once. Fill with `put`, check with `seal`; use as a context manager, or call `close`.

    tensor_bytes: bytes of one expert's packed (GATE_UP, DOWN) blocks; expert_format: what they hold. disk_dir: where
    the spill file of the DISK tier goes (default: the system's temporary directory).
    """

    def __init__(
        self,
        placement: Placement,
        tensor_bytes: tuple[int, int],
        device: torch.device | str,
        *,
        expert_format: int = FORMAT_DENSE,
        disk_dir: Path | str | None = None,
    ) -> None:
        self.expert_format = expert_format
        self.placement, self.device = placement, torch.device(device)
        self.tensor_bytes, self.strides = tensor_bytes, strides(tensor_bytes)
        layers = range(len(placement.tiers))
        self._members = {tier: [np.flatnonzero(row == tier).tolist() for row in placement.tiers] for tier in Tier}
        pin = self.device.type == "cuda"
        if pin and any(self._members[Tier.DISK]):
            raise StoreError("the disk tier needs --device cpu for now; use placement host or balanced on CUDA")
        self._resident = [self._arenas(len(self._members[Tier.RESIDENT][i]), self.device) for i in layers]
        self._host = [self._arenas(len(self._members[Tier.HOST][i]), torch.device("cpu"), pin) for i in layers]
        # Where each (layer, type) begins in the spill file, on page boundaries.
        self._offsets: list[tuple[int, int]] = []
        end = 0
        for i in layers:
            begins = []
            for stride in self.strides:
                begins.append(end)
                end += -(-len(self._members[Tier.DISK][i]) * stride // PAGE) * PAGE
            self._offsets.append((begins[0], begins[1]))
        self.disk_bytes = end
        self._file = self._direct = None
        self.direct_io = False
        if end:
            self._open_spill(Path(disk_dir or tempfile.gettempdir()))
        self._missing = {(i, e) for i in layers for e in range(placement.tiers.shape[1])}

    def _arenas(self, experts: int, device: torch.device, pin: bool = False) -> tuple[Tensor, Tensor]:
        try:
            gate_up, down = (aligned_empty(experts * stride, device, pin) for stride in self.strides)
        except RuntimeError:
            need = format_bytes(experts * sum(self.strides))
            raise StoreError(
                f"cannot allocate {need} of {'host' if pin or device.type == 'cpu' else device.type} memory for "
                "the experts of a layer; another placement or alpha moves experts to another tier"
            ) from None
        return gate_up, down

    def _open_spill(self, directory: Path) -> None:
        try:
            self._file, name = tempfile.mkstemp(prefix="fluxmoe-experts-", dir=directory)
        except OSError as error:
            raise StoreError(f"cannot create a spill file for experts in {directory}: {error.strerror}") from None
        self._spill_name = name
        try:
            if hasattr(os, "O_DIRECT"):
                try:
                    self._direct = os.open(name, os.O_RDONLY | os.O_DIRECT)
                    self.direct_io = True
                except OSError:
                    pass  # tmpfs and others have no direct reads: the page cache will serve them
            os.posix_fallocate(self._file, 0, self.disk_bytes)
        except OSError as error:
            self.close()
            raise StoreError(
                f"no room for {self.disk_bytes} bytes of experts in {directory}: {error.strerror}"
            ) from None
        finally:
            os.unlink(name)

    @staticmethod
    def resident_bytes_of(placement: Placement, tensor_bytes: tuple[int, int]) -> int:
        """Device bytes of the resident experts, before anything is allocated."""
        return int((placement.tiers == Tier.RESIDENT).sum()) * sum(strides(tensor_bytes))

    @property
    def resident_bytes(self) -> int:
        return sum(arena.nbytes for pair in self._resident for arena in pair)

    @property
    def host_bytes(self) -> int:
        return sum(arena.nbytes for pair in self._host for arena in pair)

    def slot_order(self, layer: int) -> list[int]:
        """Streamed experts of a layer in the order in which they lie in a slot."""
        return self._members[Tier.HOST][layer] + self._members[Tier.DISK][layer]

    def put(self, layer: int, expert: int, gate_up: Tensor, down: Tensor) -> None:
        """Store one expert: its packed uint8 blocks, in host memory. Each expert exactly once."""
        assert (layer, expert) in self._missing, f"expert {expert} of layer {layer} is stored already or does not exist"
        tier = Tier(self.placement.tiers[layer, expert])
        place = self._members[tier][layer].index(expert)
        for d, block in enumerate((gate_up, down)):
            assert block.numel() == self.tensor_bytes[d], f"{block.numel()} bytes, expected {self.tensor_bytes[d]}"
            begin = place * self.strides[d]
            if tier is Tier.DISK:
                self._write(block, self._offsets[layer][d] + begin)
            else:
                arena = (self._resident if tier is Tier.RESIDENT else self._host)[layer][d]
                arena[begin : begin + block.numel()].copy_(block)
        self._missing.remove((layer, expert))

    def _write(self, block: Tensor, offset: int) -> None:
        view = memoryview(block.numpy())
        while len(view):
            try:
                written = os.pwrite(self._file, view, offset)
            except OSError as error:
                raise StoreError(f"writing experts to {self._spill_name} failed: {error.strerror}") from None
            view, offset = view[written:], offset + written

    def seal(self) -> None:
        """Check that every expert is here; flush the spill file and drop it from the page cache."""
        if self._missing:
            layer, expert = min(self._missing)
            raise StoreError(f"the checkpoint lacks expert {expert} of layer {layer} ({len(self._missing)} in all)")
        if self._file is not None:
            try:
                os.fsync(self._file)
            except OSError as error:
                raise StoreError(f"writing experts to {self._spill_name} failed: {error.strerror}") from None
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)

    def resident_blocks(self, layer: int) -> dict[int, tuple[Tensor, Tensor]]:
        """Blocks of the layer's resident experts, by expert."""
        return self._blocks(self._members[Tier.RESIDENT][layer], self._resident[layer])

    def slot_blocks(self, layer: int, slot: tuple[Tensor, Tensor]) -> dict[int, tuple[Tensor, Tensor]]:
        """Blocks of the layer's streamed experts inside a slot's two buffers, by expert."""
        return self._blocks(self.slot_order(layer), slot)

    def _blocks(self, experts: list[int], arenas: tuple[Tensor, Tensor]) -> dict[int, tuple[Tensor, Tensor]]:
        blocks = {}
        for place, expert in enumerate(experts):
            gate_up, down = (
                arena[place * stride : place * stride + n]
                for arena, stride, n in zip(arenas, self.strides, self.tensor_bytes, strict=True)
            )
            blocks[expert] = (gate_up, down)
        return blocks

    def host_arena(self, layer: int, tensor_type: int) -> Tensor:
        """All HOST blocks of a layer and tensor type, contiguous: the source of one copy."""
        return self._host[layer][tensor_type]

    def read_into(
        self, layer: int, tensor_type: int, slot: Tensor, cancelled: Callable[[], bool] = lambda: False
    ) -> int:
        """Copy a layer's streamed blocks of one type into a slot buffer (uint8, host memory); returns the bytes.

        Releases the GIL. Asks `cancelled` before every chunk of 32 MiB and returns early, with fewer bytes, once it
        says so. Raises StoreError naming file, layer and tensor type when the disk fails.
        """
        host = self._host[layer][tensor_type]
        for begin in range(0, host.numel(), _CHUNK):
            if cancelled():
                return begin
            end = min(begin + _CHUNK, host.numel())
            stream_copy(slot[begin:end], host[begin:end])
        disk = len(self._members[Tier.DISK][layer]) * self.strides[tensor_type]
        return host.numel() + self._read(layer, tensor_type, slot[host.numel() : host.numel() + disk], cancelled)

    def _read(self, layer: int, tensor_type: int, target: Tensor, cancelled: Callable[[], bool]) -> int:
        if target.numel() == 0:
            return 0
        view, offset = memoryview(target.numpy()), self._offsets[layer][tensor_type]
        what = f"{TENSOR_NAMES[tensor_type]} experts of layer {layer} from {self._spill_name}"
        while len(view):
            if cancelled():
                break
            direct = (
                self.direct_io and len(view) >= PAGE and (target.data_ptr() + target.numel() - len(view)) % PAGE == 0
            )
            part = view[: min(len(view) // PAGE * PAGE if direct else len(view), _CHUNK)]
            try:
                got = os.preadv(self._direct if direct else self._file, [part], offset)
            except OSError as error:
                if direct and error.errno == errno.EINVAL:
                    self.direct_io = False  # some file systems take the flag and refuse the read
                    continue
                raise StoreError(f"reading {what} failed: {error.strerror}") from None
            if got == 0:
                raise StoreError(f"reading {what} failed: the file ends {len(view)} bytes early")
            view, offset = view[got:], offset + got
        return target.numel() - len(view)

    def close(self) -> None:
        """Give the spill file back. Idempotent."""
        for name in ("_file", "_direct"):
            handle = getattr(self, name)
            if handle is not None:
                os.close(handle)
                setattr(self, name, None)

    def __enter__(self) -> ExpertStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
