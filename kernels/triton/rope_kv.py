"""From the fused QKV projection to rotated queries and a filled KV cache, in one pass over the projection.

For each token, in this order: QK-norm over all heads ("full", OLMoE) or over each head ("head", Qwen3), clipping of
q, k and v to ±clip (DBRX, OLMoE), rotation of q and k (RoPE, arXiv 2104.09864, in the half-split form of Hugging
Face checkpoints), all in fp32, rounded once:

    out[d]       = x[d]·cos[p, d]       - x[d + D/2]·sin[p, d]
    out[d + D/2] = x[d + D/2]·cos[p, d] + x[d]·sin[p, d]            d < D/2, p the token's position

    qkv             [T, (heads + 2·kv_heads)·D]            bf16, fp16 or fp32: q heads, then k, then v
    cos, sin        [positions, D/2]                       fp32
    positions       [T]                                    int32
    slot_mapping    [T]                                    int64, block·block_size + offset; < 0: keep out of the cache
    q_out           [T, heads, D]                          qkv's dtype
    k_cache, v_cache [num_blocks, kv_heads, block_size, D]  what `paged_attention` reads: a head's tokens lie together

Example: block_size 16, slot 37 is block 2, offset 5; its key of head h goes to k_cache[2, h, 5].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launches import Case
from ..ops import KernelError
from ..work import Work, declares
from . import portable
from .norm import DTYPES
from .tiles import capability_of

QK_NORMS = ("none", "head", "full")


class QkNorms(NamedTuple):
    q: Tensor  # (D,) or (heads * D,) fp32
    k: Tensor  # (D,) or (kv_heads * D,) fp32


class Angles(NamedTuple):
    cos: Tensor  # (positions, D / 2) fp32
    sin: Tensor


class Caches(NamedTuple):
    k: Tensor  # (num_blocks, kv_heads, block_size, D)
    v: Tensor


@dataclass(frozen=True)
class RopeDims:
    """Sizes of `rope_and_cache`, as it has them; clips: whether it clips."""

    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    qk_norm: str
    clips: bool

    @property
    def half(self) -> int:
        return self.head_dim // 2

    @property
    def half_p2(self) -> int:
        return triton.next_power_of_2(self.half)

    @property
    def heads_p2(self) -> int:
        return triton.next_power_of_2(self.heads)

    @property
    def kv_heads_p2(self) -> int:
        return triton.next_power_of_2(self.kv_heads)

    @property
    def num_warps(self) -> int:
        """16 elements a thread keep 32 query heads of 128 in 8 warps, without spills."""
        return min(max(self.heads_p2 * self.half_p2 * 2 // (32 * 16), 1), 8)


@triton.jit
def _clipped_halves(
    x_ptr,  # (HEADS, D), of one token
    weight_ptr,  # (D,) or (HEADS * D,) fp32, or None
    eps,
    clip,
    HEADS: tl.constexpr,
    HEADS_P2: tl.constexpr,
    DIMS: tl.constexpr,
):
    """First and second halves of all heads, normalised and clipped, fp32 [HEADS_P2, half_p2] each."""
    HALF: tl.constexpr = DIMS.half
    HEAD_DIM: tl.constexpr = DIMS.head_dim
    head = tl.arange(0, HEADS_P2)[:, None]
    d = tl.arange(0, DIMS.half_p2)[None, :]
    mask = (head < HEADS) & (d < HALF)
    a = tl.load(x_ptr + head * HEAD_DIM + d, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + head * HEAD_DIM + HALF + d, mask=mask, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        if DIMS.qk_norm == "full":
            total = tl.sum(tl.sum(a * a + b * b, axis=1), axis=0)
            scale = 1.0 / tl.sqrt(total / (HEADS * HEAD_DIM) + eps)
            a = a * scale * tl.load(weight_ptr + head * HEAD_DIM + d, mask=mask, other=0.0)
            b = b * scale * tl.load(weight_ptr + head * HEAD_DIM + HALF + d, mask=mask, other=0.0)
        else:
            total = tl.sum(a * a + b * b, axis=1)
            scale = (1.0 / tl.sqrt(total / HEAD_DIM + eps))[:, None]
            a = a * scale * tl.load(weight_ptr + d, mask=d < HALF, other=0.0)
            b = b * scale * tl.load(weight_ptr + HALF + d, mask=d < HALF, other=0.0)
    if DIMS.clips:
        # Comparisons, not min and max, which would turn a NaN into a number and hide it.
        a = tl.where(a > clip, clip, tl.where(a < -clip, -clip, a))
        b = tl.where(b > clip, clip, tl.where(b < -clip, -clip, b))
    return a, b


@triton.jit
def _part(
    x_ptr,  # (HEADS, D), of one token
    weight_ptr,
    angles,  # cos and sin at the token's position, (D / 2,) each; None: no rotation
    out_ptr,  # (HEADS, …), rows STRIDE_OUT_H apart
    keep,  # false: store nothing
    eps,
    clip,
    STRIDE_OUT_H: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_P2: tl.constexpr,
    DIMS: tl.constexpr,
):
    """The q, k or v of one token, from the projection to where it belongs."""
    HALF: tl.constexpr = DIMS.half
    a, b = _clipped_halves(x_ptr, weight_ptr, eps, clip, HEADS, HEADS_P2, DIMS)
    head = tl.arange(0, HEADS_P2)[:, None]
    d = tl.arange(0, DIMS.half_p2)[None, :]
    if angles is not None:
        cos = tl.load(angles[0] + d, mask=d < HALF, other=0.0)
        sin = tl.load(angles[1] + d, mask=d < HALF, other=0.0)
        first = a * cos - b * sin
        second = b * cos + a * sin
    else:
        first = a
        second = b
    mask = (head < HEADS) & (d < HALF) & keep
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(out_ptr + head * STRIDE_OUT_H + d, portable.cast(first, dtype), mask=mask)
    tl.store(out_ptr + head * STRIDE_OUT_H + HALF + d, portable.cast(second, dtype), mask=mask)


def _rope_work(args: Mapping[str, Any]) -> Work:
    """The projection, the queries made of it, and the K and V of all tokens, also of those that are not kept."""
    qkv, q_out, cache, dims = (args[name] for name in ("qkv_ptr", "q_out_ptr", "cache", "DIMS"))
    kept = 2 * len(qkv) * dims.kv_heads * dims.head_dim * cache.k.element_size()
    return Work(qkv.nbytes + q_out.nbytes + kept)


@triton.jit(launch_metadata=declares(_rope_work))
def _rope_and_cache_kernel(
    qkv_ptr,  # (T, (heads + 2 * kv_heads) * D)
    norms,  # `QkNorms`, or None without QK-norm
    table,  # `Angles`
    positions_ptr,  # (T,) int32
    slot_mapping_ptr,  # (T,) int64
    cache,  # `Caches`
    q_out_ptr,  # (T, heads, D)
    eps,
    clip,
    DIMS: tl.constexpr,
):
    """Grid: (T, 3): the q, k and v of a token are independent."""
    portable.after_inputs()
    HEADS: tl.constexpr = DIMS.heads
    KV_HEADS: tl.constexpr = DIMS.kv_heads
    HEAD_DIM: tl.constexpr = DIMS.head_dim
    ROW: tl.constexpr = DIMS.block_size * HEAD_DIM
    # int64: T and the pool of blocks may both pass 2^31 elements.
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    qkv_ptr += token * (HEADS + 2 * KV_HEADS) * HEAD_DIM
    position = tl.load(positions_ptr + token).to(tl.int64) * DIMS.half
    angles = (table.cos + position, table.sin + position)
    slot = tl.load(slot_mapping_ptr + token).to(tl.int64)
    keep = slot >= 0
    slot = tl.maximum(slot, 0)
    at = slot // DIMS.block_size * (KV_HEADS * ROW) + slot % DIMS.block_size * HEAD_DIM
    q_norm = None if norms is None else norms.q
    k_norm = None if norms is None else norms.k
    if part == 0:
        q_ptr = q_out_ptr + token * HEADS * HEAD_DIM
        _part(qkv_ptr, q_norm, angles, q_ptr, True, eps, clip, HEAD_DIM, HEADS, DIMS.heads_p2, DIMS)
    elif part == 1:
        k_ptr = qkv_ptr + HEADS * HEAD_DIM
        _part(k_ptr, k_norm, angles, cache.k + at, keep, eps, clip, ROW, KV_HEADS, DIMS.kv_heads_p2, DIMS)
    else:
        v_ptr = qkv_ptr + (HEADS + KV_HEADS) * HEAD_DIM
        _part(v_ptr, None, None, cache.v + at, keep, eps, clip, ROW, KV_HEADS, DIMS.kv_heads_p2, DIMS)


def rope_and_cache(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_out: Tensor,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    qk_norm: str = "none",
    clip: float = 0.0,
    eps: float = 1e-6,
) -> Tensor:
    """Write q_out, and the slots of k_cache and v_cache; returns q_out. Shapes and dtypes: see the module.

    q_norm, k_norm: fp32 weights, [head_dim] for qk_norm "head", [heads·head_dim] and [kv_heads·head_dim] for
    "full", None for "none". clip 0: no clipping. Positions must lie within the tables, and slots within the cache:
    neither is checked, since both live on the device. KernelError on other shapes, dtypes or layouts.
    """
    tokens = qkv.shape[0]
    if qk_norm not in QK_NORMS:
        raise KernelError(f"qk_norm must be one of {', '.join(QK_NORMS)}, got {qk_norm!r}")
    if head_dim < 2 or head_dim % 2:
        raise KernelError(f"head_dim must be even, for halves to rotate, got {head_dim}")
    if qkv.dtype not in DTYPES or q_out.dtype != qkv.dtype:
        raise KernelError(f"qkv and q_out must share bf16, fp16 or fp32, got {qkv.dtype} and {q_out.dtype}")
    if k_cache.dtype not in DTYPES or v_cache.dtype != k_cache.dtype:
        raise KernelError(f"K and V caches must share bf16, fp16 or fp32, got {k_cache.dtype} and {v_cache.dtype}")
    cache_shape = (k_cache.shape[0], kv_heads, block_size, head_dim)
    expected = {
        "qkv": (qkv, (tokens, (heads + 2 * kv_heads) * head_dim), qkv.dtype),
        "cos": (cos, (cos.shape[0], head_dim // 2), torch.float32),
        "sin": (sin, (cos.shape[0], head_dim // 2), torch.float32),
        "positions": (positions, (tokens,), torch.int32),
        "slot_mapping": (slot_mapping, (tokens,), torch.int64),
        "k_cache": (k_cache, cache_shape, k_cache.dtype),
        "v_cache": (v_cache, cache_shape, k_cache.dtype),
        "q_out": (q_out, (tokens, heads, head_dim), qkv.dtype),
    }
    norms = None
    if qk_norm != "none":
        widths = (head_dim, head_dim) if qk_norm == "head" else (heads * head_dim, kv_heads * head_dim)
        if q_norm is None or k_norm is None:
            raise KernelError(f"qk_norm {qk_norm!r} needs the weights q_norm and k_norm")
        norms = QkNorms(q_norm, k_norm)
        expected["q_norm"] = (q_norm, (widths[0],), torch.float32)
        expected["k_norm"] = (k_norm, (widths[1],), torch.float32)
    for name, (tensor, shape, dtype) in expected.items():
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            raise KernelError(f"{name} must be contiguous {shape} {dtype}, got {tuple(tensor.shape)} {tensor.dtype}")
    if not tokens:
        return q_out
    dims = RopeDims(heads, kv_heads, head_dim, block_size, qk_norm, clip > 0)
    _rope_and_cache_kernel[(tokens, 3)](
        qkv, norms, Angles(cos, sin), positions, slot_mapping, Caches(k_cache, v_cache), q_out, eps, float(clip),
        dims, num_warps=dims.num_warps, **portable.dependent_launch(capability_of(qkv.device)),
    )  # fmt: skip
    return q_out


def rope_and_cache_torch(
    qkv, q_norm, k_norm, cos, sin, positions, slot_mapping, k_cache, v_cache, q_out, *, heads, kv_heads, head_dim,
    block_size, qk_norm="none", clip=0.0, eps=1e-6,
) -> Tensor:  # fmt: skip
    """The same in float64, token by token; q_out and caches may be float64 too, to see unrounded values."""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()

    for t in range(len(qkv)):
        row = qkv[t].double()
        q, k, v = row.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim])
        if qk_norm == "full":
            q, k = norm(q, q_norm), norm(k, k_norm)
        q, k, v = q.view(heads, head_dim), k.view(kv_heads, head_dim), v.view(kv_heads, head_dim)
        if qk_norm == "head":
            q, k = norm(q, q_norm), norm(k, k_norm)
        if clip > 0:
            q, k, v = q.clamp(-clip, clip), k.clamp(-clip, clip), v.clamp(-clip, clip)
        angle = torch.complex(cos[positions[t]].double(), sin[positions[t]].double())
        q, k = (torch.complex(x[:, : head_dim // 2], x[:, head_dim // 2 :]) * angle for x in (q, k))
        q_out[t] = torch.cat((q.real, q.imag), dim=-1).to(q_out.dtype)
        if slot_mapping[t] >= 0:
            block, offset = divmod(int(slot_mapping[t]), block_size)
            k_cache[block, :, offset] = torch.cat((k.real, k.imag), dim=-1).to(k_cache.dtype)
            v_cache[block, :, offset] = v.to(v_cache.dtype)
    return q_out


def audit_cases() -> Iterator[Case]:
    """For `kernels.audit`: a batch of 64 tokens of three models."""
    shapes = (
        ("qwen3-30b-a3b", 32, 4, 128, "head"),
        ("mixtral-8x7b", 32, 8, 128, "none"),
        ("qwen3-next", 16, 2, 256, "head"),
    )
    bf16, ids = (partial(torch.empty, dtype=dtype, device="meta") for dtype in (torch.bfloat16, torch.int32))
    for model, heads, kv_heads, dim, qk_norm in shapes:
        qkv = bf16(64, (heads + 2 * kv_heads) * dim)
        weight = None if qk_norm == "none" else torch.empty(dim, device="meta")
        table, cache = torch.empty(4096, dim // 2, device="meta"), bf16(256, kv_heads, 16, dim)
        positions, q = ids(64), bf16(64, heads, dim)
        launch = partial(
            rope_and_cache, qkv, weight, weight, table, table, positions, positions.long(), cache, cache, q,
            heads=heads, kv_heads=kv_heads, head_dim=dim, block_size=16, qk_norm=qk_norm,
        )  # fmt: skip
        yield Case(f"rope_and_cache/{model}", launch, wide=(_rope_and_cache_kernel,))
