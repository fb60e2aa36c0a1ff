"""How fast kernels read pinned host memory in place: the rate of on-demand experts, measured."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..work import declares, every_tensor_once


@triton.jit(launch_metadata=declares(every_tensor_once))
def _sum_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    """Grid: (programs,). x: int32 [N] anywhere a GPU can read; y: int32 [programs]."""
    total = tl.zeros([BLOCK], tl.int32)
    for start in range(tl.program_id(0) * BLOCK, N, tl.num_programs(0) * BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + offsets, mask=offsets < N, other=0)
    tl.store(y_ptr + tl.program_id(0), tl.sum(total))


def sum_in_place(x: torch.Tensor, out: torch.Tensor, programs: int) -> torch.Tensor:
    """Sum of int32 x [N], on the device or in pinned host memory, as `programs` partial sums in out, int32."""
    _sum_kernel[(programs,)](x, out, x.numel(), BLOCK=4096, num_warps=8)
    return out


def read_bandwidth(nbytes: int) -> float:
    """Bytes/s of a kernel that reads `nbytes` of pinned memory with all SMs, the best of five."""
    x = torch.ones(nbytes // 4, dtype=torch.int32, pin_memory=True)
    programs = 2 * torch.cuda.get_device_properties(0).multi_processor_count
    out, best = torch.empty(programs, dtype=torch.int32, device="cuda"), float("inf")
    for _ in range(6):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        sum_in_place(x, out, programs)
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) / 1e3)
    assert int(out.sum()) == x.numel(), "a kernel that read pinned memory summed it wrongly"
    return nbytes / best
