"""Deployment: what a model, settings and a budget come to: where experts lie, what parts take, what is left for KV.

Pure arithmetic over sizes, so that the engine and the simulator decide alike. Bytes are charged to a MemoryBudget in
this order: non-expert weights, experts on the device, slots, workspace, graphs, recurrent states; what is left is KV
cache. Experts that move, or a cache of experts, and KV are counted in slabs of one pool; a KV cache that never changes
is one slab. What the host holds beside it has a ledger of its own (the pager's `host_lines`, `swap_lines`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from fluxmoe.kernels.ops import Limits, OpSizes
from fluxmoe.kernels.packing.expert_file import PAGE
from fluxmoe.models.config import ModelConfig
from fluxmoe.models.decoder import non_expert_bytes

from ..experts.cache import CACHE_LINE
from ..experts.footprint import EXPERT_LINES, Footprint
from ..experts.placement import Placement
from ..experts.planner import Planner, PlannerConfig
from ..memory.budget import BudgetError, MemoryBudget, require
from ..memory.slabs import FREE
from .config import EngineConfig
from .kv_cache import KV_LINE, KVLayout
from .state_cache import StateCache


def limits_of(model: ModelConfig, config: EngineConfig) -> Limits:
    """What the workspace must hold."""
    context = min(config.max_context or model.max_position_embeddings, model.max_position_embeddings)
    return Limits(max(config.max_batched_tokens, config.max_batch), config.max_batch, context, config.block_size)


def require_workspace(model: ModelConfig, limits: Limits, memory: int) -> None:
    """BudgetError if `memory`, all that a device has, cannot hold the largest buffers of a pass, of any kernels: said
    before these make their workspace, which a thoughtless batch size would fill the machine with."""
    rows = limits.tokens * (2 * model.hidden_size + model.top_k * (model.moe_intermediate_size + model.hidden_size))
    logits = 4 * limits.sequences * model.vocab_size
    hint = "lower --max-batch or --max-batched-tokens"
    require(memory, {"workspace at least": rows * model.dtype.itemsize + logits}, hint)


def least_budget(deploy: Callable[[int], object]) -> int | None:
    """The least `total` for which `deploy` makes a Deployment; None where none is known."""
    total: int | None = 0
    while total is not None:
        try:
            deploy(total)
        except BudgetError as error:
            # What a larger total is cut into may take more.
            total = None if error.least is None else max(error.least, total + 1)
        else:
            return total
    return None


class Deployment:
    """One model under one budget of `total` bytes; `budget` holds all but the KV cache. experts: what they take.

    graph_bytes: of captured graphs, which also take a state slot for their padding. shares: devices that hold equal
    parts of the model; all sizes are those of one. swap_inside: swap space comes out of `total` too, so KV takes no
    more than leaves room for it.
    BudgetError if the budget cannot hold the model and `min_kv_tokens` of KV.
    """

    def __init__(
        self, model: ModelConfig, config: EngineConfig, ops: OpSizes, experts: Footprint, total: int,
        graph_bytes: int = 0, shares: int = 1, swap_inside: bool = False,
    ) -> None:  # fmt: skip
        self.model, self.config, self.ops, self.layout, self._experts = model, config, ops, experts.layout, experts
        self.limits = limits_of(model, config)
        self._spare_states = 1 if graph_bytes else 0
        self.kv_layout = KVLayout.of(
            ops, len(model.attention_layers), config.block_size, model.num_kv_heads, model.head_dim, model.dtype
        )
        self.block_bytes = self.kv_layout.block_bytes
        weights = non_expert_bytes(model, ops, self.limits.context)
        others = weights + ops.workspace_bytes + graph_bytes
        # Whether a cache of experts has what KV leaves, in slabs of one pool.
        self.lends = bool(self.layout.cached) and config.cache_bytes is None and not config.adaptive
        self.slab_bytes = self._choose_slab(total - others) if config.adaptive or self.lends else 0
        # What KV takes at a time: blocks and bytes of a slab, or a block alone.
        self._step = max(1, self.slab_bytes // self.block_bytes), self.slab_bytes or self.block_bytes
        lines = {"non_expert_weights": weights, **experts.lines(self.slab_bytes)}
        lines["workspace"] += ops.workspace_bytes
        if graph_bytes:
            lines["graphs"] = graph_bytes
        self._state_bytes = 0
        self.max_sequences = config.max_batch
        if model.delta is not None:
            each = StateCache.bytes_of(model.delta, len(model.delta_layers), 1, ops.act_dtype) // shares
            self.max_sequences = self._sequences(total - sum(lines.values()) - self._spare_states * each, each)
            lines["states"] = (self.max_sequences + self._spare_states) * each
            self._state_bytes = each
        self._least_steps = self._steps(-(-config.min_kv_tokens // config.block_size))
        least = self._least_steps * self._step[1]
        self._swap_inside = swap_inside and config.preemption == "swap"
        swap = {"swap_space": least + self.max_sequences * self._state_bytes} if self._swap_inside else {}
        require(total, {**lines, KV_LINE: least, **swap})
        self.budget = MemoryBudget(total)
        for line, nbytes in lines.items():
            self.budget.reserve(line, nbytes)

    def _choose_slab(self, total: int) -> int:
        """Bytes of a slab: what an expert takes, or more, up to the end of another KV block, whichever leaves room for
        more blocks in `total` bytes for the pager and KV; to a cache of experts the former.
        """
        if self.lends:
            # Blocks are read to where a page begins.
            skipped = PAGE if self.kv_layout.unit_bytes % PAGE else 0
            return self.kv_layout.slab_bytes(self._experts.place_bytes + skipped)

        def blocks(size: int) -> int:
            return (total - sum(self._experts.lines(size).values())) // size * (size // self.block_bytes)

        sizes = (self.kv_layout.slab_bytes(self.layout.slab_bytes, whole) for whole in (False, True))
        return max(sizes, key=blocks)

    @property
    def placement(self) -> Placement:
        return self.layout.placement

    @property
    def useful_blocks(self) -> int:
        """More KV blocks than a full batch at full context can never be used."""
        return self.config.max_batch * -(-self.limits.context // self.config.block_size)

    def kv_slabs(self, now: int) -> tuple[int, int]:
        """The least and the most slabs of a KV cache that shares with experts, and has `now`: for one request of full
        context, as far as it has them, and, unless it may not grow, for all requests; where a cache lends them, `now`,
        and what was found at `reserve_kv`."""
        if self.lends:
            return now, self.most_blocks // self._step[0]
        one = self._steps(-(-self.limits.context // self.config.block_size))
        return min(now, one), self._steps(self.useful_blocks) if self.config.grow_kv else now

    def _steps(self, blocks: int) -> int:
        return -(-blocks // self._step[0])

    @property
    def kv_room(self) -> int:
        """Bytes that are left for KV."""
        if self._swap_inside:  # as much again for its swap space, behind that of all states
            return (self.budget.free - self.max_sequences * self._state_bytes) // 2
        return self.budget.free

    def swap_lines(self, host_blocks: int) -> dict[str, int]:
        """Bytes of host memory by line for what may be swapped out: KV blocks, states of all sequences."""
        if self.config.preemption != "swap":
            return {}
        lines = {"swapped_kv": host_blocks * self.block_bytes, "swapped_states": self.max_sequences * self._state_bytes}
        return {line: nbytes for line, nbytes in lines.items() if nbytes}

    def reserve_kv(self) -> int:
        """Charge the KV cache with what is left, as far as it is of use, and where experts move, free slabs with what
        these may still need; returns the number of KV blocks. Of a pool that a cache of experts lends from, KV begins
        with as little as works, and the rest is free."""
        blocks, size = self._step
        room = self.kv_room // size
        steps = min(room, self._steps(self.useful_blocks))
        self.most_blocks = steps * blocks
        if self.lends:
            if self._swap_inside:
                # What may be swapped out has memory of its own: a quarter each, half for the cache.
                steps = max(self._least_steps, steps // 2)
                self.most_blocks = steps * blocks
                room = (self.budget.free - sum(self.swap_lines(self.most_blocks).values())) // size
            least = self._least_steps
            useful = steps + self.layout.cached - self._experts.cache_places()
            self.budget.reserve(KV_LINE, least * size)
            self.budget.reserve(FREE, (min(room, useful) - least) * size)
            return least * blocks
        self.budget.reserve(KV_LINE, steps * size)
        if self.config.adaptive:
            held = sum(self.budget.lines()[line] for line in EXPERT_LINES.values()) // size
            most = self._experts.most_slabs(size, self.config.densify)
            self.budget.reserve(FREE, min(room - steps, max(0, most - held)) * size)
        return steps * blocks

    @property
    def pool_shape(self) -> tuple[int, int]:
        """Slabs of the pool and their bytes, once KV is reserved."""
        lines = self.budget.lines()
        if not self.slab_bytes:
            return 1, lines[KV_LINE]
        others = (CACHE_LINE,) if self.lends else EXPERT_LINES.values()
        return sum(lines[line] for line in (*others, KV_LINE, FREE)) // self.slab_bytes, self.slab_bytes

    def make_planner(self) -> Planner:
        """The planner that the settings of a run whose experts move ask for; see PlannerConfig."""
        config, size = self.config, self.slab_bytes
        each = {tier: size * self.layout.slabs_each(tier, size) for tier in self.layout.moving_tiers}
        return Planner(
            PlannerConfig(
                each, size * self.pool_shape[0], theta=config.theta, spread=config.spread, eager=config.eager,
                densify=config.densify, reserve_bytes=size, least_alpha=config.least_alpha,
            )
        )  # fmt: skip

    @property
    def state_sizes(self) -> tuple[int, int, torch.dtype]:
        """Layers, slots and dtype that a StateCache is made for."""
        return len(self.model.delta_layers), self.max_sequences + self._spare_states, self.ops.act_dtype

    def _sequences(self, free: int, state_bytes: int) -> int:
        """How many sequences may run: with `fit_batch`, fewer than `max_batch` where their states would leave KV for
        less than half of the context of each."""
        if not self.config.fit_batch:
            return self.config.max_batch
        blocks = -(-self.limits.context // (2 * self.config.block_size))
        return min(self.config.max_batch, max(1, free // (state_bytes + blocks * self.block_bytes)))
