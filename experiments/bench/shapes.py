"""MoE layers of the models that the paper and its peers measure."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from fluxmoe.kernels.ops import ExpertDims


@dataclass(frozen=True)
class Shape:
    """An MoE layer's sizes."""

    hidden: int
    intermediate: int
    experts: int
    top_k: int

    @property
    def dims(self) -> ExpertDims:
        return ExpertDims(self.hidden, self.intermediate, self.experts, self.top_k, torch.bfloat16)

    @property
    def expert_bytes(self) -> int:
        return 6 * self.hidden * self.intermediate

    def rows_per_expert(self, tokens: int) -> float:
        """Mean, of experts that have any, as TritonExperts reckons it."""
        rows = tokens * self.top_k
        return rows / max(1, min(rows, self.experts))

    def touched(self, tokens: int) -> float:
        """Experts that `tokens` reach on average when any expert is alike."""
        return self.experts * (1 - (1 - self.top_k / self.experts) ** tokens)


SHAPES = {
    "mixtral": Shape(4096, 14336, 8, 2),
    "qwen3_30b": Shape(2048, 768, 128, 8),
    "qwen3_next": Shape(2048, 512, 512, 10),
    "olmoe": Shape(2048, 1024, 64, 8),
    # For rehearsals: the smallest that every format takes.
    "tiny": Shape(128, 128, 4, 2),
}
MODEL_SHAPES = [name for name in SHAPES if name != "tiny"]
TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192]
