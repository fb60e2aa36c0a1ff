"""The register tile of compressed panels (the layout of `planar`), in LLVM IR: decoded in registers, then multiplied.

It adds in the order of `simd`'s, on the same numbers: the result has the same bits as that of the uncompressed block.
"""

from __future__ import annotations

from llvmlite import binding as llvm
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from .simd import F32, I8, I32, I64, LANES, MAX_ROWS, VEC_F32, const, splat

HEADER_BYTES = 128
PAIR_BYTES = 48
# How far ahead panels are prefetched, in pairs of rows: 4.6 KB, some 0.3 µs of one thread.
_PREFETCH_PAIRS = 96

_BYTES16, _BYTES32, _WORDS16 = ir.VectorType(I8, 16), ir.VectorType(I8, 32), ir.VectorType(ir.IntType(16), 16)
_HAS_AVX2 = bool(llvm.get_host_cpu_features().get("avx2"))


def _high_bytes(builder: ir.IRBuilder, nibbles: ir.Value, base: ir.Value) -> ir.Value:
    """<32 x i8> of sign and upper exponent bits from <32 x i8> of nibbles; base: i64."""
    if _HAS_AVX2:
        # One byte shuffle looks all of them up in the 16 bytes that a base makes.
        lane = builder.trunc(base, I8)
        table = [builder.add(lane, ir.Constant(I8, code)) for code in range(8)]
        table += [builder.or_(entry, ir.Constant(I8, 0x80)) for entry in table]
        vector = ir.Constant(_BYTES32, ir.Undefined)
        for i in range(32):
            vector = builder.insert_element(vector, table[i % 16], ir.Constant(I32, i))
        kind = ir.FunctionType(_BYTES32, [_BYTES32, _BYTES32])
        shuffle = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx2.pshuf.b")
        return builder.call(shuffle, [vector, nibbles])
    sign = builder.and_(builder.shl(nibbles, _splat8(4)), _splat8(0x80))
    bases = splat(builder, builder.trunc(base, I8), _BYTES32)
    return builder.or_(sign, builder.add(builder.and_(nibbles, _splat8(7)), bases))


def _splat8(value: int) -> ir.Constant:
    return ir.Constant(_BYTES32, [value] * 32)


def _decode_pair(builder: ir.IRBuilder, address: ir.Value, base: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Rows k and k + 1 as words <16 x i16>, lanes in `_ORDER`'s word order; base: i64."""
    low_byte = builder.load(builder.inttoptr(address, _BYTES32.as_pointer()), align=1)
    packed = builder.load(builder.inttoptr(builder.add(address, ir.Constant(I64, 32)), _BYTES16.as_pointer()), align=1)
    # Both halves get all 16 bytes; the upper one is shifted to its nibbles.
    twice = builder.shuffle_vector(packed, packed, ir.Constant(ir.VectorType(I32, 32), [*range(16)] * 2))
    shifts = ir.Constant(ir.VectorType(I32, 8), [0] * 4 + [4] * 4)
    shifted = builder.bitcast(builder.lshr(builder.bitcast(twice, shifts.type), shifts), _BYTES32)
    high_byte = _high_bytes(builder, builder.and_(shifted, _splat8(15)), base)
    rows = []
    for row in range(2):
        first = 8 * row
        mask = []
        for half in (first, first + 16):
            for i in range(8):
                mask += [half + i, 32 + half + i]
        mixed = builder.shuffle_vector(low_byte, high_byte, ir.Constant(ir.VectorType(I32, 32), mask))
        rows.append(builder.bitcast(mixed, _WORDS16))
    return rows[0], rows[1]


# Lane l of a row is word _WORD_OF[l] of its vector.
_WORD_OF = [0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15]


def _to_f32(builder: ir.IRBuilder, words: ir.Value) -> ir.Value:
    """<16 x i16> in word order → <16 x float> in lane order: each word becomes the upper half of a float."""
    zero = ir.Constant(_WORDS16, [0] * 16)
    mask = [part for lane in range(LANES) for part in (0, 16 + _WORD_OF[lane])]
    wide = builder.shuffle_vector(zero, words, ir.Constant(ir.VectorType(I32, 32), mask))
    return builder.bitcast(wide, VEC_F32)


def _store_words(builder: ir.IRBuilder, row: ir.Value, address: ir.Value) -> None:
    """Store <16 x float>, which are bf16 numbers, as 16 bf16."""
    wide = ir.VectorType(I32, LANES)
    upper = builder.lshr(builder.bitcast(row, wide), ir.Constant(wide, [16] * LANES))
    builder.store(builder.trunc(upper, _WORDS16), builder.inttoptr(address, _WORDS16.as_pointer()), align=2)


def _make_tile(rows: int):
    """The tile for `rows` rows; 0 rows: decode to memory, `y` is the panel's bf16 [K, 16]."""

    @intrinsic
    def tile(typing_context, panel, base, escapes, x_rows, depth, y, y_stride):
        signature = types.void(*[types.int64] * 7)

        def codegen(context, builder, signature, arguments):
            panel, base, escapes, x_rows, depth, y, y_stride = arguments
            module = builder.module
            fma = cgutils.get_or_insert_function(module, ir.FunctionType(VEC_F32, [VEC_F32] * 3), "llvm.fma.v16f32")
            prefetch = cgutils.get_or_insert_function(
                module, ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32]), "llvm.prefetch.p0i8"
            )
            row_table = builder.inttoptr(x_rows, I64.as_pointer())
            x = [
                builder.inttoptr(builder.load(builder.gep(row_table, [const(r)])), F32.as_pointer())
                for r in range(rows)
            ]
            patched = cgutils.alloca_once(builder, ir.ArrayType(F32, 32))
            patched_rows = builder.bitcast(patched, VEC_F32.as_pointer())
            patched_floats = builder.bitcast(patched, I32.as_pointer())
            first_escape = builder.inttoptr(escapes, I64.as_pointer())
            first_entry = builder.load(first_escape)
            entry = builder.block
            segment, plain, after, patch, fixing, fixed, done = (
                builder.append_basic_block(f"planar.{name}")
                for name in ("segment", "plain", "after", "patch", "fixing", "fixed", "done")
            )
            builder.branch(segment)

            def use(k: ir.Value, weights: list[ir.Value], sums: list[ir.Value]) -> list[ir.Value]:
                for row in range(2):
                    k_row = builder.add(k, const(row))
                    for r in range(rows):
                        scalar = builder.load(builder.gep(x[r], [k_row]))
                        broadcast = splat(builder, scalar, VEC_F32)
                        sums = [*sums[:r], builder.call(fma, [broadcast, weights[row], sums[r]]), *sums[r + 1 :]]
                    if not rows:
                        _store_words(builder, weights[row], builder.add(y, builder.mul(k_row, const(2 * LANES))))
                return sums

            def pair_at(k: ir.Value) -> list[ir.Value]:
                address = builder.add(panel, builder.mul(k, const(PAIR_BYTES // 2)))
                ahead = builder.add(address, const(_PREFETCH_PAIRS * PAIR_BYTES))
                builder.call(
                    prefetch, [builder.inttoptr(ahead, I8.as_pointer()), *(ir.Constant(I32, v) for v in (0, 3, 1))]
                )
                return [_to_f32(builder, words) for words in _decode_pair(builder, address, base)]

            # The pairs up to the next escape, in a loop of their own that knows of no escapes: with a branch inside,
            # the weights of six rows' tile would not fit the registers.
            builder.position_at_end(segment)
            segment_k, escape, escape_entry = (builder.phi(I64) for _ in range(3))
            segment_sums = [builder.phi(VEC_F32) for _ in range(rows)]
            segment_k.add_incoming(const(0), entry)
            escape.add_incoming(const(0), entry)
            escape_entry.add_incoming(first_entry, entry)
            for total in segment_sums:
                total.add_incoming(ir.Constant(VEC_F32, [0.0] * LANES), entry)
            next_pair = builder.shl(builder.lshr(escape_entry, const(4 + 16 + 1)), const(1))
            stop = builder.select(builder.icmp_signed("<", next_pair, depth), next_pair, depth)
            builder.cbranch(builder.icmp_signed("<", segment_k, stop), plain, after)

            builder.position_at_end(plain)
            k = builder.phi(I64)
            sums = [builder.phi(VEC_F32) for _ in range(rows)]
            plain_sums = use(k, pair_at(k), sums)
            plain_next = builder.add(k, const(2))
            k.add_incoming(segment_k, segment)
            k.add_incoming(plain_next, plain)
            for r in range(rows):
                sums[r].add_incoming(segment_sums[r], segment)
                sums[r].add_incoming(plain_sums[r], plain)
            builder.cbranch(builder.icmp_signed("<", plain_next, stop), plain, after)

            builder.position_at_end(after)
            after_sums = [builder.phi(VEC_F32) for _ in range(rows)]
            for r in range(rows):
                after_sums[r].add_incoming(segment_sums[r], segment)
                after_sums[r].add_incoming(plain_sums[r], plain)
            builder.cbranch(builder.icmp_signed("<", stop, depth), patch, done)

            builder.position_at_end(patch)
            for row, weights in enumerate(pair_at(stop)):
                builder.store(weights, builder.gep(patched_rows, [const(row)]), align=4)
            # Entries ascend, and one of this pair lies below the first place of the next.
            limit = builder.shl(builder.add(stop, const(2)), const(4 + 16))
            builder.branch(fixing)

            builder.position_at_end(fixing)
            at, value = builder.phi(I64), builder.phi(I64)
            at.add_incoming(escape, patch)
            value.add_incoming(escape_entry, patch)
            place = builder.sub(builder.lshr(value, const(16)), builder.shl(stop, const(4)))
            bits = builder.trunc(builder.shl(value, const(16)), I32)
            builder.store(bits, builder.gep(patched_floats, [place]))
            at_next = builder.add(at, const(1))
            value_next = builder.load(builder.gep(first_escape, [at_next]))
            at.add_incoming(at_next, fixing)
            value.add_incoming(value_next, fixing)
            builder.cbranch(builder.icmp_signed("<", value_next, limit), fixing, fixed)

            builder.position_at_end(fixed)
            repaired = [builder.load(builder.gep(patched_rows, [const(row)]), align=4) for row in range(2)]
            fixed_sums = use(stop, repaired, after_sums)
            segment_k.add_incoming(builder.add(stop, const(2)), fixed)
            escape.add_incoming(at_next, fixed)
            escape_entry.add_incoming(value_next, fixed)
            for r in range(rows):
                segment_sums[r].add_incoming(fixed_sums[r], fixed)
            builder.branch(segment)

            builder.position_at_end(done)
            for r in range(rows):
                out = builder.inttoptr(builder.add(y, builder.mul(y_stride, const(r))), VEC_F32.as_pointer())
                builder.store(after_sums[r], out, align=4)
            return context.get_dummy_value()

        return signature, codegen

    return tile


_decode_tile, _tile_1, _tile_2, _tile_3, _tile_4, _tile_5, _tile_6 = [_make_tile(r) for r in range(MAX_ROWS + 1)]


@intrinsic
def _load_i64(typing_context, address):
    def codegen(context, builder, signature, arguments):
        return builder.load(builder.inttoptr(arguments[0], I64.as_pointer()))

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
