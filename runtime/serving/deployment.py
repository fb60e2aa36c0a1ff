"""Deployment: what a model, settings and a budget come to: where experts lie, what parts take, what is left for KV.

Pure arithmetic over sizes, so that the engine and the simulator decide alike. Bytes are charged to a MemoryBudget in
this order: non-expert weights, experts on the device, slots, workspace, graphs, recurrent states; what is left is KV
cache. What the host holds beside it has a ledger of its own (the pager's `host_lines`, `swap_lines`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from fluxmoe.kernels.formats import DENSE
from fluxmoe.kernels.ops import Limits, OpSizes
from fluxmoe.models.config import ModelConfig
from fluxmoe.models.decoder import non_expert_bytes

from ..experts.footprint import EXPERT_LINES, Footprint
from ..experts.placement import Placement, Tier
from ..experts.planner import Planner, PlannerConfig
from ..memory.budget import MemoryBudget, format_bytes, require
from .config import EngineConfig
from .kv_cache import GrowableKVCache, PagedKVCache
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


def make_planner(
    config: EngineConfig, expert_bytes: Mapping[Tier, int], budget_bytes: int, reserve_bytes: int
) -> Planner:
    """The planner that the settings ask for; see PlannerConfig."""
    return Planner(
        PlannerConfig(
            expert_bytes, budget_bytes, theta=config.theta, spread=config.spread, eager=config.eager,
            densify=config.densify, reserve_bytes=reserve_bytes, least_alpha=config.least_alpha,
        )
    )  # fmt: skip


class Deployment:
    """One model under one budget of `total` bytes; `budget` holds all but the KV cache. experts: what they take.

    graph_bytes: of captured graphs, which also take a state slot for their padding. shares: devices that hold equal
    parts of the model; all sizes are those of one. swap_inside: swap space comes out of `total` too, so KV takes no
    more than leaves room for it. page_bytes: if given, experts that move and KV share memory in pages of so many bytes.
    BudgetError if the budget cannot hold the model and `min_kv_tokens` of KV.
    """

    def __init__(
        self, model: ModelConfig, config: EngineConfig, ops: OpSizes, experts: Footprint, total: int,
        graph_bytes: int = 0, shares: int = 1, swap_inside: bool = False, page_bytes: int = 0,
    ) -> None:  # fmt: skip
        self.model, self.config, self.ops, self.layout, self._experts = model, config, ops, experts.layout, experts
        self.limits = limits_of(model, config)
        self._spare_states = 1 if graph_bytes else 0
        self.block_bytes = PagedKVCache.bytes_per_block(
            ops, len(model.attention_layers), config.block_size, model.num_kv_heads, model.head_dim, model.dtype
        )
        lines = {
            "non_expert_weights": non_expert_bytes(model, ops, self.limits.context),
            **experts.lines(),
        }
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
        self._quantum = 1  # KV blocks that are mapped at a time
        if page_bytes:
            for line in EXPERT_LINES.values():
                lines[line] = -(-lines[line] // page_bytes) * page_bytes
            self._quantum = GrowableKVCache.quantum_for(
                ops, config.block_size, model.num_kv_heads, model.head_dim, model.dtype, page_bytes
            )
        least = self._whole_quanta(-(-config.min_kv_tokens // config.block_size)) * self.block_bytes
        self._swap_inside = swap_inside and config.preemption == "swap"
        swap = {"swap_space": least + self.max_sequences * self._state_bytes} if self._swap_inside else {}
        require(total, {**lines, "kv_cache": least, **swap}, hint=self._hint())
        self.budget = MemoryBudget(total)
        for line, nbytes in lines.items():
            self.budget.reserve(line, nbytes)

    @property
    def placement(self) -> Placement:
        return self.layout.placement

    @property
    def useful_blocks(self) -> int:
        """More KV blocks than a full batch at full context can never be used."""
        return self._whole_quanta(self.config.max_batch * -(-self.limits.context // self.config.block_size))

    def _whole_quanta(self, blocks: int) -> int:
        return -(-blocks // self._quantum) * self._quantum

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
        """Charge the KV cache with what is left, as far as it is of use; returns the number of its blocks."""
        room = self.kv_room
        if self._shares_with_cache:
            # Half each, unless KV must have more or can use less.
            room = max(room // 2, -(-self.config.min_kv_tokens // self.config.block_size) * self.block_bytes)
        blocks = min(room // self.block_bytes, self.useful_blocks) // self._quantum * self._quantum
        self.budget.reserve("kv_cache", blocks * self.block_bytes)
        return blocks

    @property
    def _shares_with_cache(self) -> bool:
        """Whether a cache of experts takes what KV leaves."""
        return bool(self.layout.cached) and self.config.cache_bytes is None

    def reserve_cache(self) -> int | None:
        """Charge a cache of experts with what is left, as far as it is of use; returns its bytes, None without one."""
        if not self.layout.cached:
            return None
        held = self.budget.lines()["expert_cache"]
        if not self._shares_with_cache:
            return held
        nbytes = self._experts.cache_bytes(held + self.budget.free)
        self.budget.reserve("expert_cache", nbytes - held)
        return nbytes

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

    def _hint(self) -> str:
        if self.placement.alpha == 0:
            return "lower --max-batch, or serve a smaller model"
        return f"--placement host keeps no expert on the device ({format_bytes(self.layout.expert_bytes(DENSE))} each)"
