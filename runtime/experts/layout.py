"""ExpertLayout: what a placement means in bytes. Pure arithmetic, shared by ledger, store, streamer and simulator.

Each tier stores experts in one format; a kernel reads them in place, or from a slot, dense or still compressed:

    tier      stored as         read by the kernels
    RESIDENT  dense             in place
    PACKED    formats.packed    in place where the GEMM can decode it, else decoded into a slot (the paper's way)
    HOST      formats.host      in a slot: as it is where the GEMM can decode it and formats.slot says so, else dense;
                                with formats.transfer on_demand in place, through the link
    DISK      formats.host      in a slot; with formats.transfer on_demand in a place of the cache

A slot holds a layer's streamed experts, PACKED before HOST before DISK, ids ascending, one buffer a tensor type.
Blocks begin every `stride` bytes, a multiple of 64, or of pages where experts are read from a disk; the ledger counts
strides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from fluxmoe.kernels.expert_table import DOWN, GATE_UP
from fluxmoe.kernels.formats import DEFAULT_COMPRESSED, DENSE
from fluxmoe.kernels.host_memory import PAGE

from .placement import Placement, Tier

# Of the two tensor types.
TENSOR_NAMES = ("gate_up", "down")
_ALIGNMENT = 64
TensorBytes = tuple[int, int]


class LayoutError(ValueError):
    """Formats that cannot be combined."""


@dataclass(frozen=True)
class ExpertFormats:
    """How experts are stored (a name of kernels.formats): compressed on the device, in host memory and files.

    slot: packed (the GEMM reads compressed experts in their slot, if it can) or decoded.
    transfer: whole (all HOST experts of a layer are copied into its slot ahead of time) or on_demand (kernels read
    those that a token was routed to where they are, in pinned memory; nothing is prefetched, so nothing is in vain).
    ahead: of files, where they come on demand, what the next layer is likely to lack comes in the disk's idle time.
    """

    packed: str = DEFAULT_COMPRESSED
    host: str = DENSE
    slot: str = "packed"
    transfer: str = "whole"
    ahead: bool = False


@dataclass(frozen=True, eq=False)
class ExpertLayout:
    """Formats, order and sizes of every tier and slot of one placement.

    sizes: bytes of an expert's (GATE_UP, DOWN) blocks by format; fused: the formats that kernels read in place.
    """

    placement: Placement
    sizes: Mapping[str, TensorBytes]
    formats: ExpertFormats = ExpertFormats()
    fused: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        far, host = np.isin(self.placement.tiers, (Tier.HOST, Tier.DISK)).any(), self.formats.host
        if self.formats.transfer == "on_demand" and far and host not in (DENSE, *self.fused):
            raise LayoutError(
                f"these kernels cannot read format {host} as it is; transfer it whole, or choose "
                f"{' or '.join((DENSE, *sorted(self.fused)))}"
            )

    def placed(self, tiers: np.ndarray) -> ExpertLayout:
        """The same with experts in other tiers, int8 [L, E], which may be written to no more."""
        tiers.setflags(write=False)
        return replace(self, placement=replace(self.placement, tiers=tiers))

    @property
    def num_layers(self) -> int:
        return self.placement.tiers.shape[0]

    @property
    def num_experts(self) -> int:
        return self.placement.tiers.shape[1]

    @cached_property
    def _alignment(self) -> int:
        # What is read past the page cache comes in whole pages.
        return PAGE if (self.placement.tiers == Tier.DISK).any() else _ALIGNMENT

    def stored(self, tier: Tier) -> str:
        """The format in which a tier holds its experts."""
        if tier is Tier.RESIDENT:
            return DENSE
        return self.formats.packed if tier is Tier.PACKED else self.formats.host

    def streams(self, tier: Tier) -> bool:
        """Whether kernels read a tier's experts from a slot."""
        if tier in (Tier.HOST, Tier.DISK):
            return self.formats.transfer == "whole"
        return tier is Tier.PACKED and self.stored(tier) not in self.fused

    def read(self, tier: Tier) -> str:
        """The format in which kernels meet a tier's experts."""
        stored = self.stored(tier)
        if stored in self.fused and (not self.streams(tier) or self.formats.slot == "packed"):
            return stored
        return DENSE

    def decodes(self, tier: Tier) -> bool:
        """Whether a tier's experts are decoded on their way into a slot."""
        return self.streams(tier) and self.stored(tier) != self.read(tier)

    def stride(self, expert_format: str, tensor_type: int) -> int:
        """Distance of blocks in bytes."""
        return -(-self.sizes[expert_format][tensor_type] // self._alignment) * self._alignment

    def expert_bytes(self, expert_format: str) -> int:
        """Bytes of one expert, both tensor types, as the ledger counts them."""
        return self.stride(expert_format, GATE_UP) + self.stride(expert_format, DOWN)

    # Experts that move lie in slabs of a pool, one or two each.

    @property
    def moving_tiers(self) -> tuple[Tier, ...]:
        """Device tiers that experts which move may be in."""
        return (Tier.RESIDENT,) if self.stored(Tier.HOST) == DENSE else (Tier.RESIDENT, Tier.PACKED)

    @property
    def slab_bytes(self) -> int:
        """The least that a slab must have: for an expert in the format in which it moves, or for any one block."""
        blocks = (self.stride(name, d) for name in self.sizes for d in (GATE_UP, DOWN))
        return max(self.expert_bytes(self.stored(Tier.HOST)), *blocks)

    def slabs_each(self, tier: Tier, slab_bytes: int) -> int:
        """Slabs of an expert: 1, or 2, a block in each, where both do not fit: a dense one beside packed ones, which
        takes two thirds of its slabs."""
        return 1 if self.expert_bytes(self.stored(tier)) <= slab_bytes else 2

    def tier_slabs(self, tier: Tier, slab_bytes: int) -> int:
        """Slabs of all experts of a device tier."""
        experts = int((self.placement.tiers == tier).sum())
        return experts * self.slabs_each(tier, slab_bytes) if experts else 0

    def streamed(self, layer: int) -> list[tuple[int, Tier]]:
        """Experts of a layer that pass through a slot, with their tiers, in the order of the slot."""
        tiers = [tier for tier in (Tier.PACKED, Tier.HOST, Tier.DISK) if self.streams(tier)]
        return [(expert, tier) for tier in tiers for expert in self.placement.members(layer, tier)]

    def slot_places(self, layer: int, tensor_type: int) -> dict[int, tuple[int, int]]:
        """Begin and end of each streamed expert's block in a slot's buffer."""
        places, begin = {}, 0
        for expert, tier in self.streamed(layer):
            expert_format = self.read(tier)
            places[expert] = (begin, begin + self.sizes[expert_format][tensor_type])
            begin += self.stride(expert_format, tensor_type)
        return places

    @cached_property
    def cached(self) -> int:
        """Experts that come on demand from files, into a cache."""
        return 0 if self.streams(Tier.DISK) else int((self.placement.tiers == Tier.DISK).sum())

    @cached_property
    def streamed_layers(self) -> list[int]:
        return [layer for layer in range(self.num_layers) if self.streamed(layer)]

    def slot_bytes(self, tensor_type: int) -> int:
        """Bytes of one slot's buffer: what the layer that streams most needs."""
        return max((self._bytes(layer, tensor_type, self.read) for layer in self.streamed_layers), default=0)

    def staging_bytes(self, tensor_type: int, tier: Tier) -> int:
        """Bytes in which a tier's experts of one layer wait until they are decoded, if they are."""
        layers = self.streamed_layers if self.decodes(tier) else []
        return max((self._bytes(layer, tensor_type, self.stored, (tier,)) for layer in layers), default=0)

    def _bytes(self, layer: int, tensor_type: int, expert_format, tiers: tuple[Tier, ...] = tuple(Tier)) -> int:
        experts = {tier: len(self.placement.members(layer, tier)) for tier in tiers if self.streams(tier)}
        return sum(count * self.stride(expert_format(tier), tensor_type) for tier, count in experts.items())

    def tier_bytes(self, tier: Tier) -> int:
        """Bytes of all experts of a tier."""
        experts = int((self.placement.tiers == tier).sum())
        return experts * self.expert_bytes(self.stored(tier)) if experts else 0
