"""What surrounds a layer's routed experts, one operation after another; backends with larger kernels override it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic

from torch import Tensor

from .ops import Gated, LayerExperts, MoeBlock, R


class ExpertLayer(ABC, Generic[R]):
    """The part of ExpertOps that is the same for every backend."""

    @abstractmethod
    def route(self, logits: Tensor, num_tokens: Tensor | None = None) -> R: ...

    @abstractmethod
    def moe_add(self, x: Tensor, routing: R, experts: LayerExperts, residual: Tensor) -> Tensor: ...

    def gate(self, hidden: Tensor, block: MoeBlock, num_tokens: Tensor | None = None) -> Gated[R]:
        """The norm of hidden [T, H], its routing, and hidden with the shared expert added where `mix` does not."""
        x = block.ops.rms_norm(hidden, block.norm)
        if block.shared is not None:
            hidden = block.ops.mlp_add(x, block.shared, hidden)
        return Gated(x, self.route(block.ops.router(x, block.router), num_tokens), hidden)

    def mix(self, gated: Gated[R], block: MoeBlock, experts: LayerExperts) -> tuple[Tensor, Tensor]:
        """hidden [T, H] with the experts added, and its norm by `block.next_norm`."""
        hidden = self.moe_add(gated.x, gated.routing, experts, gated.hidden)
        return hidden, block.ops.rms_norm(hidden, block.next_norm)
