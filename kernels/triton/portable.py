"""What differs between Triton's interpreter and GPUs, and from one GPU to another, behind one name each.

The interpreter multiplies the raw bits of bf16 operands (triton issue 11584) and truncates fp32 → bf16, where a GPU
rounds to nearest even. On a GPU these helpers are the plain operation.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language import target_info
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Decided when triton is imported, as @triton.jit itself decides.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def after_inputs():
    """Programmatic dependent launch (Hopper and later): wait for the kernel before to end, and let the next one start.

    The first thing that a kernel does which is launched with `dependent_launch`, in every program, also in those that
    find nothing to do: the next kernel's wait is for this one alone, so this one must not end before those ahead of it.
    cuBLAS's and torch's kernels in between start when the one before has ended, and let nobody start early. What is won
    is the time between a kernel's end and the next one's start. Elsewhere nothing happens.
    """
    if not INTERPRETED and target_info.cuda_capability_geq(9):
        gdc_wait()
        gdc_launch_dependents()


def dependent_launch(capability: int) -> dict[str, bool]:
    """Options of a launch whose kernel begins with `after_inputs`."""
    return {"launch_pdl": capability >= 90}


@triton.jit
def cast(x, dtype: tl.constexpr):
    """fp32 `x` as `dtype`, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # The carry of a NaN's payload could make it an infinity.
        rounded = tl.where(x != x, 0x7FC0, rounded)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def dot(a, b, acc):
    """acc fp32 [M, N] + a [M, K] @ b [K, N]. fp32 operands are not rounded to TF32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def dot_fp32(a, b):
    """a fp32 [M, K] @ b fp32 [K, N] on matrix units, to some 16 bits: three products of their bf16 halves."""
    return tl.dot(a, b, input_precision="ieee" if INTERPRETED else "bf16x3")
