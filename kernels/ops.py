"""The operations that a mixture-of-experts decoder needs, as two interfaces that each kind of device implements.

    ExpertOps  all that touches experts: their blocks, routing, the grouped GEMM. What expert paging hosts need.
    Ops        the rest: embeddings, norms, projections, attention, Gated DeltaNet

    kernels.triton.ops, triton.experts    CUDA: Triton kernels, activations in the weights' dtype
    kernels.cpu.ops, cpu.experts          CPU: numba kernels, fp32 activations, batch-invariant
    kernels.reference.ops, .experts        plain torch on any device: the reference

They own the layout of blocks (of experts, weights, KV), which models and runtime treat as bytes. They also own
the workspace: every buffer is made in the constructor for the limits given, with its dtype and device, so
`workspace_bytes` is all that a forward pass ever uses.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from .packing.codec import Packed

if TYPE_CHECKING:
    from .expert_table import ExpertTable

# What `decode_expert` must be told beside the (gate/up, down) blocks; None where a block says it all.
Recipes = tuple[Packed | None, Packed | None]


class KernelError(ValueError):
    """Sizes or dtypes that the kernels of a device cannot take."""


@dataclass(frozen=True)
class DeltaNetDims:
    """Sizes of Gated DeltaNet layers (see `delta_net`): heads of queries and keys, heads of values, their dims, taps of
    the convolution."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int

    @property
    def key_size(self) -> int:
        return self.key_heads * self.key_dim

    @property
    def value_size(self) -> int:
        return self.value_heads * self.value_dim

    @property
    def channels(self) -> int:
        """q | k | v of a token, which pass through the convolution."""
        return 2 * self.key_size + self.value_size

    @property
    def projected(self) -> int:
        """q | k | v | z | b | a of a token."""
        return self.channels + self.value_size + 2 * self.value_heads


@dataclass(frozen=True)
class ExpertDims:
    """Sizes of a layer's experts. dtype: of their weights; renormalise: whether the chosen experts' probabilities are
    made to sum to one, where routing starts from logits."""

    hidden: int
    intermediate: int
    experts: int
    top_k: int
    dtype: torch.dtype
    renormalise: bool = True

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of an expert's weights, gate_up [2I, H] and down [H, I]."""
        return (2 * self.intermediate, self.hidden), (self.hidden, self.intermediate)


@dataclass(frozen=True)
class LayerDims:
    """Sizes that all other kernels depend on. experts: outputs of the router; `qk_norm` is none | head | full, `window`
    0 means none, `mlp` is the intermediate size of MLPs that every token uses (the largest), 0 for none."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    vocab: int
    dtype: torch.dtype
    qk_norm: str = "none"
    clip_qkv: float = 0.0
    window: int = 0
    eps: float = 1e-6
    attention_gate: bool = False
    mlp: int = 0
    delta: DeltaNetDims | None = None

    @property
    def delta_net(self) -> DeltaNetDims:
        """`delta` of a model that has such layers."""
        assert self.delta is not None, "this model has no layers with Gated DeltaNet"
        return self.delta

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
    positions 0 1 2 0 1, slot_mapping 112 113 114 64 65. state_slots int32 [B]: where layers with a recurrent state keep
    that of each sequence.

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
    state_slots: Tensor | None = None


@dataclass(frozen=True)
class Linear:
    """A weight [n, k] of `dtype` as `Ops.arrange` lays it out, with an optional fp32 bias [n]."""

    block: Tensor
    n: int
    k: int
    dtype: torch.dtype
    bias: Tensor | None = None


@dataclass(frozen=True)
class DeltaNetWeights:
    """A Gated DeltaNet layer up to its output projection. in_proj: rows q | k | v | z | b | a; fp32: conv
    [channels, taps], rate = exp(A_log) [value_heads], dt_bias [value_heads], norm [value_dim]."""

    in_proj: Linear
    conv: Tensor
    rate: Tensor
    dt_bias: Tensor
    norm: Tensor


@dataclass(frozen=True)
class DenseMlp:
    """A SwiGLU MLP that every token uses, in the place of experts or beside them (a shared expert): gate_up [2I, H] as
    `Ops.arrange_mlp` lays it out, down [H, I]; score [1, H], if given, scales its output by sigmoid(x·score)."""

    gate_up: Linear
    down: Linear
    score: Linear | None = None


@dataclass(frozen=True)
class AttentionBlock:
    """A layer's attention. qkv: q, k and v side by side; out [H, heads·D]; fp32 norms of q and k, if any; gate
    [heads·D, H], if given, scales what is attended by its sigmoid."""

    qkv: Linear
    out: Linear
    rope: RopeTable
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    gate: Linear | None = None


class LayerExperts(Protocol):
    """Experts of the layer that runs now.

    wait(d) returns (or orders the stream) once all of tensor type d is loaded. Kernels of a host that knows what it has
    routed call `need` first, with the ids of all experts that have rows, and then `ready`, which gives the experts in
    the order in which they are there: masks uint8 [E], or None for all of them. Only so come experts on demand.

    in_place: all of them are where they stay: there is nothing to wait for, and nobody to ask.
    """

    table: ExpertTable
    in_place: bool

    def wait(self, tensor_type: int) -> None: ...
    def need(self, experts: np.ndarray) -> None: ...
    def ready(self, tensor_type: int) -> Iterable[Tensor | None]: ...


R = TypeVar("R")


@dataclass(frozen=True)
class MoeBlock:
    """What surrounds the routed experts of a layer. ops: for what is not theirs; fp32 [H]: the norm before them, and
    next_norm, which follows them (the next layer's first, or the last of all); router [E, H]; shared: an expert that
    every token uses."""

    ops: Ops
    norm: Tensor
    router: Linear
    next_norm: Tensor
    shared: DenseMlp | None = None


class Gated(NamedTuple, Generic[R]):
    """Tokens on their way to the experts: x [T, H], and the residual stream to which their outputs are added."""

    x: Tensor
    routing: R
    hidden: Tensor


class ExpertSizes(Protocol):
    """What a ledger asks of ExpertOps."""

    @property
    def dims(self) -> ExpertDims: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def act_dtype(self) -> torch.dtype: ...
    @property
    def workspace_bytes(self) -> int: ...
    @property
    def fused_formats(self) -> frozenset[str]: ...
    def expert_bytes(self, expert_format: str = ...) -> tuple[int, int]: ...


class ExpertOps(ExpertSizes, Protocol[R]):
    """See CpuExperts for shapes; activations are [T, H] in `act_dtype`. R: a batch's routing, opaque to callers.

    Experts come in the formats of `formats.FORMATS`, dense unless another is named. `fused_formats` are the compressed
    ones that `moe_add` reads in place; blocks of others must go through `decode_expert` first, which makes dense blocks
    of them. It runs on the block's device, on the current stream or the calling thread alone, so that it can work
    beside a forward pass.

    `backend` is the name under which formats and files know the arrangement of blocks.

    A routing is valid until the next one is made: by `route` from router logits, by `route_to` from experts that a host
    has chosen, or by `gate` from the residual stream. `gate` and `mix` are a layer from attention to the next one's
    norm; they may write to the stream, and their results are valid until they run again.
    """

    backend: str

    def encode_expert(
        self, gate_up: Tensor, down: Tensor, out: tuple[Tensor, Tensor], expert_format: str = ...
    ) -> Recipes: ...
    def decode_expert(
        self, expert_format: str, tensor_type: int, block: Tensor, out: Tensor, recipe: Packed | None
    ) -> None: ...
    def check_expert(self, expert_format: str, tensor_type: int, block: Tensor, recipe: Packed | None) -> None: ...
    def restore_expert(self, blocks: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]: ...
    def weights_of(
        self, expert_format: str, blocks: tuple[Tensor, Tensor], recipes: Recipes
    ) -> tuple[Tensor, Tensor]: ...
    def route(self, logits: Tensor, num_tokens: Tensor | None = None) -> R: ...
    def route_to(self, topk_ids: Tensor, topk_weights: Tensor, num_tokens: Tensor | None = None) -> R: ...
    def moe_add(self, x: Tensor, routing: R, experts: LayerExperts, residual: Tensor) -> Tensor: ...
    def count_routed(self, routing: R, counts: Tensor) -> None: ...
    def chosen(self, routing: R) -> Tensor: ...
    def gate(self, hidden: Tensor, block: MoeBlock, num_tokens: Tensor | None = None) -> Gated[R]: ...
    def mix(self, gated: Gated[R], block: MoeBlock, experts: LayerExperts) -> tuple[Tensor, Tensor]: ...


class OpSizes(Protocol):
    """What a ledger asks of Ops."""

    @property
    def dims(self) -> LayerDims: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def act_dtype(self) -> torch.dtype: ...
    @property
    def workspace_bytes(self) -> int: ...
    def arranged_bytes(self, n: int, k: int) -> int: ...
    def kv_block_shape(
        self, block_size: int, kv_heads: int, head_dim: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]: ...


class Ops(OpSizes, Protocol):
    """See CpuOps for shapes; activations are [T, …] in `act_dtype`."""

    def arrange(self, weight: Tensor, out: Tensor) -> None: ...
    def arrange_mlp(self, gate_up: Tensor, out: Tensor) -> None: ...
    def embed(self, token_ids: Tensor, table: Linear) -> Tensor: ...
    def rms_norm(self, x: Tensor, weight: Tensor) -> Tensor: ...
    def qkv(self, x: Tensor, weight: Linear) -> Tensor: ...
    def attention(
        self, qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, rope: RopeTable, metadata: AttentionMetadata,
        k_cache: Tensor, v_cache: Tensor,
    ) -> Tensor: ...  # fmt: skip
    def gate_attention(self, attended: Tensor, x: Tensor, weight: Linear) -> Tensor: ...
    def attend(
        self, x: Tensor, block: AttentionBlock, metadata: AttentionMetadata, k_cache: Tensor, v_cache: Tensor,
        residual: Tensor,
    ) -> Tensor: ...  # fmt: skip
    def delta_net(
        self, x: Tensor, weights: DeltaNetWeights, metadata: AttentionMetadata, conv_state: Tensor, state: Tensor
    ) -> Tensor: ...
    def project_add(self, x: Tensor, weight: Linear, residual: Tensor) -> Tensor: ...
    def mlp_add(self, x: Tensor, mlp: DenseMlp, residual: Tensor) -> Tensor: ...
    def router(self, x: Tensor, weight: Linear) -> Tensor: ...
    def logits(self, x: Tensor, weight: Linear) -> Tensor: ...


class RowMajor:
    """Weights as checkpoints have them, row after row: what the Triton kernels and the reference share of Ops."""

    dims: LayerDims

    def arranged_bytes(self, n: int, k: int) -> int:
        return n * k * self.dims.dtype.itemsize

    def arrange(self, weight: Tensor, out: Tensor) -> None:
        out.view(self.dims.dtype).view(weight.shape).copy_(weight)

    @staticmethod
    def matrix(weight: Linear) -> Tensor:
        """[n, k]: what was arranged, as a view."""
        return weight.block.view(weight.dtype).view(weight.n, weight.k)
