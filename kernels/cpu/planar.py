"""Losslessly compressed expert panels that the CPU's GEMM reads in place: 12 bits a weight instead of 16.

The low byte of a bf16 (last exponent bit, mantissa) stays as it is. Of its high byte, the sign stays, and of the
seven upper exponent bits a trained weight almost always has one of 8 consecutive values, which 3 bits name: a nibble
that one byte shuffle turns back. A block holds panels [K, 16] of bf16 (the layout of `gemm` or `moe`), two rows of K
at a time:

    header   int64       base (first of the 8 values), panels, K, escapes; then zeros up to 128 bytes
    panels   [P, K/2, 48 bytes]   32 low bytes, then 16 bytes with two nibbles each
    index    int64 [P]   byte offset of each panel's escapes in the block
    escapes  int64       (k * 16 + lane) << 16 | bf16 bits, ascending; a panel's list ends with _END

Weights outside the window are escapes: their nibble means nothing, and the tile replaces them before it multiplies.
The order of the 32 bytes (`_ORDER`) makes two byte unpacks and four word unpacks of AVX2 yield rows of fp32 without
crossing its 128-bit halves: 9 vector operations for 32 weights, where uncompressed ones take 8. The tile adds in the
order of `simd`'s, on the same numbers: the result has the same bits as that of the uncompressed block.

Idea: exponent statistics and fixed-width codes of ZipServ (arXiv 2603.17435) and SplitZip (arXiv 2605.01708); the
split at the byte boundary and the layout are ours.
"""

from __future__ import annotations

import numpy as np
import torch
from llvmlite import binding as llvm
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from ..ops import KernelError
from ..packing.codec import Packed, PackingError
from .simd import LANES, MAX_ROWS

HEADER_BYTES = 128
PAIR_BYTES = 48
_WINDOW = 8
# Escapes that a block has room for: 0.1 % of its weights and a few. Trained weights have 0.01 to 0.05 %.
_ESCAPE_SHARE, _ESCAPE_LEAST = 0.001, 64
_END = (1 << 62) - 1
# How far ahead panels are prefetched, in pairs of rows: 4.6 KB, some 0.3 µs of one thread.
_PREFETCH_PAIRS = 96

# Place of lane l of row k (byte of the first unpack's input): lanes 0-3, 8-11 | 4-7, 12-15 in the two halves.
_LANE_PLACE = [0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23]
# Of row k + 1: behind those, so that the high unpack takes them.
_ORDER = np.array([_LANE_PLACE, [place + 8 for place in _LANE_PLACE]], dtype=np.int64)

_F32, _I8, _I32, _I64 = ir.FloatType(), ir.IntType(8), ir.IntType(32), ir.IntType(64)
_VEC_F32 = ir.VectorType(_F32, LANES)
_BYTES16, _BYTES32, _WORDS16 = ir.VectorType(_I8, 16), ir.VectorType(_I8, 32), ir.VectorType(ir.IntType(16), 16)
_HAS_AVX2 = bool(llvm.get_host_cpu_features().get("avx2"))


def block_bytes(panels: int, depth: int) -> int:
    """Bytes of a block with room for its escapes."""
    room = int(panels * depth * LANES * _ESCAPE_SHARE) + _ESCAPE_LEAST
    return HEADER_BYTES + panels * depth // 2 * PAIR_BYTES + 8 * panels + 8 * (room + panels)


@njit(nogil=True, cache=True)
def _best_base(words):
    """First of the 8 consecutive values of the upper exponent bits that cover most weights; how many they leave out."""
    counts = np.zeros(128, dtype=np.int64)
    flat = words.reshape(-1)
    for i in range(flat.size):
        counts[(flat[i] >> 8) & 0x7F] += 1
    covered = 0
    for e in range(_WINDOW):
        covered += counts[e]
    best, base = covered, 0
    for first in range(1, 128 - _WINDOW + 1):
        covered += counts[first + _WINDOW - 1] - counts[first - 1]
        if covered > best:
            best, base = covered, first
    return base, flat.size - best


@njit(nogil=True, cache=True)
def _encode_panel(words, base, order, out):
    """words uint16 [K, 16] → out uint8 [K/2, 48]."""
    for pair in range(words.shape[0] // 2):
        codes = np.zeros(32, dtype=np.uint8)
        for row in range(2):
            for lane in range(16):
                word = words[2 * pair + row, lane]
                code = ((word >> 8) & 0x7F) - base
                if code < 0 or code > 7:
                    code = 0
                place = order[row, lane]
                codes[place] = ((word >> 12) & 8) | code
                out[pair, place] = word & 0xFF
        for i in range(16):
            out[pair, 32 + i] = codes[i] | (codes[16 + i] << 4)


@njit(parallel=True, nogil=True, cache=True)
def _encode(words, base, order, out):
    for p in prange(words.shape[0]):
        _encode_panel(words[p], base, order, out[p])


@njit(nogil=True, cache=True)
def _list_escapes(words, base, index, entries, entries_offset):
    at = 0
    panels, depth = words.shape[0], words.shape[1]
    for p in range(panels):
        index[p] = entries_offset + 8 * at
        for k in range(depth):
            for lane in range(16):
                word = np.int64(words[p, k, lane])
                upper = (word >> 8) & 0x7F
                if upper < base or upper > base + 7:
                    entries[at] = ((k * 16 + lane) << 16) | word
                    at += 1
        entries[at] = _END
        at += 1


def encode(panels: Tensor, out: Tensor) -> None:
    """bf16 panels [P, K, 16] → `out`, uint8 [block_bytes(P, K)]; the bytes of `panels` come back from `decode`.

    KernelError when more weights lie outside the window than a block has room for.
    """
    count, depth, _ = panels.shape
    words = panels.contiguous().view(torch.int16).numpy().view(np.uint16)
    base, escapes = _best_base(words)
    data_bytes = count * depth // 2 * PAIR_BYTES
    index_at = HEADER_BYTES + data_bytes
    entries_at = index_at + 8 * count
    if 8 * (escapes + count) > out.numel() - entries_at:
        raise KernelError(
            f"{escapes / words.size:.2%} of an expert's weights have exponents outside any window of 16, and format "
            f"planar12 has room for {_ESCAPE_SHARE:.1%}; use the dense format"
        )
    out.zero_()
    raw = out.numpy()
    raw[:32].view(np.int64)[:] = (base, count, depth, escapes)
    _encode(words, base, _ORDER, raw[HEADER_BYTES:index_at].reshape(count, depth // 2, PAIR_BYTES))
    entries = raw[entries_at : entries_at + 8 * (escapes + count)].view(np.int64)
    _list_escapes(words, base, raw[index_at:entries_at].view(np.int64), entries, entries_at)


def decode(block: Tensor, out: Tensor | None = None, parallel: bool = True) -> Tensor:
    """The bf16 panels [P, K, 16] of a block, bit for bit, in `out` if given (contiguous, P·K·16 of bf16).

    parallel: by all threads of numba; without, by the calling thread alone.
    """
    _, count, depth, _ = block[:32].view(torch.int64).tolist()
    if out is None:
        out = torch.empty(count, depth, LANES, dtype=torch.bfloat16, device="cpu")
    panels = out.view(count, depth, LANES)
    (_decode_parallel if parallel else _decode)(block.data_ptr(), count, depth, panels.data_ptr())
    return panels


def check(block: Tensor, count: int, depth: int) -> None:
    """PackingError unless decoding `block`, uint8 in host memory, and a GEMM that reads it touch nothing beyond it and
    panels [P, K, 16]; see `Codec.check`. Reads header, index and escapes: under 1 % of the block."""
    raw = block.numpy()
    index_at = HEADER_BYTES + count * depth // 2 * PAIR_BYTES
    entries_at = index_at + 8 * count
    base, *sizes, escapes = raw[:32].view(np.int64).tolist()
    if sizes != [count, depth] or not 0 <= base <= 128 - _WINDOW:
        raise PackingError(f"its header must have {[count, depth]} and a base up to {128 - _WINDOW}")
    if not 0 <= escapes <= (len(raw) - entries_at) // 8 - count:
        raise PackingError(f"it has no room for {escapes} escapes")
    entries = raw[entries_at : entries_at + 8 * (escapes + count)].view(np.int64)
    last = np.flatnonzero(entries == _END)
    begins = np.append(0, last + 1)
    if len(last) != count or begins[-1] != len(entries):
        raise PackingError(f"its escapes must be {count} lists that end")
    if (raw[index_at:entries_at].view(np.int64) != entries_at + 8 * begins[:-1]).any():
        raise PackingError("its index does not lead to its lists of escapes")
    place = entries >> 16
    listed = entries != _END
    # Whatever follows the end of a list begins another.
    ascending = (place[1:] > place[:-1]) | ~listed[:-1]
    if not ascending.all() or (place[listed] < 0).any() or (place[listed] >= depth * LANES).any():
        raise PackingError("its escapes do not ascend inside their panels")


class PanelBlocks:
    """`packing.blocks.Blocks` of matrices whose rows are panels, [P, K·16]; rows of K come in pairs."""

    def nbytes(self, n: int, k: int) -> int:
        if k // LANES % 2:
            raise KernelError("expert format planar12 needs even hidden and intermediate sizes; use dense")
        return block_bytes(n, k // LANES)

    def encode(self, matrix: Tensor, out: Tensor) -> None:
        encode(matrix.view(len(matrix), -1, LANES), out)

    def decode(self, block: Tensor, recipe: Packed | None, out: Tensor, parallel: bool = True) -> None:
        decode(block, out, parallel)

    def check(self, block: Tensor, recipe: Packed | None, n: int, k: int) -> None:
        check(block, n, k // LANES)


@njit(nogil=True, cache=True)
def _decode(block, panels, depth, out):
    for p in range(panels):
        decode_panel(block, p, panels, depth, out + p * depth * 32)


@njit(parallel=True, nogil=True, cache=True)
def _decode_parallel(block, panels, depth, out):
    for p in prange(panels):
        decode_panel(block, p, panels, depth, out + p * depth * 32)


# The register tile.


def _high_bytes(builder: ir.IRBuilder, nibbles: ir.Value, base: ir.Value) -> ir.Value:
    """<32 x i8> of sign and upper exponent bits from <32 x i8> of nibbles; base: i64."""
    if _HAS_AVX2:
        # One byte shuffle looks all of them up in the 16 bytes that a base makes.
        lane = builder.trunc(base, _I8)
        table = [builder.add(lane, ir.Constant(_I8, code)) for code in range(8)]
        table += [builder.or_(entry, ir.Constant(_I8, 0x80)) for entry in table]
        vector = ir.Constant(_BYTES32, ir.Undefined)
        for i in range(32):
            vector = builder.insert_element(vector, table[i % 16], ir.Constant(_I32, i))
        kind = ir.FunctionType(_BYTES32, [_BYTES32, _BYTES32])
        shuffle = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx2.pshuf.b")
        return builder.call(shuffle, [vector, nibbles])
    sign = builder.and_(builder.shl(nibbles, _splat8(4)), _splat8(0x80))
    bases = _splat(builder, builder.trunc(base, _I8), _BYTES32)
    return builder.or_(sign, builder.add(builder.and_(nibbles, _splat8(7)), bases))


def _splat8(value: int) -> ir.Constant:
    return ir.Constant(_BYTES32, [value] * 32)


def _decode_pair(builder: ir.IRBuilder, address: ir.Value, base: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Rows k and k + 1 as words <16 x i16>, lanes in `_ORDER`'s word order; base: i64."""
    low_byte = builder.load(builder.inttoptr(address, _BYTES32.as_pointer()), align=1)
    packed = builder.load(builder.inttoptr(builder.add(address, ir.Constant(_I64, 32)), _BYTES16.as_pointer()), align=1)
    # Both halves get all 16 bytes; the upper one is shifted to its nibbles.
    twice = builder.shuffle_vector(packed, packed, ir.Constant(ir.VectorType(_I32, 32), [*range(16)] * 2))
    shifts = ir.Constant(ir.VectorType(_I32, 8), [0] * 4 + [4] * 4)
    shifted = builder.bitcast(builder.lshr(builder.bitcast(twice, shifts.type), shifts), _BYTES32)
    high_byte = _high_bytes(builder, builder.and_(shifted, _splat8(15)), base)
    rows = []
    for row in range(2):
        first = 8 * row
        mask = []
        for half in (first, first + 16):
            for i in range(8):
                mask += [half + i, 32 + half + i]
        mixed = builder.shuffle_vector(low_byte, high_byte, ir.Constant(ir.VectorType(_I32, 32), mask))
        rows.append(builder.bitcast(mixed, _WORDS16))
    return rows[0], rows[1]


# Lane l of a row is word _WORD_OF[l] of its vector.
_WORD_OF = [0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15]


def _to_f32(builder: ir.IRBuilder, words: ir.Value) -> ir.Value:
    """<16 x i16> in word order → <16 x float> in lane order: each word becomes the upper half of a float."""
    zero = ir.Constant(_WORDS16, [0] * 16)
    mask = [part for lane in range(LANES) for part in (0, 16 + _WORD_OF[lane])]
    wide = builder.shuffle_vector(zero, words, ir.Constant(ir.VectorType(_I32, 32), mask))
    return builder.bitcast(wide, _VEC_F32)


def _splat(builder: ir.IRBuilder, scalar: ir.Value, vector: ir.VectorType) -> ir.Value:
    undefined = ir.Constant(vector, ir.Undefined)
    lane0 = builder.insert_element(undefined, scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(lane0, undefined, ir.Constant(ir.VectorType(_I32, vector.count), [0] * vector.count))


def _store_words(builder: ir.IRBuilder, row: ir.Value, address: ir.Value) -> None:
    """Store <16 x float>, which are bf16 numbers, as 16 bf16."""
    wide = ir.VectorType(_I32, LANES)
    upper = builder.lshr(builder.bitcast(row, wide), ir.Constant(wide, [16] * LANES))
    builder.store(builder.trunc(upper, _WORDS16), builder.inttoptr(address, _WORDS16.as_pointer()), align=2)


def _const(value: int) -> ir.Constant:
    return ir.Constant(_I64, value)


def _make_tile(rows: int):
    """The tile for `rows` rows; 0 rows: decode to memory, `y` is the panel's bf16 [K, 16]."""

    @intrinsic
    def tile(typing_context, panel, base, escapes, x_rows, depth, y, y_stride):
        signature = types.void(*[types.int64] * 7)

        def codegen(context, builder, signature, arguments):
            panel, base, escapes, x_rows, depth, y, y_stride = arguments
            module = builder.module
            fma = cgutils.get_or_insert_function(module, ir.FunctionType(_VEC_F32, [_VEC_F32] * 3), "llvm.fma.v16f32")
            prefetch = cgutils.get_or_insert_function(
                module, ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32]), "llvm.prefetch.p0i8"
            )
            row_table = builder.inttoptr(x_rows, _I64.as_pointer())
            x = [
                builder.inttoptr(builder.load(builder.gep(row_table, [_const(r)])), _F32.as_pointer())
                for r in range(rows)
            ]
            patched = cgutils.alloca_once(builder, ir.ArrayType(_F32, 32))
            patched_rows = builder.bitcast(patched, _VEC_F32.as_pointer())
            patched_floats = builder.bitcast(patched, _I32.as_pointer())
            first_escape = builder.inttoptr(escapes, _I64.as_pointer())
            first_entry = builder.load(first_escape)
            entry = builder.block
            segment, plain, after, patch, fixing, fixed, done = (
                builder.append_basic_block(f"planar.{name}")
                for name in ("segment", "plain", "after", "patch", "fixing", "fixed", "done")
            )
            builder.branch(segment)

            def use(k: ir.Value, weights: list[ir.Value], sums: list[ir.Value]) -> list[ir.Value]:
                for row in range(2):
                    k_row = builder.add(k, _const(row))
                    for r in range(rows):
                        scalar = builder.load(builder.gep(x[r], [k_row]))
                        broadcast = _splat(builder, scalar, _VEC_F32)
                        sums = [*sums[:r], builder.call(fma, [broadcast, weights[row], sums[r]]), *sums[r + 1 :]]
                    if not rows:
                        _store_words(builder, weights[row], builder.add(y, builder.mul(k_row, _const(2 * LANES))))
                return sums

            def pair_at(k: ir.Value) -> list[ir.Value]:
                address = builder.add(panel, builder.mul(k, _const(PAIR_BYTES // 2)))
                ahead = builder.add(address, _const(_PREFETCH_PAIRS * PAIR_BYTES))
                builder.call(
                    prefetch, [builder.inttoptr(ahead, _I8.as_pointer()), *(ir.Constant(_I32, v) for v in (0, 3, 1))]
                )
                return [_to_f32(builder, words) for words in _decode_pair(builder, address, base)]

            # The pairs up to the next escape, in a loop of their own that knows of no escapes: with a branch inside,
            # the weights of six rows' tile would not fit the registers.
            builder.position_at_end(segment)
            segment_k, escape, escape_entry = (builder.phi(_I64) for _ in range(3))
            segment_sums = [builder.phi(_VEC_F32) for _ in range(rows)]
            segment_k.add_incoming(_const(0), entry)
            escape.add_incoming(_const(0), entry)
            escape_entry.add_incoming(first_entry, entry)
            for total in segment_sums:
                total.add_incoming(ir.Constant(_VEC_F32, [0.0] * LANES), entry)
            next_pair = builder.shl(builder.lshr(escape_entry, _const(4 + 16 + 1)), _const(1))
            stop = builder.select(builder.icmp_signed("<", next_pair, depth), next_pair, depth)
            builder.cbranch(builder.icmp_signed("<", segment_k, stop), plain, after)

            builder.position_at_end(plain)
            k = builder.phi(_I64)
            sums = [builder.phi(_VEC_F32) for _ in range(rows)]
            plain_sums = use(k, pair_at(k), sums)
            plain_next = builder.add(k, _const(2))
            k.add_incoming(segment_k, segment)
            k.add_incoming(plain_next, plain)
            for r in range(rows):
                sums[r].add_incoming(segment_sums[r], segment)
                sums[r].add_incoming(plain_sums[r], plain)
            builder.cbranch(builder.icmp_signed("<", plain_next, stop), plain, after)

            builder.position_at_end(after)
            after_sums = [builder.phi(_VEC_F32) for _ in range(rows)]
            for r in range(rows):
                after_sums[r].add_incoming(segment_sums[r], segment)
                after_sums[r].add_incoming(plain_sums[r], plain)
            builder.cbranch(builder.icmp_signed("<", stop, depth), patch, done)

            builder.position_at_end(patch)
            for row, weights in enumerate(pair_at(stop)):
                builder.store(weights, builder.gep(patched_rows, [_const(row)]), align=4)
            # Entries ascend, and one of this pair lies below the first place of the next.
            limit = builder.shl(builder.add(stop, _const(2)), _const(4 + 16))
            builder.branch(fixing)

            builder.position_at_end(fixing)
            at, value = builder.phi(_I64), builder.phi(_I64)
            at.add_incoming(escape, patch)
            value.add_incoming(escape_entry, patch)
            place = builder.sub(builder.lshr(value, _const(16)), builder.shl(stop, _const(4)))
            bits = builder.trunc(builder.shl(value, _const(16)), _I32)
            builder.store(bits, builder.gep(patched_floats, [place]))
            at_next = builder.add(at, _const(1))
            value_next = builder.load(builder.gep(first_escape, [at_next]))
            at.add_incoming(at_next, fixing)
            value.add_incoming(value_next, fixing)
            builder.cbranch(builder.icmp_signed("<", value_next, limit), fixing, fixed)

            builder.position_at_end(fixed)
            repaired = [builder.load(builder.gep(patched_rows, [_const(row)]), align=4) for row in range(2)]
            fixed_sums = use(stop, repaired, after_sums)
            segment_k.add_incoming(builder.add(stop, _const(2)), fixed)
            escape.add_incoming(at_next, fixed)
            escape_entry.add_incoming(value_next, fixed)
            for r in range(rows):
                segment_sums[r].add_incoming(fixed_sums[r], fixed)
            builder.branch(segment)

            builder.position_at_end(done)
            for r in range(rows):
                out = builder.inttoptr(builder.add(y, builder.mul(y_stride, _const(r))), _VEC_F32.as_pointer())
                builder.store(after_sums[r], out, align=4)
            return context.get_dummy_value()

        return signature, codegen

    return tile


_decode_tile, _tile_1, _tile_2, _tile_3, _tile_4, _tile_5, _tile_6 = [_make_tile(r) for r in range(MAX_ROWS + 1)]


@intrinsic
def _load_i64(typing_context, address):
    def codegen(context, builder, signature, arguments):
        return builder.load(builder.inttoptr(arguments[0], _I64.as_pointer()))

    return types.int64(types.int64), codegen


@njit(nogil=True, cache=True)
def decode_panel(block, panel, panels, depth, out):
    """Panel `panel` of the block at address `block` as bf16 [K, 16] at address `out`."""
    data = block + 128 + panel * depth * 24
    escapes = block + _load_i64(block + 128 + panels * depth * 24 + 8 * panel)
    _decode_tile(data, _load_i64(block), escapes, block, depth, out, 0)


@njit(nogil=True, cache=True)
def _tile(data, base, escapes, x_rows, rows, depth, y, y_stride):
    if rows == 1:
        _tile_1(data, base, escapes, x_rows, depth, y, y_stride)
    elif rows == 2:
        _tile_2(data, base, escapes, x_rows, depth, y, y_stride)
    elif rows == 3:
        _tile_3(data, base, escapes, x_rows, depth, y, y_stride)
    elif rows == 4:
        _tile_4(data, base, escapes, x_rows, depth, y, y_stride)
    elif rows == 5:
        _tile_5(data, base, escapes, x_rows, depth, y, y_stride)
    else:
        _tile_6(data, base, escapes, x_rows, depth, y, y_stride)


@njit(nogil=True, cache=True)
def planar_panel(block, panel, panels, x_rows, rows, depth, y, y_stride):
    """`simd.gemm_panel` on panel `panel` of `panels` of a compressed block: the same tiles, the same bits."""
    data = block + 128 + panel * depth * 24
    base = _load_i64(block)
    escapes = block + _load_i64(block + 128 + panels * depth * 24 + 8 * panel)
    tiles = (rows + MAX_ROWS - 1) // MAX_ROWS
    first = 0
    for t in range(tiles):
        last = rows * (t + 1) // tiles
        _tile(data, base, escapes, x_rows + 8 * first, last - first, depth, y + first * y_stride, y_stride)
        first = last
