"""tiered: 10.9 bits a weight, and every tile of 4096 weights decodes by itself at the speed of memory.

Half of a Huffman code's gain comes from the three most frequent exponents, nearly all of the rest from the next seven.
So exponents are coded in three tiers of fixed width, and instead of walking a bit stream a decoder counts: how many
weights before this one went down a tier. For n weights in row-major order, T = ceil(n / 4096) tiles:

    bytes    uint8 [n]             sign << 7 | mantissa
    first    uint8 [1024·T]        2 bits a weight, byte k of a tile for its weights k, k + 1024, k + 2048, k + 3072
                                   from the lowest bits up: 0, 1, 2 one of the three most frequent exponents, 3 another
    table    uint8 [16]            exponents: 3 of the first tier, 0, 7 of the second, 0 …
    offsets  int32 [2·(T + 1)]     per tile: where its words begin in `second`, its bytes in `third`
    second   int32 [words + 1]     3 bits for each other weight of a tile, dense, from the lowest bit up, a tile at a
                                   whole word: 0 … 6 one of the next seven exponents, 7 another
    third    uint8 [4·words]       exponents of those; at least four bytes follow the last

Inside a tile tiers run in the order of `first`: k = 0 (its four weights), k = 1, …; one prefix sum over 1024 bytes
then ranks 4096 weights. `second` and `third` end with a word more, there to be read by what begins in the word before.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange, types
from torch import Tensor

from ..numba_cache import cached_njit
from .codec import Codec, PackingError, align, check_offsets
from .histogram import exponent_histogram

TILE, QUARTER = 4096, 1024
# Class of an exponent: 0 … 2 first tier, 3 … 9 second, 10 third.
_THIRD = 10

_u8, _u16, _u32, _u64 = types.uint8, types.uint16, types.uint32, types.uint64


def classes(histogram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int64 [256] → (uint8 [256] class of each exponent, uint8 [16] table)."""
    frequent = np.argsort(-histogram, kind="stable")[:_THIRD].astype(np.uint8)
    kind = np.full(256, _THIRD, dtype=np.uint8)
    kind[frequent] = np.arange(_THIRD)
    table = np.zeros(16, dtype=np.uint8)
    table[:3], table[4:11] = frequent[:3], frequent[3:]
    return kind, table


@cached_njit(parallel=True, nogil=True)
def _split(bits, kind, bytes_out, kinds, others, escapes):
    """bytes and the class of every weight; how many weights of each tile are below the first tier, below the second."""
    for tile in prange(others.shape[0]):
        weights = bits[tile * 4096 : tile * 4096 + 4096]
        out, split = kinds[tile * 4096 : tile * 4096 + 4096], bytes_out[tile * 4096 : tile * 4096 + 4096]
        for i in range(weights.shape[0]):
            split[i] = _u8(((weights[i] >> 8) & 0x80) | (weights[i] & 0x7F))
        for i in range(weights.shape[0]):
            out[i] = kind[_u64((weights[i] >> 7) & 255)]
        out[weights.shape[0] :] = 0
        below_first = below_second = _u32(0)
        for i in range(4096):
            below_first += _u32(out[i] > 2)
            below_second += _u32(out[i] > 9)
        others[tile] = below_first
        escapes[tile] = below_second


@cached_njit(parallel=True, nogil=True)
def _encode(bits, kinds, offsets, first, second, third):
    """kinds uint8 [4096·T], zero beyond the last weight."""
    for tile in prange(offsets.shape[0] - 1):
        start = tile * 4096
        q0, q1 = kinds[start : start + 1024], kinds[start + 1024 : start + 2048]
        q2, q3 = kinds[start + 2048 : start + 3072], kinds[start + 3072 : start + 4096]
        out = first[tile * 1024 : tile * 1024 + 1024]
        for k in range(1024):
            low = min(q0[k], _u8(3)) | (min(q1[k], _u8(3)) << _u8(2))
            out[k] = _u8(low | (min(q2[k], _u8(3)) << _u8(4)) | (min(q3[k], _u8(3)) << _u8(6)))
        codes = np.empty(4104, dtype=np.uint8)
        rank, escape = _u64(0), offsets[tile, 1]
        for k in range(1024):
            for quarter in range(4):
                c = kinds[_u64(start + quarter * 1024 + k)]
                # Written always, kept if another: a branch would be mispredicted at every fourth weight.
                codes[rank] = c - _u8(3)
                rank += _u64(c > 2)
                if c == 10:
                    third[escape] = _u8(bits[start + quarter * 1024 + k] >> 7)
                    escape += 1
        codes[rank : min(rank + _u64(8), _u64(4104))] = 0
        word, buffer, filled = offsets[tile, 0], _u64(0), _u64(0)
        for group in range((np.int64(rank) + 7) // 8):
            bunch = _u64(0)
            for i in range(8):
                bunch |= _u64(codes[_u64(group * 8 + i)]) << _u64(3 * i)
            buffer |= bunch << filled
            filled += _u64(24)
            if filled >= 32:
                second[word] = _u32(buffer)
                word += 1
                buffer >>= _u64(32)
                filled -= _u64(32)
        if word < offsets[tile + 1, 0]:
            second[word] = _u32(buffer)


@cached_njit(nogil=True)
def _decode_tile(tile, bytes_in, first, table, offsets, second, third, counts, out):
    """counts uint8 [256]: how many of a byte's four codes are 3."""
    codes = first[tile * 1024 : tile * 1024 + 1024]
    total = 0
    for k in range(1024):
        total += counts[_u64(codes[k])]
    # Three exponents of the first tier, then those of all others in order: a weight's exponent is one load, from
    # its own code or from the count of others so far.
    known = np.empty(4112, dtype=np.uint8)
    known[:4] = table[:4]
    word, escape = offsets[tile, 0], offsets[tile, 1]
    for group in range((total + 7) // 8):
        bit = group * 24
        at = _u64(word + (bit >> 5))
        window = (_u64(second[at]) | (_u64(second[at + _u64(1)]) << _u64(32))) >> _u64(bit & 31)
        for i in range(8):
            code = (window >> _u64(3 * i)) & _u64(7)
            known[_u64(3 + group * 8 + i)] = table[_u64(4) + code]
            if code == 7 and group * 8 + i < total:
                known[3 + group * 8 + i] = third[escape]
                escape += 1
    exponents = np.empty(4096, dtype=np.uint8)
    rank = _u64(3)
    for k in range(1024):
        c = _u64(codes[k])
        for quarter in range(4):
            code = (c >> _u64(2 * quarter)) & _u64(3)
            exponents[_u64(quarter * 1024 + k)] = known[rank if code == 3 else code]
            rank += _u64(code == 3)
    weights, split = out[tile * 4096 : tile * 4096 + 4096], bytes_in[tile * 4096 : tile * 4096 + 4096]
    for i in range(weights.shape[0]):
        b = _u16(split[i])
        weights[i] = _u16(((b << 8) & 0x8000) | (b & 0x7F)) | _u16(_u16(exponents[i]) << 7)


@cached_njit(nogil=True)
def _decode(bytes_in, first, table, offsets, second, third, counts, out):
    for tile in range(offsets.shape[0] - 1):
        _decode_tile(tile, bytes_in, first, table, offsets, second, third, counts, out)


@cached_njit(parallel=True, nogil=True)
def _decode_parallel(bytes_in, first, table, offsets, second, third, counts, out):
    for tile in prange(offsets.shape[0] - 1):
        _decode_tile(tile, bytes_in, first, table, offsets, second, third, counts, out)


@cached_njit(nogil=True)
def _miscounted(first, offsets, second, counts):
    """The first tile whose codes need another number of words or of rare exponents than `offsets` leave it; -1 for
    none. Offsets of words ascend and stay inside `second`."""
    for tile in range(offsets.shape[0] - 1):
        total = 0
        for k in range(tile * 1024, tile * 1024 + 1024):
            total += counts[_u64(first[k])]
        word = offsets[tile, 0]
        if offsets[tile + 1, 0] - word != (total * 3 + 31) // 32:
            return tile
        rare = _u64(0)
        for group in range((total + 7) // 8):
            bit = group * 24
            at = _u64(word + (bit >> 5))
            window = (_u64(second[at]) | (_u64(second[at + _u64(1)]) << _u64(32))) >> _u64(bit & 31)
            # An octal digit a code: 1 where all three bits are set, none beyond the last code. Digits are added in
            # halves, for none may exceed 7.
            sevens = window & (window >> _u64(1)) & (window >> _u64(2)) & _u64(0o11111111)
            if total - group * 8 < 8:
                sevens &= (_u64(1) << _u64(3 * (total - group * 8))) - _u64(1)
            sevens = (sevens & _u64(0o1111)) + (sevens >> _u64(12))
            sevens = (sevens & _u64(0o77)) + (sevens >> _u64(6))
            rare += (sevens & _u64(7)) + (sevens >> _u64(3))
        if _u64(offsets[tile + 1, 1] - offsets[tile, 1]) != rare:
            return tile
    return -1


def _third_bytes(escapes: int) -> int:
    """At least four bytes more, and whole words."""
    return (escapes // 4 + 2) * 4


_OTHERS = np.array([sum((byte >> shift) & 3 == 3 for shift in (0, 2, 4, 6)) for byte in range(256)], dtype=np.uint8)


class Tiered(Codec):
    """See the module."""

    name = "tiered"

    def room(self, n: int, k: int) -> int:
        # A third of a bit more than Gaussian weights take, and tables.
        return align(int(n * k * 11.2 / 8) + 4096)

    def _planes(self, shape):
        size = int(np.prod(shape, dtype=np.int64))
        tiles = -(-size // TILE)
        return {
            "bytes": (torch.uint8, size),
            "first": (torch.uint8, tiles * QUARTER),
            "table": (torch.uint8, 16),
            "offsets": (torch.int32, 2 * (tiles + 1)),
            "second": (torch.int32, None),
            "third": (torch.uint8, None),
        }

    def _encode(self, bits: np.ndarray) -> dict[str, np.ndarray] | None:
        bits = bits.reshape(-1)
        tiles = -(-bits.size // TILE)
        kind, table = classes(exponent_histogram(bits.reshape(1, -1))[0])
        split, kinds = np.empty(bits.size, dtype=np.uint8), np.empty(tiles * TILE, dtype=np.uint8)
        others, escapes = np.empty(tiles, dtype=np.int64), np.empty(tiles, dtype=np.int64)
        _split(bits, kind, split, kinds, others, escapes)
        offsets = np.zeros((tiles + 1, 2), dtype=np.int64)
        np.cumsum(-(-others * 3 // 32), out=offsets[1:, 0])
        np.cumsum(escapes, out=offsets[1:, 1])
        words, last = int(offsets[-1, 0]) + 1, int(offsets[-1, 1])
        if bits.size + tiles * QUARTER + words * 4 + last + 8 >= bits.nbytes or max(words, last) >= 2**31:
            return None
        planes = {
            "bytes": split,
            "first": np.empty(tiles * QUARTER, dtype=np.uint8),
            "table": table,
            "offsets": offsets.astype(np.int32).reshape(-1),
            "second": np.zeros(words, dtype=np.uint32),
            "third": np.zeros(_third_bytes(last), dtype=np.uint8),
        }
        _encode(bits, kinds, offsets, planes["first"], planes["second"], planes["third"])
        return planes

    def _check(self, planes, shape):
        offsets = planes["offsets"].view(np.int32).reshape(-1, 2)
        second, third = planes["second"], planes["third"]
        last = int(offsets[-1, 1])
        check_offsets("offsets of words", offsets[:, 0], second.size - 1)
        check_offsets("offsets of rare exponents", offsets[:, 1], last)
        if third.size != _third_bytes(last):
            raise PackingError(f"{last} rare exponents take {_third_bytes(last)} bytes, not {third.size}")
        if (tile := _miscounted(planes["first"], offsets, second, _OTHERS)) >= 0:
            raise PackingError(f"tile {tile} has not as many words and rare exponents as its codes say")

    def _decode_cpu(self, planes: dict[str, np.ndarray], out: np.ndarray, parallel: bool) -> None:
        args = [planes[name] for name in ("bytes", "first", "table")]
        offsets = planes["offsets"].view(np.int32).reshape(-1, 2)
        decode = _decode_parallel if parallel else _decode
        decode(*args, offsets, planes["second"], planes["third"], _OTHERS, out.reshape(-1))

    def _decode_triton(self, planes: dict[str, Tensor], out: Tensor) -> None:
        from ._tiered import decode

        decode(planes, out)
