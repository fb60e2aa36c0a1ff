"""The engine on a virtual clock, for machines and models that are not there.

Scheduler, deployment (ledger, layout, placement) and planner are the runtime's own code; a CostModel stands in for
kernels and copies, and a VirtualStreamer for the streamer. Deterministic: the same requests give the same steps.

Loads are issued in order over one link and one decoder, neither of which idles while a slot is free, by the schedule
that drives the real streamers (Algorithm 1): they run ahead as far as the slots allow, over the end of a pass too.

    load v begins   once the link (the decoder) is free and visit `schedule.follows(v)` was computed
    load v is done  after the longer of link and decode

Within a pass, layer after layer of those with experts, with t the compute stream's time:

    t += what runs before the layer's experts;  t = max(t, its load done);  t += experts;  its slot is free at t

Swapped KV crosses the link before its pass, and stalls it. Where copies take compute from the kernels (`copy_overlap`
below 1), a layer with a load is longer by that share of the shorter of its compute and its copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from fluxmoe.models.config import ModelConfig

from ..experts.cache import CACHE_LINE
from ..experts.footprint import EXPERT_LINES, Footprint, lay_out, slot_schedule
from ..experts.layout import ExpertLayout
from ..experts.planner import Move, Observation
from ..hardware import HardwareProfile, ProfileError
from ..memory.budget import explained
from ..memory.slabs import SlabError, SlabPool
from ..serving.advice import advice
from ..serving.config import EngineConfig
from ..serving.deployment import Deployment, limits_of, require_workspace
from ..serving.kv_cache import PagedKVCache
from ..serving.loop import Executed, ServingLoop
from ..serving.residency import Lending, PlannerDriver, Seen, Sharing
from ..serving.scheduler import Scheduler, Step
from ..timeline import COMPUTE, COPY, DECODE, HostClock, Timeline
from .cost_model import CostModel, CostParameters, Load, SimOps

# Share of a device's memory that a run may use when no budget is given: vLLM's default.
_USABLE = 0.9


class _VirtualClock(HostClock):
    def __init__(self, now_s: Callable[[], float]) -> None:
        self._now_s = now_s

    def mark(self) -> int:
        return round(self._now_s() * 1e9)


class Arrived(NamedTuple):
    """A layer's experts: when they are there, and the load that brought them (None: they came in an earlier pass)."""

    at_s: float
    load: Load | None


class VirtualStreamer:
    """Loads of a layout's streamed layers on `slots` slots; moves: every layer has its turn, as experts come and go.

    loads: by layer, read when a load is issued, so it may be replaced between passes.
    """

    def __init__(
        self, layout: ExpertLayout, slots: int, moves: bool, loads: list[Load], timeline: Timeline | None = None
    ) -> None:
        self._timeline = timeline or Timeline(enabled=False)
        self.order, self.schedule = slot_schedule(layout, slots, moves)
        self.loads = loads
        self._rank = {layer: rank for rank, layer in enumerate(self.order)}
        self._visit = self._issued = 0
        self._link_free = self._decoder_free = 0.0
        self._computed: dict[int, float] = {}
        self._arrived: dict[int, Arrived] = {}

    def __contains__(self, layer: int) -> bool:
        return layer in self._rank

    def begin(self, layer: int) -> Arrived:
        """The next visit, which is of `layer`: all loads that may have begun by now are issued."""
        visit = self._rank[layer] if self.schedule.keeps_all else self._visit
        assert self.order[self.schedule.rank(visit)] == layer, f"layer {layer} visited out of order"
        upto = self.schedule.loads_by(visit)
        while self._issued < upto:
            self._issue(self._issued)
            self._issued += 1
        return self._arrived.pop(visit, Arrived(0.0, None))

    def finish(self, layer: int, now_s: float) -> None:
        """The visit is computed at `now_s`: its slot may be overwritten."""
        if not self.schedule.keeps_all:
            self._computed[self._visit] = now_s
            self._visit += 1

    def _issue(self, visit: int) -> None:
        layer = self.order[self.schedule.rank(visit)]
        load = self.loads[layer]
        # Each visit is followed by one load, so nobody asks again.
        free_s = self._computed.pop(self.schedule.follows(visit), 0.0)
        self._link_free = self._use(COPY, layer, self._link_free, free_s, load.link_s, load)
        self._decoder_free = self._use(DECODE, layer, self._decoder_free, free_s, load.decode_s, load)
        done_s = max(self._link_free if load.link_s else free_s, self._decoder_free if load.decode_s else free_s)
        self._arrived[visit] = Arrived(done_s, load)

    def _use(self, track: str, layer: int, idle_s: float, free_s: float, takes_s: float, load: Load) -> float:
        """Link or decoder, idle since `idle_s`, is used once the slot is free; until when."""
        begin_s = max(idle_s, free_s)
        if takes_s and self._timeline.enabled:
            idle, begin, end = (round(s * 1e9) for s in (idle_s, begin_s, begin_s + takes_s))
            nbytes = load.nbytes if track == COPY else 0
            self._timeline.add(track, f"wait slot {layer}", "wait", idle, begin, layer=layer)
            self._timeline.add(
                track, f"{track} {layer}", "load", begin, end, layer=layer, experts=load.experts, bytes=nbytes
            )
        return begin_s + takes_s


class VirtualCache:
    """Room for so many experts of files, in slabs of a pool that KV shares (None: it does not)."""

    def __init__(self, pool: SlabPool | None, places: int) -> None:
        self._pool, self.places = pool, 0 if pool else places
        for _ in range(places if pool else 0):
            self.grow()

    def grow(self) -> None:
        assert self._pool is not None, "it is shared"
        self._pool.take(CACHE_LINE)
        self.places += 1

    def shrink(self, count: int) -> None:
        assert self._pool is not None, "it is shared"
        for slab in self._pool.held(CACHE_LINE)[:count]:
            self._pool.give(slab)
        self.places -= count


class SimEngine(ServingLoop):
    """Serves requests for `model` on `profile`, like Engine; `config.budget_bytes` is of one device.

    devices: of the profile's, how many share the model (default: all). BudgetError, PlacementError as Engine.
    """

    def __init__(
        self, model: ModelConfig, profile: HardwareProfile, config: EngineConfig,
        parameters: CostParameters | None = None, devices: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        copy_rate = profile.host_bandwidth
        if config.link_bandwidth is not None:
            profile = replace(profile, host_bandwidth=min(profile.host_bandwidth, config.link_bandwidth))
        self.model, self.profile, self.config = model, profile, config
        self.devices = devices or profile.num_devices
        if not 1 <= self.devices <= profile.num_devices:
            raise ProfileError(f"profile {profile.name} has {profile.num_devices} devices, asked for {devices}")
        parameters = parameters or CostParameters()
        limits = limits_of(model, config)
        total = int(profile.memory_bytes * _USABLE) if config.budget_bytes is None else config.budget_bytes
        with explained(config.named):
            require_workspace(model, limits, max(total, int(profile.memory_bytes)) * self.devices)
        ops = SimOps(model, limits, self.devices, parameters, config.formats_met)
        layout = lay_out(len(model.moe_layers), config, ops.experts, lambda: profile.bandwidths(None))
        experts = Footprint(layout, config, ops.experts)
        with explained(config.named, instead=partial(self._instead, ops, total)):
            self.deployment = Deployment(model, config, ops, experts, total, shares=self.devices)
        self.placement, self.budget = self.deployment.placement, self.deployment.budget
        self.costs = CostModel(model, profile, self.devices, parameters)
        self._copy_rate = copy_rate
        blocks = self.deployment.reserve_kv()
        host_blocks = 4 * max(blocks, self.deployment.useful_blocks) if config.preemption == "swap" else 0
        pool = SlabPool(torch.empty(self.deployment.pool_shape, dtype=torch.uint8, device="meta"))
        self.kv = PagedKVCache(self.deployment.kv_layout, pool)
        while self.kv.num_blocks < blocks:
            self.kv.grow()
        self.scheduler = Scheduler(
            self.kv.blocks, config.block_size, self.deployment.max_sequences, limits.tokens, config.preemption,
            limits.context, host_blocks=host_blocks,
        )  # fmt: skip
        self._cache = VirtualCache(pool if self.deployment.lends else None, experts.cache_places())
        self._lending: Lending | None = None
        if self.deployment.lends:
            kv_slabs = self.deployment.kv_slabs(self.kv.num_slabs)
            self._lending = Lending(self.kv, self._cache, self.budget, kv_slabs, layout.cached)
        self._clock = 0.0
        self.timeline = Timeline(config.timeline, _VirtualClock(self._clock_s), f"simulated on {profile.name}")
        self._streamer = VirtualStreamer(layout, config.slots, config.adaptive, self._adopt(layout), self.timeline)
        planner = self.deployment.make_planner() if config.adaptive and config.planning else None
        self._driver = None if planner is None else PlannerDriver(planner, config.plan_every)
        if config.adaptive:
            kv_slabs = self.deployment.kv_slabs(self.kv.num_slabs)
            self._sharing = Sharing(self.kv, self.scheduler, self.budget, kv_slabs)
            self._hold(layout)
        self._moves: list[Move] = []

    def _instead(self, ops: SimOps, total: int) -> str:
        """What would do where `total` bytes do not."""

        def place(other: EngineConfig) -> Footprint:
            return Footprint(lay_out(len(self.model.moe_layers), other, ops.experts, dict), other, ops.experts)

        def deploy(other: EngineConfig, footprint: Footprint, budget: int) -> Deployment:
            return Deployment(self.model, other, ops, footprint, budget, shares=self.devices)

        def fits(budget: int, host: int) -> bool:
            return budget <= total and host <= self.profile.host_memory_bytes

        on_cpu = self.profile.device == "cpu"
        return advice(self.config, place, deploy, lambda footprint: sum(footprint.host_lines().values()), fits, on_cpu)

    def _adopt(self, layout: ExpertLayout) -> list[Load]:
        """Take a layout into use; returns the loads of its layers."""
        self.layout = layout
        return self.costs.bind(layout)

    def __enter__(self) -> SimEngine:
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing is held."""

    # Serving: what the loop asks for.

    def _clock_s(self) -> float:
        return self._clock

    def _wait(self, seconds: float) -> None:
        self._clock += seconds

    def _execute(self, step: Step) -> Executed:
        swapped = len(step.swap_out) + len(step.swap_in)
        states = (len(step.state_out) + len(step.state_in)) * self.model.state_bytes_per_sequence / self.devices
        moved = swapped * self.deployment.block_bytes + states
        ready = self._clock + self.costs.link_seconds(moved)
        self._traced("wait swap", "wait", self._clock, ready)
        stall, load, streamed = self._pass(step, ready)
        return Executed([0] * sum(chunk.sample for chunk in step.chunks), stall, load, streamed * self.devices)

    def _pass(self, step: Step, now: float) -> tuple[float, float, int]:
        """Run a pass from `now` on; moves the clock; returns seconds of waiting and of loads, bytes that crossed."""
        costs, outside = self.costs.pass_costs(step, self._cache.places)
        stall, load, crossed = 0.0, 0.0, 0
        for layer, cost in enumerate(costs):
            now = self._traced("attention", "compute", now, now + cost.before, layer)
            if layer not in self._streamer:
                now = self._traced("experts", "compute", now, now + cost.experts, layer)
                continue
            ready, brought = self._streamer.begin(layer)
            stall += max(0.0, ready - now)
            begin = self._traced("wait", "wait", now, max(now, ready), layer)
            now = begin + cost.experts
            if brought is not None:
                # Waiting for a slow link costs no compute; copying and decoding do.
                copying = max(brought.nbytes / self._copy_rate, brought.decode_s)
                now += (1 - self.profile.copy_overlap) * min(copying, cost.before + cost.experts)
                load += max(brought.link_s, brought.decode_s)
                crossed += brought.nbytes
            self._traced("experts", "compute", begin, now, layer)
            self._streamer.finish(layer, now)
        self._clock = self._traced("logits", "compute", now, now + outside)
        return stall, load, crossed

    def _traced(self, name: str, kind: str, begin_s: float, end_s: float, layer: int | None = None) -> float:
        """A span of the compute stream, if anybody wants to know; its end."""
        if self.timeline.enabled:
            begin, end = round(begin_s * 1e9), round(end_s * 1e9)
            if layer is None:
                self.timeline.add(COMPUTE, name, kind, begin, end)
            else:
                self.timeline.add(COMPUTE, f"{name} {layer}", kind, begin, end, layer=layer)
        return end_s

    # Experts that move. A move takes effect at once; what it copies is charged to nobody, for it is a few bytes.

    @property
    def tiers(self) -> np.ndarray:
        return self.placement.tiers

    def request(self, moves: Iterable[Move]) -> None:
        """Moves to be made before the next iteration."""
        self._moves += moves

    def _adapt(self, step: Step, executed: Executed, elapsed_s: float) -> None:
        if self._lending is not None:
            self._lending.take_back()
        if self._driver is not None:
            compute_s, load_s = elapsed_s - executed.stall_s, executed.transfer_s
            self._driver.see(Seen(compute_s, load_s, step.num_tokens, not step.prefill_tokens))
            if self._driver.due:
                compute_s, load_s, _ = self._driver.medians()
                seen = Observation(compute_s, load_s, *self._sharing.kv_bytes())
                self.request(self._driver.moves(self.placement.tiers, seen))
        if self._moves:
            self._apply()

    def _apply(self) -> None:
        """Make the moves, if KV has slabs to spare for them, and give what they free to the KV cache."""
        moves, self._moves = self._moves, []
        tiers = self.placement.tiers.copy()
        for move in moves:
            tiers[move.layer, move.expert] = move.target
        layout = self.layout.placed(tiers)
        if self._hold(layout):
            self.placement = layout.placement
            self._streamer.loads = self._adopt(layout)
        self._sharing.share_out()

    def _hold(self, layout: ExpertLayout) -> bool:
        """Experts hold the slabs of a layout; False, and they hold what they held, if KV cannot spare enough."""
        pool = self.kv.pool
        more = {
            line: layout.tier_slabs(tier, pool.slab_bytes) - len(pool.held(line)) for tier, line in EXPERT_LINES.items()
        }
        try:
            self._sharing.make_room(max(0, sum(more.values())))
        except SlabError:
            return False
        for line, count in more.items():
            for slab in pool.held(line)[: max(0, -count)]:
                pool.give(slab)
        for line, count in more.items():
            for _ in range(count):
                pool.take(line)
        return True
