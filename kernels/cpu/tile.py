"""The register tile under every matrix kernel of the CPU. It computes, for some rows of x and one panel of 16 columns,

    y[r, 0:16] (+)= sum_k x[r, k] * panel[k, 0:16]

in one of three kinds, chosen once at start by the weights' dtype and the CPU (`kind_of`):

    FP32      weights fp32, x fp32     one FMA a k, k ascending
    BF16      weights bf16, x fp32     the same; upcasting weights is a shift
    BF16_DOT  weights bf16, x bf16     dot products of pairs (vdpbf16ps of AVX-512 BF16), accumulated in fp32: pairs of
                                       even number in one sum, of odd number in another, which are added at the end

Two sums, since one would wait for the instruction's latency: one Zen 5 core multiplies a single row with weights from
its cache at 45 GB/s then, at 89 with two, and by FMA, one a k, at 32. Weights lie in panels [K, 16] for all kinds: a
word shuffle makes pairs of two rows.

The order of a sum depends on nothing but k. Whatever rows share a tile, whatever tile a row is in: the same bits. That
is what makes the CPU engine batch-invariant.
"""

from __future__ import annotations

from functools import partial

import torch
from llvmlite import binding as llvm
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ..numba_cache import cached_njit
from .simd import (
    F32,
    I16,
    I32,
    LANES,
    VEC_F32,
    VEC_I16,
    VEC_I32,
    ZERO,
    Values,
    by_count,
    const,
    fma,
    function,
    load_at,
    loop,
    prefetch,
    row_addresses,
    splat,
    store_at,
    when,
)  # fmt: skip

FP32, BF16, BF16_DOT = 0, 1, 2
_FEATURES = llvm.get_host_cpu_features()
HAS_DOT = all(_FEATURES.get(name) for name in ("avx512bf16", "avx512bw"))


def bf16_kind(cpu: str) -> int:
    """How bf16 is multiplied on a CPU of LLVM's name `cpu`, with this machine's instructions.

    AMD's cores reach twice the rate of FMAs by dot products. Intel's reach half of it: one dot product in two cycles
    and two FMAs in one (measured on Emerald Rapids).
    """
    return BF16_DOT if HAS_DOT and cpu.startswith("znver") else BF16


BF16_KIND = bf16_kind(llvm.get_host_cpu_name())

# Rows of a tile. By FMA on AVX2: 6 x 16 lanes = 12 accumulators, which leaves 4 of 16 registers for panel and
# broadcast; on AVX-512, where two FMAs a cycle of latency 4 need 8 sums, as many as have their pointers in registers.
# By dot products: 8 rows of two sums in 16 of 32 registers; 12 rows are 6 % faster and run out of pointers.
MAX_ROWS, DOT_ROWS = 10 if _FEATURES.get("avx512f") else 6, 8
# Panels that the tile of many rows multiplies together (`wide_tile`): two of them by ten rows of x need 20 sums and
# three registers more, for which AVX2 has too few.
ABREAST = 2 if _FEATURES.get("avx512f") else 1
# How far ahead of the arithmetic a GEMM fetches, bytes. Panels of one expert are contiguous, so running past a panel's
# end fetches what the thread most likely needs next.
_FMA_AHEAD, _DOT_AHEAD = 1024, 8192

PAIRS = ir.VectorType(I16, 2 * LANES)


class _BFloat(ir.Type):
    """llvmlite knows no bf16, which the intrinsic's type asks for."""

    def _to_string(self) -> str:
        return "bfloat"


_BF16_PAIRS = ir.VectorType(_BFloat(), 2 * LANES)


def kind_of(dtype: torch.dtype, exact: bool = False) -> int:
    """How weights of a dtype are multiplied on this machine; exact: without rounding x."""
    if dtype == torch.float32:
        return FP32
    return BF16 if exact else BF16_KIND


def x_dtype(kind: int) -> torch.dtype:
    """The dtype of the rows that a kind multiplies."""
    return torch.bfloat16 if kind == BF16_DOT else torch.float32


def dot(builder: ir.IRBuilder, x_pair: ir.Value, weights: ir.Value, total: ir.Value) -> ir.Value:
    """total[l] + x[0]·weights[l, 0] + x[1]·weights[l, 1]; x_pair: i32, two bf16; weights: <32 x i16>."""
    x = splat(builder, x_pair, VEC_I32)
    name = "llvm.x86.avx512bf16.dpbf16ps.512"
    instruction = function(builder, name, VEC_F32, [VEC_F32, _BF16_PAIRS, _BF16_PAIRS])
    # x last: the instruction broadcasts its last operand from memory, and needs no register for it.
    return builder.call(instruction, [total, *(builder.bitcast(v, _BF16_PAIRS) for v in (weights, x))])


def row_of_panel(builder: ir.IRBuilder, at: ir.Value, kind: int) -> ir.Value:
    """One row of a panel as fp32; bf16 is the upper half of fp32, so decoding is a shift."""
    if kind == FP32:
        return load_at(builder, at, VEC_F32, 4)
    wide = builder.zext(load_at(builder, at, VEC_I16, 2), VEC_I32)
    return builder.bitcast(builder.shl(wide, ir.Constant(VEC_I32, [16] * LANES)), VEC_F32)


def outputs(builder: ir.IRBuilder, y: ir.Value, y_stride: ir.Value, rows: int) -> Values:
    return [builder.add(y, builder.mul(y_stride, const(r))) for r in range(rows)]


def previous(builder: ir.IRBuilder, out: Values, accumulate: ir.Value) -> Values:
    """What the sums begin with: the outputs where a tile goes on, else zeros."""
    goes_on = builder.icmp_signed("!=", accumulate, const(0))
    return when(builder, goes_on, [ZERO] * len(out), lambda _: [load_at(builder, at, VEC_F32, 4) for at in out])


def _fma_tile(kind: int, builder: ir.IRBuilder, rows: int, arguments: Values) -> None:
    panel, x_rows, depth, ahead, y, y_stride, accumulate = arguments
    x, out = row_addresses(builder, x_rows, rows), outputs(builder, y, y_stride, rows)
    row_bytes = LANES * (4 if kind == FP32 else 2)

    def add_row(k: ir.Value, sums: Values) -> Values:
        at = builder.add(panel, builder.mul(k, const(row_bytes)))
        prefetch(builder, builder.add(at, ahead))
        weights = row_of_panel(builder, at, kind)
        lane = builder.mul(k, const(4))
        scalars = [load_at(builder, builder.add(row, lane), F32, 4) for row in x]
        return [fma(builder, splat(builder, s), weights, t) for s, t in zip(scalars, sums, strict=True)]

    sums = loop(builder, const(0), depth, 1, previous(builder, out, accumulate), add_row)
    for total, at in zip(sums, out, strict=True):
        store_at(builder, total, at, 4)


def _dot_tile(builder: ir.IRBuilder, rows: int, arguments: Values) -> None:
    panel, x_rows, depth, ahead, y, y_stride, accumulate = arguments
    x, out = row_addresses(builder, x_rows, rows), outputs(builder, y, y_stride, rows)

    def add_pair(k: ir.Value, sums: Values) -> Values:
        at = builder.add(panel, builder.mul(k, const(2 * LANES)))
        prefetch(builder, builder.add(at, ahead))
        two_rows = load_at(builder, at, PAIRS, 2)
        side_by_side = [word for lane in range(LANES) for word in (lane, LANES + lane)]
        indices = ir.Constant(ir.VectorType(I32, 2 * LANES), side_by_side)
        return add_dots(builder, x, k, builder.shuffle_vector(two_rows, two_rows, indices), sums)

    def add_single(k: ir.Value, sums: Values) -> Values:
        row = load_at(builder, builder.add(panel, builder.mul(k, const(2 * LANES))), VEC_I16, 2)
        weights = builder.bitcast(builder.zext(row, VEC_I32), PAIRS)
        last = [load_at(builder, builder.add(row, builder.mul(k, const(2))), I16, 2) for row in x]
        return [dot(builder, builder.zext(x_last, I32), weights, t) for x_last, t in zip(last, sums, strict=True)]

    def add_quad(k: ir.Value, sums: Values) -> Values:
        even, odd = sums[:rows], sums[rows:]
        return add_pair(k, even) + add_pair(builder.add(k, const(2)), odd)

    first = previous(builder, out, accumulate) + [ZERO] * rows
    whole = builder.and_(depth, const(-4))
    sums = loop(builder, const(0), whole, 4, first, add_quad)
    left = builder.sub(depth, whole)
    two = builder.icmp_signed(">=", left, const(2))
    even, odd = when(builder, two, sums[:rows], lambda sums: add_pair(whole, sums)), sums[rows:]
    last = builder.sub(depth, const(1))
    three = builder.icmp_signed("==", left, const(3))
    odd = when(builder, three, odd, lambda sums: add_single(last, sums))
    one = builder.icmp_signed("==", left, const(1))
    even = when(builder, one, even, lambda sums: add_single(last, sums))
    store_sums(builder, even, odd, out)


def _make_tile(kind: int):
    """The tile of a kind, for any number of rows that it takes."""
    emit, most = (_dot_tile, DOT_ROWS) if kind == BF16_DOT else (partial(_fma_tile, kind), MAX_ROWS)

    @intrinsic
    def tile(typing_context, rows, panel, x_rows, depth, ahead, y, y_stride, accumulate):
        def codegen(context, builder, signature, arguments):
            by_count(builder, arguments[0], range(1, most + 1), lambda n: emit(builder, n, arguments[1:]))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), codegen

    return tile


def add_dots(builder: ir.IRBuilder, x: Values, k: ir.Value, weights: ir.Value, sums: Values) -> Values:
    """sums[r] += dot of rows k and k + 1 of the panel, <32 x i16>, with x[r]'s pair."""
    pair = builder.mul(k, const(2))
    pairs = [load_at(builder, builder.add(row, pair), I32, 2) for row in x]
    return [dot(builder, x_pair, weights, total) for x_pair, total in zip(pairs, sums, strict=True)]


def store_sums(builder: ir.IRBuilder, even: Values, odd: Values, out: Values) -> None:
    """out[r] = even[r] + odd[r]."""
    for a, b, at in zip(even, odd, out, strict=True):
        store_at(builder, builder.fadd(a, b), at, 4)


_fp32, _bf16, _dots = map(_make_tile, (FP32, BF16, BF16_DOT))


@cached_njit(nogil=True)
def gemm_tile(panel, kind, x_rows, rows, depth, ahead, y, y_stride, accumulate):
    """One tile: depth ≥ 1, rows ≤ MAX_ROWS (≤ DOT_ROWS where the kind is BF16_DOT).

    panel: address of [depth, 16] bf16 or fp32, as `kind` says; x_rows: address of `rows` int64 addresses of rows
    [depth], fp32 or bf16 (so a gather costs nothing); y: address of fp32 [rows, 16], `y_stride` bytes between rows.
    ahead: bytes from each line that is read to one that is fetched meanwhile, since it is to be read soon.
    """
    if HAS_DOT and kind == BF16_DOT:
        _dots(rows, panel, x_rows, depth, ahead, y, y_stride, accumulate)
    elif kind == BF16:
        _bf16(rows, panel, x_rows, depth, ahead, y, y_stride, accumulate)
    else:
        _fp32(rows, panel, x_rows, depth, ahead, y, y_stride, accumulate)


@cached_njit(nogil=True)
def gemm_panel(panel, kind, x_rows, rows, depth, following, y, y_stride):
    """All `rows` rows against one panel: tiles of nearly equal height, so that no tile has one lonely row.

    following: address of what the thread reads next. Of several tiles the last fetches it, since it reads a panel that
    is in the cache, and memory would have nothing to do.
    """
    most, ahead = (DOT_ROWS, _DOT_AHEAD) if kind == BF16_DOT else (MAX_ROWS, _FMA_AHEAD)
    tiles = (rows + most - 1) // most
    first = 0
    for t in range(tiles):
        last = rows * (t + 1) // tiles
        if t > 0 and last == rows:
            ahead = following - panel
        gemm_tile(panel, kind, x_rows + 8 * first, last - first, depth, ahead, y + first * y_stride, y_stride, 0)
        first = last
