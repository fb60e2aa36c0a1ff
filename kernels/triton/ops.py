"""TritonOps: the operations of a decoder but its experts on the Triton kernels, with every buffer made once.

Runs on CUDA, on the CPU where kernels are interpreted (TRITON_INTERPRET=1: slow, for tests), and on the meta device
inside `launches.compile_only`, where launches are compiled and nothing runs. Activations have
the weights' dtype; router logits, softmax and all sums are fp32. Dense projections are torch's (cuBLAS), unless
`batch_invariant` asks for one order of summation whatever the batch: then they, too, run on our tile.

No operation waits for the device or allocates, and all launch shapes follow from the sizes of the batch alone: a
pass can be captured in a CUDA graph. Tokens beyond `AttentionMetadata.num_tokens` are a captured graph's padding.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..attention_layer import AttentionLayer
from ..launches import compiled_for
from ..ops import (
    AttentionMetadata,
    DeltaNetWeights,
    DenseMlp,
    KernelError,
    LayerDims,
    Limits,
    Linear,
    RopeTable,
    RowMajor,
)  # fmt: skip
from . import delta_net, flash_linear, gates, grouped_gemm, paged_attention
from .norm import DTYPES, rms_norm
from .rope_kv import rope_and_cache
from .tiles import Tile, capability_of, fit, invariant_tile, num_sms_of

# What torch gives cuBLAS on each stream (its default for Hopper, the largest): 32 MiB.
_CUBLAS_BYTES = 32 << 20


def check_backend(device: torch.device, dtype: torch.dtype) -> None:
    """KernelError unless Triton kernels run, or are compiled, on this device for weights of this dtype."""
    if device.type != "cuda" and compiled_for(device) is None and not triton.knobs.runtime.interpret:
        raise KernelError("Triton kernels need a CUDA device, or TRITON_INTERPRET=1 to be interpreted (slowly)")
    if dtype not in DTYPES:
        raise KernelError(f"Triton kernels take bfloat16, float16 or float32 weights, got {dtype}")


class TritonOps(AttentionLayer, RowMajor):
    """Same contract as CpuOps; one engine owns one (not thread-safe). A result is valid until the same operation runs
    again; the residual stream is updated in place. delta_net_rule: fluxmoe; or fla, flash-linear-attention's, for
    passes with prompts, which allocate.

    Raises KernelError for dtypes and sizes that the kernels cannot take, and without a GPU or interpreter.
    """

    def __init__(
        self, dims: LayerDims, limits: Limits, device: torch.device | str, *, batch_invariant: bool = False,
        delta_net_rule: str = "fluxmoe",
    ) -> None:  # fmt: skip
        self.dims, self.limits, self.device = dims, limits, torch.device(device)
        self.act_dtype, self.batch_invariant = dims.dtype, batch_invariant
        check_backend(self.device, dims.dtype)
        if limits.block_size % 16:
            raise KernelError(f"the KV block size must be a multiple of 16, got {limits.block_size}")
        tokens = limits.tokens
        self._capability = capability_of(self.device)
        self._num_sms = num_sms_of(self.device)
        self._buffers = {
            "hidden": self._empty(tokens, dims.hidden),
            "normed": self._empty(tokens, dims.hidden),
            "qkv": self._empty(tokens, dims.qkv_size),
            "q": self._empty(tokens, dims.heads, dims.head_dim),
            "attended": self._empty(tokens, dims.heads, dims.head_dim),
            "router": self._empty(tokens, dims.experts, dtype=torch.float32),
            "logits": self._empty(limits.sequences, dims.vocab, dtype=torch.float32),
            "attention": self._empty(
                paged_attention.workspace_bytes(
                    limits.sequences, dims.heads, dims.kv_heads, dims.head_dim, limits.context, self._num_sms,
                    dims.window,
                ),
                dtype=torch.uint8,
            ),
        }  # fmt: skip
        if dims.attention_gate:
            self._buffers["gate"] = self._empty(tokens, dims.heads * dims.head_dim)
        if dims.mlp:
            self._buffers |= {
                "mlp_gate_up": self._empty(tokens, 2 * dims.mlp), "mlp": self._empty(tokens * dims.mlp),
            }  # fmt: skip
        if dims.delta is not None:
            self._buffers |= {
                "delta_in": self._empty(tokens, dims.delta.projected),
                "delta": self._empty(delta_net.workspace_bytes(dims.delta, tokens, dims.dtype), dtype=torch.uint8),
                "delta_out": self._empty(tokens, dims.delta.value_size),
            }
        # Rows that are sampled from, gathered by the decoder.
        transient = limits.sequences * dims.hidden * dims.dtype.itemsize
        transient += _CUBLAS_BYTES if self.device.type == "cuda" else 0
        self._chunk_rule: flash_linear.ChunkRule | None = None
        if delta_net_rule == "fla" and dims.delta is not None:
            self._chunk_rule = flash_linear.chunk_rule(self.device)
            transient += flash_linear.transient_bytes(dims.delta, tokens, limits.sequences, dims.dtype)
        self.workspace_bytes = transient + sum(b.nbytes for b in self._buffers.values())

    def _empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.act_dtype, device=self.device)

    # Layouts: opaque to everybody else.

    def arrange_mlp(self, gate_up: Tensor, out: Tensor) -> None:
        """Gate and up rows in turns."""
        grouped_gemm.interleave(gate_up, out.view(self.dims.dtype).view(gate_up.shape))

    def kv_block_shape(self, block_size: int, kv_heads: int, head_dim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (kv_heads, block_size, head_dim), (kv_heads, block_size, head_dim)

    # The forward pass.

    def embed(self, token_ids: Tensor, table: Linear) -> Tensor:
        """token_ids int64 [T] → [T, H]."""
        return torch.index_select(self.matrix(table), 0, token_ids, out=self._buffers["hidden"][: len(token_ids)])

    def rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, self.dims.eps, self._buffers["normed"][: len(x)])

    def qkv(self, x: Tensor, weight: Linear) -> Tensor:
        """[T, H] → [T, (heads + 2·kv_heads)·D]: q, k, v side by side."""
        return self._linear(x, weight, "qkv")

    def attention(
        self, qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, rope: RopeTable, metadata: AttentionMetadata,
        k_cache: Tensor, v_cache: Tensor,
    ) -> Tensor:  # fmt: skip
        """QK-norm, RoPE and KV write in one kernel, then causal attention over the paged context: [T, heads·D]."""
        d, tokens = self.dims, len(qkv)
        q = rope_and_cache(
            qkv, q_norm, k_norm, rope.cos, rope.sin, metadata.positions, metadata.slot_mapping, k_cache, v_cache,
            self._buffers["q"][:tokens], heads=d.heads, kv_heads=d.kv_heads, head_dim=d.head_dim,
            block_size=metadata.block_size, qk_norm=d.qk_norm, clip=d.clip_qkv, eps=d.eps,
        )  # fmt: skip
        out = paged_attention.paged_attention(
            q, k_cache, v_cache, metadata.block_table, metadata.context_lens, metadata.query_start,
            scale=d.head_dim**-0.5, window=d.window, block_size=metadata.block_size,
            # No sequence is without tokens: as many tokens as sequences means one each.
            max_query_len=1 if tokens == len(metadata.context_lens) else tokens,
            max_context=self.limits.context, out=self._buffers["attended"][:tokens],
            workspace=self._buffers["attention"], batch_invariant=self.batch_invariant,
        )  # fmt: skip
        return out.view(tokens, d.heads * d.head_dim)

    def gate_attention(self, attended: Tensor, x: Tensor, weight: Linear) -> Tensor:
        """attended [T, heads·D] *= sigmoid(x @ W^T); returns attended."""
        return gates.scale(attended, self._linear(x, weight, "gate"))

    def delta_net(
        self, x: Tensor, weights: DeltaNetWeights, metadata: AttentionMetadata, conv_state: Tensor, state: Tensor
    ) -> Tensor:
        """Gated DeltaNet of x [T, H] without its output projection: [T, value_heads·DV]."""
        return delta_net.gated_delta_net(
            self._linear(x, weights.in_proj, "delta_in"), weights, self.dims.delta_net, metadata, conv_state, state,
            self._buffers["delta_out"][: len(x)], self.dims.eps, self._buffers["delta"], self.batch_invariant,
            self._chunk_rule,
        )  # fmt: skip

    def mlp_add(self, x: Tensor, mlp: DenseMlp, residual: Tensor) -> Tensor:
        """residual += SwiGLU MLP of x [T, H], times sigmoid(x·score) where there is one; returns residual."""
        gate_up = self._linear(x, mlp.gate_up, "mlp_gate_up")
        score = None if mlp.score is None else self.matrix(mlp.score)
        h = self._buffers["mlp"][: len(x) * mlp.down.k].view(len(x), mlp.down.k)
        return self.project_add(gates.swiglu(gate_up, x, score, h), mlp.down, residual)

    def project_add(self, x: Tensor, weight: Linear, residual: Tensor) -> Tensor:
        """residual += x @ W^T; returns residual."""
        if self.batch_invariant:
            grouped_gemm.linear(x, self.matrix(weight), residual, self._fixed_tile, add=True)
        else:
            residual.addmm_(x, self.matrix(weight).t())
        return residual if weight.bias is None else residual.add_(weight.bias)

    def router(self, x: Tensor, weight: Linear) -> Tensor:
        """[T, H] → fp32 logits [T, experts]."""
        logits = self._buffers["router"][: len(x)]
        return grouped_gemm.linear(x, self.matrix(weight), logits, self._router_tile(len(x)))

    def logits(self, x: Tensor, weight: Linear) -> Tensor:
        """[B, H] → fp32 [B, vocab]."""
        out, w = self._buffers["logits"][: len(x)], self.matrix(weight)
        if self.batch_invariant or self.device.type != "cuda":
            return grouped_gemm.linear(x, w, out, self._fixed_tile)
        if self.act_dtype == torch.float32:
            return torch.mm(x, w.t(), out=out)
        return torch.mm(x, w.t(), out_dtype=torch.float32, out=out)

    def _linear(self, x: Tensor, weight: Linear, name: str) -> Tensor:
        """Into a buffer, which may be wider."""
        w, out = self.matrix(weight), self._buffers[name][: len(x), : weight.n]
        if self.batch_invariant:
            grouped_gemm.linear(x, w, out, self._fixed_tile)
        else:
            torch.mm(x, w.t(), out=out)
        return out if weight.bias is None else out.add_(weight.bias)

    # Tiles.

    @property
    def _fixed_tile(self) -> Tile:
        return invariant_tile(self._capability, self.act_dtype.itemsize)

    def _router_tile(self, tokens: int) -> Tile:
        # A router has few outputs: 16 of them a program give E / 16 programs, each with little to read.
        if self.batch_invariant or self.act_dtype.itemsize == 4 or tokens > 64:
            return self._fixed_tile
        return fit(Tile(16, 16, 256, 4, 3), self._capability, self.act_dtype.itemsize)
