"""The register tile of compressed panels (the layout of `planar`), in LLVM IR: decoded in registers, then multiplied.

It adds in the order of `tile`'s, on the same numbers: the result has the same bits as that of the uncompressed block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ..numba_cache import cached_njit
from .planar_rows import PAIR_BYTES, Rows, decoder
from .simd import (
    I16,
    I64,
    LANES,
    Values,
    by_count,
    const,
    load_at,
    load_i64,
    loop,
    opaque,
    prefetch,
    repeat,
    row_addresses,
    when,
)  # fmt: skip
from .tile import BF16, BF16_DOT, DOT_ROWS, HAS_DOT, MAX_ROWS, gemm_panel

HEADER_BYTES = 128
# How far ahead panels are prefetched, bytes: some 0.3 µs of one thread. A
# tall tile fills the window in which a core reorders, so that nothing but this brings weights in time.
_AHEAD = 10240
# An escape is (k * 16 + lane) << 16 | bits: where its k begins.
_K_BIT = 16 + 4

# What is done with rows k … of K beside multiplying them: decoder, k, the decoded, whether they are a whole step.
_Keep = Callable[[Rows, ir.Value, Values, ir.Value | None], None]


def _emit(
    builder: ir.IRBuilder, weights: Rows, panel: ir.Value, base: ir.Value, escapes: ir.Value, start: ir.Value,
    stop: ir.Value, ahead: ir.Value | None, keep: _Keep | None,
) -> tuple[ir.Value, Values]:  # fmt: skip
    """Rows start … stop - 1 of K, decoded, kept and multiplied; the address of the first escape beyond, the sums.

    start: a multiple of the decoder's step; escapes: the address of the first one at `start` or beyond; ahead: bytes to
    what is fetched meanwhile, None: nothing.
    """
    step = weights.step
    whole_steps = builder.and_(stop, const(-step))

    def address_of(k: ir.Value) -> ir.Value:
        return builder.add(panel, builder.mul(k, const(PAIR_BYTES // 2)))

    def plain(k: ir.Value, sums: Values) -> Values:
        address = address_of(k)
        if ahead is not None:
            for pair in range(step // 2):
                prefetch(builder, builder.add(builder.add(address, ahead), const(pair * PAIR_BYTES)))
        decoded = weights.decode(address, base)
        if keep:
            keep(weights, k, decoded, None)
        # Each row of x at its address and k: LLVM would keep two parts of k apart, and add them once a row.
        return weights.multiply(opaque(builder, k), decoded, sums)

    def segment(state: Values) -> Values:
        # The steps up to the next escape, in a loop of their own that knows of no escapes: with a branch
        # inside, the weights of a tall tile would not fit the registers.
        k, at, escape, *sums = state
        of_escape = builder.and_(builder.lshr(escape, const(_K_BIT)), const(-step))
        near = builder.icmp_signed("<", of_escape, whole_steps)
        end = builder.select(near, of_escape, whole_steps)
        sums = loop(builder, k, end, step, sums, plain)
        more = builder.icmp_signed("<", end, stop)
        patched = when(builder, more, [at, escape, *sums], lambda values: patch(end, values))
        return [builder.add(end, const(step)), *patched]

    def patch(k: ir.Value, values: Values) -> Values:
        at, escape, *sums = values
        whole = builder.icmp_signed("<", k, whole_steps)
        decoded = weights.decode(address_of(k), base, whole)
        # Entries ascend, and those of this step lie below the first place of the next.
        limit = builder.shl(builder.add(k, const(step)), const(_K_BIT))
        at, escape, *decoded = repeat(
            builder,
            [at, escape, *decoded],
            lambda state: builder.icmp_signed("<", state[1], limit),
            lambda state: fix(k, state),
        )
        if keep:
            keep(weights, k, decoded, whole)
        return [at, escape, *weights.multiply(k, decoded, sums, whole)]

    def fix(k: ir.Value, state: Values) -> Values:
        at, escape, *decoded = state
        place = builder.sub(builder.lshr(escape, const(16)), builder.mul(k, const(LANES)))
        decoded = weights.replace(decoded, place, builder.trunc(escape, I16))
        following = builder.add(at, const(8))
        return [following, load_at(builder, following, I64, 8), *decoded]

    _, at, _, *sums = repeat(
        builder,
        [start, escapes, load_at(builder, escapes, I64, 8), *weights.first],
        lambda state: builder.icmp_signed("<", state[0], stop),
        segment,
    )
    return at, sums


def _make_tile(kind: int, counts: Sequence[int], keep: bool = False):
    """The tile for any of `counts` rows; keep: it leaves the panel decoded too, bf16 [K, 16] from address `room` on."""

    def emit(builder: ir.IRBuilder, rows: int, arguments: Values) -> None:
        panel, base, escapes, x_rows, depth, ahead, room, y, y_stride = arguments
        weights = decoder(builder, kind, row_addresses(builder, x_rows, rows))
        kept: _Keep | None = (lambda rows, k, decoded, whole: rows.keep(k, decoded, room, whole)) if keep else None
        _, sums = _emit(builder, weights, panel, base, escapes, const(0), depth, ahead, kept)
        weights.store(sums, [builder.add(y, builder.mul(y_stride, const(r))) for r in range(rows)])

    @intrinsic
    def tile(typing_context, rows, panel, base, escapes, x_rows, depth, ahead, room, y, y_stride):
        def codegen(context, builder, signature, arguments):
            by_count(builder, arguments[0], counts, lambda n: emit(builder, n, arguments[1:]))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 10), codegen

    return tile


_fma, _dots = _make_tile(BF16, range(1, MAX_ROWS + 1)), _make_tile(BF16_DOT, range(1, DOT_ROWS + 1))
_dots_kept = _make_tile(BF16_DOT, [DOT_ROWS], keep=True)
_decode_tile = _make_tile(BF16, [0], keep=True)


def make_widen(row_bytes: int):
    """The decoder of some rows of a panel to fp32, `row_bytes` apart."""

    @intrinsic
    def widen(typing_context, panel, base, escapes, start, stop, out):
        """Rows start … stop - 1 of K from address `out` on; the address of the first escape beyond.

        start: even; escapes: the address of the first one at `start` or beyond.
        """

        def codegen(context, builder, signature, arguments):
            panel, base, escapes, start, stop, out = arguments
            weights, first = decoder(builder, BF16, []), builder.sub(out, builder.mul(start, const(row_bytes)))

            def keep(rows: Rows, k: ir.Value, decoded: Values, whole: ir.Value | None) -> None:
                rows.widen(k, decoded, first, row_bytes)

            return _emit(builder, weights, panel, base, escapes, start, stop, None, keep)[0]

        return types.int64(*[types.int64] * 6), codegen

    return widen


@cached_njit(nogil=True, inline="always")
def panel_at(block, panel, panels, depth):
    """Of panel `panel` of `panels` of the block at address `block`: the addresses of its data and its first escape."""
    index = block + HEADER_BYTES + panels * depth * PAIR_BYTES // 2
    return block + HEADER_BYTES + panel * depth * PAIR_BYTES // 2, block + load_i64(index + 8 * panel)


@cached_njit(nogil=True)
def decode_panel(block, panel, panels, depth, out):
    """Panel `panel` of the block at address `block` as bf16 [K, 16] at address `out`."""
    data, escapes = panel_at(block, panel, panels, depth)
    _decode_tile(0, data, load_i64(block), escapes, block, depth, _AHEAD, out, 0, 0)


@cached_njit(nogil=True)
def _tile(data, base, escapes, kind, x_rows, rows, depth, ahead, y, y_stride):
    """The tile of a kind. A function of its own: written into the loop over tiles, 8 rows take 6 % more of a layer."""
    if HAS_DOT and kind == BF16_DOT:
        _dots(rows, data, base, escapes, x_rows, depth, ahead, 0, y, y_stride)
    else:
        _fma(rows, data, base, escapes, x_rows, depth, ahead, 0, y, y_stride)


@cached_njit(nogil=True)
def planar_panel(block, panel, panels, kind, x_rows, rows, depth, room, y, y_stride):
    """`tile.gemm_panel` on panel `panel` of `panels` of a compressed block: the same bits.

    By FMA each tile decodes it. By dot products two tiles decode it twice, which costs 4 % of a tile each; of three and
    more the first leaves the panel decoded at address `room`, bf16 [K, 16], which costs 15 %, and the others read that.
    """
    data, escapes = panel_at(block, panel, panels, depth)
    following = data + depth * PAIR_BYTES // 2
    base, dots = load_i64(block), HAS_DOT and kind == BF16_DOT
    most = DOT_ROWS if dots else MAX_ROWS
    if dots and rows > 2 * most:
        _dots_kept(most, data, base, escapes, x_rows, depth, _AHEAD, room, y, y_stride)
        gemm_panel(room, kind, x_rows + 8 * most, rows - most, depth, following, y + most * y_stride, y_stride)
        return
    tiles, first, ahead = (rows + most - 1) // most, 0, _AHEAD
    for t in range(tiles):
        last = rows * (t + 1) // tiles
        if t > 0 and last == rows:
            ahead = following - data
        table, out = x_rows + 8 * first, y + first * y_stride
        _tile(data, base, escapes, kind, table, last - first, depth, ahead, out, y_stride)
        first = last
