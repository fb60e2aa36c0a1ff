"""ExpertStore: the bytes of every expert, in the tier that placement chose.

    RESIDENT  one device arena a layer and tensor type; kernels read it in place
    PACKED    likewise, compressed
    HOST      one host arena a layer and tensor type (page-locked for CUDA): a layer's load is one copy a type
    DISK      one spill file, unlinked as soon as it is open, so that nothing is left whatever happens

Blocks are made by the backend and opaque here; where which block lies, and in which format, says `layout`.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from fluxmoe.kernels.cpu.copy import stream_copy
from fluxmoe.kernels.ops import Recipes
from torch import Tensor

from .budget import format_bytes
from .host_memory import PAGE, HostMemory, HostMemoryError
from .layout import ExpertLayout
from .placement import DEVICE_TIERS, Tier

TENSOR_NAMES = ("gate_up", "down")
# Between chunks a load can be given up. 32 MiB are 2 ms of memory and 20 ms of a fast disk: quick enough to close,
# and rare enough that the copy thread seldom has to ask for the GIL.
_CHUNK = 32 << 20


class StoreError(ValueError):
    """Experts could not be stored or read back."""


def aligned_empty(nbytes: int, device: torch.device) -> Tensor:
    """uint8 [nbytes]; on the CPU it starts at a page boundary, as direct reads need."""
    if device.type == "cuda":
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    raw = torch.empty(nbytes + PAGE, dtype=torch.uint8)
    skip = -raw.data_ptr() % PAGE
    return raw[skip : skip + nbytes]


class Block(NamedTuple):
    """A block as a kernel's table has it: uint8 [bytes] of both tensor types, and its format."""

    pair: tuple[Tensor, Tensor]
    expert_format: str


class Decode(NamedTuple):
    """A compressed block on its way into a slot: its format, its bytes, what its dense form fills in the buffer."""

    expert_format: str
    block: Tensor
    begin: int
    end: int
    recipe: object


class LayerPlan(NamedTuple):
    """What a load of one layer brings, and where: fixed when the load begins, whatever moves meanwhile.

    streamed: experts with their tiers, in the order of the slot; places: begin and end of each in the two buffers;
    host_runs: (source, begin in the buffer) of every contiguous copy from host memory, by tensor type.
    """

    layer: int
    streamed: tuple[tuple[int, Tier], ...]
    places: tuple[dict[int, tuple[int, int]], dict[int, tuple[int, int]]]
    host_runs: tuple[list[tuple[Tensor, int]], list[tuple[Tensor, int]]]

    def host_bytes(self, tensor_type: int) -> int:
        return sum(source.numel() for source, _ in self.host_runs[tensor_type])

    def copies(self) -> list[tuple[int, int, int]]:
        """(address, bytes, begin in the buffer) of every copy from host memory: what a captured load has fixed."""
        return [(source.data_ptr(), source.numel(), at) for runs in self.host_runs for source, at in runs]


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


class ExpertStore:
    """Holds every expert once. Fill with `put`, check with `seal`; use as a context manager, or call `close`.

    decode: `Ops.decode_expert`, for layouts that decode into slots. disk_dir: where the spill file of the DISK tier
    goes (default: the system's temporary directory).
    """

    # Whether experts may change tier while serving (moving_store.MovingStore).
    moves = False

    def __init__(
        self,
        layout: ExpertLayout,
        device: torch.device | str,
        *,
        decode: Callable[..., None] | None = None,
        disk_dir: Path | str | None = None,
    ) -> None:
        self.layout, self.device, self.decode = layout, torch.device(device), decode
        layers = range(layout.num_layers)
        self._members = {tier: [layout.placement.members(i, tier) for i in layers] for tier in Tier}
        self._recipes: dict[tuple[int, int], Recipes] = {}
        pin = self.device.type == "cuda"
        if pin and any(self._members[Tier.DISK]):
            raise StoreError("the disk tier needs --device cpu for now; use placement host or balanced on CUDA")
        self._memory = HostMemory(pin)
        self._file = self._direct = None
        self._offsets, self.disk_bytes = spill_offsets(layout)
        self.direct_io = False
        try:
            if self.disk_bytes:
                self._open_spill(Path(disk_dir or tempfile.gettempdir()))
            self._arenas = {tier: [self._arena(i, tier) for i in layers] for tier in (*DEVICE_TIERS, Tier.HOST)}
        except BaseException:
            self.close()
            raise
        self._missing = {(i, e) for i in layers for e in range(layout.num_experts)}
        self.plans = [self._plan(i) for i in layers]
        # By layer, counts changes of addresses or plans: tables of an older epoch are made again.
        self.epochs = [0] * layout.num_layers

    def _plan(self, layer: int) -> LayerPlan:
        places = (self.layout.slot_places(layer, 0), self.layout.slot_places(layer, 1))
        runs: tuple[list, list] = ([], [])
        if self.layout.streams(Tier.HOST) and self._members[Tier.HOST][layer]:
            for d in (0, 1):
                begin = places[d][self._members[Tier.HOST][layer][0]][0]
                runs[d].append((self._arenas[Tier.HOST][layer][d], begin))
        return LayerPlan(layer, tuple(self.layout.streamed(layer)), places, runs)

    def _stride(self, tier: Tier, tensor_type: int) -> int:
        return self.layout.stride(self.layout.stored(tier), tensor_type)

    def _payload_bytes(self, layer: int, tier: Tier, tensor_type: int) -> int:
        members = self._members[tier][layer]
        return len(members) * self._stride(tier, tensor_type) if members else 0

    def _arena(self, layer: int, tier: Tier) -> tuple[Tensor, Tensor]:
        sizes = [self._payload_bytes(layer, tier, d) for d in (0, 1)]
        make = self._memory.empty if tier is Tier.HOST else lambda size: aligned_empty(size, self.device)
        try:
            gate_up, down = (make(size) for size in sizes)
        except (RuntimeError, HostMemoryError) as error:
            reason = error
            if not isinstance(error, HostMemoryError):
                where = "host" if self.device.type == "cpu" else self.device.type
                reason = f"cannot allocate {format_bytes(sum(sizes))} of {where} memory"
            raise StoreError(
                f"{reason} for the experts of a layer; another placement or alpha moves experts to another tier"
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

    def slot_bytes(self, tensor_type: int) -> int:
        """Bytes of one slot's buffer."""
        return self.layout.slot_bytes(tensor_type)

    def tier_bytes(self, tier: Tier) -> int:
        """Bytes that a tier in memory holds."""
        return sum(arena.nbytes for pair in self._arenas[tier] for arena in pair)

    def stored(self, layer: int, expert: int) -> str:
        """The format in which `put` wants an expert."""
        return self.layout.stored(Tier(self.layout.placement.tiers[layer, expert]))

    def put(self, layer: int, expert: int, blocks: Sequence[Tensor], recipes: Recipes = (None, None)) -> None:
        """Store one expert: its (gate/up, down) uint8 blocks, in host memory, in the format of its tier. Each once."""
        assert (layer, expert) in self._missing, f"expert {expert} of layer {layer} is stored already or does not exist"
        tier = Tier(self.layout.placement.tiers[layer, expert])
        place = self._members[tier][layer].index(expert)
        sizes = self.layout.sizes[self.layout.stored(tier)]
        for d, block in enumerate(blocks):
            assert block.numel() == sizes[d], f"{block.numel()} bytes, expected {sizes[d]}"
            begin = place * self._stride(tier, d)
            if tier is Tier.DISK:
                self._write(block, self._offsets[layer][d] + begin)
            else:
                arena = self._arenas[tier][layer][d]
                arena[begin : begin + block.numel()].copy_(block)
        if self.layout.decodes(tier):
            self._recipes[layer, expert] = recipes
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

    def blocks_in_place(self, layer: int) -> dict[int, Block]:
        """Blocks of the layer's experts that kernels read where they are stored, by expert."""
        blocks = {}
        for tier in (*DEVICE_TIERS, Tier.HOST):
            if not self.layout.streams(tier):
                arenas = [self._payload(layer, tier, d, self._arenas[tier][layer][d]) for d in (0, 1)]
                for expert, pair in zip(self._members[tier][layer], zip(*arenas, strict=True), strict=True):
                    blocks[expert] = Block(pair, self.layout.read(tier))
        return blocks

    def slot_blocks(self, plan: LayerPlan, slot: tuple[Tensor, Tensor]) -> dict[int, Block]:
        """Blocks of a plan's streamed experts inside a slot's two buffers, by expert."""
        blocks = {}
        for expert, tier in plan.streamed:
            gate_up, down = (slot[d][slice(*plan.places[d][expert])] for d in (0, 1))
            blocks[expert] = Block((gate_up, down), self.layout.read(tier))
        return blocks

    def _payload(self, layer: int, tier: Tier, tensor_type: int, source: Tensor) -> list[Tensor]:
        """The blocks of a tier's experts as they lie in `source`."""
        members = self._members[tier][layer]
        if not members:
            return []
        stride, size = self._stride(tier, tensor_type), self.layout.sizes[self.layout.stored(tier)][tensor_type]
        return [source[place * stride : place * stride + size] for place in range(len(members))]

    def decodes(self, plan: LayerPlan, tensor_type: int, lie: Mapping[Tier, Tensor]) -> Iterator[Decode]:
        """What must be decoded into a slot; `lie`: where the payload of HOST and DISK experts lies now."""
        layer = plan.layer
        lie = {Tier.PACKED: self._arenas[Tier.PACKED][layer][tensor_type], **lie}
        for tier in (Tier.PACKED, Tier.HOST, Tier.DISK):
            if self.layout.decodes(tier):
                blocks = self._payload(layer, tier, tensor_type, lie[tier]) if self._members[tier][layer] else []
                for expert, block in zip(self._members[tier][layer], blocks, strict=True):
                    begin, end = plan.places[tensor_type][expert]
                    recipe = self._recipes[layer, expert][tensor_type]
                    yield Decode(self.layout.stored(tier), block, begin, end, recipe)

    def read_into(
        self,
        plan: LayerPlan,
        tensor_type: int,
        slot: Tensor,
        staging: Tensor | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> int:
        """Bring a layer's streamed blocks of one type into a slot buffer (uint8, host memory); returns the bytes read
        from HOST and DISK.

        staging: where compressed blocks of the DISK tier go first, if they are decoded. Releases the GIL. Asks
        `cancelled` before every chunk of 32 MiB and returns early, with fewer bytes, once it says so. Raises
        StoreError naming file, layer and tensor type when the disk fails.
        """
        layer, copied = plan.layer, 0
        staged_host = None
        for host, at in plan.host_runs[tensor_type]:
            if self.layout.decodes(Tier.HOST):
                staged_host = host  # decoded from where it lies
                copied += host.numel()
                continue
            for begin in range(0, host.numel(), _CHUNK):
                if cancelled():
                    return copied
                end = min(begin + _CHUNK, host.numel())
                stream_copy(slot[at + begin : at + end], host[begin:end])
                copied += end - begin
        lies = {Tier.HOST: staged_host}
        if disk := self._payload_bytes(layer, Tier.DISK, tensor_type):
            lies[Tier.DISK] = staging[:disk]
            if not self.layout.decodes(Tier.DISK):
                at = plan.places[tensor_type][self._members[Tier.DISK][layer][0]][0]
                lies[Tier.DISK] = slot[at : at + disk]
            copied += self._read(layer, tensor_type, lies[Tier.DISK], cancelled)
        for step in self.decodes(plan, tensor_type, lies):
            if cancelled():
                break
            self.decode(step.expert_format, tensor_type, step.block, slot[step.begin : step.end], step.recipe)
        return copied

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
        """Give spill file and page-locked memory back; nothing in the store may be used any more. Idempotent."""
        self._memory.close()
        for name in ("_file", "_direct"):
            handle = getattr(self, name)
            if handle is not None:
                os.close(handle)
                setattr(self, name, None)

    def __enter__(self) -> ExpertStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
