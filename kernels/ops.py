"""The operations a decoder needs, as one interface that each kind of device implements.

    fluxmoe.kernels.triton_ops.TritonOps  CUDA: Triton kernels, activations in the weights' dtype
    fluxmoe.kernels.cpu.ops.CpuOps        CPU: numba kernels, fp32 activations, batch-invariant
    fluxmoe.kernels.torch_ops.TorchOps    plain torch on any device: the reference

An ops object owns the layout of packed weights and of KV blocks; models and runtime treat both as bytes. It also
owns the workspace: every buffer is made in the constructor for the limits given, so `workspace_bytes` is all
that a forward pass ever uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .expert_table import ExpertTable
from .packing.formats import Packed

DENSE = "dense"
# What `decode_expert` must be told beside the (gate/up, down) blocks; None where a block says it all.
Recipes = tuple[Packed | None, Packed | None]


class KernelError(ValueError):
    """Sizes or dtypes that the kernels of a device cannot take."""


@dataclass(frozen=True)
class LayerDims:
    """Sizes that kernels and workspace depend on; `qk_norm` is none | head | full, `window` 0 means none."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    top_k: int
    intermediate: int
    vocab: int
    dtype: torch.dtype
    renormalise: bool = True
    qk_norm: str = "none"
    clip_qkv: float = 0.0
    window: int = 0
    eps: float = 1e-6

    @property
    def qkv_size(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim


@dataclass(frozen=True)
class Limits:
    """What a workspace must hold: tokens a forward pass, rows of logits, context length, KV block size."""

    tokens: int
    sequences: int
    context: int
    block_size: int


@dataclass(frozen=True)
class RopeTable:
    """cos, sin fp32 [positions, head_dim/2], attention scaling folded in."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class AttentionMetadata:
    """Which tokens of a flat batch belong to which sequence, and where their KV lies (B sequences, T tokens).

    query_start int32 [B+1]; context_lens int32 [B], cached tokens including this pass's; block_table int32
    [B, max_blocks]; positions int32 [T]; slot_mapping int64 [T], block·block_size + offset.
    Example: prompts of 3 and 2 tokens, block_size 16, blocks (7) and (4): query_start 0 3 5, context_lens 3 2,
    positions 0 1 2 0 1, slot_mapping 112 113 114 64 65.

    A captured graph has a fixed T and pads: num_tokens int32 [1] on the device says how many are real. Padding is a
    sequence of context_len 0 whose token has slot -1.
    """

    query_start: Tensor
    context_lens: Tensor
    block_table: Tensor
    positions: Tensor
    slot_mapping: Tensor
    block_size: int
    num_tokens: Tensor | None = None


@dataclass(frozen=True)
class PackedLinear:
    """A packed weight [n, k] of `dtype`, with an optional fp32 bias [n]."""

    block: Tensor
    n: int
    k: int
    dtype: torch.dtype
    bias: Tensor | None = None


class LayerExperts(Protocol):
    """Experts of the layer that runs now; `wait(d)` returns (or orders the stream) once tensor type d is loaded."""

    table: ExpertTable

    def wait(self, tensor_type: int) -> None: ...


class Ops(Protocol):
    """See CpuOps for shapes; activations are [T, …] in `act_dtype`.

    Experts come in formats: dense, or one of packing.FORMATS. `fused_formats` are those that `moe_add` reads in place;
    blocks of others must go through `decode_expert` first, which makes dense blocks of them. It runs on the block's
    device, on the current stream or the calling thread alone, so that it can work beside a forward pass.
    """

    dims: LayerDims
    device: torch.device
    act_dtype: torch.dtype
    workspace_bytes: int
    fused_formats: frozenset[str]

    def packed_bytes(self, n: int, k: int) -> int: ...
    def pack(self, weight: Tensor, out: Tensor) -> None: ...
    def unpack(self, block: Tensor, n: int, k: int) -> Tensor: ...
    def expert_bytes(self, expert_format: str = DENSE) -> tuple[int, int]: ...
    def pack_expert(
        self, gate_up: Tensor, down: Tensor, out: tuple[Tensor, Tensor], expert_format: str = DENSE
    ) -> Recipes: ...
    def decode_expert(
        self, expert_format: str, tensor_type: int, block: Tensor, out: Tensor, recipe: Packed | None
    ) -> None: ...
    def unpack_expert(self, blocks: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]: ...
    def kv_block_shape(
        self, block_size: int, kv_heads: int, head_dim: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]: ...
    def embed(self, token_ids: Tensor, table: PackedLinear) -> Tensor: ...
    def rms_norm(self, x: Tensor, weight: Tensor) -> Tensor: ...
    def qkv(self, x: Tensor, weight: PackedLinear) -> Tensor: ...
    def attention(
        self,
        qkv: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        rope: RopeTable,
        metadata: AttentionMetadata,
        k_cache: Tensor,
        v_cache: Tensor,
    ) -> Tensor: ...
    def project_add(self, x: Tensor, weight: PackedLinear, residual: Tensor) -> Tensor: ...
    def moe_add(
        self,
        x: Tensor,
        router: PackedLinear,
        experts: LayerExperts,
        residual: Tensor,
        num_tokens: Tensor | None = None,
    ) -> Tensor: ...
    def logits(self, x: Tensor, weight: PackedLinear) -> Tensor: ...
