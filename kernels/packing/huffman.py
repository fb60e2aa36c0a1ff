"""huffman: the paper's scheme, 10.7 bits a weight: a Huffman code for each exponent, sign and mantissa as they are.

FluxMoE (arXiv 2604.02715) and DFloat11 (arXiv 2504.11651) code exponents so. A bit stream decodes only from its start,
so it is cut into lanes of 512 weights with their offsets. 32 lanes make a group of 16384 weights and take turns, eight
weights each: a warp that decodes the group reads and writes 256 neighbours at a time. For n weights in row-major order,
L = 32 · ceil(n / 16384) lanes:

    bytes    uint8 [n]          sign << 7 | mantissa
    table    int16 [2048]       by the next 11 bits of a stream: exponent | code length << 8
    offsets  int32 [L + 1]      where a lane's words begin in `stream`
    stream   int32 [words]      codes, lowest bit first, a lane at a whole word

    weight i: group i / 16384, lane (i / 8) mod 32 of it, there number i mod 8 + 8 · (i mod 16384 / 256)

Codes have 11 bits at most: a table of 4 KiB stays in a first-level cache, and rare exponents cost < 0.001 bit more
than with 16.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange, types
from torch import Tensor

from ..numba_cache import cached_njit
from .codec import Codec, PackingError, align, check_offsets
from .histogram import exponent_histogram

MAX_LENGTH = 11
GROUP, LANES = 16384, 32

_u8, _u16, _u32, _u64 = types.uint8, types.uint16, types.uint32, types.uint64


def code_lengths(histogram: np.ndarray, limit: int = MAX_LENGTH) -> np.ndarray:
    """int64 [256] → uint8 [256]: lengths of an optimal prefix code of at most `limit` bits, 0 for what never occurs.

    Package-merge (Larmore and Hirschberg, 1990): a symbol's length is how many of the cheapest 2·(symbols - 1)
    packages it is in.
    """
    symbols: list[tuple[int, tuple[int, ...]]] = [
        (int(count), (symbol,)) for symbol, count in enumerate(histogram) if count
    ]
    lengths = np.zeros(256, dtype=np.uint8)
    if len(symbols) == 1:
        lengths[symbols[0][1][0]] = 1
        return lengths
    symbols.sort()
    packages = symbols
    for _ in range(limit - 1):
        pairs = zip(packages[::2], packages[1::2], strict=False)
        packages = sorted([*symbols, *((a[0] + b[0], a[1] + b[1]) for a, b in pairs)], key=lambda item: item[0])
    for _, members in packages[: 2 * (len(symbols) - 1)]:
        for symbol in members:
            lengths[symbol] += 1
    return lengths


def canonical_codes(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [256] → (uint32 [256] codes with their first bit lowest, uint16 [2048] decoding table)."""
    codes, table = np.zeros(256, dtype=np.uint32), np.zeros(1 << MAX_LENGTH, dtype=np.uint16)
    code, previous = 0, 0
    for length, symbol in sorted((int(length), symbol) for symbol, length in enumerate(lengths) if length):
        code <<= length - previous
        reverse = int(format(code, f"0{length}b")[::-1], 2)
        codes[symbol] = reverse
        table[reverse :: 1 << length] = symbol | length << 8
        code, previous = code + 1, length
    return codes, table


@cached_njit(parallel=True, nogil=True)
def _measure(bits, lengths, bytes_out, lane_bits):
    """bytes, and the bits of each lane's stream."""
    for group in prange(lane_bits.shape[0]):
        first = group * 16384
        weights, split = bits[first : first + 16384], bytes_out[first : first + 16384]
        for i in range(weights.shape[0]):
            split[i] = _u8(((weights[i] >> 8) & 0x80) | (weights[i] & 0x7F))
        sums = lane_bits[group]
        sums[:] = 0
        size = np.empty(16384, dtype=np.uint8)
        for i in range(weights.shape[0]):
            size[i] = lengths[_u64((weights[i] >> 7) & 255)]
        size[weights.shape[0] :] = 0
        for step in range(64):
            for lane in range(32):
                total = _u32(0)
                for i in range(8):
                    total += _u32(size[step * 256 + lane * 8 + i])
                sums[lane] += total


@cached_njit(parallel=True, nogil=True)
def _encode(bits, lengths, codes, offsets, stream):
    for lane in prange(offsets.shape[0] - 1):
        first = lane // 32 * 16384 + lane % 32 * 8
        word, buffer, filled = offsets[lane], _u64(0), _u64(0)
        for step in range(64):
            start = first + step * 256
            for i in range(start, min(start + 8, bits.shape[0])):
                exponent = _u64((bits[_u64(i)] >> 7) & 255)
                buffer |= _u64(codes[exponent]) << filled
                filled += _u64(lengths[exponent])
                if filled >= 32:
                    stream[word] = _u32(buffer)
                    word += 1
                    buffer >>= _u64(32)
                    filled -= _u64(32)
        if filled:
            stream[word] = _u32(buffer)


@cached_njit(nogil=True, inline="always")
def _refill(stream, end, word, buffer, filled):
    """At least 32 bits in the buffer, zeros beyond the end of a lane."""
    if filled <= 32:
        if word < end:
            buffer |= _u64(stream[word]) << filled
        filled += _u64(32)
        word += _u64(1)
    return word, buffer, filled


@cached_njit(nogil=True, inline="always")
def _eight(stream, end, table, word, buffer, filled, out, place):
    """The next eight exponents of a lane; two codes fit between refills, three of 11 bits would not."""
    for i in range(8):
        if i % 2 == 0:
            word, buffer, filled = _refill(stream, end, word, buffer, filled)
        entry = _u64(table[buffer & _u64(2047)])
        out[place + _u64(i)] = _u8(entry)
        buffer >>= entry >> _u64(8)
        filled -= entry >> _u64(8)
    return word, buffer, filled


@cached_njit(nogil=True)
def _decode_group(group, bytes_in, table, offsets, stream, out):
    exponents = np.empty(16384, dtype=np.uint8)
    for lane in range(0, 32, 4):
        # Four lanes at once: within one, each lookup waits for the one before.
        at = group * 32 + lane
        w0, w1, w2, w3 = _u64(offsets[at]), _u64(offsets[at + 1]), _u64(offsets[at + 2]), _u64(offsets[at + 3])
        e0, e1, e2, e3 = w1, w2, w3, _u64(offsets[at + 4])
        b0 = b1 = b2 = b3 = _u64(0)
        f0 = f1 = f2 = f3 = _u64(0)
        for step in range(64):
            place = _u64(step * 256 + lane * 8)
            w0, b0, f0 = _eight(stream, e0, table, w0, b0, f0, exponents, place)
            w1, b1, f1 = _eight(stream, e1, table, w1, b1, f1, exponents, place + _u64(8))
            w2, b2, f2 = _eight(stream, e2, table, w2, b2, f2, exponents, place + _u64(16))
            w3, b3, f3 = _eight(stream, e3, table, w3, b3, f3, exponents, place + _u64(24))
    first = group * 16384
    weights, split = out[first : first + 16384], bytes_in[first : first + 16384]
    for i in range(weights.shape[0]):
        b = _u16(split[i])
        weights[i] = _u16(((b << 8) & 0x8000) | (b & 0x7F)) | _u16(_u16(exponents[i]) << 7)


@cached_njit(nogil=True)
def _decode(bytes_in, table, offsets, stream, out):
    for group in range((offsets.shape[0] - 1) // 32):
        _decode_group(group, bytes_in, table, offsets, stream, out)


@cached_njit(parallel=True, nogil=True)
def _decode_parallel(bytes_in, table, offsets, stream, out):
    for group in prange((offsets.shape[0] - 1) // 32):
        _decode_group(group, bytes_in, table, offsets, stream, out)


class Huffman(Codec):
    """See the module."""

    name = "huffman"

    def room(self, n: int, k: int) -> int:
        # A third of a bit more than Gaussian weights take, and tables.
        return align(int(n * k * 11.0 / 8) + 8192)

    def _planes(self, shape):
        size = int(np.prod(shape, dtype=np.int64))
        lanes = -(-size // GROUP) * LANES
        return {
            "bytes": (torch.uint8, size),
            "table": (torch.int16, 1 << MAX_LENGTH),
            "offsets": (torch.int32, lanes + 1),
            "stream": (torch.int32, None),
        }

    def _encode(self, bits: np.ndarray) -> dict[str, np.ndarray] | None:
        bits = bits.reshape(-1)
        lengths = code_lengths(exponent_histogram(bits.reshape(1, -1))[0])
        codes, table = canonical_codes(lengths)
        split = np.empty(bits.size, dtype=np.uint8)
        lane_bits = np.empty((-(-bits.size // GROUP), LANES), dtype=np.int64)
        _measure(bits, lengths, split, lane_bits)
        offsets = np.zeros(lane_bits.size + 1, dtype=np.int64)
        np.cumsum(-(-lane_bits.reshape(-1) // 32), out=offsets[1:])
        words = int(offsets[-1])
        if bits.size + offsets.size * 4 + words * 4 + table.nbytes >= bits.nbytes or words >= 2**31:
            return None
        offsets, stream = offsets.astype(np.int32), np.empty(words, dtype=np.uint32)
        _encode(bits, lengths, codes, offsets, stream)
        return {"bytes": split, "table": table, "offsets": offsets, "stream": stream}

    def _check(self, planes, shape):
        if (planes["table"] >> 8).max() > MAX_LENGTH:
            raise PackingError(f"its table has codes of more than {MAX_LENGTH} bits")
        check_offsets("offsets of lanes", planes["offsets"].view(np.int32), planes["stream"].size)

    def _decode_cpu(self, planes: dict[str, np.ndarray], out: np.ndarray, parallel: bool) -> None:
        decode = _decode_parallel if parallel else _decode
        decode(*(planes[name] for name in ("bytes", "table", "offsets", "stream")), out.reshape(-1))

    def _decode_triton(self, planes: dict[str, Tensor], out: Tensor) -> None:
        from ._huffman import decode

        decode(planes, out)
