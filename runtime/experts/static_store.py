"""StaticStore: experts stay in the tier that they were put into.

RESIDENT  one device arena a layer and tensor type; kernels read it in place
PACKED    likewise, compressed
HOST      one host arena a layer and tensor type (page-locked for CUDA): a layer's load is one copy a type
DISK      a file a layer: a load reads several experts at a time
"""

from __future__ import annotations

from collections.abc import Sequence

from fluxmoe.kernels.ops import Recipes
from torch import Tensor

from ..devices import Device
from ..memory.budget import format_bytes
from ..memory.host_memory import HostMemoryError
from .disk import DiskTier, StoreError
from .layout import ExpertLayout
from .placement import DEVICE_TIERS, Tier
from .store import Block, DecodeExpert, ExpertStore, LoadPlan, Where


class StaticStore(ExpertStore):
    """disk: the files of the DISK tier, if there are experts in it; the store closes them."""

    moves = False

    def __init__(
        self,
        layout: ExpertLayout,
        device: Device,
        decode: DecodeExpert | None = None,
        disk: DiskTier | None = None,
    ) -> None:
        super().__init__(layout, device, decode)
        layers = range(layout.num_layers)
        self._members = {tier: [layout.placement.members(i, tier) for i in layers] for tier in Tier}
        self.disk = disk
        on_disk = {(i, expert) for i in layers for expert in self._members[Tier.DISK][i]}
        assert disk is not None or not on_disk, "experts on disk need files"
        if disk is not None:
            here = {where for where in on_disk if disk.has(*where)}
            self._missing -= here
            if layout.decodes(Tier.DISK):
                self._recipes |= {where: disk.recipes(*where) for where in here}
        try:
            self._arenas = {tier: [self._arena(i, tier) for i in layers] for tier in (*DEVICE_TIERS, Tier.HOST)}
        except BaseException:
            self.close()
            raise
        self.load_plans = [self._load_plan(i) for i in layers]

    def _load_plan(self, layer: int) -> LoadPlan:
        places = (self.layout.slot_places(layer, 0), self.layout.slot_places(layer, 1))
        host_runs: tuple[list, list] = ([], [])
        for d in (0, 1):
            if self.layout.streams(Tier.HOST) and (members := self._members[Tier.HOST][layer]):
                host_runs[d].append((self._arenas[Tier.HOST][layer][d], places[d][members[0]][0]))
        streamed = tuple(self.layout.streamed(layer))
        disk = tuple(expert for expert, tier in streamed if tier is Tier.DISK)
        return LoadPlan(layer, streamed, places, host_runs, disk, self._arenas[Tier.PACKED][layer])

    def _stride(self, tier: Tier, tensor_type: int) -> int:
        return self.layout.stride(self.layout.stored(tier), tensor_type)

    def _payload_bytes(self, layer: int, tier: Tier, tensor_type: int) -> int:
        members = self._members[tier][layer]
        return len(members) * self._stride(tier, tensor_type) if members else 0

    def _arena(self, layer: int, tier: Tier) -> tuple[Tensor, Tensor]:
        sizes = [self._payload_bytes(layer, tier, d) for d in (0, 1)]
        make = self._memory.empty if tier is Tier.HOST else self.device.empty
        try:
            gate_up, down = (make(size) for size in sizes)
        except (RuntimeError, HostMemoryError) as error:
            reason = str(error)
            if not isinstance(error, HostMemoryError):
                where = "host" if self.device.is_host else self.device.kind
                reason = f"cannot allocate {format_bytes(sum(sizes))} of {where} memory"
            raise StoreError(
                f"{reason} for the experts of a layer; another placement or alpha moves experts to another tier"
            ) from None
        return gate_up, down

    def stored(self, layer: int, expert: int) -> str:
        return self.layout.stored(self.tier_of(layer, expert))

    def _put(self, where: Where, blocks: Sequence[Tensor], recipes: Recipes) -> None:
        (layer, expert), tier = where, self.tier_of(*where)
        if tier is Tier.DISK:
            self.on_disk.put(layer, expert, blocks, recipes)
        else:
            place = self._members[tier][layer].index(expert)
            for d, block in enumerate(blocks):
                begin = place * self._stride(tier, d)
                self._arenas[tier][layer][d][begin : begin + block.numel()].copy_(block)
        if self.layout.decodes(tier):
            self._recipes[where] = recipes

    def seal(self) -> None:
        super().seal()
        if self.disk is not None:
            self.disk.flush()

    def slot_bytes(self, tensor_type: int) -> int:
        return self.layout.slot_bytes(tensor_type)

    def tier_bytes(self, tier: Tier) -> int:
        return sum(arena.nbytes for pair in self._arenas[tier] for arena in pair)

    def blocks_in_place(self, layer: int) -> dict[int, Block]:
        blocks: dict[int, Block] = {}
        for tier in (*DEVICE_TIERS, Tier.HOST):
            members = self._members[tier][layer]
            if members and not self.layout.streams(tier):
                arenas = (
                    self._blocks(self.layout.stored(tier), d, arena, members)
                    for d, arena in enumerate(self._arenas[tier][layer])
                )
                read = self.layout.read(tier)
                for expert, gate_up, down in zip(members, *arenas, strict=True):
                    blocks[expert] = Block((gate_up, down), read)
        if self.cache is not None:
            # Until they come, when the cache says where to.
            anywhere = Block(self.cache.pair(0), self.layout.read(Tier.DISK))
            blocks |= dict.fromkeys(self._members[Tier.DISK][layer], anywhere)
        return blocks
