"""MovingStore: experts that change tier while serving. A heap for each device tier, and a copy of all in host memory.

    HOST      every expert, in the format that the GEMM reads; page-locked on CUDA
    PACKED    a heap of such blocks on the device         (absent where the host's format is dense)
    RESIDENT  a heap of dense blocks on the device

What changes is a layer's plan and its table, never a block that a kernel may be reading.

An expert that has left the device streams from the next load of its layer on. For loads that were begun before, the
table has its address in host memory: there kernels read it in place, once or twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
from fluxmoe.kernels.expert_table import DOWN, GATE_UP
from fluxmoe.kernels.formats import DENSE
from fluxmoe.kernels.ops import Recipes
from torch import Tensor

from ..devices import Device
from ..memory.region import BlockPool
from .disk import StoreError
from .heap import ExpertHeap
from .layout import ExpertLayout
from .placement import DEVICE_TIERS, Placement, Tier
from .store import Block, DecodeExpert, ExpertStore, LayerPlan, Where

Copy = Callable[[Tensor, Tensor], object]


class MovingStore(ExpertStore):
    """Experts move between the device and host memory, where each has a copy.

    layout: its HOST format is dense, or one that kernels read in place and that the PACKED tier has too. pool: gives
    the device tiers their memory. most_streamed: experts of a layer that a slot holds. decode: packed experts become
    dense with it.
    """

    moves = True

    def __init__(
        self, layout: ExpertLayout, device: Device, pool: BlockPool, most_streamed: int,
        decode: DecodeExpert | None = None,
    ) -> None:  # fmt: skip
        tiers, stored = layout.placement.tiers, layout.stored(Tier.HOST)
        if (tiers == Tier.DISK).any():
            raise StoreError("experts that move need their copies in host memory; choose a placement without disk")
        if layout.read(Tier.HOST) != stored or (layout.stored(Tier.PACKED) != stored != DENSE):
            raise StoreError("experts that move have one format that the GEMM reads, in host memory, slots and device")
        if stored == DENSE and (tiers == Tier.PACKED).any():
            raise StoreError("experts that are compressed on the device and move are so in host memory too")
        if tiers.size and (tiers == Tier.HOST).sum(axis=1).max() > most_streamed:
            raise StoreError(f"more than {most_streamed} experts of a layer lie in host memory; give slots more room")
        super().__init__(layout, device, decode)
        self.most_streamed, self.format = most_streamed, stored
        self.device_tiers = (Tier.RESIDENT,) if stored == DENSE else (Tier.RESIDENT, Tier.PACKED)
        self._strides = self._both(stored)
        self.heaps: dict[Tier, ExpertHeap] = {}
        try:
            self._host = [
                tuple(self._memory.empty(layout.num_experts * stride) for stride in self._strides)
                for _ in range(layout.num_layers)
            ]
            for tier in self.device_tiers:
                sizes, strides = layout.sizes[layout.stored(tier)], self._both(layout.stored(tier))
                self.heaps[tier] = ExpertHeap(pool, sizes, strides, most=tiers.size)
        except BaseException:
            self.close()
            raise
        self.plans = [self._plan(i) for i in range(layout.num_layers)]

    def _both(self, expert_format: str) -> tuple[int, int]:
        return self.layout.stride(expert_format, GATE_UP), self.layout.stride(expert_format, DOWN)

    def _plan(self, layer: int) -> LayerPlan:
        places = (self.layout.slot_places(layer, GATE_UP), self.layout.slot_places(layer, DOWN))
        runs: tuple[list, list] = ([], [])
        for d, stride in enumerate(self._strides):
            for first, last in _runs(places[d]):
                source = self._host[layer][d][first * stride : (last + 1) * stride]
                runs[d].append((source, places[d][first][0]))
        return LayerPlan(layer, tuple(self.layout.streamed(layer)), places, runs)

    def slot_bytes(self, tensor_type: int) -> int:
        return self.most_streamed * self._strides[tensor_type]

    def tier_bytes(self, tier: Tier) -> int:
        if tier is Tier.HOST:
            return sum(arena.nbytes for pair in self._host for arena in pair)
        return self.heaps[tier].nbytes if tier in self.heaps else 0

    def stored(self, layer: int, expert: int) -> str:
        return self.format

    def _put(self, where: Where, blocks: Sequence[Tensor], recipes: Recipes) -> None:
        host, tier = self._host_pair(where), self.tier_of(*where)
        for target, block in zip(host, blocks, strict=True):
            target.copy_(block)
        self._recipes[where] = recipes
        if tier in self.heaps:
            heap = self.heaps[tier]
            unit = heap.reserve()
            for d, (target, source) in enumerate(zip(heap.pair(unit), host, strict=True)):
                if self.layout.stored(tier) == self.format:
                    target.copy_(source)
                else:
                    self.decode(self.format, d, source.to(self.device.torch), target, recipes[d])
            heap.settle(unit, where)

    def _host_pair(self, where: Where) -> tuple[Tensor, Tensor]:
        layer, expert = where
        gate_up, down = (
            arena[expert * stride : expert * stride + size]
            for arena, stride, size in zip(
                self._host[layer], self._strides, self.layout.sizes[self.format], strict=True
            )
        )
        return gate_up, down

    def blocks_in_place(self, layer: int) -> dict[int, Block]:
        blocks = {}
        for expert in range(self.layout.num_experts):
            where, tier = (layer, expert), self.tier_of(layer, expert)
            pair = self.heaps[tier].pair_of(where) if tier in self.heaps else self._host_pair(where)
            blocks[expert] = Block(pair, self.layout.stored(tier))
        return blocks

    def close(self) -> None:
        for heap in self.heaps.values():
            heap.close()
        super().close()

    # Moves, between iterations only.

    def fetch(self, where: Where, target: Tier, unit: int, copy: Copy) -> None:
        """Bring an expert's bytes into a reserved unit of tier `target`; for the thread that copies.

        A dense expert of a compressed store is decoded from its compressed block on the device, so it must be PACKED.
        """
        blocks = self.heaps[target].pair(unit)
        if self.layout.stored(target) == self.format:
            for block, source in zip(blocks, self._host_pair(where), strict=True):
                copy(block, source)
            return
        packed = self.heaps[Tier.PACKED].pair_of(where)
        for d in (GATE_UP, DOWN):
            self.decode(self.format, d, packed[d], blocks[d], self._recipes[where][d])

    def fetched_bytes(self, target: Tier) -> int:
        """Bytes that `fetch` into a tier brings from host memory."""
        return sum(self.layout.sizes[self.format]) if self.layout.stored(target) == self.format else 0

    def land(self, arrived: Iterable[tuple[Where, Tier, int]], failed: Iterable[tuple[Tier, int]] = ()) -> None:
        """The bytes of experts are in the units that were reserved for them in a tier: kernels read them there from the
        next table on, and what they had before is freed. `failed` units are given up."""
        arrived = list(arrived)
        for where, target, unit in arrived:
            self.heaps[target].settle(unit, where)
        # From the end, so that closing one gap does not move another reserved unit; the same goes for what is freed.
        for tier, unit in sorted(failed, key=lambda entry: -entry[1]):
            self._moved(self.heaps[tier].cancel(unit))
        for where, target, _ in arrived:
            self._set(where, target)

    def leave(self, where: Where) -> None:
        """The expert streams from the next load of its layer on; its unit is freed."""
        self._set(where, Tier.HOST)

    def _set(self, where: Where, tier: Tier) -> None:
        layer, old = where[0], self.layout
        source = Tier(old.placement.tiers[where])
        tiers = old.placement.tiers.copy()
        tiers[where] = tier
        tiers.setflags(write=False)
        self.layout = ExpertLayout(Placement(old.placement.name, tiers), old.sizes, old.formats, old.fused)
        self.plans[layer] = self._plan(layer)
        self.epochs[layer] += 1
        if source in self.heaps:
            self._moved(self.heaps[source].remove(where))

    def _moved(self, where: Where | None) -> None:
        if where is not None:
            self.epochs[where[0]] += 1

    def set_transfer(self, transfer: str) -> None:
        """How HOST experts reach kernels: whole | on_demand, see ExpertFormats."""
        old = self.layout
        formats = replace(old.formats, transfer=transfer)
        self.layout = ExpertLayout(old.placement, old.sizes, formats, old.fused)
        for layer in range(old.num_layers):
            self.plans[layer] = self._plan(layer)
            self.epochs[layer] += 1

    def check_integrity(self) -> None:
        """AssertionError unless every expert is where the placement says, and no heap has a gap."""
        tiers = self.layout.placement.tiers
        for tier, heap in self.heaps.items():
            heap.check_integrity({(int(i), int(e)) for i, e in np.argwhere(tiers == tier)})
        assert np.isin(tiers, (Tier.HOST, *DEVICE_TIERS)).all()


def _runs(experts: Iterable[int]) -> list[tuple[int, int]]:
    """First and last of each run of ids that follow one another."""
    runs: list[tuple[int, int]] = []
    for expert in experts:
        if runs and expert == runs[-1][1] + 1:
            runs[-1] = runs[-1][0], expert
        else:
            runs.append((expert, expert))
    return runs
