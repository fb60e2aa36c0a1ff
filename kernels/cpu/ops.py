"""CpuOps: the operations of a decoder but its experts on the CPU kernels, with every buffer made once.

Activations between operations are fp32 whatever the weights are. Products with bf16 weights round them to bf16 where
the CPU's dot products of bf16 are its fastest (`tile`), as every bf16 engine does, and keep them elsewhere, where
upcasting weights is free. Weights and KV cache keep the model's dtype.
"""

from __future__ import annotations

import torch
from numba import prange
from torch import Tensor

from ..attention_layer import AttentionLayer
from ..numba_cache import cached_njit
from ..ops import (
    AttentionBlock,
    AttentionMetadata,
    DeltaNetWeights,
    DenseMlp,
    KernelError,
    LayerDims,
    Limits,
    Linear,
    RopeTable,
)
from . import attention as attn
from . import delta_net, gates, gemm
from .norm import rms_norm
from .simd import FEW, address_of, floats
from .tile import kind_of


@cached_njit(nogil=True)
def _add_row(total, x):
    for h in range(total.shape[0]):
        total[h] += x[h]


@cached_njit(parallel=True, nogil=True)
def _add(total_address, x_address, x_columns, tokens, hidden):
    """total[t] += x[t, :hidden]; x is fp32 [tokens, x_columns]."""
    total, x = floats(total_address, tokens, hidden), floats(x_address, tokens, x_columns)
    if total.size <= FEW:
        for t in range(tokens):
            _add_row(total[t], x[t])
    else:
        for t in prange(tokens):
            _add_row(total[t], x[t])


@cached_njit(nogil=True)
def _attend(projection, prepared, attended, output, total):
    """A layer's attention from its norm to the residual stream as one call, of what each kernel takes: a call
    from Python, with all that finds its arguments, costs as much as a small model's layer reads in."""
    gemm.multiply(*projection)
    attn.prepare_qkv(*prepared)
    attn.attend(*attended)
    gemm.multiply(*output)
    _add(*total)


class CpuOps(AttentionLayer):
    """Kernels plus workspace for at most `limits`; one engine owns one (not thread-safe).

    Buffers are reused by every layer, so a result is valid until the same operation runs again.
    """

    device = torch.device("cpu")
    act_dtype = torch.float32

    def __init__(self, dims: LayerDims, limits: Limits, threads: int | None = None) -> None:
        if dims.dtype not in (torch.bfloat16, torch.float32):
            raise KernelError(f"CPU kernels take bfloat16 or float32 weights, got {dims.dtype}")
        self.dims, self.limits = dims, limits
        self.threads = gemm.use_threads(threads)
        tokens, pad = limits.tokens, gemm.padded
        widths = [dims.hidden, dims.heads * dims.head_dim, dims.mlp, dims.delta.value_size if dims.delta else 0]
        self._scratch = gemm.Scratch(tokens, self.threads, max(widths), dims.dtype)
        self._attention = attn.AttentionBuffers(
            dims.head_dim, limits.context, limits.block_size, self.threads, dims.dtype
        )
        self._buffers = {
            "hidden": gemm.zeros(tokens, dims.hidden),
            "normed": gemm.zeros(tokens, dims.hidden),
            "qkv": gemm.zeros(tokens, pad(dims.qkv_size)),
            "attended": gemm.zeros(tokens, dims.heads * dims.head_dim),
            "projected": gemm.zeros(tokens, pad(dims.hidden)),
            "router": gemm.zeros(tokens, pad(dims.experts)),
            "logits": gemm.zeros(limits.sequences, pad(dims.vocab)),
        }
        if dims.attention_gate:
            self._buffers["gate"] = gemm.zeros(tokens, pad(dims.heads * dims.head_dim))
        if dims.mlp:
            self._buffers["mlp"] = gemm.zeros(tokens, pad(2 * dims.mlp))
            self._buffers["mlp_score"] = gemm.zeros(tokens, pad(1))
        if dims.delta is not None:
            self._buffers["delta_in"] = gemm.zeros(tokens, pad(dims.delta.projected))
            self._buffers["delta_mixed"] = gemm.zeros(tokens, dims.delta.channels)
            self._buffers["delta_out"] = gemm.zeros(tokens, dims.delta.value_size)
        self._views: dict[str, Tensor] = {}
        # A temporary of torch's own: the rows that are sampled from.
        transient = limits.sequences * dims.hidden * 4
        self.workspace_bytes = (
            transient + sum(b.nbytes for b in self._buffers.values()) + self._scratch.nbytes + self._attention.nbytes
        )

    # Layouts: opaque to everybody else.

    def arranged_bytes(self, n: int, k: int) -> int:
        return gemm.arranged_bytes(n, k, self.dims.dtype)

    def arrange(self, weight: Tensor, out: Tensor) -> None:
        gemm.arrange(weight, out)

    def arrange_mlp(self, gate_up: Tensor, out: Tensor) -> None:
        self.arrange(gate_up, out)

    def kv_block_shape(self, block_size: int, kv_heads: int, head_dim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return attn.kv_block_shape(block_size, kv_heads, head_dim)

    # The forward pass.

    def embed(self, token_ids: Tensor, table: Linear) -> Tensor:
        """token_ids int64 [T], table: arranged [vocab, H] (so that tied embeddings are stored once) → fp32 [T, H]."""
        return gemm.rows_of(table.block, kind_of(table.dtype), token_ids, self._rows("hidden", len(token_ids)))

    def rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, self.dims.eps, self._rows("normed", x.shape[0]))

    def qkv(self, x: Tensor, weight: Linear) -> Tensor:
        """[T, H] → [T, (heads + 2·kv_heads)·D]: q, k, v side by side."""
        return self._linear(x, weight, "qkv")

    def attention(
        self, qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, rope: RopeTable, metadata: AttentionMetadata,
        k_cache: Tensor, v_cache: Tensor,
    ) -> Tensor:  # fmt: skip
        """QK-norm, RoPE, KV write, then causal attention over the paged context: [T, heads·D]."""
        return attn.attention(
            self.dims, qkv, q_norm, k_norm, rope, metadata, k_cache, v_cache,
            self._rows("attended", qkv.shape[0]), self._attention, self._scratch,
        )  # fmt: skip

    def attend(
        self, x: Tensor, block: AttentionBlock, metadata: AttentionMetadata, k_cache: Tensor, v_cache: Tensor,
        residual: Tensor,
    ) -> Tensor:  # fmt: skip
        if block.gate is not None or block.qkv.bias is not None or block.out.bias is not None or not len(x):
            return super().attend(x, block, metadata, k_cache, v_cache, residual)
        rows = len(x)
        qkv, attended, projected = (self._rows(name, rows) for name in ("qkv", "attended", "projected"))
        prepared, attend = attn.launches(
            self.dims, qkv, block.q_norm, block.k_norm, block.rope, metadata, k_cache, v_cache, attended,
            self._attention, self._scratch,
        )  # fmt: skip
        _attend(
            self._product(x, block.qkv, qkv), prepared, attend, self._product(attended, block.out, projected),
            (address_of(residual), projected.data_ptr(), projected.stride(0), *residual.shape),
        )  # fmt: skip
        return residual

    def gate_attention(self, attended: Tensor, x: Tensor, weight: Linear) -> Tensor:
        """attended [T, heads·D] *= sigmoid(x @ W^T); returns attended."""
        return gates.scale(attended, self._linear(x, weight, "gate"))

    def delta_net(
        self, x: Tensor, weights: DeltaNetWeights, metadata: AttentionMetadata, conv_state: Tensor, state: Tensor
    ) -> Tensor:
        """Gated DeltaNet of x [T, H] without its output projection: [T, value_heads·DV]."""
        tokens = len(x)
        self._linear(x, weights.in_proj, "delta_in")
        projected, mixed, out = (self._buffers[f"delta_{name}"][:tokens] for name in ("in", "mixed", "out"))
        return delta_net.gated_delta_net(
            projected, weights, self.dims.delta_net, metadata, conv_state, state, mixed, out, self.dims.eps
        )

    def mlp_add(self, x: Tensor, mlp: DenseMlp, residual: Tensor) -> Tensor:
        """residual += SwiGLU MLP of x [T, H], times sigmoid(x·score) where there is one; returns residual."""
        self._linear(x, mlp.gate_up, "mlp")
        activation = gates.swiglu(self._buffers["mlp"][: len(x)], mlp.down.k)
        if mlp.score is None:
            return self.project_add(activation, mlp.down, residual)
        y, score = self._linear(activation, mlp.down, "projected"), self._linear(x, mlp.score, "mlp_score")
        return gates.add_scaled(residual, y, score)

    def project_add(self, x: Tensor, weight: Linear, residual: Tensor) -> Tensor:
        """residual += x @ W^T; returns residual."""
        projected = self._linear(x, weight, "projected")
        _add(address_of(residual), projected.data_ptr(), projected.stride(0), *residual.shape)
        return residual

    def router(self, x: Tensor, weight: Linear) -> Tensor:
        """[T, H] → fp32 logits [T, experts]; x is not rounded: which experts a token gets is worth the little work."""
        return self._linear(x, weight, "router", exact=True)

    def logits(self, x: Tensor, weight: Linear) -> Tensor:
        """[B, H] → fp32 [B, vocab]."""
        return self._linear(x, weight, "logits")

    def _linear(self, x: Tensor, weight: Linear, name: str, exact: bool = False) -> Tensor:
        kind = kind_of(weight.dtype, exact)
        y = gemm.linear(x, weight.block, weight.n, kind, self._rows(name, x.shape[0]), self._scratch)
        if weight.bias is not None:
            y += weight.bias
        return y

    def _product(self, x: Tensor, weight: Linear, y: Tensor) -> tuple:
        return gemm.product(x, weight.block, weight.n, kind_of(weight.dtype), y, self._scratch)

    def _rows(self, name: str, count: int) -> Tensor:
        """The first rows of a buffer: the same view while their number is the same."""
        view = self._views.get(name)
        if view is None or view.shape[0] != count:
            view = self._views[name] = self._buffers[name][:count]
        return view
