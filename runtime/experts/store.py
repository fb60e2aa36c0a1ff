"""ExpertStore: the bytes of every expert, in the tier that placement chose; what static and moving stores both offer.

    StaticStore   static_store.py   experts stay where they were put, in any tier
    MovingStore   moving_store.py   experts change tier while serving; each has a copy in host memory

Blocks are made by the backend and opaque here; where which block lies, and in which format, says `layout`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
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

TENSOR_NAMES = ("gate_up", "down")
# Between chunks a load can be given up. 32 MiB are 2 ms of memory and 20 ms of a fast disk: quick enough to close,
# and rare enough that the copy thread seldom has to ask for the GIL.
_CHUNK = 32 << 20
Where = tuple[int, int]
# `ExpertOps.decode_expert`.
DecodeExpert = Callable[[str, int, Tensor, Tensor, Packed | None], None]


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
    recipe: Packed | None


class LoadPlan(NamedTuple):
    """What a load of one layer brings, and where: fixed when the load begins, whatever moves meanwhile.

    streamed: experts with their tiers, in the order of the slot; places: begin and end of each in the two buffers.
    disk: those that are read from files. By tensor type: host_runs (source, begin in the buffer) of every contiguous
    copy from host memory; packed: the compressed experts on the device that are decoded, if any.
    """

    layer: int
    streamed: tuple[tuple[int, Tier], ...]
    places: tuple[dict[int, tuple[int, int]], dict[int, tuple[int, int]]]
    host_runs: tuple[list[tuple[Tensor, int]], list[tuple[Tensor, int]]]
    disk: tuple[int, ...] = ()
    packed: tuple[Tensor | None, Tensor | None] = (None, None)

    def host_bytes(self, tensor_type: int) -> int:
        return sum(source.numel() for source, _ in self.host_runs[tensor_type])

    def copies(self) -> list[tuple[int, int, int]]:
        """(address, bytes, begin in the buffer) of every copy from host memory: what a captured load has fixed."""
        return [(source.data_ptr(), source.numel(), at) for runs in self.host_runs for source, at in runs]


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
        self._missing.remove(where)

    def seal(self) -> None:
        """All experts are here, and can be read from now on. StoreError otherwise."""
        if self._missing:
            layer, expert = min(self._missing)
            raise StoreError(f"the checkpoint lacks expert {expert} of layer {layer} ({len(self._missing)} in all)")

    @abstractmethod
    def stored(self, layer: int, expert: int) -> str:
        """The format in which `put` wants an expert."""

    @abstractmethod
    def _put(self, where: Where, blocks: Sequence[Tensor], recipes: Recipes) -> None:
        """Copy the blocks to where they belong; keep the recipes if the expert will ever be decoded."""

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

    def decodes(self, load_plan: LoadPlan, tensor_type: int, lie: Mapping[Tier, Tensor]) -> Iterator[Decode]:
        """What must be decoded into a slot; `lie`: where the payload of HOST and DISK experts lies now."""
        sources: dict[Tier, Tensor | None] = {Tier.PACKED: load_plan.packed[tensor_type], **lie}
        for tier in (Tier.PACKED, Tier.HOST, Tier.DISK):
            if not self.layout.decodes(tier):
                continue
            expert_format = self.layout.stored(tier)
            members = [expert for expert, where in load_plan.streamed if where is tier]
            blocks = self._blocks(expert_format, tensor_type, sources.get(tier), members)
            for expert, block in zip(members, blocks, strict=True):
                begin, end = load_plan.places[tensor_type][expert]
                yield Decode(expert_format, block, begin, end, self._recipes[load_plan.layer, expert][tensor_type])

    def _blocks(
        self, expert_format: str, tensor_type: int, source: Tensor | None, members: Sequence[int]
    ) -> list[Tensor]:
        """The blocks of as many experts as they lie in `source`, one behind the other."""
        if not members:
            return []
        assert source is not None, "whoever decodes experts says where their blocks lie"
        stride, size = self.layout.stride(expert_format, tensor_type), self.layout.sizes[expert_format][tensor_type]
        return [source[place * stride : place * stride + size] for place in range(len(members))]

    def read_into(
        self,
        load_plan: LoadPlan,
        tensor_type: int,
        slot: Tensor,
        staging: Tensor | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> tuple[int, int]:
        """Bring a layer's streamed blocks of one type into a slot buffer (uint8, host memory); returns the bytes read
        from (HOST, DISK). Changes nothing but the slot and the staging buffer.

        staging: where compressed blocks of the DISK tier go first, if they are decoded. Releases the GIL. Asks
        `cancelled` before every chunk of 32 MiB and returns early, with fewer bytes, once it says so. Raises
        StoreError naming file, layer and tensor type when the disk fails.
        """
        lie: dict[Tier, Tensor] = {}
        copied = 0
        for host, at in load_plan.host_runs[tensor_type]:
            if self.layout.decodes(Tier.HOST):
                lie[Tier.HOST] = host  # decoded from where it lies
                copied += host.numel()
                continue
            for begin in range(0, host.numel(), _CHUNK):
                if cancelled():
                    return copied, 0
                end = min(begin + _CHUNK, host.numel())
                stream_copy(slot[at + begin : at + end], host[begin:end])
                copied += end - begin
        read = 0
        if load_plan.disk:
            stride = self.layout.stride(self.layout.stored(Tier.DISK), tensor_type)
            if self.layout.decodes(Tier.DISK):
                assert staging is not None, "compressed experts on disk are read into a staging buffer"
                lie[Tier.DISK] = target = staging
                begins = [place * stride for place in range(len(load_plan.disk))]
            else:
                target, begins = slot, [load_plan.places[tensor_type][expert][0] for expert in load_plan.disk]
            targets = [target[begin : begin + stride] for begin in begins]
            read = self.on_disk.read(
                load_plan.layer, tensor_type, list(zip(load_plan.disk, targets, strict=True)), cancelled
            )
        for step in self.decodes(load_plan, tensor_type, lie):
            if cancelled():
                break
            self.decode(step.expert_format, tensor_type, step.block, slot[step.begin : step.end], step.recipe)
        return copied, read

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
