"""StaticStore: every expert stays in the tier that placement chose, or where its file is mapped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fluxmoe.kernels.ops import Recipes
from fluxmoe.kernels.packing.expert_file import ExpertFile
from torch import Tensor

from ..devices import Device
from ..memory.budget import format_bytes
from ..memory.host_memory import HostMemoryError
from .disk import DiskTier, StoreError
from .layout import ExpertLayout
from .placement import DEVICE_TIERS, Tier
from .store import Block, DecodeExpert, ExpertStore, LoadPlan, Where


class StaticStore(ExpertStore):
    """disk: the files of the DISK tier, if there are experts in it; the store closes them. host: by layer the arenas of
    the HOST tier, filled already, in memory of the caller's; None: they are allocated here, for `put` to fill. files:
    by layer, of blocks as kernels of this device read them: what these read in place in host memory is mapped there,
    and `target` says so; the caller may close them."""

    moves = False

    def __init__(
        self,
        layout: ExpertLayout,
        device: Device,
        decode: DecodeExpert | None = None,
        disk: DiskTier | None = None,
        host: Sequence[tuple[Tensor, Tensor]] | None = None,
        files: Mapping[int, ExpertFile] | None = None,
    ) -> None:
        super().__init__(layout, device, decode)
        self._files = dict(files or {}) if device.is_host else {}
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
        if host is not None:
            self._missing -= {(i, expert) for i in layers for expert in self._members[Tier.HOST][i]}
        try:
            self._arenas = {tier: [self._arena(i, tier) for i in layers] for tier in DEVICE_TIERS}
            self._arenas[Tier.HOST] = [self._arena(i, Tier.HOST) for i in layers] if host is None else list(host)
            self._rooms = {tier: [self._rooms_of(i, tier) for i in layers] for tier in self._arenas}
        except BaseException:
            self.close()
            raise
        self.load_plans = [self._load_plan(i) for i in layers]

    def _load_plan(self, layer: int) -> LoadPlan:
        places = (self.layout.slot_places(layer, 0), self.layout.slot_places(layer, 1))
        host_runs: tuple[list, list] = ([], [])
        if self.layout.streams(Tier.HOST) and (members := self._members[Tier.HOST][layer]):
            for d, arena in enumerate(self._arenas[Tier.HOST][layer]):
                host_runs[d].append((arena, places[d][members[0]][0]))
        streamed = tuple(self.layout.streamed(layer))
        return LoadPlan(layer, streamed, places, host_runs, self._arenas[Tier.PACKED][layer])

    def _arena(self, layer: int, tier: Tier) -> tuple[Tensor, Tensor]:
        members = [] if self._maps(layer, tier) else self._members[tier][layer]
        sizes = [len(members) * self._stride(tier, d) if members else 0 for d in (0, 1)]
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

    def _maps(self, layer: int, tier: Tier) -> bool:
        """Whether a layer's experts of a tier lie where their file is mapped."""
        if tier not in DEVICE_TIERS or layer not in self._files or self.layout.streams(tier):
            return False
        return self._files[layer].header.format == self.layout.stored(tier)

    def _rooms_of(self, layer: int, tier: Tier) -> list[tuple[Tensor, Tensor]]:
        """The (gate/up, down) blocks of a layer's experts of a tier in memory, in order."""
        members = self._members[tier][layer]
        if not members:
            return []
        if not self._maps(layer, tier):
            arenas = enumerate(self._arenas[tier][layer])
            gate_ups, downs = (self._blocks(tier, d, arena, len(members)) for d, arena in arenas)
            return list(zip(gate_ups, downs, strict=True))
        try:
            return [self._files[layer].mapped(expert) for expert in members]
        except OSError as error:
            raise StoreError(f"{self._files[layer].path} cannot be mapped: {error.strerror}") from None

    def stored(self, layer: int, expert: int) -> str:
        return self.layout.stored(self.tier_of(layer, expert))

    def _put(self, where: Where, blocks: Sequence[Tensor], recipes: Recipes) -> None:
        if self.tier_of(*where) is Tier.DISK:
            self.on_disk.put(*where, blocks, recipes)
            return
        for room, block in zip(self._room(where), blocks, strict=True):
            room.copy_(block)

    def _room(self, where: Where) -> tuple[Tensor, Tensor]:
        """The blocks of an expert in memory."""
        (layer, expert), tier = where, self.tier_of(*where)
        return self._rooms[tier][layer][self._members[tier][layer].index(expert)]

    def target(self, layer: int, expert: int) -> tuple[Tensor, Tensor] | None:
        tier = self.tier_of(layer, expert)
        in_host = tier is Tier.HOST or (tier is not Tier.DISK and self.device.is_host)
        return self._room((layer, expert)) if in_host else None

    def _arrived(self, where: Where, recipes: Recipes) -> None:
        if self.layout.decodes(self.tier_of(*where)):
            self._recipes[where] = recipes

    def seal(self) -> None:
        super().seal()
        if self.disk is not None:
            self.disk.flush()

    def slot_bytes(self, tensor_type: int) -> int:
        return self.layout.slot_bytes(tensor_type)

    def tier_bytes(self, tier: Tier) -> int:
        return sum(arena.nbytes for pair in self._arenas[tier] for arena in pair) + self._mapped_bytes(tier)

    def _mapped_bytes(self, tier: Tier) -> int:
        mapped = sum(len(each) for i, each in enumerate(self._members[tier]) if self._maps(i, tier))
        return mapped * self.layout.expert_bytes(self.layout.stored(tier)) if mapped else 0

    @property
    def mapped_bytes(self) -> int:
        return sum(map(self._mapped_bytes, DEVICE_TIERS))

    def blocks_in_place(self, layer: int) -> dict[int, Block]:
        blocks: dict[int, Block] = {}
        for tier in (*DEVICE_TIERS, Tier.HOST):
            if not self.layout.streams(tier):
                rooms = zip(self._members[tier][layer], self._rooms[tier][layer], strict=True)
                blocks |= {expert: Block(pair, self.layout.read(tier)) for expert, pair in rooms}
        if self.cache is not None:
            # Until they come, when the cache says where to.
            anywhere = Block(self.cache.any_pair(), self.layout.read(Tier.DISK))
            blocks |= dict.fromkeys(self._members[Tier.DISK][layer], anywhere)
        return blocks
