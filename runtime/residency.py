"""Dynamic residency: experts change tier while serving, and the KV cache takes and gives the memory (PAPER §4.3).

Experts of the device tier and KV blocks share one pool of physical blocks (`region`). Experts lie in a heap without
gaps: when one leaves, the last takes its place and the heap's end is unmapped; those blocks are mapped at the end of
the KV cache, and the scheduler admits more requests at once. The paper leaves that as future work.

    device → host   a change of the layer's plan, since every expert has a copy in host memory; its place on the device
                    is free once no load that was begun before still counts on it
    host → device   a place at the end of the heap, a copy in the background, then the change of plan

All changes happen between iterations, none of which waits for a copy. A move that cannot be made (no memory, KV blocks
in use, a copy that fails) leaves the old state, and says why in `refused`.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from fluxmoe.kernels.expert_table import TABLE_FORMATS
from fluxmoe.kernels.ops import Recipes
from torch import Tensor

from .budget import MemoryBudget
from .kv_cache import GrowableKVCache
from .layout import ExpertLayout
from .placement import DEVICE_TIERS, Placement, Tier
from .planner import Move, Observation, Planner, PlannerError
from .region import BlockPool, GrowableRegion, RegionError
from .scheduler import Scheduler
from .store import Block, ExpertStore, LayerPlan, StoreError, aligned_empty


class MovingStore(ExpertStore):
    """An ExpertStore whose experts move between one device tier and host memory, where each has a copy.

    layout: RESIDENT or PACKED experts, in a format that kernels read in place, and HOST ones in the same.
    most_streamed: experts of a layer that a slot holds.
    """

    moves = True

    def __init__(self, layout: ExpertLayout, device: torch.device, pool: BlockPool, most_streamed: int) -> None:
        present = [tier for tier in DEVICE_TIERS if (layout.placement.tiers == tier).any()] or [Tier.PACKED]
        stored = layout.stored(present[0])
        if len(present) > 1 or (layout.placement.tiers == Tier.DISK).any():
            raise StoreError("experts can move between one device tier and host memory: no disk, no dense share")
        if layout.stored(Tier.HOST) != stored or layout.read(Tier.HOST) != stored or not layout.streams(Tier.HOST):
            raise StoreError("experts that move have one format that the GEMM reads, in host memory, slots and device")
        self.device_tier, self.most_streamed = present[0], most_streamed
        if layout.placement.tiers.size and (layout.placement.tiers == Tier.HOST).sum(axis=1).max() > most_streamed:
            raise StoreError(f"more than {most_streamed} experts of a layer lie in host memory; give slots more room")
        self.layout, self.device, self.decode = layout, device, None
        self.format = stored
        self._sizes = layout.sizes[stored]
        self._strides = (layout.stride(stored, 0), layout.stride(stored, 1))
        self.unit_bytes = sum(self._strides)
        pin = device.type == "cuda"
        experts = layout.num_experts
        self._host = [
            tuple(aligned_empty(experts * stride, torch.device("cpu"), pin) for stride in self._strides)
            for _ in range(layout.num_layers)
        ]
        self.heap = GrowableRegion(pool.reserve(layout.num_layers * experts * self.unit_bytes))
        self._units = self.heap.region.tensor(0, (layout.num_layers * experts, self.unit_bytes), torch.uint8)
        self._owner: list[tuple[int, int]] = []
        self._unit_of: dict[tuple[int, int], int] = {}
        self.heap.resize(int((layout.placement.tiers == self.device_tier).sum()) * self.unit_bytes)
        self._missing = {(i, e) for i in range(layout.num_layers) for e in range(experts)}
        self.epoch, self.disk_bytes, self.direct_io = 0, 0, False
        self._file = self._direct = None
        self.plans = [self._plan(i) for i in range(layout.num_layers)]

    # What an ExpertStore offers.

    def _plan(self, layer: int) -> LayerPlan:
        places = (self.layout.slot_places(layer, 0), self.layout.slot_places(layer, 1))
        runs: tuple[list, list] = ([], [])
        for d, stride in enumerate(self._strides):
            first = previous = None
            for expert in [*self.layout.placement.members(layer, Tier.HOST), None]:
                if previous is not None and expert != previous + 1:
                    source = self._host[layer][d][first * stride : (previous + 1) * stride]
                    runs[d].append((source, places[d][first][0]))
                    first = None
                first, previous = (expert if first is None else first), expert
        return LayerPlan(layer, tuple(self.layout.streamed(layer)), places, runs)

    def slot_bytes(self, tensor_type: int) -> int:
        return self.most_streamed * self._strides[tensor_type]

    def tier_bytes(self, tier: Tier) -> int:
        if tier is Tier.HOST:
            return sum(arena.nbytes for pair in self._host for arena in pair)
        return self.heap.nbytes if tier is self.device_tier else 0

    def put(self, layer: int, expert: int, blocks: Iterable[Tensor], recipes: Recipes = (None, None)) -> None:
        assert (layer, expert) in self._missing, f"expert {expert} of layer {layer} is stored already or does not exist"
        for d, block in enumerate(blocks):
            begin = expert * self._strides[d]
            self._host[layer][d][begin : begin + block.numel()].copy_(block)
        if self.layout.placement.tiers[layer, expert] == self.device_tier:
            unit = self._append(layer, expert)
            for target, source in self.copies(layer, expert, unit):
                target.copy_(source)
        self._missing.remove((layer, expert))

    def blocks_in_place(self, layer: int) -> dict[int, Block]:
        number = TABLE_FORMATS[self.format]
        return {
            expert: Block(self._pair(self._unit_of[layer, expert]), number)
            for expert in range(self.layout.num_experts)
            if (layer, expert) in self._unit_of
        }

    def decodes(self, plan, tensor_type, lie):
        return iter(())

    def _payload_bytes(self, layer: int, tier: Tier, tensor_type: int) -> int:
        return 0

    def close(self) -> None:
        self.heap.region.close()

    # Moves, between iterations only.

    def _pair(self, unit: int) -> tuple[Tensor, Tensor]:
        (a, b), begin = self._sizes, self._strides[0]
        return self._units[unit][:a], self._units[unit][begin : begin + b]

    def copies(self, layer: int, expert: int, unit: int) -> list[tuple[Tensor, Tensor]]:
        """(target, source) of what an expert needs to be in `unit`."""
        pair = []
        for d, target in enumerate(self._pair(unit)):
            begin = expert * self._strides[d]
            pair.append((target, self._host[layer][d][begin : begin + self._sizes[d]]))
        return pair

    def _append(self, layer: int, expert: int) -> int:
        self._owner.append((layer, expert))
        self._unit_of[layer, expert] = len(self._owner) - 1
        return len(self._owner) - 1

    def reserve_unit(self) -> int:
        """A place at the end of the heap for an expert that is to come. RegionError when there is no memory."""
        self.heap.resize((len(self._owner) + 1) * self.unit_bytes)
        self._owner.append((-1, -1))
        return len(self._owner) - 1

    def cancel_unit(self, unit: int) -> None:
        """Give up a reserved place; units behind it move up."""
        assert self._owner[unit] == (-1, -1)
        self._remove(unit)

    def arrived(self, layer: int, expert: int, unit: int) -> None:
        """The expert's bytes are in `unit`: kernels read it there from the next load of its layer on."""
        self._owner[unit] = (layer, expert)
        self._unit_of[layer, expert] = unit
        self._set(layer, expert, self.device_tier)

    def leave(self, layer: int, expert: int) -> None:
        """The expert streams from the next load of its layer on; its place stays until `release`."""
        self._set(layer, expert, Tier.HOST)

    def release(self, layer: int, expert: int) -> None:
        """Free the place of an expert that has left."""
        self._remove(self._unit_of.pop((layer, expert)))

    def _remove(self, unit: int) -> None:
        last = len(self._owner) - 1
        if unit != last:
            # On CUDA in the order of the compute stream: behind the kernels that read both places.
            self._units[unit].copy_(self._units[last])
            self._owner[unit] = self._owner[last]
            if self._owner[unit] != (-1, -1):
                self._unit_of[self._owner[unit]] = unit
        self._owner.pop()
        self.epoch += 1
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # pages must not be unmapped under a kernel or copy
        self.heap.resize(len(self._owner) * self.unit_bytes)

    def _set(self, layer: int, expert: int, tier: Tier) -> None:
        tiers = self.layout.placement.tiers.copy()
        tiers[layer, expert] = tier
        tiers.setflags(write=False)
        old = self.layout
        self.layout = ExpertLayout(Placement(old.placement.name, tiers), old.sizes, old.formats, old.fused)
        self.plans[layer] = self._plan(layer)
        self.epoch += 1

    def check_integrity(self) -> None:
        """AssertionError unless every expert is where the placement says, and the heap has no gap."""
        assert self._unit_of == {owner: unit for unit, owner in enumerate(self._owner) if owner != (-1, -1)}
        on_device = {tuple(map(int, at)) for at in np.argwhere(self.layout.placement.tiers == self.device_tier)}
        assert on_device <= self._unit_of.keys(), "an expert of the device tier has no place"
        assert self.heap.nbytes == self.heap.region.pool.pages(len(self._owner) * self.unit_bytes) * (
            self.heap.region.pool.block_bytes
        )


class _Arrival(NamedTuple):
    layer: int
    expert: int
    unit: int
    done: threading.Event
    error: list[BaseException]


Copy = Callable[[Tensor, Tensor], None]


class Residency:
    """Applies moves between iterations, and shares the pool out between experts and KV.

    pending_plans(layer): loads that were begun, see Streamer. on_change: called after addresses or plans changed.
    planner: decides every `every` iterations from the mean of what they saw; None: only `request` moves experts.
    copy: how bytes reach the device, for tests that inject failures.
    """

    def __init__(
        self, store: MovingStore, kv: GrowableKVCache, scheduler: Scheduler, budget: MemoryBudget, pool: BlockPool,
        pending_plans: Callable[[int], list[LayerPlan]], on_change: Callable[[], None] = lambda: None,
        planner: Planner | None = None, every: int = 8, grow_kv: bool = True,
        copy: Copy = lambda target, source: target.copy_(source),
    ) -> None:  # fmt: skip
        self.store, self.kv, self.scheduler, self.budget, self.pool = store, kv, scheduler, budget, pool
        self.planner, self.every, self.grow_kv = planner, every, grow_kv
        self._pending_plans, self._on_change, self._copy = pending_plans, on_change, copy
        self._requested: list[Move] = []
        self._retired: list[tuple[int, int]] = []
        self._arrivals: list[_Arrival] = []
        self._window: list[tuple[float, float]] = []
        self.applied: Counter[str] = Counter()
        self.refused: list[str] = []
        self.last_reason = ""
        self._line = "packed_experts" if store.device_tier is Tier.PACKED else "resident_experts"

    def request(self, moves: Iterable[Move]) -> None:
        """Moves to be made from the next iteration on, in order."""
        self._requested += moves

    @property
    def busy(self) -> bool:
        """Whether moves are under way."""
        return bool(self._requested or self._retired or self._arrivals)

    def between_iterations(self, times: tuple[float, float] | None = None) -> None:
        """Everything that may change, before the next pass begins. Never waits for a copy.

        times: seconds of compute and of loads of the iteration that has ended, if the planner should learn from it.
        """
        epoch = self.store.epoch
        self._end_arrivals()
        if not self._arrivals:
            self._free_retired()  # the heap must not move while a copy writes into it
        if self.planner is not None and times is not None:
            self._plan(*times)
        self._begin_requested()
        self._share_out()
        if self.store.epoch != epoch:
            self._on_change()

    def _end_arrivals(self) -> None:
        if not all(arrival.done.is_set() for arrival in self._arrivals):
            return
        failed = []
        for arrival in self._arrivals:
            if arrival.error:
                failed.append(arrival)
                self.refused.append(f"expert {arrival.expert} of layer {arrival.layer} stays: {arrival.error[0]}")
            else:
                self.store.arrived(arrival.layer, arrival.expert, arrival.unit)
                self.applied["to device"] += 1
        self._arrivals = []
        # From the end, so that closing one gap does not move another reserved place.
        for arrival in sorted(failed, key=lambda a: -a.unit):
            self.store.cancel_unit(arrival.unit)

    def _free_retired(self) -> None:
        kept = []
        for layer, expert in self._retired:
            plans = self._pending_plans(layer)
            if all(any(e == expert for e, _ in plan.streamed) for plan in plans):
                self.store.release(layer, expert)
                self.applied["to host"] += 1
            else:
                kept.append((layer, expert))
        self._retired = kept

    def _begin_requested(self) -> None:
        moves, self._requested = self._requested, []
        retiring = set(self._retired)
        coming = {(arrival.layer, arrival.expert) for arrival in self._arrivals}
        for move in moves:
            where = (move.layer, move.expert)
            tier = Tier(self.store.layout.placement.tiers[where])
            if where in retiring | coming or tier != move.source:
                self.refused.append(f"expert {move.expert} of layer {move.layer} is {tier.name}, or on its way")
            elif move.target == Tier.HOST:
                streamed = len(self.store.layout.placement.members(move.layer, Tier.HOST))
                if streamed >= self.store.most_streamed:
                    self.refused.append(f"layer {move.layer} streams {streamed} experts already, all that a slot holds")
                    continue
                self.store.leave(*where)
                self._retired.append(where)
                retiring.add(where)
            elif move.target == self.store.device_tier:
                self._begin_arrival(move)
                coming.add(where)
            else:
                self.refused.append(f"no expert can become {Tier(move.target).name} here")

    def _begin_arrival(self, move: Move) -> None:
        try:
            self._make_room(self.store.unit_bytes)
            unit = self.store.reserve_unit()
        except RegionError as error:
            self.refused.append(f"expert {move.expert} of layer {move.layer} stays in host memory: {error}")
            return
        arrival = _Arrival(move.layer, move.expert, unit, threading.Event(), [])
        copies = self.store.copies(move.layer, move.expert, unit)

        def work() -> None:
            try:
                for target, source in copies:
                    self._copy(target, source)
                if self.store.device.type == "cuda":
                    torch.cuda.synchronize(self.store.device)
            except Exception as error:
                arrival.error.append(error)
            arrival.done.set()

        self._arrivals.append(arrival)
        threading.Thread(target=work, name="expert-arrival", daemon=True).start()

    def _make_room(self, nbytes: int) -> None:
        """Take KV quanta that hold nothing until the pool has `nbytes`. RegionError if they are in use."""
        while self.pool.free_blocks * self.pool.block_bytes < nbytes:
            if not self.kv.num_blocks or not self.scheduler.shrink(self.kv.quantum):
                raise RegionError("the KV blocks at the end of the cache are in use")
            self.kv.resize(self.kv.num_blocks - self.kv.quantum)

    def _share_out(self) -> None:
        """What experts left goes to KV, in whole quanta; then the ledger says who holds what."""
        spare = self.pool.free_blocks * self.pool.block_bytes
        # Places for experts on their way in are mapped already.
        quanta = min(spare // self.kv.quantum_bytes, (self.kv.most_blocks - self.kv.num_blocks) // self.kv.quantum)
        if self.grow_kv and quanta > 0 and not self._requested:
            more = quanta * self.kv.quantum
            try:
                self.kv.resize(self.kv.num_blocks + more)
                self.scheduler.grow(more)
            except RegionError as error:
                self.refused.append(f"the KV cache does not grow: {error}")
        held = {self._line: self.store.heap.nbytes, "kv_cache": self.kv.nbytes}
        lines = self.budget.lines()
        for line, nbytes in held.items():
            if nbytes < lines.get(line, 0):
                self.budget.release(line, lines[line] - nbytes)
        for line, nbytes in held.items():
            if nbytes > lines.get(line, 0):
                self.budget.reserve(line, nbytes - lines.get(line, 0))

    def _plan(self, compute_s: float, load_s: float) -> None:
        self._window.append((compute_s, load_s))
        if len(self._window) < self.every or self.busy:
            return
        compute, load = (float(np.median(values)) for values in zip(*self._window, strict=True))
        self._window = []
        per_block = self.kv.quantum_bytes // self.kv.quantum
        seen = Observation(
            compute, load, self.scheduler.blocks_used * per_block, self.scheduler.blocks_wanted * per_block
        )
        try:
            plan = self.planner.decide(self.store.layout.placement.tiers, seen)
        except PlannerError as error:
            self.last_reason = str(error)
            return
        self.last_reason = plan.reason
        self.request(plan.moves)

    def settle(self, seconds: float = 10.0) -> None:
        """Wait for copies under way; for the end of a run."""
        for arrival in self._arrivals:
            arrival.done.wait(seconds)
