"""What surrounds a layer's attention, one operation after another; backends with larger kernels override it."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from .ops import AttentionBlock, AttentionMetadata, Linear, RopeTable


class AttentionLayer(ABC):
    """The part of Ops that is the same for every backend."""

    @abstractmethod
    def qkv(self, x: Tensor, weight: Linear) -> Tensor: ...

    @abstractmethod
    def attention(
        self, qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, rope: RopeTable, metadata: AttentionMetadata,
        k_cache: Tensor, v_cache: Tensor,
    ) -> Tensor: ...  # fmt: skip

    @abstractmethod
    def gate_attention(self, attended: Tensor, x: Tensor, weight: Linear) -> Tensor: ...

    @abstractmethod
    def project_add(self, x: Tensor, weight: Linear, residual: Tensor) -> Tensor: ...

    def attend(
        self, x: Tensor, block: AttentionBlock, metadata: AttentionMetadata, k_cache: Tensor, v_cache: Tensor,
        residual: Tensor,
    ) -> Tensor:  # fmt: skip
        """residual [T, H] += attention of x [T, H], a norm of it; returns residual."""
        qkv = self.qkv(x, block.qkv)
        attended = self.attention(qkv, block.q_norm, block.k_norm, block.rope, metadata, k_cache, v_cache)
        if block.gate is not None:
            attended = self.gate_attention(attended, x, block.gate)
        return self.project_add(attended, block.out, residual)
