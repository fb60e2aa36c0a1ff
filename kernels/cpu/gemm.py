"""Dense linear layers on the CPU: weights arranged once into panels, multiplied by the tile of `tile`.

Layout of a weight [N, K] (out_features, in_features), dtype bf16 or fp32:

    [ceil(N/16), K, 16]   panel p holds columns 16p..16p+15 of the output; rows past N are zero

A thread streams through a panel with one sequential read and needs no horizontal sum. Floor at few rows: the
weight's bytes over memory bandwidth; at many: 2·M·N·K over the FMA rate.
"""

from __future__ import annotations

import os

import numba
import numpy as np
import torch
from numba import prange
from torch import Tensor

from ..numba_cache import cached_njit
from .simd import FEW, LANES, address_of, fetch_add, floats, load_bf16, load_f32, round_row
from .tile import BF16_DOT, FP32, kind_of
from .wide_tile import gemm_panels

# Weight bytes of a task. A thread that goes elsewhere in memory begins with nothing fetched ahead, and what was fetched
# beyond its last task is another's: 41 GB/s in tasks of 64 KiB, 45 of 1 MiB (two Zen 5 cores, a plain read 49).
_LEAST_TASK_BYTES, _MOST_TASK_BYTES = 64 * 1024, 1024 * 1024


def padded(n: int) -> int:
    """`n` rounded up to whole panels of 16."""
    return -(-n // LANES) * LANES


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A buffer in host memory; its dtype and device are ours, whatever defaults the process has set."""
    return torch.zeros(shape, dtype=dtype, device="cpu")


def arranged_bytes(n: int, k: int, dtype: torch.dtype) -> int:
    """Bytes of an arranged [n, k] weight."""
    return padded(n) * k * dtype.itemsize


def arrange(weight: Tensor, out: Tensor) -> None:
    """Write weight [N, K] (bf16 or fp32) into `out`, uint8 [arranged_bytes(N, K, dtype)], bit for bit."""
    n, k = weight.shape
    bits = torch.int16 if weight.dtype == torch.bfloat16 else torch.int32
    panels = out.view(bits).view(-1, k, LANES)
    source = weight.contiguous().view(bits)
    whole = n // LANES
    panels[:whole].copy_(source[: whole * LANES].view(whole, LANES, k).transpose(1, 2))
    if n % LANES:
        panels[whole].zero_()
        panels[whole, :, : n % LANES].copy_(source[whole * LANES :].t())


def restore(block: Tensor, n: int, k: int, dtype: torch.dtype) -> Tensor:
    """Inverse of `arrange`: weight [n, k]."""
    panels = block.view(dtype).view(-1, k, LANES)
    return panels.transpose(1, 2).reshape(-1, k)[:n].contiguous()


@cached_njit(nogil=True)
def _row_of(weight, kind, row, out):
    item = 4 if kind == FP32 else 2
    first = weight + (row // 16 * out.shape[0] * 16 + row % 16) * item
    for k in range(out.shape[0]):
        at = first + k * 16 * item
        out[k] = load_f32(at) if kind == FP32 else load_bf16(at)


@cached_njit(parallel=True, nogil=True)
def _rows_of(weight, kind, chosen, out_address, depth):
    out = floats(out_address, chosen.shape[0], depth)
    if out.size <= FEW:
        for t in range(chosen.shape[0]):
            _row_of(weight, kind, chosen[t], out[t])
    else:
        for t in prange(chosen.shape[0]):
            _row_of(weight, kind, chosen[t], out[t])


def rows_of(weight: Tensor, kind: int, chosen: Tensor, out: Tensor) -> Tensor:
    """Rows `chosen`, int64 [T], of an arranged [N, K] weight of the kind's dtype, in `out` fp32 [T, K]."""
    _rows_of(weight.data_ptr(), kind, chosen.numpy(), address_of(out), out.shape[1])
    return out


@cached_njit(nogil=True)
def tasks_of(pairs, pair_bytes, threads):
    """int64 [tasks + 1]: the first pair of panels of each task, and all of them. What is left is halved for each
    thread, and half of that is a task, so that the last, which decide how long threads wait for one another, are the
    smallest."""
    least, most = max(1, _LEAST_TASK_BYTES // pair_bytes), max(1, _MOST_TASK_BYTES // pair_bytes)
    first = np.empty(pairs + 1, np.int64)
    first[0] = count = 0
    while first[count] < pairs:
        left = pairs - first[count]
        first[count + 1] = first[count] + min(left, most, max(least, left // (2 * threads)))
        count += 1
    return first[: count + 1]


@cached_njit(nogil=True)
def fill_rows(row_table, first_address, stride_bytes, rows):
    """row_table[r] = address of row r of a matrix: the tile reads x through a table of rows."""
    for r in range(rows):
        row_table[r] = first_address + r * stride_bytes


@cached_njit(nogil=True)
def round_rows(x, x_stride, rows, columns, out, out_stride):
    """fp32 [rows, columns] at address `x` → bf16 at address `out`; strides in bytes."""
    for r in range(rows):
        round_row(x + r * x_stride, out + r * out_stride, columns)


@cached_njit(nogil=True)
def _multiply(weight, kind, depth, panels, first, last, x_rows, rows, y, y_stride):
    """The pairs of panels first … last - 1 of a weight, whose last may be half of one."""
    for pair in range(first, last):
        p = 2 * pair
        gemm_panels(
            weight, False, p, min(2, panels - p), panels, kind, x_rows, rows, depth, 0, y + p * 64, 64, y_stride
        )


@cached_njit(parallel=True, nogil=True)
def multiply(
    weight, kind, depth, panels, x, x_stride, rows, rounded, y, y_stride, row_table, counter, threads
):  # fmt: skip
    if kind == BF16_DOT:
        round_rows(x, x_stride, rows, depth, rounded, 2 * depth)
        fill_rows(row_table, rounded, 2 * depth, rows)
    else:
        fill_rows(row_table, x, x_stride, rows)
    pairs = (panels + 1) // 2
    first_pair = tasks_of(pairs, depth * 32 * (4 if kind == FP32 else 2), threads)
    tasks = first_pair.shape[0] - 1
    counter[0] = 0
    claim = counter.ctypes.data
    table = row_table.ctypes.data
    if tasks == 1:
        _multiply(weight, kind, depth, panels, 0, pairs, table, rows, y, y_stride)
    else:
        for _ in prange(threads):
            while True:
                task = fetch_add(claim)
                if task >= tasks:
                    break
                first, last = first_pair[task], first_pair[task + 1]
                _multiply(weight, kind, depth, panels, first, last, table, rows, y, y_stride)


def product(x: Tensor, weight: Tensor, n: int, kind: int, y: Tensor, scratch: Scratch) -> tuple:
    """The arguments of `multiply` for y[:, :n] = x @ W^T; see `linear`."""
    rows, depth = x.shape
    assert kind != BF16_DOT or scratch.rounded.numel() >= rows * depth, f"{list(x.shape)} do not fit"
    return (
        weight.data_ptr(), kind, depth, padded(n) // LANES, x.data_ptr(), x.stride(0) * 4, rows,
        scratch.rounded_address, y.data_ptr(), y.stride(0) * 4, scratch.row_table, scratch.counter, scratch.threads,
    )  # fmt: skip


def linear(x: Tensor, weight: Tensor, n: int, kind: int, y: Tensor, scratch: Scratch) -> Tensor:
    """y[:, :n] = x @ W^T, multiplied as `kind` says (see `tile`): x is rounded to bf16 for BF16_DOT.

    x fp32 [M, K]; weight: arranged [n, K] of the kind's dtype; y fp32 [M, ≥ padded(n)] with contiguous rows, written in
    its first padded(n) columns. Returns the view [M, n].
    """
    rows = len(x)
    if rows:
        multiply(*product(x, weight, n, kind, y, scratch))
    return y if y.shape == (rows, n) else y[:rows, :n]


def default_threads() -> int:
    """Processors that this process may use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return min(usable, numba.config.NUMBA_NUM_THREADS)


def use_threads(threads: int | None = None) -> int:
    """Set the threads of the kernels that follow, all by default; returns their number."""
    threads = threads or default_threads()
    numba.set_num_threads(threads)
    return threads


class Scratch:
    """What parallel kernels of one engine share: a work counter, a table of row addresses, a thread count, and room for
    rows that are rounded to bf16, up to `depth` wide, where kernels take those. None of them can run without."""

    def __init__(self, max_rows: int, threads: int, depth: int = 0, dtype: torch.dtype = torch.bfloat16) -> None:
        gemm_panels.link()
        # A cache line to itself: every thread hits the counter.
        self.counter = np.zeros(16, dtype=np.int64)
        self.row_table = np.zeros(max(1, max_rows), dtype=np.int64)
        self.rounded = zeros(max_rows if kind_of(dtype) == BF16_DOT else 0, depth, dtype=torch.bfloat16)
        self.rounded_address = self.rounded.data_ptr()
        self.threads = threads

    @property
    def nbytes(self) -> int:
        return self.counter.nbytes + self.row_table.nbytes + self.rounded.nbytes
