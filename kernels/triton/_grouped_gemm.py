"""The kernels of `grouped_gemm`, where formulas, sources and launches are, and what they declare of their launches.

table: a `TableArrays`; routing: the arrays of a `Routing`; TILE: a `Tile`, in all of them. num_tokens_ptr: (1,) int32,
tokens from there on are padding; None: there is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..expert_table import GATE_UP
from ..formats import FORMATS
from ..work import Work, declares, touched_experts
from .norm import normed_row
from .planar_gemm import planar_times_rows
from .portable import after_inputs, cast, dot

_PLANAR12 = tl.constexpr(FORMATS["planar12"].number)


class TableArrays(NamedTuple):
    """What a kernel is given of an `ExpertTable`; shared: the weight of the expert behind the table's, if there is.
    formats: of a launch that is for a group of experts (`RoutingArrays.group`), theirs."""

    addresses: Tensor  # (E, 2) int64
    formats: Tensor  # (E, 2) uint8
    shared: Tensor | None


@triton.jit
def weight_times_rows(x_ptr, sources, w_ptr, n, n0, N, K, TILE: tl.constexpr, EVEN_K: tl.constexpr):
    """fp32 [block_m, block_n]: rows of x (element offsets `sources` int64) times rows `n` of w [N, K], over all K.

    Nothing here masks rows: callers clamp `sources` and `n` into range and mask what they store.
    """
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_N: tl.constexpr = TILE.block_n
    BLOCK_K: tl.constexpr = TILE.block_k
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + sources[:, None] + k[None, :]
    w_ptrs = w_ptr + n[:, None] * K + k[None, :]
    if TILE.tma:
        w_desc = tl.make_tensor_descriptor(w_ptr, shape=[N, K], strides=[K, 1], block_shape=[BLOCK_N, BLOCK_K])
    acc = tl.zeros([BLOCK_N, BLOCK_M] if TILE.swap_ab else [BLOCK_M, BLOCK_N], tl.float32)
    for k0 in tl.range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
        else:
            x = tl.load(x_ptrs, mask=k[None, :] < K - k0, other=0.0)
        if TILE.tma:
            w = w_desc.load([n0, k0])
        elif EVEN_K:
            w = tl.load(w_ptrs)
        else:
            w = tl.load(w_ptrs, mask=k[None, :] < K - k0, other=0.0)
        acc = dot(w, x.T, acc) if TILE.swap_ab else dot(x, w.T, acc)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    return tl.trans(acc) if TILE.swap_ab else acc


@triton.jit
def _tile_of_expert(
    x_ptr,
    table,
    y_ptr,
    routing,
    tile,
    blocks,  # the first, and how many
    N,
    K,
    strides,  # of x and y
    TENSOR: tl.constexpr,
    TOP_K: tl.constexpr,
    TILE: tl.constexpr,
    EVEN_K: tl.constexpr,
    COMPRESSED: tl.constexpr,
):
    """One tile of `_grouped_gemm_kernel`."""
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_N: tl.constexpr = TILE.block_n
    GROUP_M: tl.constexpr = TILE.group_m
    W_DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    tiles_n = tl.cdiv(N, BLOCK_N)
    # Blocks in groups, so that programs that run together share the weights of a few columns in L2.
    group = tile // (GROUP_M * tiles_n)
    in_group = tl.minimum(blocks[1] - group * GROUP_M, GROUP_M)
    within = tile % (GROUP_M * tiles_n)
    block = routing.block_map + (blocks[0] + group * GROUP_M + within % in_group) * 4
    n0 = within // in_group * BLOCK_N
    entry = tl.load(block) * 2 + TENSOR
    begin = tl.load(block + 1)
    end = tl.load(block + 2)

    positions = tl.minimum(begin + tl.arange(0, BLOCK_M), end - 1)
    if TENSOR == 0:
        rows = tl.load(routing.order + positions) // TOP_K
    else:
        rows = positions
    if table.shared is not None:
        is_shared = tl.load(block + 3) == 1
        entry = tl.where(is_shared, 0, entry)
    # 28672 x 4096 elements of a weight fit int32; a pool of experts does not, hence one address each.
    address = tl.load(table.addresses + entry)
    if table.shared is not None:
        address = tl.where(is_shared, table.shared.to(tl.int64), address)
    n = tl.minimum(n0 + tl.arange(0, BLOCK_N), N - 1)
    sources = rows.to(tl.int64) * strides[0]
    # Without the hints, loads through an address that was loaded are as narrow as one element.
    w_ptr = tl.multiple_of(address.to(tl.pointer_type(W_DTYPE)), 16)
    if COMPRESSED:
        compressed = tl.load(table.formats + entry) == COMPRESSED
        if table.shared is not None:
            compressed = compressed & (is_shared == 0)
        if compressed:
            block_ptr = tl.multiple_of(address.to(tl.pointer_type(tl.uint8)), 16)
            acc = planar_times_rows(
                x_ptr, sources, block_ptr, n, n0, N, K, TILE, EVEN_K, NIBBLES=COMPRESSED == _PLANAR12
            )
        else:
            acc = weight_times_rows(x_ptr, sources, w_ptr, n, n0, N, K, TILE, EVEN_K)
    else:
        acc = weight_times_rows(x_ptr, sources, w_ptr, n, n0, N, K, TILE, EVEN_K)
    # Found again: else they would keep registers while the sum is made.
    end = tl.load(block + 2, volatile=True)
    positions = tl.load(block + 1, volatile=True) + tl.arange(0, BLOCK_M)
    mine = positions < end
    positions = tl.minimum(positions, end - 1)
    if TENSOR == 0:
        gate, up = tl.split(tl.reshape(acc, [BLOCK_M, BLOCK_N // 2, 2]))
        value = gate / (1.0 + tl.exp(-gate)) * up
        columns = n0 // 2 + tl.arange(0, BLOCK_N // 2)
        inside = columns < N // 2
        targets = positions
    else:
        targets = tl.load(routing.order + positions)
        value = acc * tl.load(routing.weights + targets)[:, None]
        columns = n0 + tl.arange(0, BLOCK_N)
        inside = columns < N
    y_ptrs = y_ptr + targets.to(tl.int64)[:, None] * strides[1] + columns[None, :]
    tl.store(y_ptrs, cast(value, y_ptr.dtype.element_ty), mask=mine[:, None] & inside[None, :])


def gemm_work(n: int, k: int, tokens: float, rows: float, weight_bytes: float, itemsize: int, tensor: int) -> Work:
    """Of one grouped GEMM: weight_bytes in all, activations in and out once. gate_up reads tokens and writes half of n
    a row; down reads rows and writes n."""
    read, written = (tokens, n // 2) if tensor == GATE_UP else (rows, n)
    return Work(weight_bytes + itemsize * (read * k + rows * written), 2.0 * rows * n * k)


def work_of_gemm(args: Mapping[str, Any]) -> Work:
    n, k, tensor, table, routing = (args[name] for name in ("N", "K", "TENSOR", "table", "routing"))
    tokens, choices = routing.experts.shape
    shared = int(table.shared is not None)
    bits = {each.number: each.bits for each in FORMATS.values() if each.number is not None}
    numbers = table.formats[:, tensor].cpu().tolist()
    experts, share = len(table.addresses), 1.0
    if routing.expert_start.device.type == "meta":
        share = len(numbers) / experts
        total = sum(bits[number] for number in numbers) / experts
        total *= touched_experts(routing.expert_start, tokens, choices - shared)
    else:
        start = routing.expert_start.cpu()
        if routing.group is not None:
            first, last = routing.group[2:].tolist()
            share = float(start[last] - start[first]) / max(1, int(start[-1]))
            start = start[first : last + 1]
        used = (torch.diff(start) > 0).tolist()
        total = sum(bits[number] for number, has_tokens in zip(numbers, used, strict=True) if has_tokens)
    weight_bytes = (total + shared * bits[0]) / 8 * n * k
    rows = tokens * choices * share
    return gemm_work(n, k, tokens * share, rows, weight_bytes, args["x_ptr"].element_size(), tensor)


def _combine_work(args: Mapping[str, Any]) -> Work:
    """Rows read, the residual read and written, and where there is one the norm written."""
    streams = 3 if "normed_ptr" in args else 2
    return Work(args["y_ptr"].nbytes + streams * args["residual_ptr"].nbytes)


def _linear_work(args: Mapping[str, Any]) -> Work:
    x, w, y = (args[name] for name in ("x_ptr", "w_ptr", "y_ptr"))
    tokens, n, k = args["T"], args["N"], args["K"]
    return Work(x.nbytes + w.nbytes + (2 if args["ADD"] else 1) * tokens * n * y.element_size(), 2.0 * tokens * n * k)


@triton.jit(launch_metadata=declares(work_of_gemm))
def _grouped_gemm_kernel(
    x_ptr,  # (T, K) tokens for gate_up, (R, K) sorted positions for down
    table,  # `TableArrays`
    y_ptr,  # (R, N / 2) by position for gate_up, (R, N) by row for down
    routing,  # `RoutingArrays`
    N,
    K,
    stride_x,
    stride_y,
    TENSOR: tl.constexpr,  # GATE_UP or DOWN
    TOP_K: tl.constexpr,
    TILE: tl.constexpr,
    EVEN_K: tl.constexpr,
    COMPRESSED: tl.constexpr,  # number of the format that experts may have beside dense; 0: none has another
):
    """Grid: (programs,), each takes tile pid, and if persistent pid + programs, …; tiles = blocks in use, or those of
    the group, x cdiv(N, block_n)."""
    after_inputs()
    if routing.group is None:
        blocks = (0, tl.load(routing.num_blocks))
    else:
        blocks = (tl.load(routing.group), tl.load(routing.group + 1))
    tiles = blocks[1] * tl.cdiv(N, TILE.block_n)
    if TILE.persistent:
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
            _tile_of_expert(
                x_ptr, table, y_ptr, routing, tile, blocks, N, K, (stride_x, stride_y), TENSOR, TOP_K, TILE, EVEN_K,
                COMPRESSED,
            )  # fmt: skip
    elif tl.program_id(0) < tiles:
        # What a loop would carry from tile to tile takes registers.
        _tile_of_expert(
            x_ptr, table, y_ptr, routing, tl.program_id(0), blocks, N, K, (stride_x, stride_y), TENSOR, TOP_K, TILE,
            EVEN_K, COMPRESSED,
        )  # fmt: skip


@triton.jit
def _summed_rows(y_ptr, routing, num_tokens_ptr, t, h, H, TOP_K: tl.constexpr, SOME: tl.constexpr):
    """fp32: the rows of token t (int64) at elements h of them, one after another; SOME: experts may be elsewhere."""
    # Rows of padding were never written.
    real = h < H
    if num_tokens_ptr is not None:
        real = real & (t < tl.load(num_tokens_ptr))
    total = tl.zeros_like(h).to(tl.float32)
    for choice in tl.static_range(TOP_K):
        # Nor were those of experts that are elsewhere.
        here = real & (tl.load(routing.experts + t * TOP_K + choice) >= 0) if SOME else real
        total += tl.load(y_ptr + (t * TOP_K + choice) * H + h, mask=here, other=0.0).to(tl.float32)
    return total


@triton.jit(launch_metadata=declares(_combine_work))
def _combine_kernel(
    y_ptr,  # (T, TOP_K, H) by row
    residual_ptr,  # (T, H)
    out_ptr,  # (T, H), may be residual_ptr
    routing,  # `RoutingArrays`
    num_tokens_ptr,  # (1,) int32 or None
    H,
    TOP_K: tl.constexpr,
    SOME: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Grid: (T, cdiv(H, BLOCK_H))."""
    after_inputs()
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.load(residual_ptr + t * H + h, mask=h < H, other=0.0).to(tl.float32)
    total += _summed_rows(y_ptr, routing, num_tokens_ptr, t, h, H, TOP_K, SOME)
    tl.store(out_ptr + t * H + h, cast(total, out_ptr.dtype.element_ty), mask=h < H)


@triton.jit(launch_metadata=declares(_combine_work))
def _combine_and_norm_kernel(
    y_ptr,  # (T, TOP_K, HIDDEN) by row
    residual_ptr,  # (T, HIDDEN), in and out
    weight_ptr,  # (HIDDEN,) fp32
    normed_ptr,  # (T, HIDDEN)
    routing,  # `RoutingArrays`
    num_tokens_ptr,  # (1,) int32 or None
    eps,
    HIDDEN: tl.constexpr,
    TOP_K: tl.constexpr,
    SOME: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Grid: (T,). The norm sees the sum as it is stored, rounded: bits are those of the two kernels one by one."""
    after_inputs()
    t = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    at = t * HIDDEN + h
    total = tl.load(residual_ptr + at, mask=h < HIDDEN, other=0.0).to(tl.float32)
    total += _summed_rows(y_ptr, routing, num_tokens_ptr, t, h, HIDDEN, TOP_K, SOME)
    rounded = cast(total, residual_ptr.dtype.element_ty)
    tl.store(residual_ptr + at, rounded, mask=h < HIDDEN)
    normed = normed_row(rounded.to(tl.float32), weight_ptr, eps, HIDDEN, BLOCK_H)
    tl.store(normed_ptr + at, cast(normed, normed_ptr.dtype.element_ty), mask=h < HIDDEN)


@triton.jit(do_not_specialize=["T"], launch_metadata=declares(_linear_work))
def _linear_kernel(
    x_ptr,  # (T, K)
    w_ptr,  # (N, K)
    y_ptr,  # (T, N)
    T,
    N,
    K,
    stride_x,
    stride_y,
    TILE: tl.constexpr,
    EVEN_K: tl.constexpr,
    ADD: tl.constexpr,
):
    """Grid: (cdiv(T, block_m), cdiv(N, block_n)). y = x w^T, or y += x w^T."""
    after_inputs()
    rows = tl.program_id(0) * TILE.block_m + tl.arange(0, TILE.block_m)
    n0 = tl.program_id(1) * TILE.block_n
    columns = n0 + tl.arange(0, TILE.block_n)
    sources = tl.minimum(rows, T - 1).to(tl.int64) * stride_x
    acc = weight_times_rows(x_ptr, sources, w_ptr, tl.minimum(columns, N - 1), n0, N, K, TILE, EVEN_K)
    y_ptrs = y_ptr + rows.to(tl.int64)[:, None] * stride_y + columns[None, :]
    mask = (rows[:, None] < T) & (columns[None, :] < N)
    if ADD:
        acc += tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptrs, cast(acc, y_ptr.dtype.element_ty), mask=mask)
