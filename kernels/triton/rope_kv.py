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

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launches import Case
from ..ops import KernelError
from . import portable
from .norm import DTYPES

QK_NORMS = ("none", "head", "full")


@triton.jit
def _clipped_halves(
    x_ptr,  # (HEADS, HEAD_DIM), of one token
    weight_ptr,  # (HEAD_DIM,) or (HEADS * HEAD_DIM,) fp32
    eps,
    clip,
    HEADS: tl.constexpr,
    HEADS_P2: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF_P2: tl.constexpr,
    QK_NORM: tl.constexpr,
    CLIP: tl.constexpr,
):
    """First and second halves of all heads, normalised and clipped, fp32 [HEADS_P2, HALF_P2] each."""
    HALF: tl.constexpr = HEAD_DIM // 2
    head = tl.arange(0, HEADS_P2)[:, None]
    d = tl.arange(0, HALF_P2)[None, :]
    mask = (head < HEADS) & (d < HALF)
    a = tl.load(x_ptr + head * HEAD_DIM + d, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + head * HEAD_DIM + HALF + d, mask=mask, other=0.0).to(tl.float32)
    if QK_NORM == "full":
        total = tl.sum(tl.sum(a * a + b * b, axis=1), axis=0)
        scale = 1.0 / tl.sqrt(total / (HEADS * HEAD_DIM) + eps)
        a = a * scale * tl.load(weight_ptr + head * HEAD_DIM + d, mask=mask, other=0.0)
        b = b * scale * tl.load(weight_ptr + head * HEAD_DIM + HALF + d, mask=mask, other=0.0)
    elif QK_NORM == "head":
        total = tl.sum(a * a + b * b, axis=1)
        scale = (1.0 / tl.sqrt(total / HEAD_DIM + eps))[:, None]
        a = a * scale * tl.load(weight_ptr + d, mask=d < HALF, other=0.0)
        b = b * scale * tl.load(weight_ptr + HALF + d, mask=d < HALF, other=0.0)
    if CLIP:
        # Comparisons, not min and max, which would turn a NaN into a number and hide it.
        a = tl.where(a > clip, clip, tl.where(a < -clip, -clip, a))
        b = tl.where(b > clip, clip, tl.where(b < -clip, -clip, b))
    return a, b


@triton.jit
def _part(
    x_ptr,  # (HEADS, HEAD_DIM), of one token
    weight_ptr,
    cos_ptr,  # (HEAD_DIM / 2,) at the token's position
    sin_ptr,
    out_ptr,  # (HEADS, …), rows stride_out_h apart
    keep,  # false: store nothing
    eps,
    clip,
    stride_out_h: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_P2: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF_P2: tl.constexpr,
    QK_NORM: tl.constexpr,
    CLIP: tl.constexpr,
    ROTATE: tl.constexpr,
):
    """The q, k or v of one token, from the projection to where it belongs."""
    HALF: tl.constexpr = HEAD_DIM // 2
    a, b = _clipped_halves(x_ptr, weight_ptr, eps, clip, HEADS, HEADS_P2, HEAD_DIM, HALF_P2, QK_NORM, CLIP)
    head = tl.arange(0, HEADS_P2)[:, None]
    d = tl.arange(0, HALF_P2)[None, :]
    if ROTATE:
        cos = tl.load(cos_ptr + d, mask=d < HALF, other=0.0)
        sin = tl.load(sin_ptr + d, mask=d < HALF, other=0.0)
        first = a * cos - b * sin
        second = b * cos + a * sin
    else:
        first = a
        second = b
    mask = (head < HEADS) & (d < HALF) & keep
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(out_ptr + head * stride_out_h + d, portable.cast(first, dtype), mask=mask)
    tl.store(out_ptr + head * stride_out_h + HALF + d, portable.cast(second, dtype), mask=mask)


@triton.jit
def _rope_and_cache_kernel(
    qkv_ptr,  # (T, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    q_norm_ptr,  # (HEAD_DIM,) or (HEADS * HEAD_DIM,) fp32; unused without QK-norm
    k_norm_ptr,  # (HEAD_DIM,) or (KV_HEADS * HEAD_DIM,) fp32; unused without QK-norm
    cos_ptr,  # (positions, HEAD_DIM / 2) fp32
    sin_ptr,  # (positions, HEAD_DIM / 2) fp32
    positions_ptr,  # (T,) int32
    slot_mapping_ptr,  # (T,) int64
    k_cache_ptr,  # (num_blocks, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    v_cache_ptr,  # (num_blocks, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    q_out_ptr,  # (T, HEADS, HEAD_DIM)
    eps,
    clip,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QK_NORM: tl.constexpr,
    CLIP: tl.constexpr,
    HEADS_P2: tl.constexpr,
    KV_HEADS_P2: tl.constexpr,
    HALF_P2: tl.constexpr,
):
    """Grid: (T, 3): the q, k and v of a token are independent."""
    # int64: T and the pool of blocks may both pass 2^31 elements.
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    qkv_ptr += token * (HEADS + 2 * KV_HEADS) * HEAD_DIM
    position = tl.load(positions_ptr + token).to(tl.int64)
    cos_ptr += position * (HEAD_DIM // 2)
    sin_ptr += position * (HEAD_DIM // 2)
    slot = tl.load(slot_mapping_ptr + token).to(tl.int64)
    keep = slot >= 0
    slot = tl.maximum(slot, 0)
    at = slot // BLOCK_SIZE * (KV_HEADS * BLOCK_SIZE * HEAD_DIM) + slot % BLOCK_SIZE * HEAD_DIM
    if part == 0:
        _part(
            qkv_ptr, q_norm_ptr, cos_ptr, sin_ptr, q_out_ptr + token * HEADS * HEAD_DIM, True, eps, clip,
            HEAD_DIM, HEADS, HEADS_P2, HEAD_DIM, HALF_P2, QK_NORM, CLIP, True,
        )  # fmt: skip
    elif part == 1:
        _part(
            qkv_ptr + HEADS * HEAD_DIM, k_norm_ptr, cos_ptr, sin_ptr, k_cache_ptr + at, keep, eps, clip,
            BLOCK_SIZE * HEAD_DIM, KV_HEADS, KV_HEADS_P2, HEAD_DIM, HALF_P2, QK_NORM, CLIP, True,
        )  # fmt: skip
    else:
        _part(
            qkv_ptr + (HEADS + KV_HEADS) * HEAD_DIM, k_norm_ptr, cos_ptr, sin_ptr, v_cache_ptr + at, keep, eps, clip,
            BLOCK_SIZE * HEAD_DIM, KV_HEADS, KV_HEADS_P2, HEAD_DIM, HALF_P2, "none", CLIP, False,
        )  # fmt: skip


def _launch(heads: int, kv_heads: int, head_dim: int, block_size: int, qk_norm: str, clip: float) -> tuple[dict, int]:
    """(constexprs, warps): 16 elements a thread keep 32 query heads of 128 in 8 warps, without spills."""
    constexprs = {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "HEAD_DIM": head_dim,
        "BLOCK_SIZE": block_size,
        "QK_NORM": qk_norm,
        "CLIP": clip > 0,
        "HEADS_P2": triton.next_power_of_2(heads),
        "KV_HEADS_P2": triton.next_power_of_2(kv_heads),
        "HALF_P2": triton.next_power_of_2(head_dim // 2),
    }
    elements = constexprs["HEADS_P2"] * constexprs["HALF_P2"] * 2
    return constexprs, min(max(elements // (32 * 16), 1), 8)


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
    if qk_norm != "none":
        widths = (head_dim, head_dim) if qk_norm == "head" else (heads * head_dim, kv_heads * head_dim)
        if q_norm is None or k_norm is None:
            raise KernelError(f"qk_norm {qk_norm!r} needs the weights q_norm and k_norm")
        expected["q_norm"] = (q_norm, (widths[0],), torch.float32)
        expected["k_norm"] = (k_norm, (widths[1],), torch.float32)
    for name, (tensor, shape, dtype) in expected.items():
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            raise KernelError(f"{name} must be contiguous {shape} {dtype}, got {tuple(tensor.shape)} {tensor.dtype}")
    if not tokens:
        return q_out
    constexprs, num_warps = _launch(heads, kv_heads, head_dim, block_size, qk_norm, clip)
    if qk_norm == "none":
        # Never read; a tensor rather than None keeps one signature.
        q_norm = k_norm = cos
    _rope_and_cache_kernel[(tokens, 3)](
        qkv, q_norm, k_norm, cos, sin, positions, slot_mapping, k_cache, v_cache, q_out, eps, float(clip),
        **constexprs, num_warps=num_warps,
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
