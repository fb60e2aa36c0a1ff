"""Rows of compressed panels (the layout of `planar`) as LLVM IR: decoded in registers, then multiplied or stored.

Three kinds of decoders behind one interface, `Rows`, chosen by `decoder`. Sums are those of `tile` on the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from llvmlite import binding as llvm
from llvmlite import ir

from .simd import (
    F32,
    I8,
    I16,
    I32,
    LANES,
    VEC_F32,
    ZERO,
    Values,
    const,
    fma,
    function,
    load_at,
    opaque,
    splat,
    store_at,
)  # fmt: skip
from .tile import BF16_DOT, PAIRS, add_dots, store_sums

PAIR_BYTES = 48

_BYTES64 = ir.VectorType(I8, 64)
_BYTES16, _BYTES32, _WORDS16 = ir.VectorType(I8, 16), ir.VectorType(I8, 32), ir.VectorType(I16, 16)
_HAS_AVX2 = bool(llvm.get_host_cpu_features().get("avx2"))
_HAS_VBMI = all(llvm.get_host_cpu_features().get(name) for name in ("avx512vbmi", "avx512vl"))


def _high_bytes(builder: ir.IRBuilder, nibbles: ir.Value, base: ir.Value) -> ir.Value:
    """<32 x i8> of sign and upper exponent bits from <32 x i8> whose lower halves are nibbles; base: i64."""
    if _HAS_VBMI:
        # One byte shuffle looks all of them up in the 16 bytes that a base makes, twice: it takes five bits of each.
        look_up = function(builder, "llvm.x86.avx512.permvar.qi.256", _BYTES32, [_BYTES32] * 2)
        return builder.call(look_up, [_table(builder, base), nibbles])
    nibbles = builder.and_(nibbles, _splat8(15))
    if _HAS_AVX2:
        look_up = function(builder, "llvm.x86.avx2.pshuf.b", _BYTES32, [_BYTES32] * 2)
        return builder.call(look_up, [_table(builder, base), nibbles])
    sign = builder.and_(builder.shl(nibbles, _splat8(4)), _splat8(0x80))
    bases = splat(builder, builder.trunc(base, I8), _BYTES32)
    return builder.or_(sign, builder.add(builder.and_(nibbles, _splat8(7)), bases))


def _table(builder: ir.IRBuilder, base: ir.Value) -> ir.Value:
    """<32 x i8>: what each nibble stands for, twice over."""
    lane = builder.trunc(base, I8)
    table = [builder.add(lane, ir.Constant(I8, code)) for code in range(8)]
    table += [builder.or_(entry, ir.Constant(I8, 0x80)) for entry in table]
    vector = ir.Constant(_BYTES32, ir.Undefined)
    for i in range(32):
        vector = builder.insert_element(vector, table[i % 16], ir.Constant(I32, i))
    return vector


def _splat8(value: int) -> ir.Constant:
    return ir.Constant(_BYTES32, [value] * 32)


def _bytes_of_pair(builder: ir.IRBuilder, address: ir.Value, base: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Low and high bytes <32 x i8> of rows k and k + 1, in the order of `planar`; base: i64."""
    low_byte = load_at(builder, address, _BYTES32)
    packed = load_at(builder, builder.add(address, const(32)), _BYTES16)
    # Both halves get all 16 bytes; the upper one is shifted to its nibbles.
    twice = builder.shuffle_vector(packed, packed, ir.Constant(ir.VectorType(I32, 32), [*range(16)] * 2))
    shifts = ir.Constant(ir.VectorType(I32, 8), [0] * 4 + [4] * 4)
    shifted = builder.bitcast(builder.lshr(builder.bitcast(twice, shifts.type), shifts), _BYTES32)
    return low_byte, _high_bytes(builder, shifted, base)


def _words_of_pair(builder: ir.IRBuilder, address: ir.Value, base: ir.Value, places: list[int]) -> ir.Value:
    """<32 x i16>: the words of rows k and k + 1 whose bytes are at `places`, by byte shuffles of AVX-512; base: i64.

    One load of 64 bytes, of which 16 belong to what follows, the index at the end of a block, and go nowhere: loads are
    the limit of a tall tile, whose every dot product reads x from memory.
    """
    line = load_at(builder, address, _BYTES64)
    mask = [part for place in places for part in (place, 32 + place % 16)]
    spread = builder.shuffle_vector(line, line, ir.Constant(ir.VectorType(I32, 64), mask))
    shifts = ir.Constant(PAIRS, [4 if place >= 16 else 0 for place in places])
    codes = builder.bitcast(builder.lshr(builder.bitcast(spread, PAIRS), shifts), _BYTES64)
    look_up = function(builder, "llvm.x86.avx512.permvar.qi.512", _BYTES64, [_BYTES64] * 2)
    table = _table(builder, base)
    table = builder.shuffle_vector(table, table, ir.Constant(ir.VectorType(I32, 64), [*range(32)] * 2))
    high = builder.call(look_up, [table, codes])
    odd = ir.Constant(ir.VectorType(ir.IntType(1), 64), [0, 1] * 32)
    return builder.bitcast(builder.select(odd, high, spread), PAIRS)


def _byte_of(row: int, word: int) -> int:
    """Which of 32 low or high bytes the word of a row is made of."""
    return 8 * row + word + (8 if word >= 8 else 0)


# Lane l of a row is word _WORD_OF[l] of its vector.
_WORD_OF = [0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15]
# Which weight each of 32 low or high bytes belongs to, 16 · row + lane.
_PLACES = sorted(range(32), key=lambda place: _byte_of(place // LANES, _WORD_OF[place % LANES]))


class Rows:
    """Two rows of K at a time, each <16 x i16> in word order, multiplied by FMA: the sums of tile.BF16.

    step: rows of K that are decoded together; places: of each element of the decoded vectors, where in those rows it
    is, 16 · row + lane.
    """

    step = 2
    places: ClassVar = [[16 * row + _WORD_OF.index(word) for word in range(LANES)] for row in range(2)]

    def __init__(self, builder: ir.IRBuilder, x: Values) -> None:
        self.builder, self.x = builder, x
        self.first = [ZERO] * len(x)

    def decode(self, address: ir.Value, base: ir.Value, whole: ir.Value | None = None) -> Values:
        """The vectors of `step` rows of K; whole: i1, false at an end of half a step, which this kind does not have."""
        low, high = _bytes_of_pair(self.builder, address, base)
        rows = []
        for row in range(2):
            mask = [part for word in range(LANES) for part in (_byte_of(row, word), 32 + _byte_of(row, word))]
            rows.append(self._shuffle(low, high, mask, _WORDS16))
        return rows

    def multiply(self, k: ir.Value, decoded: Values, sums: Values, whole: ir.Value | None = None) -> Values:
        """The sums with rows k … of K added."""
        for row, weights in enumerate(self._floats(decoded)):
            at = self.builder.mul(self.builder.add(k, const(row)), const(4))
            scalars = [load_at(self.builder, self.builder.add(x, at), F32, 4) for x in self.x]
            sums = [fma(self.builder, splat(self.builder, s), weights, t) for s, t in zip(scalars, sums, strict=True)]
        return sums

    def _floats(self, decoded: Values) -> Iterator[ir.Value]:
        """Each row of K as <16 x float>."""
        return (_to_f32(self.builder, words) for words in decoded)

    def replace(self, decoded: Values, place: ir.Value, bits: ir.Value) -> Values:
        """The vectors with `bits` (i16) at a place (i64)."""
        wanted = self.builder.trunc(place, I16)
        replaced = []
        for vector, here in zip(decoded, self.places, strict=True):
            wherever = splat(self.builder, wanted, vector.type)
            is_it = self.builder.icmp_signed("==", ir.Constant(vector.type, here), wherever)
            replaced.append(self.builder.select(is_it, splat(self.builder, bits, vector.type), vector))
        return replaced

    def keep(self, k: ir.Value, decoded: Values, room: ir.Value, whole: ir.Value | None = None) -> None:
        """Store rows k … of K where a panel bf16 [K, 16] from address `room` on has them."""
        in_lanes = ir.Constant(ir.VectorType(I32, LANES), _WORD_OF)
        for row, words in enumerate(decoded):
            at = self.builder.mul(self.builder.add(k, const(row)), const(2 * LANES))
            lanes = self.builder.shuffle_vector(words, words, in_lanes)
            store_at(self.builder, lanes, self.builder.add(room, at), 2)

    def widen(self, k: ir.Value, decoded: Values, out: ir.Value, row_bytes: int) -> None:
        """Store rows k … of K as fp32, `row_bytes` apart from address `out` on."""
        for row, weights in enumerate(self._floats(decoded)):
            at = self.builder.mul(self.builder.add(k, const(row)), const(row_bytes))
            store_at(self.builder, weights, self.builder.add(out, at), 4)

    def store(self, sums: Values, out: Values) -> None:
        for total, at in zip(sums, out, strict=True):
            store_at(self.builder, total, at, 4)

    def _shuffle(self, low: ir.Value, high: ir.Value, mask: list[int], kind: ir.Type) -> ir.Value:
        indices = ir.Constant(ir.VectorType(I32, len(mask)), mask)
        return self.builder.bitcast(self.builder.shuffle_vector(low, high, indices), kind)


class _Planes(Rows):
    """The same by byte shuffles of AVX-512: two rows are one <64 x i8>, their 32 high bytes, then their 32 low ones."""

    places: ClassVar = [[place for _ in range(2) for place in _PLACES]]

    def __init__(self, builder: ir.IRBuilder, x: Values) -> None:
        super().__init__(builder, x)
        at = {place: i for i, place in enumerate(_PLACES)}
        words = [[(32 + at[LANES * row + lane], at[LANES * row + lane]) for lane in range(LANES)] for row in range(2)]
        # One shuffle a row, which makes the lower half of each float zero too: of constants LLVM would make five.
        wide = [[byte for word in row for byte in (0, 0, *word)] for row in words]
        self.wide = [opaque(builder, ir.Constant(_BYTES64, mask)) for mask in wide]
        upper = opaque(builder, const(-0x3333333333333334))
        self.upper = builder.bitcast(upper, ir.VectorType(ir.IntType(1), 64))
        in_panel = [byte for row in words for word in row for byte in word]
        self.panel_order = opaque(builder, ir.Constant(_BYTES64, in_panel))

    def decode(self, address: ir.Value, base: ir.Value, whole: ir.Value | None = None) -> Values:
        low, high = _bytes_of_pair(self.builder, address, base)
        return [self.builder.shuffle_vector(high, low, ir.Constant(ir.VectorType(I32, 64), [*range(64)]))]

    def replace(self, decoded: Values, place: ir.Value, bits: ir.Value) -> Values:
        builder = self.builder
        halves = [splat(builder, builder.trunc(half, I8), _BYTES32) for half in (builder.lshr(bits, I16(8)), bits)]
        word = builder.shuffle_vector(*halves, ir.Constant(ir.VectorType(I32, 64), [*range(64)]))
        is_it = builder.icmp_signed(
            "==", ir.Constant(_BYTES64, self.places[0]), splat(builder, builder.trunc(place, I8), _BYTES64)
        )
        return [builder.select(is_it, word, decoded[0])]

    def _floats(self, decoded: Values) -> Iterator[ir.Value]:
        zeros = ir.Constant(_BYTES64, [0] * 64)
        for mask in self.wide:
            wide = self.builder.select(self.upper, self._shuffled(decoded[0], mask), zeros)
            yield self.builder.bitcast(wide, VEC_F32)

    def keep(self, k: ir.Value, decoded: Values, room: ir.Value, whole: ir.Value | None = None) -> None:
        at = self.builder.add(room, self.builder.mul(k, const(2 * LANES)))
        store_at(self.builder, self._shuffled(decoded[0], self.panel_order), at, 2)

    def _shuffled(self, planes: ir.Value, mask: ir.Value) -> ir.Value:
        shuffle = function(self.builder, "llvm.x86.avx512.permvar.qi.512", _BYTES64, [_BYTES64] * 2)
        return self.builder.call(shuffle, [planes, mask])


class _Pairs(Rows):
    """Two pairs of rows at a time, each <32 x i16> with a pair a lane, multiplied by dot products: the sums of
    tile.BF16_DOT, those of even pairs first."""

    step = 4
    places: ClassVar = [[32 * p + 16 * row + lane for lane in range(LANES) for row in range(2)] for p in range(2)]

    def __init__(self, builder: ir.IRBuilder, x: Values) -> None:
        super().__init__(builder, x)
        self.first = [ZERO] * (2 * len(x))

    def decode(self, address: ir.Value, base: ir.Value, whole: ir.Value | None = None) -> Values:
        places = [_byte_of(row, _WORD_OF[lane]) for lane in range(LANES) for row in range(2)]
        following = _second(self.builder, whole, PAIR_BYTES)
        both = (address, self.builder.add(address, following))
        if _HAS_VBMI:
            return [_words_of_pair(self.builder, at, base, places) for at in both]
        mask = [part for place in places for part in (place, 32 + place)]
        return [self._shuffle(*_bytes_of_pair(self.builder, at, base), mask, PAIRS) for at in both]

    def multiply(self, k: ir.Value, decoded: Values, sums: Values, whole: ir.Value | None = None) -> Values:
        even, odd = sums[: len(self.x)], sums[len(self.x) :]
        even = add_dots(self.builder, self.x, k, decoded[0], even)
        following = self.builder.add(k, _second(self.builder, whole, 2))
        added = add_dots(self.builder, self.x, following, decoded[1], odd)
        if whole is not None:
            added = [self.builder.select(whole, a, t) for a, t in zip(added, odd, strict=True)]
        return even + added

    def keep(self, k: ir.Value, decoded: Values, room: ir.Value, whole: ir.Value | None = None) -> None:
        in_rows = ir.Constant(
            ir.VectorType(I32, 2 * LANES), [2 * lane + row for row in range(2) for lane in range(LANES)]
        )
        places = [k, self.builder.add(k, _second(self.builder, whole, 2))]
        # The first last: it is the one with escapes replaced where the second is the first once more.
        for pairs, place in zip(reversed(decoded), reversed(places), strict=True):
            at = self.builder.add(room, self.builder.mul(place, const(2 * LANES)))
            store_at(self.builder, self.builder.shuffle_vector(pairs, pairs, in_rows), at, 2)

    def store(self, sums: Values, out: Values) -> None:
        store_sums(self.builder, sums[: len(out)], sums[len(out) :], out)


def _second(builder: ir.IRBuilder, whole: ir.Value | None, distance: int) -> ir.Value:
    """How far the second pair is from the first: the first once more where there is no second."""
    return const(distance) if whole is None else builder.select(whole, const(distance), const(0))


def _to_f32(builder: ir.IRBuilder, words: ir.Value) -> ir.Value:
    """<16 x i16> in word order → <16 x float> in lane order: each word becomes the upper half of a float."""
    zero = ir.Constant(_WORDS16, [0] * 16)
    mask = [part for lane in range(LANES) for part in (0, 16 + _WORD_OF[lane])]
    wide = builder.shuffle_vector(zero, words, ir.Constant(ir.VectorType(I32, 32), mask))
    return builder.bitcast(wide, VEC_F32)


def decoder(builder: ir.IRBuilder, kind: int, x: Values) -> Rows:
    """What decodes for a kind of `tile`, and multiplies with rows of x at these addresses (i64)."""
    by_fma = _Planes if _HAS_VBMI else Rows
    return (_Pairs if kind == BF16_DOT else by_fma)(builder, x)
