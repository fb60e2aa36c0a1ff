"""MovingStore: experts that change tier while serving. Slabs of a pool on the device, and a copy of all in host memory.

    HOST      every expert, in the format that the GEMM reads; page-locked on CUDA
    PACKED    such blocks on the device, a slab an expert             (absent where the host's format is dense)
    RESIDENT  dense blocks on the device, a slab an expert; beside packed ones, whose slabs are smaller, two

What changes is a layer's load plan and its table, never a block that a kernel may be reading.

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
from ..memory.slabs import SlabError, SlabPool
from .disk import StoreError
from .footprint import EXPERT_LINES
from .layout import ExpertLayout
from .placement import DEVICE_TIERS, Tier
from .store import Block, DecodeExpert, ExpertStore, LoadPlan, Where

Copy = Callable[[Tensor, Tensor], object]
Slabs = tuple[int, ...]


class MovingStore(ExpertStore):
    """Experts move between the device and host memory, where each has a copy.

    layout: its HOST format is dense, or one that kernels read in place and that the PACKED tier has too. pool: gives
    experts their slabs, of `layout.slab_bytes` or more. most_streamed: experts of a layer that a slot holds. decode:
    packed experts become dense with it.
    """

    moves = True

    def __init__(
        self, layout: ExpertLayout, device: Device, pool: SlabPool, most_streamed: int,
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
        assert pool.slab_bytes >= layout.slab_bytes, f"slabs of {pool.slab_bytes} bytes are too small for an expert"
        self.pool, self.most_streamed, self.format = pool, most_streamed, stored
        self._strides = layout.stride(stored, GATE_UP), layout.stride(stored, DOWN)
        # Of experts on the device.
        self._slabs: dict[Where, Slabs] = {}
        try:
            self._host = [
                tuple(self._memory.empty(layout.num_experts * stride) for stride in self._strides)
                for _ in range(layout.num_layers)
            ]
        except BaseException:
            self.close()
            raise
        self.load_plans = [self._load_plan(i) for i in range(layout.num_layers)]

    def _load_plan(self, layer: int) -> LoadPlan:
        places = (self.layout.slot_places(layer, GATE_UP), self.layout.slot_places(layer, DOWN))
        runs: tuple[list, list] = ([], [])
        for d, stride in enumerate(self._strides):
            for first, last in _runs(places[d]):
                source = self._host[layer][d][first * stride : (last + 1) * stride]
                runs[d].append((source, places[d][first][0]))
        return LoadPlan(layer, tuple(self.layout.streamed(layer)), places, runs)

    def slot_bytes(self, tensor_type: int) -> int:
        return self.most_streamed * self._strides[tensor_type]

    def tier_bytes(self, tier: Tier) -> int:
        if tier is Tier.HOST:
            return sum(arena.nbytes for pair in self._host for arena in pair)
        return self.pool.bytes_of(EXPERT_LINES[tier]) if tier in EXPERT_LINES else 0

    def stored(self, layer: int, expert: int) -> str:
        return self.format

    def _put(self, where: Where, blocks: Sequence[Tensor], recipes: Recipes) -> None:
        for target, block in zip(self._host_pair(where), blocks, strict=True):
            target.copy_(block)

    def target(self, layer: int, expert: int) -> tuple[Tensor, Tensor]:
        return self._host_pair((layer, expert))

    def _arrived(self, where: Where, recipes: Recipes) -> None:
        host, tier = self._host_pair(where), self.tier_of(*where)
        self._recipes[where] = recipes
        if tier in DEVICE_TIERS:
            slabs = self._slabs[where] = self.reserve(tier)
            for d, (target, source) in enumerate(zip(self._pair(tier, slabs), host, strict=True)):
                if self.layout.stored(tier) == self.format:
                    target.copy_(source)
                else:
                    self.decode(self.format, d, source.to(self.device.torch), target, recipes[d])

    def _host_pair(self, where: Where) -> tuple[Tensor, Tensor]:
        layer, expert = where
        gate_up, down = (
            arena[expert * stride : expert * stride + size]
            for arena, stride, size in zip(
                self._host[layer], self._strides, self.layout.sizes[self.format], strict=True
            )
        )
        return gate_up, down

    def _pair(self, tier: Tier, slabs: Slabs) -> tuple[Tensor, Tensor]:
        """The (gate/up, down) blocks of an expert of a device tier in its slabs."""
        stored = self.layout.stored(tier)
        gate_up, down = self.layout.sizes[stored]
        at = self.layout.stride(stored, GATE_UP) if len(slabs) == 1 else 0
        return self.pool.memory[slabs[0]][:gate_up], self.pool.memory[slabs[-1]][at : at + down]

    def blocks_in_place(self, layer: int) -> dict[int, Block]:
        blocks = {}
        for expert in range(self.layout.num_experts):
            where, tier = (layer, expert), self.tier_of(layer, expert)
            pair = self._pair(tier, self._slabs[where]) if tier in DEVICE_TIERS else self._host_pair(where)
            blocks[expert] = Block(pair, self.layout.stored(tier))
        return blocks

    # Moves, between iterations only.

    def reserve(self, tier: Tier) -> Slabs:
        """Slabs for an expert that comes into a device tier. SlabError, and none is taken, if too few are free."""
        wanted = self.layout.slabs_each(tier, self.pool.slab_bytes)
        if wanted > self.pool.num_free:
            raise SlabError(f"it needs {wanted} free slabs, there are {self.pool.num_free}")
        return tuple(self.pool.take(EXPERT_LINES[tier]) for _ in range(wanted))

    def give(self, slabs: Slabs) -> None:
        """Free slabs that were reserved."""
        for slab in slabs:
            self.pool.give(slab)

    def fetch(self, where: Where, target: Tier, slabs: Slabs, copy: Copy) -> None:
        """Bring an expert's bytes into slabs that were reserved for tier `target`; for the thread that copies.

        A dense expert of a compressed store is decoded from its compressed block on the device, so it must be PACKED.
        """
        blocks = self._pair(target, slabs)
        if self.layout.stored(target) == self.format:
            for block, source in zip(blocks, self._host_pair(where), strict=True):
                copy(block, source)
            return
        packed = self._pair(Tier.PACKED, self._slabs[where])
        for d in (GATE_UP, DOWN):
            self.decode(self.format, d, packed[d], blocks[d], self._recipes[where][d])

    def fetched_bytes(self, target: Tier) -> int:
        """Bytes that `fetch` into a tier brings from host memory."""
        return sum(self.layout.sizes[self.format]) if self.layout.stored(target) == self.format else 0

    def land(self, where: Where, tier: Tier, slabs: Slabs = ()) -> None:
        """The expert is in a tier, on the device in slabs that were reserved for it: kernels read it there from the
        next table on, from host memory from the next load of its layer on; what it had before is freed."""
        tiers = self.layout.placement.tiers.copy()
        tiers[where] = tier
        self.layout = self.layout.placed(tiers)
        self._plan(where[0])
        self.give(self._slabs.pop(where, ()))
        if slabs:
            self._slabs[where] = slabs

    def set_transfer(self, transfer: str) -> None:
        """How HOST experts reach kernels: whole | on_demand, see ExpertFormats."""
        self.layout = replace(self.layout, formats=replace(self.layout.formats, transfer=transfer))
        for layer in range(self.layout.num_layers):
            self._plan(layer)

    def _plan(self, layer: int) -> None:
        """Tiers of a layer's experts have changed, or how they cross."""
        self.load_plans[layer] = self._load_plan(layer)
        self.epochs[layer] += 1

    def check_integrity(self) -> None:
        """AssertionError unless every expert is where the placement says, in slabs of its own."""
        tiers = self.layout.placement.tiers
        assert np.isin(tiers, (Tier.HOST, *DEVICE_TIERS)).all()
        assert self._slabs.keys() == {(int(i), int(e)) for i, e in np.argwhere(tiers != Tier.HOST)}
        for tier, line in EXPERT_LINES.items():
            taken = [slab for where, slabs in self._slabs.items() if tiers[where] == tier for slab in slabs]
            assert len(taken) == len(set(taken)), "two experts have one slab"
            assert set(taken) <= set(self.pool.held(line)), "an expert lies in a slab of others"
        self.pool.check_integrity()


def _runs(experts: Iterable[int]) -> list[tuple[int, int]]:
    """First and last of each run of ids that follow one another."""
    runs: list[tuple[int, int]] = []
    for expert in experts:
        if runs and expert == runs[-1][1] + 1:
            runs[-1] = runs[-1][0], expert
        else:
            runs.append((expert, expert))
    return runs
