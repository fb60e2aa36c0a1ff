"""huffman by Triton: decode to a buffer, a lane of a warp a lane of the format."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..work import declares, every_tensor_once

# Lanes of a program; more share the table's cache lines, fewer hold less of the machine while a slow lane ends.
_LANES = 128


@triton.jit
def _next(table_ptr, buffer, filled):
    """(exponent, buffer, filled) after one code."""
    entry = tl.load(table_ptr + (buffer & 2047).to(tl.int32)).to(tl.int32)
    length = entry >> 8
    return entry & 0xFF, buffer >> length.to(tl.uint64), filled - length


@triton.jit
def _refill(stream_ptr, word, end, buffer, filled):
    """At least 32 bits in the buffer, for two codes (three of 11 bits have 33); zeros beyond the end of a lane."""
    short = filled <= 32
    bits = tl.load(stream_ptr + word, mask=short & (word < end), other=0).to(tl.uint32, bitcast=True).to(tl.uint64)
    # A full buffer must not be shifted into by 64 or more.
    buffer |= bits << (filled & 63).to(tl.uint64)
    return word + short.to(tl.int32), buffer, filled + tl.where(short, 32, 0)


@triton.jit(launch_metadata=declares(every_tensor_once))
def _huffman_kernel(
    byte_ptr,  # (size,) uint8
    table_ptr,  # (2048,) int16
    offset_ptr,  # (L + 1,) int32
    stream_ptr,  # (words,) int32
    out_ptr,  # (size,) int16
    size,
    lanes,
    LANES: tl.constexpr,
):
    """Grid: (ceil(L / LANES),)."""
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    word = tl.load(offset_ptr + lane, mask=lane < lanes, other=0)
    end = tl.load(offset_ptr + lane + 1, mask=lane < lanes, other=0)
    # int64: 128 experts of 2048 x 8192 reach 2^31.
    place = (lane // 32).to(tl.int64) * 16384 + lane % 32 * 8
    place = tl.multiple_of(place[:, None] + tl.arange(0, 8)[None, :], (1, 8))
    buffer = tl.zeros([LANES], tl.uint64)
    filled = tl.zeros([LANES], tl.int32)
    # A program's first group is its longest.
    left = size - tl.program_id(0).to(tl.int64) * (LANES // 32 * 16384)
    for _ in range(tl.minimum(tl.cdiv(left, 256), 64).to(tl.int32)):
        word, buffer, filled = _refill(stream_ptr, word, end, buffer, filled)
        e0, buffer, filled = _next(table_ptr, buffer, filled)
        e1, buffer, filled = _next(table_ptr, buffer, filled)
        word, buffer, filled = _refill(stream_ptr, word, end, buffer, filled)
        e2, buffer, filled = _next(table_ptr, buffer, filled)
        e3, buffer, filled = _next(table_ptr, buffer, filled)
        word, buffer, filled = _refill(stream_ptr, word, end, buffer, filled)
        e4, buffer, filled = _next(table_ptr, buffer, filled)
        e5, buffer, filled = _next(table_ptr, buffer, filled)
        word, buffer, filled = _refill(stream_ptr, word, end, buffer, filled)
        e6, buffer, filled = _next(table_ptr, buffer, filled)
        e7, buffer, filled = _next(table_ptr, buffer, filled)
        # join puts its new axis last, so the first pair joined is the furthest apart.
        even = tl.join(tl.join(e0, e4), tl.join(e2, e6))
        odd = tl.join(tl.join(e1, e5), tl.join(e3, e7))
        exponent = tl.join(even, odd).reshape([LANES, 8])
        byte = tl.load(byte_ptr + place, mask=place < size, other=0).to(tl.int32)
        bits = (byte & 0x80) << 8 | byte & 0x7F | exponent << 7
        tl.store(out_ptr + place, bits.to(tl.int16), mask=place < size)
        place += 256


def decode(planes: dict[str, Tensor], out: Tensor) -> None:
    """Planes of a weight that is not raw → out int16 of its shape, on one device."""
    lanes = planes["offsets"].numel() - 1
    args = (planes[name] for name in ("bytes", "table", "offsets", "stream"))
    grid = (triton.cdiv(lanes, _LANES),)
    _huffman_kernel[grid](*args, out, out.numel(), lanes, LANES=_LANES, num_warps=_LANES // 32)
