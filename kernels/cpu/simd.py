"""LLVM vector intrinsics for numba: what the CPU kernels are made of.

numba has no vector types, and its loop vectoriser cannot keep a tile of accumulators in registers. Here vectors are
`<16 x float>`; LLVM lowers that to two AVX2 registers, one AVX-512 register or four NEON registers, so the same files
are fast on a laptop and on a server.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llvmlite import binding as llvm
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from ..numba_cache import cached_njit

LANES = 16
# Elements that one thread passes over sooner than it wakes another.
FEW = 16 * 1024
# How far beyond a line that is fetched to L1 another is fetched to L2, bytes; 0: none. An Intel core has 16
# requests of its L1 under way and 48 of its L2, so that memory is far from busy with the first alone: one core of
# Emerald Rapids multiplies a row at 16.7 GB/s for 14.3 (4 to 24 KiB: the same; to L2 alone: 15.6; a plain read: 14.8),
# by FMA, which fetches but 1 KiB ahead, at 16.4 for 12.7.
# Zen keeps what was measured on it.
_L2_AHEAD = 8192 if any(line in llvm.get_host_cpu_name() for line in ("lake", "rapids")) else 0
_TO_L1, _TO_L2 = 3, 2

F32, I8, I16, I32, I64 = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
VEC_F32 = ir.VectorType(F32, LANES)
VEC_I16 = ir.VectorType(I16, LANES)
VEC_I32 = ir.VectorType(I32, LANES)
ZERO = ir.Constant(VEC_F32, [0.0] * LANES)


def const(value: int) -> ir.Constant:
    return ir.Constant(I64, value)


def splat(builder: ir.IRBuilder, scalar: ir.Value, vector: ir.VectorType = VEC_F32) -> ir.Value:
    """A vector whose every element is `scalar`."""
    undefined = ir.Constant(vector, ir.Undefined)
    lane0 = builder.insert_element(undefined, scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(lane0, undefined, ir.Constant(ir.VectorType(I32, vector.count), [0] * vector.count))


def function(builder: ir.IRBuilder, name: str, result: ir.Type, arguments: list[ir.Type]) -> ir.Function:
    """An LLVM intrinsic, declared in the module that is being built."""
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)


def opaque(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """The same constant, of which LLVM does not know that it is one: what it feeds stays the instruction it is."""
    register = "r" if isinstance(value.type, ir.IntType) else "v"
    same = ir.InlineAsm(ir.FunctionType(value.type, [value.type]), "", f"={register},0")
    return builder.call(same, [value])


def fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, total: ir.Value) -> ir.Value:
    """a·b + total of <16 x float>, rounded once."""
    return builder.call(function(builder, "llvm.fma.v16f32", VEC_F32, [VEC_F32] * 3), [a, b, total])


def prefetch(builder: ir.IRBuilder, address: ir.Value) -> None:
    """Bring the line at an address (i64) to the cache, and on Intel one that is to follow to L2; an address that is
    nobody's does no harm."""
    fetch(builder, address)
    if _L2_AHEAD:
        fetch(builder, builder.add(address, const(_L2_AHEAD)), _TO_L2)


def fetch(builder: ir.IRBuilder, address: ir.Value, where: int = _TO_L1) -> None:
    """Bring the line at an address (i64) to a cache and no other."""
    read_where_data = [ir.Constant(I32, v) for v in (0, where, 1)]
    kind = function(builder, "llvm.prefetch.p0i8", ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
    builder.call(kind, [builder.inttoptr(address, I8.as_pointer()), *read_where_data])


def load_at(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type, align: int = 1) -> ir.Value:
    """The value of a type at an address (i64)."""
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align)


def store_at(builder: ir.IRBuilder, value: ir.Value, address: ir.Value, align: int = 1) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=align)


def row_addresses(builder: ir.IRBuilder, table: ir.Value, rows: int) -> list[ir.Value]:
    """The first `rows` entries (i64) of a table of addresses."""
    return [load_at(builder, builder.add(table, const(8 * r)), I64, 8) for r in range(rows)]


Values = list[ir.Value]


def repeat(
    builder: ir.IRBuilder, first: Values, more: Callable[[Values], ir.Value], body: Callable[[Values], Values]
) -> Values:
    """while more(values): values = body(values), from `first` on; the last values."""
    begin = builder.block
    head, inside, done = (builder.append_basic_block(f"loop{name}") for name in ("", ".body", ".done"))
    builder.branch(head)
    builder.position_at_end(head)
    values = [builder.phi(value.type) for value in first]
    builder.cbranch(more(values), inside, done)
    builder.position_at_end(inside)
    updated = body(values)
    end = builder.block
    builder.branch(head)
    for phi, before, after in zip(values, first, updated, strict=True):
        phi.add_incoming(before, begin)
        phi.add_incoming(after, end)
    builder.position_at_end(done)
    return values


def loop(
    builder: ir.IRBuilder, start: ir.Value, stop: ir.Value, step: int, first: Values,
    body: Callable[[ir.Value, Values], Values],
) -> Values:  # fmt: skip
    """values = body(k, values) for k = start, start + step, … below stop (i64), from `first` on; the last values."""
    _, *values = repeat(
        builder,
        [start, *first],
        lambda state: builder.icmp_signed("<", state[0], stop),
        lambda state: [builder.add(state[0], const(step)), *body(state[0], state[1:])],
    )
    return values


def when(builder: ir.IRBuilder, condition: ir.Value, values: Values, body: Callable[[Values], Values]) -> Values:
    """body(values) where a condition (i1) holds, else the values."""
    begin, yes, done = builder.block, builder.append_basic_block("when"), builder.append_basic_block("when.done")
    builder.cbranch(condition, yes, done)
    builder.position_at_end(yes)
    updated = body(values)
    end = builder.block
    builder.branch(done)
    builder.position_at_end(done)
    merged = [builder.phi(value.type) for value in values]
    for phi, before, after in zip(merged, values, updated, strict=True):
        phi.add_incoming(before, begin)
        phi.add_incoming(after, end)
    return merged


def by_count(builder: ir.IRBuilder, count: ir.Value, counts: Sequence[int], emit: Callable[[int], None]) -> None:
    """Code of its own for each of `counts`, one of which `count` (i64) is: `emit` makes it."""
    blocks = {n: builder.append_basic_block(f"of{n}") for n in counts}
    switch, done = builder.switch(count, blocks[counts[-1]]), builder.append_basic_block("of.done")
    for n, block in blocks.items():
        switch.add_case(const(n), block)
        builder.position_at_end(block)
        emit(n)
        builder.branch(done)
    builder.position_at_end(done)


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


@intrinsic
def load_f32(typing_context, address):
    """The fp32 at an address."""

    def codegen(context, builder, signature, arguments):
        return load_at(builder, arguments[0], F32, 4)

    return types.float32(types.int64), codegen


@intrinsic
def load_bf16(typing_context, address):
    """The bf16 at an address, as fp32."""

    def codegen(context, builder, signature, arguments):
        bits = builder.zext(load_at(builder, arguments[0], I16, 2), I32)
        return builder.bitcast(builder.shl(bits, ir.Constant(I32, 16)), F32)

    return types.float32(types.int64), codegen


@intrinsic
def load_i64(typing_context, address):
    """The int64 at an address."""

    def codegen(context, builder, signature, arguments):
        return load_at(builder, arguments[0], I64, 8)

    return types.int64(types.int64), codegen


@intrinsic
def _pointer(typing_context, address):
    """An address as numba's pointer to fp32."""

    def codegen(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], F32.as_pointer())

    return types.CPointer(types.float32)(types.int64), codegen


def address_of(rows: Tensor) -> int:
    """Where contiguous fp32 rows begin, for kernels that make their arrays themselves (`floats`): a tensor's view as an
    array takes 1.5 µs, as long as the norm of a token, and its address 0.2."""
    assert rows.is_contiguous(), f"rows must lie side by side, got strides {rows.stride()}"
    return rows.data_ptr()


@cached_njit(nogil=True, inline="always")
def floats(address, rows, columns):
    """fp32 [rows, columns] at an address."""
    return carray(_pointer(address), (rows, columns))


@intrinsic
def _largest_of_16s(typing_context, address, count, first):
    """The largest of `first` and `count` fp32, a multiple of 16, at an address."""

    def codegen(context, builder, signature, arguments):
        address, count, first = arguments
        maximum = function(builder, "llvm.maxnum.v16f32", VEC_F32, [VEC_F32] * 2)

        def step(k: ir.Value, so_far: Values) -> Values:
            values = load_at(builder, builder.add(address, builder.mul(k, const(4))), VEC_F32, 4)
            return [builder.call(maximum, [*so_far, values])]

        lanes = loop(builder, const(0), count, LANES, [splat(builder, first)], step)
        return builder.call(function(builder, "llvm.vector.reduce.fmax.v16f32", F32, [VEC_F32]), lanes)

    return types.float32(types.int64, types.int64, types.float32), codegen


def _make_store(bits: int):
    @intrinsic
    def store(typing_context, address, value):
        integer = {16: types.uint16, 32: types.uint32, 64: types.int64}[bits]

        def codegen(context, builder, signature, arguments):
            pointer = builder.inttoptr(arguments[0], ir.IntType(bits).as_pointer())
            builder.store(arguments[1], pointer)
            return context.get_dummy_value()

        return types.void(types.int64, integer), codegen

    return store


store_u16, store_u32, store_i64 = _make_store(16), _make_store(32), _make_store(64)


@intrinsic
def round_16(typing_context, source, target):
    """16 fp32 at an address → 16 bf16 at another, as `round_bf16`."""

    def codegen(context, builder, signature, arguments):
        source, target = arguments
        value = load_at(builder, source, VEC_F32, 4)
        bits = builder.bitcast(value, VEC_I32)
        every = [ir.Constant(VEC_I32, [n] * LANES) for n in (16, 1, 0x7FFF, 0x400000)]
        odd = builder.and_(builder.lshr(bits, every[0]), every[1])
        rounded = builder.add(bits, builder.add(odd, every[2]))
        quiet = builder.or_(bits, every[3])
        bits = builder.select(builder.fcmp_unordered("uno", value, value), quiet, rounded)
        store_at(builder, builder.trunc(builder.lshr(bits, every[0]), VEC_I16), target, 2)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@cached_njit(nogil=True, inline="always")
def round_bf16(value):
    """fp32 → bf16 bits (uint16), round to nearest even; NaN stays NaN."""
    bits = float_bits(value)
    if value != value:
        return types.uint16((bits >> types.uint32(16)) | types.uint32(0x40))
    bias = types.uint32(0x7FFF) + ((bits >> types.uint32(16)) & types.uint32(1))
    return types.uint16((bits + bias) >> types.uint32(16))


@cached_njit(nogil=True, inline="always")
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


@intrinsic
def copy_16(typing_context, source, target):
    """16 fp32 from one address to another."""

    def codegen(context, builder, signature, arguments):
        store_at(builder, load_at(builder, arguments[0], VEC_F32, 4), arguments[1], 4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@cached_njit(nogil=True)
def largest(address, count):
    """The largest of `count` ≥ 1 fp32 at an address."""
    whole = count // 16 * 16
    peak = _largest_of_16s(address, whole, load_f32(address))
    for i in range(whole, count):
        peak = max(peak, load_f32(address + 4 * i))
    return peak


@cached_njit(nogil=True)
def round_row(source, target, count):
    """`count` fp32 at address `source` → bf16 at address `target`."""
    whole = count // 16 * 16
    for i in range(0, whole, 16):
        round_16(source + 4 * i, target + 2 * i)
    for i in range(whole, count):
        store_u16(target + 2 * i, round_bf16(load_f32(source + 4 * i)))
