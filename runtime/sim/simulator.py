"""The engine on a virtual clock, for machines and models that are not there.

Scheduler, deployment (ledger, layout, placement) and planner are the runtime's own code; a CostModel stands in for
kernels and copies, and a model of Algorithm 1 for the streamer. Deterministic: the same requests give the same steps.

Within a pass, layer after layer of those with experts, with t the compute stream's time and one link and one decoder
that never idle while a slot is free:

    load j     begins once the link is free and job j - S was computed; done after the longer of link and decode
    layer      t += what runs before its experts;  t = max(t, load j done);  t += experts;  its slot is free at t

Loads run ahead over the end of a pass, as in the engine. Swapped KV crosses the link before its pass, and stalls it.
Where copies take compute from the kernels (`copy_overlap` below 1), a layer with a load is longer by that share of the
shorter of its compute and its copy.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from fluxmoe.models.config import ModelConfig

from ..experts.footprint import EXPERT_LINES, Footprint, lay_out
from ..experts.layout import ExpertLayout
from ..experts.placement import Placement
from ..experts.planner import Move, Observation, PlannerError
from ..hardware import HardwareProfile, ProfileError
from ..memory.slabs import SlabError, SlabPool
from ..serving.config import EngineConfig
from ..serving.deployment import Deployment, limits_of, require_workspace
from ..serving.kv_cache import PagedKVCache
from ..serving.loop import Executed, ServingLoop
from ..serving.residency import Sharing
from ..serving.scheduler import Scheduler, Step
from .cost_model import CostModel, CostParameters, SimOps

# Share of a device's memory that a run may use when no budget is given: vLLM's default.
_USABLE = 0.9


@dataclass
class _Pipeline:
    """Where the loads are: times on the virtual clock, jobs counted as in the streamer."""

    slots: int
    link_free: float = 0.0
    decode_free: float = 0.0
    jobs: int = 0

    def __post_init__(self) -> None:
        self.computed = [0.0] * self.slots
        self.done: dict[int, float] = {}


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
        require_workspace(model, limits, max(total, int(profile.memory_bytes)) * self.devices)
        ops = SimOps(model, limits, self.devices, parameters)
        layout = lay_out(len(model.moe_layers), config, ops.experts, lambda: profile.bandwidths(None))
        experts = Footprint(layout, config, ops.experts)
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
        self._adopt(layout)
        self._clock = 0.0
        self._pipeline = _Pipeline(config.slots)
        self._planner = self.deployment.make_planner() if config.adaptive and config.planning else None
        if config.adaptive:
            kv_slabs = self.deployment.kv_slabs(self.kv.num_slabs)
            self._sharing = Sharing(self.kv, self.scheduler, self.budget, kv_slabs)
            self._hold(layout)
        self._window: list[tuple[float, float]] = []
        self._moves: list[Move] = []
        self.last_reason = ""

    def _adopt(self, layout: ExpertLayout) -> None:
        """Take a layout into use; what loads of its layers take."""
        self.layout = layout
        self.costs.bind(layout)
        self._loads = [self.costs.load_seconds(layer, layout) for layer in range(layout.num_layers)]
        # Where experts move, every layer has its turn of the slots, as in the streamer: loads run so many layers ahead.
        turns = [self.config.adaptive or any(times) for times in self._loads]
        self._streamed = [layer for layer, turn in enumerate(turns) if turn]
        self._load_bytes = [self.costs.host_bytes(layer, layout) for layer in range(layout.num_layers)]
        # Waiting for a slow link costs no compute; copying and decoding do.
        work = zip(self._load_bytes, self._loads, strict=True)
        self._copying = [max(nbytes / self._copy_rate, decode_s) for nbytes, (_, decode_s) in work]

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
        stall, load, streamed = self._pass(step, self._clock + self.costs.link_seconds(moved))
        return Executed([0] * sum(chunk.sample for chunk in step.chunks), stall, load, streamed * self.devices)

    def _pass(self, step: Step, now: float) -> tuple[float, float, int]:
        """Run a pass from `now` on; moves the clock; returns seconds of waiting and of loads, bytes that crossed."""
        costs, outside = self.costs.pass_costs(step)
        pipe, streamed = self._pipeline, set(self._streamed)
        keeps_all = len(streamed) <= pipe.slots and not self.config.adaptive
        stall, load, crossed = 0.0, 0.0, 0
        for layer, cost in enumerate(costs):
            now += cost.before
            if layer in streamed and not (keeps_all and pipe.jobs >= len(streamed)):
                job = pipe.jobs
                ready = self._loaded(job, layer)
                stall += max(0.0, ready - now)
                contended = min(self._copying[layer], cost.before + cost.experts)
                now = max(now, ready) + cost.experts + (1 - self.profile.copy_overlap) * contended
                pipe.computed[job % pipe.slots] = now
                pipe.jobs += 1
                pipe.done.pop(job, None)
                load += max(self._loads[layer])
                crossed += self._load_bytes[layer]
                # The next load into this slot may begin; its order on the link is that of the layers.
                if not keeps_all:
                    self._begin(job + pipe.slots, self._layer_after(layer, pipe.slots))
            else:
                now += cost.experts
        self._clock = now + outside
        return stall, load, crossed

    def _layer_after(self, layer: int, count: int) -> int:
        order = self._streamed
        return order[(order.index(layer) + count) % len(order)]

    def _loaded(self, job: int, layer: int) -> float:
        if job not in self._pipeline.done:
            self._begin(job, layer)
        return self._pipeline.done[job]

    def _begin(self, job: int, layer: int) -> None:
        pipe, (link_s, decode_s) = self._pipeline, self._loads[layer]
        free = pipe.computed[job % pipe.slots]
        pipe.link_free = max(pipe.link_free, free) + link_s
        pipe.decode_free = max(pipe.decode_free, free) + decode_s
        pipe.done[job] = max(pipe.link_free if link_s else free, pipe.decode_free if decode_s else free)

    # Experts that move. A move takes effect at once; what it copies is charged to nobody, for it is a few bytes.

    @property
    def tiers(self) -> np.ndarray:
        return self.placement.tiers

    def request(self, moves: Iterable[Move]) -> None:
        """Moves to be made before the next iteration."""
        self._moves += moves

    def _adapt(self, step: Step, executed: Executed, elapsed_s: float) -> None:
        if self._planner is not None and not step.prefill_tokens:
            self._window.append((elapsed_s - executed.stall_s, executed.transfer_s))
            if len(self._window) >= self.config.plan_every:
                self._plan()
        if self._moves:
            self._apply()

    def _plan(self) -> None:
        assert self._planner is not None, "the window is filled for a planner"
        compute_s, load_s = (float(np.median(values)) for values in zip(*self._window, strict=True))
        self._window = []
        seen = Observation(compute_s, load_s, *self._sharing.kv_bytes())
        try:
            plan = self._planner.decide(self.placement.tiers, seen)
        except PlannerError as error:
            self.last_reason = str(error)
            return
        self.last_reason = plan.reason
        self.request(plan.moves)

    def _apply(self) -> None:
        """Make the moves, if KV has slabs to spare for them, and give what they free to the KV cache."""
        moves, self._moves = self._moves, []
        tiers, old = self.placement.tiers.copy(), self.layout
        for move in moves:
            tiers[move.layer, move.expert] = move.target
        layout = ExpertLayout(Placement(self.placement.name, tiers), old.sizes, old.formats, old.fused)
        if self._hold(layout):
            self.placement = layout.placement
            self._adopt(layout)
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
