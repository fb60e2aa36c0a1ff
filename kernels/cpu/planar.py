"""Losslessly compressed expert panels that the CPU's GEMM reads in place: 12 bits a weight instead of 16.

A trained weight's exponent almost always lies among 16 consecutive ones, so 4 bits name it; sign and mantissa stay
as they are. A block holds panels [K, 16] of bf16 (the layout of `gemm` or `moe`, which see), two rows of K at a time:

    header   16 int64    base exponent, panels, K, escapes
    panels   [P, K/2, 48 bytes]   32 bytes sign | mantissa, then 16 bytes with two 4-bit codes each
    index    int64 [P]   byte offset of each panel's escapes in the block
    escapes  int64       (k * 16 + lane) << 16 | bf16 bits, ascending; a panel's list ends with _END

Weights outside the window are escapes: their code means nothing, and the tile replaces them before it multiplies. The
order of the 32 bytes (`_ORDER`) makes decoding two byte unpacks and two word unpacks of AVX2, without crossing its
128-bit halves: 19 vector operations for 32 weights. The tile adds in the order of `simd`'s, on the same numbers: the
result has the same bits as that of the uncompressed block.

Idea: exponent statistics and fixed-width codes of ZipServ (arXiv 2603.17435) and SplitZip (arXiv 2605.01708); the
layout is ours.
"""

from __future__ import annotations

import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from ..ops import KernelError
from .simd import LANES, MAX_ROWS, gemm_panel

HEADER_BYTES = 128
PAIR_BYTES = 48
_WINDOW = 16
# Escapes that a block has room for: 0.1 % of its weights and a few. Trained weights have 0.01 to 0.05 %.
_ESCAPE_SHARE, _ESCAPE_LEAST = 0.001, 64
_END = (1 << 62) - 1
# How far ahead panels are prefetched, in pairs of rows: 1.5 KB.
_PREFETCH_PAIRS = 32

# Place of lane l of row k (byte of the first unpack's input): lanes 0-3, 8-11 | 4-7, 12-15 in the two halves.
_LANE_PLACE = [0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23]
# Of row k + 1: behind those, so that the high unpack takes them.
_ORDER = np.array([_LANE_PLACE, [place + 8 for place in _LANE_PLACE]], dtype=np.int64)

_F32, _I8, _I32, _I64 = ir.FloatType(), ir.IntType(8), ir.IntType(32), ir.IntType(64)
_VEC_F32 = ir.VectorType(_F32, LANES)
_BYTES16, _BYTES32, _WORDS16 = ir.VectorType(_I8, 16), ir.VectorType(_I8, 32), ir.VectorType(ir.IntType(16), 16)
_WORDS32 = ir.VectorType(ir.IntType(16), 32)


def fits(depth: int) -> bool:
    """Rows of K come in pairs."""
    return depth % 2 == 0


def block_bytes(panels: int, depth: int) -> int:
    """Bytes of a block with room for its escapes."""
    room = int(panels * depth * LANES * _ESCAPE_SHARE) + _ESCAPE_LEAST
    return HEADER_BYTES + panels * depth // 2 * PAIR_BYTES + 8 * panels + 8 * (room + panels)


@njit(nogil=True, cache=True)
def _best_base(words):
    """First of the 16 consecutive exponents that cover most weights; and how many they leave out."""
    counts = np.zeros(256, dtype=np.int64)
    flat = words.reshape(-1)
    for i in range(flat.size):
        counts[(flat[i] >> 7) & 0xFF] += 1
    covered = 0
    for e in range(_WINDOW):
        covered += counts[e]
    best, base = covered, 0
    for first in range(1, 256 - _WINDOW + 1):
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
                code = ((word >> 7) & 0xFF) - base
                if code < 0 or code > 15:
                    code = 0
                place = order[row, lane]
                codes[place] = code
                out[pair, place] = ((word >> 8) & 0x80) | (word & 0x7F)
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
                exponent = (word >> 7) & 0xFF
                if exponent < base or exponent > base + 15:
                    entries[at] = ((k * 16 + lane) << 16) | word
                    at += 1
        entries[at] = _END
        at += 1


def encode(panels: Tensor, out: Tensor) -> None:
    """bf16 panels [P, K, 16] → `out`, uint8 [block_bytes(P, K)]; the bytes of `panels` come back from `decode`.

    KernelError when too many weights lie outside any 16 consecutive exponents for the room that a block has.
    """
    count, depth, _ = panels.shape
    words = panels.contiguous().view(torch.int16).numpy().view(np.uint16)
    base, escapes = _best_base(words)
    data_bytes = count * depth // 2 * PAIR_BYTES
    index_at = HEADER_BYTES + data_bytes
    entries_at = index_at + 8 * count
    if 8 * (escapes + count) > out.numel() - entries_at:
        raise KernelError(
            f"{escapes / words.size:.2%} of an expert's weights lie outside 16 consecutive exponents, format planar12 "
            f"has room for {_ESCAPE_SHARE:.1%}; use the dense format"
        )
    out.zero_()
    raw = out.numpy()
    raw[:32].view(np.int64)[:] = (base, count, depth, escapes)
    _encode(words, base, _ORDER, raw[HEADER_BYTES:index_at].reshape(count, depth // 2, PAIR_BYTES))
    entries = raw[entries_at : entries_at + 8 * (escapes + count)].view(np.int64)
    _list_escapes(words, base, raw[index_at:entries_at].view(np.int64), entries, entries_at)


def decode(block: Tensor) -> Tensor:
    """The bf16 panels [P, K, 16] of a block, bit for bit."""
    _, count, depth, _ = block[:32].view(torch.int64).tolist()
    panels = torch.empty(count, depth, LANES, dtype=torch.bfloat16)
    _decode_block(block.data_ptr(), count, depth, panels.data_ptr())
    return panels


@njit(parallel=True, nogil=True, cache=True)
def _decode_block(block, panels, depth, out):
    for p in prange(panels):
        decode_panel(block, p, panels, depth, out + p * depth * 32)


# The register tile.


def _splat8(value: int) -> ir.Constant:
    return ir.Constant(_BYTES32, [value] * 32)


def _decode_pair(builder: ir.IRBuilder, address: ir.Value, base: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Rows k and k + 1 as words <16 x i16>, lanes in `_ORDER`'s word order; base: <32 x i8>."""
    raw = builder.load(builder.inttoptr(address, _BYTES32.as_pointer()), align=1)
    nibbles = builder.load(
        builder.inttoptr(builder.add(address, ir.Constant(_I64, 32)), _BYTES16.as_pointer()), align=1
    )
    low = builder.and_(nibbles, ir.Constant(_BYTES16, [15] * 16))
    high = builder.lshr(nibbles, ir.Constant(_BYTES16, [4] * 16))
    codes = builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(_I32, 32), list(range(32))))
    exponent = builder.add(codes, base)
    low_byte = builder.or_(builder.shl(exponent, _splat8(7)), builder.and_(raw, _splat8(0x7F)))
    high_byte = builder.or_(builder.lshr(exponent, _splat8(1)), builder.and_(raw, _splat8(0x80)))
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
            fma = cgutils.get_or_insert_function(
                module, ir.FunctionType(_VEC_F32, [_VEC_F32] * 3), "llvm.fma.v16f32"
            )
            prefetch = cgutils.get_or_insert_function(
                module, ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32]), "llvm.prefetch.p0i8"
            )
            bases = _splat(builder, builder.trunc(base, _I8), _BYTES32)
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
            loop, patch, fixing, fixed, multiply, done = (
                builder.append_basic_block(f"planar.{name}")
                for name in ("k", "patch", "fixing", "fixed", "multiply", "done")
            )
            builder.branch(loop)

            builder.position_at_end(loop)
            k = builder.phi(_I64)
            escape, escape_entry = builder.phi(_I64), builder.phi(_I64)
            sums = [builder.phi(_VEC_F32) for _ in range(rows)]
            k.add_incoming(_const(0), entry)
            escape.add_incoming(_const(0), entry)
            escape_entry.add_incoming(first_entry, entry)
            for total in sums:
                total.add_incoming(ir.Constant(_VEC_F32, [0.0] * LANES), entry)
            address = builder.add(panel, builder.mul(k, _const(PAIR_BYTES // 2)))
            ahead = builder.add(address, _const(_PREFETCH_PAIRS * PAIR_BYTES))
            builder.call(
                prefetch, [builder.inttoptr(ahead, _I8.as_pointer()), *(ir.Constant(_I32, v) for v in (0, 3, 1))]
            )
            plain = [_to_f32(builder, words) for words in _decode_pair(builder, address, bases)]
            # Entries ascend, and one of this pair lies below the first place of the next.
            limit = builder.shl(builder.add(k, _const(2)), _const(4 + 16))
            builder.cbranch(builder.icmp_signed("<", escape_entry, limit), patch, multiply)

            builder.position_at_end(patch)
            for row in range(2):
                builder.store(plain[row], builder.gep(patched_rows, [_const(row)]), align=4)
            builder.branch(fixing)

            builder.position_at_end(fixing)
            at, value = builder.phi(_I64), builder.phi(_I64)
            at.add_incoming(escape, patch)
            value.add_incoming(escape_entry, patch)
            place = builder.sub(builder.lshr(value, _const(16)), builder.shl(k, _const(4)))
            bits = builder.trunc(builder.shl(value, _const(16)), _I32)
            builder.store(bits, builder.gep(patched_floats, [place]))
            at_next = builder.add(at, _const(1))
            value_next = builder.load(builder.gep(first_escape, [at_next]))
            at.add_incoming(at_next, fixing)
            value.add_incoming(value_next, fixing)
            builder.cbranch(builder.icmp_signed("<", value_next, limit), fixing, fixed)

            builder.position_at_end(fixed)
            repaired = [builder.load(builder.gep(patched_rows, [_const(row)]), align=4) for row in range(2)]
            builder.branch(multiply)

            builder.position_at_end(multiply)
            weights = [builder.phi(_VEC_F32) for _ in range(2)]
            escape_next, entry_next = builder.phi(_I64), builder.phi(_I64)
            for row in range(2):
                weights[row].add_incoming(plain[row], loop)
                weights[row].add_incoming(repaired[row], fixed)
            for phi, unchanged, changed in ((escape_next, escape, at_next), (entry_next, escape_entry, value_next)):
                phi.add_incoming(unchanged, loop)
                phi.add_incoming(changed, fixed)
            updated = list(sums)
            for row in range(2):
                k_row = builder.add(k, _const(row))
                for r in range(rows):
                    scalar = builder.load(builder.gep(x[r], [k_row]))
                    updated[r] = builder.call(fma, [_splat(builder, scalar, _VEC_F32), weights[row], updated[r]])
                if not rows:
                    upper = builder.lshr(
                        builder.bitcast(weights[row], ir.VectorType(_I32, LANES)),
                        ir.Constant(ir.VectorType(_I32, LANES), [16] * LANES),
                    )
                    out = builder.inttoptr(builder.add(y, builder.mul(k_row, _const(2 * LANES))), _WORDS16.as_pointer())
                    builder.store(builder.trunc(upper, _WORDS16), out, align=2)
            k_next = builder.add(k, _const(2))
            k.add_incoming(k_next, multiply)
            escape.add_incoming(escape_next, multiply)
            escape_entry.add_incoming(entry_next, multiply)
            for r in range(rows):
                sums[r].add_incoming(updated[r], multiply)
            builder.cbranch(builder.icmp_signed("<", k_next, depth), loop, done)

            builder.position_at_end(done)
            for r in range(rows):
                out = builder.inttoptr(builder.add(y, builder.mul(y_stride, _const(r))), _VEC_F32.as_pointer())
                builder.store(updated[r], out, align=4)
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
def planar_panel(block, panel, panels, x_rows, rows, depth, y, y_stride, scratch):
    """`simd.gemm_panel` on a compressed panel: the same bits.

    More rows than a tile has: the panel is decoded once to `scratch` (address of bf16 [K, 16]), since every tile would
    decode it again.
    """
    if rows > 6:
        decode_panel(block, panel, panels, depth, scratch)
        gemm_panel(scratch, True, x_rows, rows, depth, y, y_stride)
        return
    data = block + 128 + panel * depth * 24
    base = _load_i64(block)
    escapes = block + _load_i64(block + 128 + panels * depth * 24 + 8 * panel)
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
