"""ExpertStore: the bytes of every expert, in the tier that placement chose.

    RESIDENT, PACKED   one device arena a layer and tensor type; kernels read it in place. On a CPU, experts of files
                       that hold them as they are read have no arena: the files are mapped
    HOST               one host arena a layer and tensor type (page-locked for CUDA): a layer's load is one copy a type
    DISK               a file a layer: a load reads several experts at a time

A StaticStore (static_store.py) keeps them there; experts that change tier while serving are in a MovingStore
(moving_store.py). Blocks are made by the backend and opaque here; where which block lies, and in which format, says
`layout`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from fluxmoe.kernels.cpu.copy import stream_copy
from fluxmoe.kernels.ops import Recipes
from fluxmoe.kernels.packing import Packed
from torch import Tensor

from ..devices import Device
from ..memory.host_memory import HostMemory
from .cache import ExpertCache
from .disk import DiskTier, StoreError
from .layout import ExpertLayout
from .placement import Tier

# Between chunks a load can be given up. 32 MiB are 2 ms of memory and 20 ms of a fast disk: quick enough to close,
# and rare enough that the copy thread seldom has to ask for the GIL.
_CHUNK = 32 << 20
Where = tuple[int, int]
# `ExpertOps.decode_expert`.
DecodeExpert = Callable[[str, int, Tensor, Tensor, Packed | None], None]
Cancelled = Callable[[], bool]
# Copies a source to its target; returns the bytes, fewer once cancelled.
Copy = Callable[[Tensor, Tensor, Cancelled], int]


class Block(NamedTuple):
    """A block as a kernel's table has it: uint8 [bytes] of both tensor types, and its format."""

    pair: tuple[Tensor, Tensor]
    expert_format: str


class LoadPlan(NamedTuple):
    """What a load of one layer brings, and where: fixed when the load begins, whatever moves meanwhile.

    streamed: experts with their tiers, in the order of the slot; places: begin and end of each in the two buffers. By
    tensor type: host_runs (source, begin in the buffer) of every contiguous
    copy from host memory; packed: the compressed experts on the device that are decoded, if any.
    """

    layer: int
    streamed: tuple[tuple[int, Tier], ...]
    places: tuple[dict[int, tuple[int, int]], dict[int, tuple[int, int]]]
    host_runs: tuple[list[tuple[Tensor, int]], list[tuple[Tensor, int]]]
    packed: tuple[Tensor | None, Tensor | None] = (None, None)

    def members(self, tier: Tier) -> list[int]:
        """Streamed experts of a tier, in the order of the slot."""
        return [expert for expert, each in self.streamed if each is tier]

    def host_bytes(self, tensor_type: int) -> int:
        return sum(source.numel() for source, _ in self.host_runs[tensor_type])

    def copies(self) -> list[tuple[int, int, int]]:
        """(address, bytes, begin in the buffer) of every copy from host memory: what a captured load has fixed."""
        return [(source.data_ptr(), source.numel(), at) for runs in self.host_runs for source, at in runs]


def copy_in_chunks(target: Tensor, source: Tensor, cancelled: Cancelled) -> int:
    """Copy inside host memory; asks `cancelled` before every chunk, and lets go of the GIL meanwhile."""
    for begin in range(0, source.numel(), _CHUNK):
        if cancelled():
            return begin
        stream_copy(target[begin : begin + _CHUNK], source[begin : begin + _CHUNK])
    return source.numel()


class ExpertStore(ABC):
    """Holds every expert once, or once and a copy. Fill with `put`, check with `seal`; use as a context manager, or
    call `close`.

    decode: None where no expert is ever decoded. Nothing here waits for the device. Only the thread that runs passes
    may call what changes a store; loads, in other threads, read the load plans that they were given.
    """

    # Whether experts may change tier, so that any layer may come to stream.
    moves: bool

    def __init__(self, layout: ExpertLayout, device: Device, decode: DecodeExpert | None) -> None:
        self.layout, self.device, self.decode = layout, device, decode or _no_decode
        self.disk: DiskTier | None = None
        self.cache: ExpertCache | None = None  # of the experts on disk that come on demand
        self._memory = HostMemory(device.asynchronous)
        self._recipes: dict[Where, Recipes] = {}
        self._missing = {(i, e) for i in range(layout.num_layers) for e in range(layout.num_experts)}
        # By layer: what its next load brings; and how often addresses or load plans have changed: tables of an older
        # epoch are made again.
        self.load_plans: list[LoadPlan] = []
        self.epochs = [0] * layout.num_layers

    def tier_of(self, layer: int, expert: int) -> Tier:
        return Tier(self.layout.placement.tiers[layer, expert])

    @property
    def on_demand(self) -> bool:
        """Whether kernels read HOST experts where they are."""
        return self.layout.formats.transfer == "on_demand"

    # Filling.

    def wants(self, layer: int, expert: int) -> bool:
        """Whether an expert is still to be put: one that a file has is here already."""
        return (layer, expert) in self._missing

    def put(self, layer: int, expert: int, blocks: Sequence[Tensor], recipes: Recipes = (None, None)) -> None:
        """Store one expert: its (gate/up, down) uint8 blocks, in host memory, in the format that `stored` says; they
        are copied. Changes no load plan and no table. StoreError for an expert that is here already, or does not exist.
        """
        where = layer, expert
        if where not in self._missing:
            raise StoreError(f"expert {expert} of layer {layer} is stored already or does not exist")
        sizes = self.layout.sizes[self.stored(layer, expert)]
        for block, size in zip(blocks, sizes, strict=True):
            assert block.numel() == size, f"{block.numel()} bytes, expected {size}"
        self._put(where, blocks, recipes)
        self.arrived(layer, expert, recipes)

    def arrived(self, layer: int, expert: int, recipes: Recipes) -> None:
        """The blocks of an expert that was wanted lie in its `target`: it is stored."""
        self._arrived((layer, expert), recipes)
        self._missing.remove((layer, expert))

    def seal(self) -> None:
        """All experts are here, and can be read from now on. StoreError otherwise."""
        if self._missing:
            layer, expert = min(self._missing)
            raise StoreError(f"the checkpoint lacks expert {expert} of layer {layer} ({len(self._missing)} in all)")

    @abstractmethod
    def stored(self, layer: int, expert: int) -> str:
        """The format in which `put` wants an expert."""

    @abstractmethod
    def target(self, layer: int, expert: int) -> tuple[Tensor, Tensor] | None:
        """Host memory in which the (gate/up, down) blocks of an expert that is wanted will lie, in the format that
        `stored` says: whoever writes them there says `arrived`. None for those that lie elsewhere."""

    @abstractmethod
    def _put(self, where: Where, blocks: Sequence[Tensor], recipes: Recipes) -> None:
        """Copy the blocks to where they belong."""

    @abstractmethod
    def _arrived(self, where: Where, recipes: Recipes) -> None:
        """The blocks are where they belong; keep the recipes if the expert will ever be decoded."""

    # What it takes.

    @abstractmethod
    def slot_bytes(self, tensor_type: int) -> int:
        """Bytes of one slot's buffer. The same for ever, whatever moves."""

    @abstractmethod
    def tier_bytes(self, tier: Tier) -> int:
        """Bytes that a tier in memory holds now."""

    @property
    def on_disk(self) -> DiskTier:
        assert self.disk is not None, "a store with experts on disk has files"
        return self.disk

    @property
    def mapped_bytes(self) -> int:
        """Bytes of experts that lie where files are mapped, in the page cache."""
        return 0

    # Reading.

    @abstractmethod
    def blocks_in_place(self, layer: int) -> dict[int, Block]:
        """Blocks of the layer's experts that kernels read where they are stored, by expert; those of a slot take
        precedence. They are right for as long as the layer's epoch does not change."""

    def slot_blocks(self, load_plan: LoadPlan, slot: tuple[Tensor, Tensor]) -> dict[int, Block]:
        """Blocks of a load plan's streamed experts inside a slot's two buffers, by expert."""
        blocks: dict[int, Block] = {}
        for expert, tier in load_plan.streamed:
            gate_up, down = (slot[d][slice(*load_plan.places[d][expert])] for d in (0, 1))
            blocks[expert] = Block((gate_up, down), self.layout.read(tier))
        return blocks

    def _blocks(self, tier: Tier, tensor_type: int, source: Tensor, count: int) -> list[Tensor]:
        """The blocks of `count` experts of a tier, one behind the other in `source`."""
        stride, size = self._stride(tier, tensor_type), self.layout.sizes[self.layout.stored(tier)][tensor_type]
        return [source[place * stride : place * stride + size] for place in range(count)]

    def _stride(self, tier: Tier, tensor_type: int) -> int:
        return self.layout.stride(self.layout.stored(tier), tensor_type)

    def read_into(
        self, load_plan: LoadPlan, tensor_type: int, slot: Tensor, staging: Mapping[Tier, Tensor],
        copy: Copy = copy_in_chunks, cancelled: Cancelled = lambda: False,
    ) -> tuple[int, int]:  # fmt: skip
        """Bring a layer's streamed blocks of one type into a slot buffer (uint8); returns the bytes read from (HOST,
        DISK). Changes nothing but the slot and the staging buffers.

        staging: by tier, where compressed blocks go before they are decoded; HOST blocks without one are decoded where
        they lie. Returns early, with fewer bytes, once `cancelled` says so. Raises StoreError naming file, layer and
        tensor type when the disk fails.
        """
        layout, copied = self.layout, 0
        compressed: dict[Tier, Tensor | None] = {Tier.PACKED: load_plan.packed[tensor_type], **staging}
        # Tiers deliver at the same time, so that a layer takes as long as the slowest of them (§4.2 of the paper).
        finish = self._begin_reads(load_plan, tensor_type, slot, staging, cancelled)
        try:
            for source, at in load_plan.host_runs[tensor_type]:
                if not layout.decodes(Tier.HOST):
                    copied += copy(slot[at : at + source.numel()], source, cancelled)
                elif Tier.HOST in staging:
                    copied += copy(staging[Tier.HOST][: source.numel()], source, cancelled)
                else:
                    compressed[Tier.HOST] = source
                    copied += source.numel()
        finally:
            read = finish()
        for tier, memory in compressed.items():
            members = load_plan.members(tier) if layout.decodes(tier) else []
            if not members:
                continue
            assert memory is not None, "blocks that are decoded lie somewhere"
            for expert, block in zip(members, self._blocks(tier, tensor_type, memory, len(members)), strict=True):
                if cancelled():
                    return copied, read
                begin, end = load_plan.places[tensor_type][expert]
                recipe = self._recipes[load_plan.layer, expert][tensor_type]
                self.decode(layout.stored(tier), tensor_type, block, slot[begin:end], recipe)
        return copied, read

    def _begin_reads(
        self, load_plan: LoadPlan, tensor_type: int, slot: Tensor, staging: Mapping[Tier, Tensor], cancelled: Cancelled
    ) -> Callable[[], int]:
        """Begin to read a load plan's blocks of one type from files; see `DiskTier.begin`."""
        if not (on_disk := load_plan.members(Tier.DISK)):
            return lambda: 0
        stride, places = self._stride(Tier.DISK, tensor_type), load_plan.places[tensor_type]
        if self.layout.decodes(Tier.DISK):
            target, begins = staging[Tier.DISK], [place * stride for place in range(len(on_disk))]
        else:
            target, begins = slot, [places[expert][0] for expert in on_disk]
        targets = [(expert, target[at : at + stride]) for expert, at in zip(on_disk, begins, strict=True)]
        return self.on_disk.begin(load_plan.layer, tensor_type, targets, cancelled)

    def close(self) -> None:
        """Give files and page-locked memory back; nothing in the store may be used any more. Idempotent."""
        self._memory.close()
        if self.cache is not None:
            self.cache.close()
        if self.disk is not None:
            self.disk.close()

    def __enter__(self) -> ExpertStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _no_decode(expert_format: str, tensor_type: int, block: Tensor, out: Tensor, recipe: Packed | None) -> None:
    raise AssertionError("this store was made without a decoder")
