"""Many rows by FMA: panels abreast, widened to fp32 once for all tiles of rows, a block of K at a time.

The tile of `tile` widens bf16 for itself, two of twelve operations a row of weights on the ports that multiply, and
loads a number of x for each product. Here both are halved or gone: a block of weights lies as fp32 in L1 while all rows
pass, and what is loaded of x meets two panels. One core of Emerald Rapids reaches 0.91 of what FMAs alone reach for
0.71 (128 rows, K = 2,048). Compressed panels are decoded into the same block.

Sums wait in y between blocks, in fp32, so they are added in the order of `tile`'s: the same bits.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ..numba_cache import Linked, cached_njit
from .planar_tile import PAIR_BYTES, make_widen, panel_at, planar_panel
from .simd import (
    F32,
    I64,
    LANES,
    VEC_F32,
    Values,
    by_count,
    const,
    fetch,
    fma,
    load_at,
    load_i64,
    loop,
    row_addresses,
    splat,
    store_at,
    store_i64,
)  # fmt: skip
from .tile import ABREAST, BF16, FP32, MAX_ROWS, gemm_panel, outputs, previous, row_of_panel

# Rows of K that are widened together: 16 KiB for two panels, beside which L1 keeps what is fetched and rows of x.
# Of 256 two tiles are 6 to 10 % slower, of 64 many tiles 3 to 15.
_BLOCK = 128
_ROW_BYTES = 4 * LANES * ABREAST
# Rows from which it pays beyond: by one panel at a time 8 rows are 5 % slower dense and 19 compressed, 16 level.
_FEW_ROWS = MAX_ROWS if ABREAST > 1 else 2 * MAX_ROWS
# Rows that share equal tiles of at most MAX_ROWS, more than one, are so many a tile.
_HEIGHTS = range((MAX_ROWS + 1) // 2, MAX_ROWS + 1)


@intrinsic
def _room(typing_context):
    """The address of a block's room, on the caller's stack: fp32 [_BLOCK, ABREAST, 16], then an int64 a panel."""

    def codegen(context, builder, signature, arguments):
        room = cgutils.alloca_once(builder, ir.ArrayType(VEC_F32, _BLOCK * ABREAST + 1))
        room.align = 64
        return builder.ptrtoint(room, I64)

    return types.int64(), codegen


@intrinsic
def _widen(typing_context, panel, rows, out):
    """`rows` rows of a panel bf16 [K, 16] as fp32, _ROW_BYTES apart from address `out` on."""

    def codegen(context, builder, signature, arguments):
        panel, rows, out = arguments

        def widen_row(k: ir.Value, none: Values) -> Values:
            row = row_of_panel(builder, builder.add(panel, builder.mul(k, const(2 * LANES))), BF16)
            store_at(builder, row, builder.add(out, builder.mul(k, const(_ROW_BYTES))), 4 * LANES)
            return none

        loop(builder, const(0), rows, 1, [], widen_row)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


_decode = make_widen(_ROW_BYTES)


def _emit(builder: ir.IRBuilder, rows: int, arguments: Values) -> None:
    weights, x_rows, skip, depth, ahead, y, y_step, y_stride, accumulate = arguments
    x = [builder.add(row, skip) for row in row_addresses(builder, x_rows, rows)]
    out = [
        at
        for p in range(ABREAST)
        for at in outputs(builder, builder.add(y, builder.mul(y_step, const(p))), y_stride, rows)
    ]

    def add_row(k: ir.Value, sums: Values) -> Values:
        fetch(builder, builder.add(ahead, builder.mul(k, const(2 * LANES))))
        at, lane = builder.add(weights, builder.mul(k, const(_ROW_BYTES))), builder.mul(k, const(4))
        panels = [load_at(builder, builder.add(at, const(4 * LANES * p)), VEC_F32, 4 * LANES) for p in range(ABREAST)]
        scalars = [splat(builder, load_at(builder, builder.add(row, lane), F32, 4)) for row in x]
        return [
            fma(builder, s, panel, sums[p * rows + r]) for p, panel in enumerate(panels) for r, s in enumerate(scalars)
        ]

    sums = loop(builder, const(0), depth, 1, previous(builder, out, accumulate), add_row)
    for total, at in zip(sums, out, strict=True):
        store_at(builder, total, at, 4)


@intrinsic
def _tile(typing_context, rows, weights, x_rows, skip, depth, ahead, y, y_step, y_stride, accumulate):
    """y[p, r, 0:16] (+)= sum_k x[r, k] * weights[k, p]; skip: bytes of each row of x before the first that is read;
    ahead: address from which 32 bytes a row of K are fetched."""

    def codegen(context, builder, signature, arguments):
        by_count(builder, arguments[0], _HEIGHTS, lambda n: _emit(builder, n, arguments[1:]))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 10), codegen


@cached_njit(nogil=True)
def _wide(block, planar, panel, panels, x_rows, rows, depth, y, y_step, y_stride):
    """ABREAST panels from `panel` on; more than _FEW_ROWS rows."""
    room = _room()
    escapes = room + _BLOCK * _ROW_BYTES
    row_bytes, base = 2 * LANES, 0
    data = block + panel * depth * row_bytes
    if planar:
        row_bytes, base = PAIR_BYTES // 2, load_i64(block)
        data = panel_at(block, panel, panels, depth)[0]
        for p in range(ABREAST):
            store_i64(escapes + 8 * p, panel_at(block, panel + p, panels, depth)[1])
    tiles = (rows + MAX_ROWS - 1) // MAX_ROWS
    for begin in range(0, depth, _BLOCK):
        end = min(depth, begin + _BLOCK)
        for p in range(ABREAST):
            this, out = data + p * depth * row_bytes, room + 4 * LANES * p
            if planar:
                following = _decode(this, base, load_i64(escapes + 8 * p), begin, end, out)
                store_i64(escapes + 8 * p, following)
            else:
                _widen(this + begin * row_bytes, end - begin, out)
        first = 0
        for t in range(tiles):
            last = rows * (t + 1) // tiles
            # Each of the first tiles fetches the next block of one panel, the last block's of a panel that follows.
            ahead = room
            if t < ABREAST:
                ahead = data + (t * depth + end if end < depth else (ABREAST + t) * depth) * row_bytes
            _tile(
                last - first, room, x_rows + 8 * first, 4 * begin, end - begin, ahead, y + first * y_stride, y_step,
                y_stride, begin,
            )  # fmt: skip
            first = last


@Linked.of(types.void(*[types.int64] * 13))
def gemm_panels(block, planar, panel, count, panels, kind, x_rows, rows, depth, room, y, y_step, y_stride):
    """All `rows` rows against `count` panels from `panel` on, of a block of `panels`, whatever its format.

    The rows as in `tile.gemm_tile`; planar: the block is compressed; y: address of fp32 [rows, 16] of the first panel,
    `y_step` bytes before that of the second; room: see `planar_panel`.
    """
    if kind == BF16 and rows > _FEW_ROWS and count % ABREAST == 0:
        for p in range(0, count, ABREAST):
            _wide(block, planar, panel + p, panels, x_rows, rows, depth, y + p * y_step, y_step, y_stride)
    else:
        panel_bytes = depth * LANES * (4 if kind == FP32 else 2)
        for p in range(count):
            out = y + p * y_step
            if planar:
                planar_panel(block, panel + p, panels, kind, x_rows, rows, depth, room, out, y_stride)
            else:
                this = block + (panel + p) * panel_bytes
                gemm_panel(this, kind, x_rows, rows, depth, this + panel_bytes, out, y_stride)
