"""RMSNorm: y = x / sqrt(mean(x²) + eps) · weight, row by row (Zhang and Sennrich, arXiv 1910.07467).

    x       [T, H]  bf16, fp16 or fp32, contiguous
    weight  [H]     fp32
    y       [T, H]  x's dtype, rounded once, from fp32

A row fits in one program's registers, so x is read once. The sum over a row has an order that depends on H alone:
a row has the same bits in any batch.
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
from ..work import Work, declares
from . import portable
from .tiles import capability_of

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# A program holds its row in registers; beyond this many elements, 8 warps would spill.
MAX_HIDDEN = 32768


@triton.jit
def normed_row(x, weight_ptr, eps, HIDDEN: tl.constexpr, BLOCK_H: tl.constexpr):
    """fp32 [BLOCK_H]: the norm of a row x, fp32 and 0 beyond HIDDEN."""
    h = tl.arange(0, BLOCK_H)
    weight = tl.load(weight_ptr + h, mask=h < HIDDEN, other=0.0)
    return x * (1.0 / tl.sqrt(tl.sum(x * x, axis=0) / HIDDEN + eps)) * weight


@triton.jit(launch_metadata=declares(lambda args: Work(args["x_ptr"].nbytes + args["out_ptr"].nbytes)))
def _rms_norm_kernel(
    x_ptr,  # (T, HIDDEN)
    weight_ptr,  # (HIDDEN,) fp32
    out_ptr,  # (T, HIDDEN)
    eps,
    HIDDEN: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Grid: (T,)."""
    portable.after_inputs()
    # int64: 2^20 tokens of 4096 elements pass 2^31.
    row = tl.program_id(0).to(tl.int64) * HIDDEN
    h = tl.arange(0, BLOCK_H)
    mask = h < HIDDEN
    x = tl.load(x_ptr + row + h, mask=mask, other=0.0).to(tl.float32)
    normed = normed_row(x, weight_ptr, eps, HIDDEN, BLOCK_H)
    tl.store(out_ptr + row + h, portable.cast(normed, out_ptr.dtype.element_ty), mask=mask)


def row_launch(hidden: int) -> tuple[dict, int]:
    """(constexprs, warps): 8 elements a thread make one 16-byte load of bf16; more than 8 warps only add barriers."""
    block = triton.next_power_of_2(hidden)
    return {"HIDDEN": hidden, "BLOCK_H": block}, min(max(block // (32 * 8), 1), 8 if block <= 8192 else 16)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """x [T, H] bf16 | fp16 | fp32, weight fp32 [H] → [T, H] of x's dtype, in `out` if given (may be x itself).

    KernelError on shapes, dtypes or layouts other than these.
    """
    if x.dim() != 2 or x.dtype not in DTYPES or not x.is_contiguous():
        raise KernelError(f"x must be contiguous [T, H] of bf16, fp16 or fp32, got {tuple(x.shape)} {x.dtype}")
    tokens, hidden = x.shape
    if not 0 < hidden <= MAX_HIDDEN:
        raise KernelError(f"rows must have 1 to {MAX_HIDDEN} elements, got {hidden}")
    if weight.shape != (hidden,) or weight.dtype != torch.float32 or not weight.is_contiguous():
        raise KernelError(f"weight must be contiguous fp32 [{hidden}], got {tuple(weight.shape)} {weight.dtype}")
    if out is None:
        out = torch.empty_like(x)
    elif out.shape != x.shape or out.dtype != x.dtype or not out.is_contiguous():
        raise KernelError(f"out must be contiguous {tuple(x.shape)} {x.dtype}, got {tuple(out.shape)} {out.dtype}")
    if tokens:
        constexprs, num_warps = row_launch(hidden)
        options = portable.dependent_launch(capability_of(x.device))
        _rms_norm_kernel[(tokens,)](x, weight, out, eps, **constexprs, num_warps=num_warps, **options)
    return out


def audit_cases() -> Iterator[Case]:
    """For `kernels.audit`: the norm of Qwen3-30B-A3B and of Mixtral-8x7B."""
    for model, hidden in (("qwen3-30b-a3b", 2048), ("mixtral-8x7b", 4096)):
        x = torch.empty(64, hidden, dtype=torch.bfloat16, device="meta")
        weight = torch.empty(hidden, device="meta")
        yield Case(f"rms_norm/{model}", partial(rms_norm, x, weight, 1e-6), wide=(_rms_norm_kernel,))
