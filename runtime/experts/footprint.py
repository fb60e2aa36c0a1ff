"""Where every expert goes, and what bytes its pager takes, line by line, before anything is allocated.

Pure arithmetic over sizes, so that pager, ledger and simulator agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
from fluxmoe.kernels.expert_table import DOWN, GATE_UP
from fluxmoe.kernels.formats import DENSE
from fluxmoe.kernels.ops import ExpertSizes
from fluxmoe.kernels.packing.expert_file import ExpertFileHeader

from ..devices import device_of
from ..memory.slabs import FREE
from .cache import CACHE_LINE, ExpertCache
from .config import PagingConfig
from .disk import StoreError
from .layout import ExpertLayout
from .placement import BY_BANDWIDTH, IN_FILES, Tier, place
from .slots import SlotSchedule

EXPERT_LINES = {Tier.RESIDENT: "resident_experts", Tier.PACKED: "packed_experts"}


def lay_out(
    num_layers: int, config: PagingConfig, ops: ExpertSizes, measure: Callable[[], Mapping[Tier, float]]
) -> ExpertLayout:
    """Tier and format of every expert. measure: bandwidths of the tiers, asked for only where they decide."""
    device_tier = Tier.RESIDENT if config.device_format == DENSE else Tier.PACKED
    bandwidths: dict[Tier, float] | None = None
    given = (config.alpha, config.disk_share) if config.placement in IN_FILES else (config.alpha,)
    if config.placement in BY_BANDWIDTH and None in given:
        if config.profile is not None:
            fused = config.device_format in ops.fused_formats
            bandwidths = config.profile.bandwidths(None if fused else config.device_format)
        else:
            # A GEMM that decodes in its loop is bound by bytes, and both tiers deliver the same compressed ones.
            bandwidths = dict(measure())
            bandwidths |= {Tier.PACKED: bandwidths[Tier.RESIDENT]}
        if (link := config.link_bandwidth) is not None:
            bandwidths |= {tier: min(bandwidths[tier], link) for tier in (Tier.HOST, Tier.DISK) if tier in bandwidths}
    placement = place(
        config.placement, num_layers, ops.dims.experts, alpha=config.alpha, disk=config.disk_share,
        dense=config.dense_share, device_tier=device_tier, bandwidths=bandwidths,
    )  # fmt: skip
    formats, used = config.formats, {DENSE}
    used |= {formats.packed} if (placement.tiers == Tier.PACKED).any() else set()
    used |= {formats.host} if config.adaptive or np.isin(placement.tiers, (Tier.HOST, Tier.DISK)).any() else set()
    return ExpertLayout(placement, {name: ops.expert_bytes(name) for name in used}, formats, ops.fused_formats)


def slot_schedule(layout: ExpertLayout, slots: int, moves: bool) -> tuple[list[int], SlotSchedule]:
    """Layers that have their turns of the slots, and the schedule of these. StoreError on less than 2 slots.

    moves: experts change tier while serving, so any layer may come to stream.
    """
    if slots < 2:
        raise StoreError(f"streaming needs at least 2 slots (one loads while one is read), got {slots} slots")
    if moves:
        return list(range(layout.num_layers)), SlotSchedule(layout.num_layers, slots)
    order = layout.streamed_layers
    # No more slots than layers; with one each, they are loaded once.
    used = min(slots, max(1, len(order)))
    return order, SlotSchedule(len(order), used, keeps_all=len(order) <= used)


class Footprint:
    """What a pager with this layout takes. ops: its kernels, or what has their sizes."""

    def __init__(self, layout: ExpertLayout, config: PagingConfig, ops: ExpertSizes) -> None:
        self.layout, self.config = layout, config
        self._ops_bytes, self._staged = ops.workspace_bytes, device_of(ops.device).streamer.staged

    def lines(self, slab_bytes: int = 0) -> dict[str, int]:
        """Device bytes by line: experts that lie there, slots, workspace. slab_bytes: of the host's pool that experts
        which move, or a cache of them, will be in, in whole slabs; 0: they are in one of the pager's own."""
        layout = self.layout
        if self.config.adaptive:
            size = slab_bytes or layout.slab_bytes
            experts = {line: size * layout.tier_slabs(tier, size) for tier, line in EXPERT_LINES.items()}
            if not slab_bytes:
                experts[FREE] = size * self.most_slabs(size) - sum(experts.values())
        else:
            experts = {line: layout.tier_bytes(tier) for tier, line in EXPERT_LINES.items()}
        lines = {**experts, "slots": self.slot_bytes, "workspace": self._ops_bytes + self.count_bytes}
        return lines | ({CACHE_LINE: self.cache_places() * (slab_bytes or self.place_bytes)} if layout.cached else {})

    @property
    def place_bytes(self) -> int:
        """Of an expert in a cache."""
        return self.layout.expert_bytes(self.layout.stored(Tier.DISK))

    def cache_places(self) -> int:
        """Experts that a cache holds in config.cache_bytes, at most all that may come; without, and at least, as few as
        work: `slots` layers' worth, of which one runs while the next are read."""
        if not self.layout.cached:
            return 0
        least = ExpertCache.least_places(self.layout, self.config.slots)
        return max(least, min(self.layout.cached, (self.config.cache_bytes or 0) // self.place_bytes))

    def most_slabs(self, slab_bytes: int, dense: bool = False) -> int:
        """Slabs that hold all experts: those that are dense now, or with `dense` all of them, as dense ones."""
        layout, tiers = self.layout, self.layout.placement.tiers
        as_dense = tiers.size if dense else int((tiers == Tier.RESIDENT).sum())
        counts = (Tier.RESIDENT, as_dense), (layout.moving_tiers[-1], tiers.size - as_dense)
        return sum(count * layout.slabs_each(tier, slab_bytes) for tier, count in counts)

    def host_lines(self, source: ExpertFileHeader | None = None) -> dict[str, int]:
        """Host bytes by line: experts that lie there, what one passes through on its way. source: of the files from
        which they come, if these hold blocks."""
        layout = self.layout
        host = layout.tier_bytes(Tier.HOST)
        if self.config.adaptive:  # a copy of every expert
            host = layout.placement.tiers.size * layout.expert_bytes(layout.stored(Tier.HOST))
        staging = sum(sum(sizes) for sizes in layout.sizes.values())
        placed = (Tier(tier) for tier in np.unique(layout.placement.tiers))
        stored = {layout.stored(Tier.HOST)} if self.config.adaptive else set(map(layout.stored, placed))
        if source is not None and stored != {source.format}:
            # A block of the file, decoded, and as it was before it was arranged.
            staging += sum(source.sizes) + 2 * sum(layout.sizes[DENSE])
        lines = {"host_experts": host, "staging": staging}
        return {line: nbytes for line, nbytes in lines.items() if nbytes}

    @property
    def most_streamed(self) -> int:
        """With experts that move: how many of a layer a slot must hold."""
        experts = self.layout.num_experts
        placed = int((self.layout.placement.tiers == Tier.HOST).sum(axis=1).max(initial=0))
        return max(1, placed, experts - math.ceil(self.config.least_alpha * experts))

    @property
    def slot_bytes(self) -> int:
        """Device bytes of all slots, and of what is staged beside them."""
        layout, slots = self.layout, self.config.slots
        if self.config.adaptive:
            return slots * self.most_streamed * layout.expert_bytes(layout.stored(Tier.HOST))
        used = slot_schedule(layout, slots, moves=False)[1].slots
        return sum(used * layout.slot_bytes(d) + layout.staging_bytes(d, self._staged) for d in (GATE_UP, DOWN))

    @property
    def counts_reads(self) -> bool:
        """Whether kernels may read experts in host memory, which the pager counts."""
        on_demand = self.layout.formats.transfer == "on_demand"
        return self.config.adaptive or (on_demand and bool((self.layout.placement.tiers == Tier.HOST).any()))

    @property
    def count_bytes(self) -> int:
        """Counts by expert, fp32: of tokens [L, E], for a planner; of reads in host memory [L, E], and [E] to make
        them from."""
        layers, experts = self.layout.placement.tiers.shape
        counts = layers if self.config.counts_routing else 0
        return 4 * experts * (counts + (layers + 1 if self.counts_reads else 0))
