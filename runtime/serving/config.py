"""EngineConfig: how to serve a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from ..experts.config import PagingConfig, SettingError, setting
from ..memory.budget import parse_bytes
from .scheduler import Preemption


@dataclass(frozen=True, kw_only=True)
class EngineConfig(PagingConfig):
    """How to serve a model: how its experts are paged (see PagingConfig), and what follows."""

    budget_bytes: int | None = setting(
        None, "device bytes for everything, e.g. 512MiB; all: all that is free, on a CPU less what is kept beside it",
        flag="budget", parse=parse_bytes, metavar="BYTES",
    )  # fmt: skip
    max_batch: int = setting(64, "sequences in a batch")
    fit_batch: bool = setting(True, "fewer sequences, where recurrent states of so many would leave KV short")
    max_batched_tokens: int = setting(256, "tokens of one pass (prefill chunk)")
    block_size: int = setting(32, "tokens in a KV block")
    preemption: Preemption = setting("recompute", "where KV runs out", choices=get_args(Preemption))
    # Longest prompt + output served, None: the model's limit; the budget must hold min_kv_tokens of KV at least.
    max_context: int | None = setting(None, None)
    min_kv_tokens: int = setting(1, None)
    device: str = setting("auto", "what serves", choices=("auto", "cpu", "cuda"))
    cuda_graphs: bool = setting(True, "CUDA: launch decode steps as graphs, not kernel by kernel")
    delta_net: str = setting(
        "fluxmoe", "CUDA: whose rule passes with prompts take in layers of Gated DeltaNet: ours, or that of "
        "flash-linear-attention, where it is installed; untried on a GPU", choices=("fluxmoe", "fla"),
    )  # fmt: skip
    densify: bool = setting(False, "with adaptive: idle memory makes packed experts dense")
    # With adaptive: whether KV takes what experts leave; of the planner, and of `Residency`.
    grow_kv: bool = setting(True, None)
    theta: float = setting(0.9, None)
    eager: bool = setting(False, None)
    spread: bool = setting(True, None)
    plan_every: int = setting(8, None)
    # Take KV's memory from the system at the start: else the first token in a block waits for its pages.
    touch_kv: bool = setting(False, None)
    # Record loads and compute, on CUDA without graphs; show a bar while loading.
    timeline: bool = setting(False, None)
    progress: bool = setting(False, None)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_batch", "max_batched_tokens", "block_size", "max_context"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingError(f"{name} must be at least 1, got {value}")
        if self.delta_net == "fla" and self.batch_invariant:
            raise SettingError("delta_net fla is for chunks: batch_invariant takes Gated DeltaNet token by token")
        if self.densify and not self.adaptive:
            raise SettingError("densify is the planner's: without adaptive it has no effect")
