"""EngineConfig: how to serve a model."""

from __future__ import annotations

from dataclasses import dataclass

from ..experts.config import PagingConfig, SettingError
from .scheduler import Preemption


@dataclass(frozen=True, kw_only=True)
class EngineConfig(PagingConfig):
    """How to serve a model: how its experts are paged (see PagingConfig), and

    budget_bytes        device bytes for everything; None: all that is free, on a CPU less what is kept beside it
    max_batch           sequences in a batch; fit_batch: fewer, where recurrent states of so many would leave KV short
    max_batched_tokens  tokens of one pass: the chunk size of prefill
    block_size          tokens of a KV block
    preemption          recompute | swap
    max_context         longest prompt + output served; None: the model's limit
    min_kv_tokens       the budget must hold at least this many tokens of KV
    cuda_graphs         CUDA: decode steps are launched as graphs
    grow_kv             with adaptive: whether KV takes what experts leave
    densify             with adaptive: packed experts become dense where memory is idle
    theta, eager, spread, plan_every    of the planner and of `Residency`
    timeline            record loads and compute
    """

    budget_bytes: int | None = None
    max_batch: int = 64
    fit_batch: bool = True
    max_batched_tokens: int = 256
    block_size: int = 32
    preemption: Preemption = "recompute"
    max_context: int | None = None
    min_kv_tokens: int = 1
    device: str = "auto"
    cuda_graphs: bool = True
    grow_kv: bool = True
    densify: bool = False
    theta: float = 0.9
    eager: bool = False
    spread: bool = True
    plan_every: int = 8
    timeline: bool = False
    progress: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_batch", "max_batched_tokens", "block_size", "max_context"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingError(f"{name} must be at least 1, got {value}")
        if self.preemption not in ("recompute", "swap"):
            raise SettingError(f"preemption must be recompute or swap, got {self.preemption!r}")
