"""CpuOps: the operations of a decoder on the CPU kernels, with every buffer made once.

Activations are fp32 whatever the weights are: upcasting bf16 is free in the kernels, and the result is closer to
exact arithmetic than bf16 activations would be. Packed weights and KV cache keep the model's dtype.
"""

from __future__ import annotations

import os

import numba
import torch
from numba import njit, prange
from torch import Tensor

from ..expert_table import DOWN, GATE_UP
from ..ops import (
    DENSE,
    AttentionMetadata,
    DeltaNetWeights,
    DenseMlp,
    KernelError,
    LayerDims,
    LayerExperts,
    Limits,
    PackedLinear,
    Recipes,
    RopeTable,
)  # fmt: skip
from ..packing.blocks import block_bytes, decode_block, encode_block
from ..packing.formats import Packed
from . import attention as attn
from . import delta_net, gates, gemm, moe, planar
from .norm import rms_norm

PLANAR12 = "planar12"
_NORMS = {"none": attn.NO_NORM, "head": attn.HEAD_NORM, "full": attn.FULL_NORM}


def default_threads() -> int:
    """Processors that this process may use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return min(usable, numba.config.NUMBA_NUM_THREADS)


@njit(parallel=True, nogil=True, cache=True)
def _add(a, b, out):
    for t in prange(a.shape[0]):
        for h in range(a.shape[1]):
            out[t, h] = a[t, h] + b[t, h]


class CpuOps:
    """Kernels plus workspace for at most `limits`; one engine owns one (not thread-safe).

    Buffers are reused by every layer, so a result is valid until the same operation runs again.
    """

    device = torch.device("cpu")
    act_dtype = torch.float32
    fused_formats = frozenset({PLANAR12})

    def __init__(self, dims: LayerDims, limits: Limits, threads: int | None = None) -> None:
        if dims.dtype not in (torch.bfloat16, torch.float32):
            raise KernelError(f"CPU kernels take bfloat16 or float32 weights, got {dims.dtype}")
        self.dims, self.limits = dims, limits
        # The dense blocks as matrices, a panel a row.
        self._expert_shapes = (
            (2 * gemm.padded(dims.intermediate) // gemm.LANES, dims.hidden * gemm.LANES),
            (gemm.padded(dims.hidden) // gemm.LANES, dims.intermediate * gemm.LANES),
        )
        self.threads = threads or default_threads()
        numba.set_num_threads(self.threads)
        tokens, pad = limits.tokens, gemm.padded
        self._scratch = gemm.Scratch(tokens * max(1, dims.top_k), self.threads)
        self._moe = moe.MoeBuffers(tokens, dims.hidden, dims.intermediate, dims.experts, dims.top_k, self.threads)
        self._attention = attn.AttentionBuffers(dims.head_dim, limits.context, limits.block_size, self.threads)
        self._buffers = {
            "hidden": torch.zeros(tokens, dims.hidden),
            "normed": torch.zeros(tokens, dims.hidden),
            "qkv": torch.zeros(tokens, pad(dims.qkv_size)),
            "attended": torch.zeros(tokens, dims.heads * dims.head_dim),
            "projected": torch.zeros(tokens, pad(dims.hidden)),
            "router": torch.zeros(tokens, pad(dims.experts)),
            "logits": torch.zeros(limits.sequences, pad(dims.vocab)),
        }
        if dims.attention_gate:
            self._buffers["gate"] = torch.zeros(tokens, pad(dims.heads * dims.head_dim))
        if dims.mlp:
            self._buffers["mlp"] = torch.zeros(tokens, pad(2 * dims.mlp))
            self._buffers["mlp_score"] = torch.zeros(tokens, pad(1))
        if dims.delta is not None:
            self._buffers["delta_in"] = torch.zeros(tokens, pad(dims.delta.projected))
            self._buffers["delta_mixed"] = torch.zeros(tokens, dims.delta.channels)
            self._buffers["delta_out"] = torch.zeros(tokens, dims.delta.value_size)
        self._no_norm = torch.zeros(0)
        # Temporaries of torch's own: embedded tokens before they are upcast, the rows that are sampled from.
        transient = tokens * dims.hidden * dims.dtype.itemsize + limits.sequences * dims.hidden * 4
        self.workspace_bytes = (
            transient
            + sum(b.nbytes for b in self._buffers.values())
            + self._scratch.nbytes
            + self._moe.nbytes
            + self._attention.nbytes
        )

    # Layouts: opaque to everybody else.

    def packed_bytes(self, n: int, k: int) -> int:
        return gemm.packed_bytes(n, k, self.dims.dtype)

    def pack(self, weight: Tensor, out: Tensor) -> None:
        gemm.pack(weight, out)

    def unpack(self, block: Tensor, n: int, k: int) -> Tensor:
        return gemm.unpack(block, n, k, self.dims.dtype)

    def expert_bytes(self, expert_format: str = DENSE) -> tuple[int, int]:
        """Bytes of one expert's (gate/up, down) blocks. KernelError for a format that does not exist or suit."""
        d, (gate_up, down) = self.dims, self._expert_shapes
        if expert_format == DENSE:
            return (
                moe.gate_up_bytes(d.intermediate, d.hidden, d.dtype),
                gemm.packed_bytes(d.hidden, d.intermediate, d.dtype),
            )
        sizes = block_bytes(expert_format, *gate_up, d.dtype), block_bytes(expert_format, *down, d.dtype)
        if expert_format != PLANAR12:
            return sizes
        if not (planar.fits(d.hidden) and planar.fits(d.intermediate)):
            raise KernelError("expert format planar12 needs even hidden and intermediate sizes; use dense")
        return planar.block_bytes(gate_up[0], d.hidden), planar.block_bytes(down[0], d.intermediate)

    def pack_expert(
        self, gate_up: Tensor, down: Tensor, out: tuple[Tensor, Tensor], expert_format: str = DENSE
    ) -> Recipes:
        """gate_up [2I, H], down [H, I] → the two uint8 blocks of `expert_bytes`."""
        if expert_format == DENSE:
            moe.pack_gate_up(gate_up, out[GATE_UP])
            gemm.pack(down, out[DOWN])
            return None, None
        return (
            self._compress(expert_format, gate_up, moe.pack_gate_up, 2, out[GATE_UP]),
            self._compress(expert_format, down, gemm.pack, 1, out[DOWN]),
        )

    def _compress(self, expert_format: str, weight: Tensor, pack, halves: int, out: Tensor) -> Packed | None:
        """Panels of `weight`, compressed into `out`; halves: how many matrices it holds."""
        rows, depth = weight.shape[0] // halves, weight.shape[1]
        dense = torch.empty(halves * gemm.packed_bytes(rows, depth, weight.dtype), dtype=torch.uint8)
        pack(weight, dense)
        panels = dense.view(weight.dtype).view(-1, depth, gemm.LANES)
        if rows % gemm.LANES:
            # Lanes past the last row are read by nobody; zeros there would all be escapes.
            panels[-halves:, :, rows % gemm.LANES :] = panels[-halves:, :, :1]
        if expert_format == PLANAR12:
            return planar.encode(panels, out)
        return encode_block(expert_format, panels.view(len(panels), -1), out)

    def decode_expert(
        self, expert_format: str, tensor_type: int, block: Tensor, out: Tensor, recipe: Packed | None
    ) -> None:
        """A compressed block → the dense block of the same weights; see Ops."""
        panels = out.view(self.dims.dtype).view(self._expert_shapes[tensor_type])
        if expert_format == PLANAR12:
            planar.decode(block, panels, parallel=False)
        else:
            decode_block(recipe, block, panels, parallel=False)

    def unpack_expert(self, blocks: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Dense blocks → gate_up [2I, H], down [H, I]."""
        d = self.dims
        return (
            moe.unpack_gate_up(blocks[GATE_UP], d.intermediate, d.hidden, d.dtype),
            gemm.unpack(blocks[DOWN], d.hidden, d.intermediate, d.dtype),
        )

    def kv_block_shape(self, block_size: int, kv_heads: int, head_dim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return attn.kv_block_shape(block_size, kv_heads, head_dim)

    # The forward pass.

    def embed(self, token_ids: Tensor, table: PackedLinear) -> Tensor:
        """token_ids int64 [T], table: packed [vocab, H] (so that tied embeddings are stored once) → fp32 [T, H]."""
        panels = table.block.view(table.dtype).view(-1, table.k, gemm.LANES)
        rows = panels[token_ids // gemm.LANES, :, token_ids % gemm.LANES]
        return self._buffers["hidden"][: len(token_ids)].copy_(rows)

    def rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, self.dims.eps, self._buffers["normed"][: len(x)])

    def qkv(self, x: Tensor, weight: PackedLinear) -> Tensor:
        """[T, H] → [T, (heads + 2·kv_heads)·D]: q, k, v side by side."""
        return self._linear(x, weight, "qkv")

    def attention(
        self,
        qkv: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        rope: RopeTable,
        metadata: AttentionMetadata,
        k_cache: Tensor,
        v_cache: Tensor,
    ) -> Tensor:
        """QK-norm, RoPE, KV write, then causal attention over the paged context: [T, heads·D]."""
        d = self.dims
        attn.prepare_qkv(
            qkv,
            d.heads,
            d.kv_heads,
            d.head_dim,
            _NORMS[d.qk_norm],
            self._no_norm if q_norm is None else q_norm,
            self._no_norm if k_norm is None else k_norm,
            d.eps,
            d.clip_qkv,
            rope,
            metadata,
            k_cache,
            v_cache,
        )
        out = self._buffers["attended"][: len(qkv)]
        return attn.attention(
            qkv,
            d.heads,
            d.kv_heads,
            d.head_dim,
            d.window,
            metadata,
            k_cache,
            v_cache,
            out,
            self._attention,
            self._scratch,
        )

    def gate_attention(self, attended: Tensor, x: Tensor, weight: PackedLinear) -> Tensor:
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
            projected, weights, self.dims.delta, metadata, conv_state, state, mixed, out, self.dims.eps
        )

    def mlp_add(self, x: Tensor, mlp: DenseMlp, residual: Tensor) -> Tensor:
        """residual += SwiGLU MLP of x [T, H], times sigmoid(x·score) where there is one; returns residual."""
        self._linear(x, mlp.gate_up, "mlp")
        activation = gates.swiglu(self._buffers["mlp"][: len(x)], mlp.down.k)
        if mlp.score is None:
            return self.project_add(activation, mlp.down, residual)
        y, score = self._linear(activation, mlp.down, "projected"), self._linear(x, mlp.score, "mlp_score")
        return gates.add_scaled(residual, y, score)

    def project_add(self, x: Tensor, weight: PackedLinear, residual: Tensor) -> Tensor:
        """residual += x @ W^T; returns residual."""
        projected = self._linear(x, weight, "projected")
        _add(residual.numpy(), projected.numpy(), residual.numpy())
        return residual

    def moe_add(
        self,
        x: Tensor,
        router: PackedLinear,
        experts: LayerExperts,
        residual: Tensor,
        num_tokens: Tensor | None = None,
    ) -> Tensor:
        """residual += mixture of experts of x [T, H]; returns residual."""
        assert num_tokens is None, "padding is for captured graphs, which a CPU does not have"
        d = self.dims
        moe.route(self._linear(x, router, "router"), d.top_k, d.renormalise, self._moe)
        experts.wait(GATE_UP)
        moe.gate_up(x, experts.table, d.intermediate, d.dtype, self._moe, self._scratch)
        experts.wait(DOWN)
        moe.down(experts.table, d.intermediate, d.dtype, self._moe, self._scratch)
        return moe.combine(residual, residual, self._moe)

    def count_routed(self, counts: Tensor) -> None:
        """counts fp32 [E] += how many tokens each expert got in the last `moe_add`."""
        counts += torch.diff(self._moe.expert_start)

    def logits(self, x: Tensor, weight: PackedLinear) -> Tensor:
        """[B, H] → fp32 [B, vocab]."""
        return self._linear(x, weight, "logits")

    def _linear(self, x: Tensor, weight: PackedLinear, name: str) -> Tensor:
        y = gemm.linear(x, weight.block, weight.n, weight.dtype, self._buffers[name][: len(x)], self._scratch)
        if weight.bias is not None:
            y += weight.bias
        return y
