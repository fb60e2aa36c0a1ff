"""LLVM vector intrinsics for numba: the register tile under every CPU matrix kernel.

numba has no vector types, and its loop vectoriser cannot keep a tile of accumulators in registers. Here the
tile is written once as LLVM IR over `<16 x float>`; LLVM lowers that to two AVX2 registers, one AVX-512 register
or four NEON registers, so the same file is fast on a laptop and on a server.

The tile computes, for up to `MAX_ROWS` rows of x and one panel of 16 output columns,

    y[r, 0:16] (+)= sum_k x[r, k] * panel[k, 0:16]        k ascending, one FMA a step

The order of the sum depends on nothing but k. Whatever rows share a tile, whatever tile a row is in: the same
bits. That is what makes the CPU engine batch-invariant.
"""

from __future__ import annotations

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
# 6 rows x 16 lanes = 12 AVX2 accumulators, which leaves 4 of 16 registers for the panel and the broadcast.
MAX_ROWS = 6
# How far ahead of the FMA the panel is prefetched. Panels of one expert are contiguous, so running past a
# panel's end fetches what the thread most likely needs next; a prefetch never faults.
_PREFETCH_STEPS = 32

F32, I8, I16, I32, I64 = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
VEC_F32 = ir.VectorType(F32, LANES)
VEC_I16 = ir.VectorType(I16, LANES)
VEC_I32 = ir.VectorType(I32, LANES)


def const(value: int) -> ir.Constant:
    return ir.Constant(I64, value)


def splat(builder: ir.IRBuilder, scalar: ir.Value, vector: ir.VectorType = VEC_F32) -> ir.Value:
    """A vector whose every element is `scalar`."""
    undefined = ir.Constant(vector, ir.Undefined)
    lane0 = builder.insert_element(undefined, scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(lane0, undefined, ir.Constant(ir.VectorType(I32, vector.count), [0] * vector.count))


def _load_panel_row(builder: ir.IRBuilder, panel: ir.Value, k: ir.Value, bf16: bool) -> ir.Value:
    """panel[k, 0:16] as fp32; bf16 is the upper half of fp32, so decoding is a shift."""
    if not bf16:
        pointer = builder.gep(builder.inttoptr(panel, VEC_F32.as_pointer()), [k])
        return builder.load(pointer, align=4)
    pointer = builder.gep(builder.inttoptr(panel, VEC_I16.as_pointer()), [k])
    wide = builder.zext(builder.load(pointer, align=2), VEC_I32)
    return builder.bitcast(builder.shl(wide, ir.Constant(VEC_I32, [16] * LANES)), VEC_F32)


def _make_tile(rows: int, bf16: bool):
    @intrinsic
    def tile(typing_context, panel, x_rows, depth, y, y_stride, accumulate):
        signature = types.void(*[types.int64] * 6)

        def codegen(context, builder, signature, arguments):
            panel, x_rows, depth, y, y_stride, accumulate = arguments
            module = builder.module
            fma_type = ir.FunctionType(VEC_F32, [VEC_F32] * 3)
            fma = cgutils.get_or_insert_function(module, fma_type, "llvm.fma.v16f32")
            prefetch_type = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
            prefetch = cgutils.get_or_insert_function(module, prefetch_type, "llvm.prefetch.p0i8")

            row_table = builder.inttoptr(x_rows, I64.as_pointer())
            x = [
                builder.inttoptr(builder.load(builder.gep(row_table, [const(r)])), F32.as_pointer())
                for r in range(rows)
            ]
            y_out = [
                builder.inttoptr(builder.add(y, builder.mul(y_stride, const(r))), VEC_F32.as_pointer())
                for r in range(rows)
            ]
            entry = builder.block
            resume = builder.append_basic_block("tile.resume")
            loop = builder.append_basic_block("tile.k")
            done = builder.append_basic_block("tile.done")
            zero = ir.Constant(VEC_F32, [0.0] * LANES)
            builder.cbranch(builder.icmp_signed("!=", accumulate, const(0)), resume, loop)

            builder.position_at_end(resume)
            previous = [builder.load(y_out[r], align=4) for r in range(rows)]
            builder.branch(loop)

            builder.position_at_end(loop)
            k = builder.phi(I64)
            k.add_incoming(const(0), entry)
            k.add_incoming(const(0), resume)
            sums = [builder.phi(VEC_F32) for _ in range(rows)]
            for r in range(rows):
                sums[r].add_incoming(zero, entry)
                sums[r].add_incoming(previous[r], resume)
            step_bytes = LANES * (2 if bf16 else 4)
            ahead = builder.add(panel, builder.mul(builder.add(k, const(_PREFETCH_STEPS)), const(step_bytes)))
            read_keep_data = [ir.Constant(I32, v) for v in (0, 3, 1)]
            builder.call(prefetch, [builder.inttoptr(ahead, I8.as_pointer()), *read_keep_data])
            weights = _load_panel_row(builder, panel, k, bf16)
            updated = []
            for r in range(rows):
                broadcast = splat(builder, builder.load(builder.gep(x[r], [k])))
                updated.append(builder.call(fma, [broadcast, weights, sums[r]]))
            k_next = builder.add(k, const(1))
            k.add_incoming(k_next, loop)
            for r in range(rows):
                sums[r].add_incoming(updated[r], loop)
            builder.cbranch(builder.icmp_signed("<", k_next, depth), loop, done)

            builder.position_at_end(done)
            for r in range(rows):
                builder.store(updated[r], y_out[r], align=4)
            return context.get_dummy_value()

        return signature, codegen

    return tile


(_bf16_1, _bf16_2, _bf16_3, _bf16_4, _bf16_5, _bf16_6) = [_make_tile(r + 1, True) for r in range(MAX_ROWS)]
(_fp32_1, _fp32_2, _fp32_3, _fp32_4, _fp32_5, _fp32_6) = [_make_tile(r + 1, False) for r in range(MAX_ROWS)]


@njit(nogil=True, cache=True)
def gemm_tile(panel, bf16, x_rows, rows, depth, y, y_stride, accumulate):
    """One tile: rows ≤ MAX_ROWS, depth ≥ 1.

    panel: address of [depth, 16] bf16 (`bf16` true) or fp32; x_rows: address of `rows` int64 addresses of fp32
    rows [depth] (so a gather costs nothing); y: address of fp32 [rows, 16], `y_stride` bytes between rows.
    """
    if bf16:
        if rows == 1:
            _bf16_1(panel, x_rows, depth, y, y_stride, accumulate)
        elif rows == 2:
            _bf16_2(panel, x_rows, depth, y, y_stride, accumulate)
        elif rows == 3:
            _bf16_3(panel, x_rows, depth, y, y_stride, accumulate)
        elif rows == 4:
            _bf16_4(panel, x_rows, depth, y, y_stride, accumulate)
        elif rows == 5:
            _bf16_5(panel, x_rows, depth, y, y_stride, accumulate)
        else:
            _bf16_6(panel, x_rows, depth, y, y_stride, accumulate)
    elif rows == 1:
        _fp32_1(panel, x_rows, depth, y, y_stride, accumulate)
    elif rows == 2:
        _fp32_2(panel, x_rows, depth, y, y_stride, accumulate)
    elif rows == 3:
        _fp32_3(panel, x_rows, depth, y, y_stride, accumulate)
    elif rows == 4:
        _fp32_4(panel, x_rows, depth, y, y_stride, accumulate)
    elif rows == 5:
        _fp32_5(panel, x_rows, depth, y, y_stride, accumulate)
    else:
        _fp32_6(panel, x_rows, depth, y, y_stride, accumulate)


@njit(nogil=True, cache=True)
def gemm_panel(panel, bf16, x_rows, rows, depth, y, y_stride):
    """All `rows` rows against one panel: tiles of nearly equal height, so that no tile has one lonely row."""
    tiles = (rows + MAX_ROWS - 1) // MAX_ROWS
    first = 0
    for t in range(tiles):
        last = rows * (t + 1) // tiles
        gemm_tile(panel, bf16, x_rows + 8 * first, last - first, depth, y + first * y_stride, y_stride, 0)
        first = last


@intrinsic
def fetch_add(typing_context, address):
    """Atomically add 1 to the int64 at `address`, return the old value: work claimed tile by tile."""

    def codegen(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], I64.as_pointer())
        return builder.atomic_rmw("add", pointer, const(1), "monotonic")

    return types.int64(types.int64), codegen


@intrinsic
def float_bits(typing_context, value):
    """fp32 → its uint32 bits."""

    def codegen(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], I32)

    return types.uint32(types.float32), codegen


@intrinsic
def bits_float(typing_context, bits):
    """uint32 bits → fp32."""

    def codegen(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], F32)

    return types.float32(types.uint32), codegen


def _make_store(bits: int):
    @intrinsic
    def store(typing_context, address, value):
        integer = types.uint16 if bits == 16 else types.uint32

        def codegen(context, builder, signature, arguments):
            pointer = builder.inttoptr(arguments[0], ir.IntType(bits).as_pointer())
            builder.store(arguments[1], pointer)
            return context.get_dummy_value()

        return types.void(types.int64, integer), codegen

    return store


store_u16, store_u32 = _make_store(16), _make_store(32)


@njit(nogil=True, cache=True, inline="always")
def round_bf16(value):
    """fp32 → bf16 bits (uint16), round to nearest even; NaN stays NaN."""
    bits = float_bits(value)
    if value != value:
        return types.uint16((bits >> types.uint32(16)) | types.uint32(0x40))
    bias = types.uint32(0x7FFF) + ((bits >> types.uint32(16)) & types.uint32(1))
    return types.uint16((bits + bias) >> types.uint32(16))


@njit(nogil=True, cache=True, inline="always")
def exp_f32(x):
    """e^x in fp32 (Cephes expf: 2^n times a degree-5 polynomial; ≤ 2 ulp), branch-free so that loops vectorise."""
    f = types.float32
    x = min(max(x, f(-87.0)), f(88.0))
    shifted = x * f(1.44269504088896341) + f(12582912.0)
    n = shifted - f(12582912.0)
    r = x - n * f(0.693359375) - n * f(-2.12194440e-4)
    p = f(1.9875691500e-4)
    p = p * r + f(1.3981999507e-3)
    p = p * r + f(8.3334519073e-3)
    p = p * r + f(4.1665795894e-2)
    p = p * r + f(1.6666665459e-1)
    p = p * r + f(5.0000001201e-1)
    p = p * r * r + r + f(1.0)
    exponent = (float_bits(shifted) - float_bits(f(12582912.0)) + types.uint32(127)) << types.uint32(23)
    return p * bits_float(exponent)
