"""Gates of decoder layers, elementwise: what an MLP and gated attention do between their matrices.

    swiglu   h[i] = silu(gate[i]) · up[i], times sigmoid(x·score) of the token where there is a score
    scale    y = y · sigmoid(gate)

Rows of gate_up have gate and up in turns, as the grouped GEMM's (`grouped_gemm.interleave`). The score is applied to h:
the product with the down matrix is linear, and so a shared expert ends in the same addmm as any MLP.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launches import Case
from ..work import Work, declares
from .portable import after_inputs, cast, dependent_launch
from .tiles import capability_of

_BLOCK = 1024


def _swiglu_work(args: Mapping[str, Any]) -> Work:
    h = args["h_ptr"]
    x = 0 if args["score_ptr"] is None else args["x_ptr"].nbytes
    return Work(2 * args["N"] * len(h) * args["gate_up_ptr"].element_size() + x + h.nbytes)


@triton.jit(launch_metadata=declares(_swiglu_work))
def _swiglu_kernel(
    gate_up_ptr,  # (T, 2 * N), rows stride_t apart
    x_ptr,  # (T, HIDDEN); unread without score_ptr
    score_ptr,  # (HIDDEN,) or None
    h_ptr,  # (T, N)
    stride_t,
    N,
    HIDDEN: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid: (T, cdiv(N, BLOCK_N))."""
    after_inputs()
    t = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK_N
    both = 2 * i + tl.arange(0, 2 * BLOCK_N)
    mixed = tl.load(gate_up_ptr + t * stride_t + both, mask=both < 2 * N, other=0.0).to(tl.float32)
    gate, up = tl.split(tl.reshape(mixed, [BLOCK_N, 2]))
    value = gate / (1.0 + tl.exp(-gate)) * up
    if score_ptr is not None:
        k = tl.arange(0, BLOCK_H)
        x = tl.load(x_ptr + t * HIDDEN + k, mask=k < HIDDEN, other=0.0).to(tl.float32)
        score = tl.sum(x * tl.load(score_ptr + k, mask=k < HIDDEN, other=0.0).to(tl.float32), axis=0)
        value = value / (1.0 + tl.exp(-score))
    i += tl.arange(0, BLOCK_N)
    tl.store(h_ptr + t * N + i, cast(value, h_ptr.dtype.element_ty), mask=i < N)


@triton.jit(launch_metadata=declares(lambda args: Work(2 * args["y_ptr"].nbytes + args["gate_ptr"].nbytes)))
def _scale_kernel(y_ptr, gate_ptr, N, BLOCK: tl.constexpr):
    """Grid: (cdiv(N, BLOCK),)."""
    after_inputs()
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(y_ptr + i, mask=i < N, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + i, mask=i < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + i, cast(y / (1.0 + tl.exp(-gate)), y_ptr.dtype.element_ty), mask=i < N)


def swiglu(gate_up: Tensor, x: Tensor, score: Tensor | None, h: Tensor) -> Tensor:
    """gate_up [T, 2I], x [T, H] contiguous, score [1, H] or None → h [T, I] contiguous, which is returned."""
    tokens, intermediate = h.shape
    if tokens:
        hidden = x.shape[1]
        block = min(_BLOCK, triton.next_power_of_2(intermediate))
        _swiglu_kernel[(tokens, triton.cdiv(intermediate, block))](
            gate_up, x, score, h, gate_up.stride(0), intermediate, hidden, triton.next_power_of_2(hidden), block,
            num_warps=4, **dependent_launch(capability_of(x.device)),
        )  # fmt: skip
    return h


def scale(y: Tensor, gate: Tensor) -> Tensor:
    """y *= sigmoid(gate), both contiguous and of one shape; returns y."""
    if y.numel():
        _scale_kernel[(triton.cdiv(y.numel(), _BLOCK),)](
            y, gate, y.numel(), _BLOCK, num_warps=4, **dependent_launch(capability_of(y.device))
        )  # fmt: skip
    return y


def audit_cases() -> Iterator[Case]:
    """For `kernels.audit`: the shared expert of Qwen3-Next and its attention's gate."""
    bf16 = partial(torch.empty, dtype=torch.bfloat16, device="meta")
    launch = partial(swiglu, bf16(64, 1024), bf16(64, 2048), bf16(1, 2048), bf16(64, 512))
    yield Case("swiglu/qwen3-next", launch, (_swiglu_kernel,))
    yield Case("scale/qwen3-next", partial(scale, bf16(64, 4096), bf16(64, 4096)), (_scale_kernel,))
