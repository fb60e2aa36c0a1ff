"""What a disk allows a model whose experts come from it."""

from __future__ import annotations

from typing import NamedTuple

from fluxmoe.kernels.expert_blocks import blocks_of
from fluxmoe.kernels.formats import DEFAULT_COMPRESSED, DENSE
from fluxmoe.models.config import ModelConfig
from fluxmoe.models.decoder import expert_dims

from ..lib.serve import placed


class Bounds(NamedTuple):
    """Tokens/s that a disk allows. rate: bytes/s of it in requests of experts' sizes, None where that cannot be told;
    busy_rate: where these are summed up while products keep all cores busy."""

    model: ModelConfig
    rate: float | None
    busy_rate: float | None = None

    def expert_bytes(self, provider: str) -> int:
        """Of an expert in the format in which `provider` has it."""
        expert_format = DENSE
        if provider.startswith("fluxmoe ") and provider != "fluxmoe resident":
            expert_format = placed(provider.removeprefix("fluxmoe "))["expert_format"] or DEFAULT_COMPRESSED
        return sum(blocks_of("cpu", expert_dims(self.model)).expert_bytes(expert_format))

    def of_bytes(self, nbytes_a_token: float) -> float | None:
        return self.rate / nbytes_a_token if self.rate and nbytes_a_token else None

    def uniform(self, expert_bytes: int, limit: int | None, batch: int) -> float | None:
        """Where routing is uniform and whatever a wall leaves beside the other weights holds experts."""
        c = self.model
        layers, total = len(c.moe_layers), len(c.moe_layers) * c.num_experts * expert_bytes
        kept = 1.0 if limit is None else min(1.0, max(0.0, limit - c.non_expert_bytes) / total)
        routed = layers * c.num_experts * (1 - (1 - c.top_k / c.num_experts) ** batch) * expert_bytes
        return self.of_bytes(routed * (1 - kept) / batch)
