"""tiered by Triton: decode to a buffer, a program a tile."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton.portable import INTERPRETED
from ..work import declares, every_tensor_once

# Every nibble its own place: the selector of `_prmt` that changes nothing.
_SAME = tl.constexpr(0x3210)


@triton.jit
def _prmt(a, b, selector):
    """uint32 of the four bytes that the four low nibbles of `selector`, 0 … 7, pick from bytes a0 … a3, b0 … b3.

    One instruction of a GPU, and the only one with which it looks up four codes at once.
    """
    if INTERPRETED:
        both = (b.to(tl.uint64) << 32) | a.to(tl.uint64)
        picked = (both >> ((selector & 7) * 8).to(tl.uint64)) & 0xFF
        for i in tl.static_range(1, 4):
            picked |= ((both >> (((selector >> (4 * i)) & 7) * 8).to(tl.uint64)) & 0xFF) << (8 * i)
        return picked.to(tl.uint32)
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, selector], dtype=tl.uint32, is_pure=True, pack=1
    )


@triton.jit
def _insert(flags):
    """Selector that puts b0, b1, … in turn where a nibble of `flags` is 1, and leaves a's byte where it is 0."""
    # The product's nibbles count the flags below; none exceeds 4 + 3.
    where = flags * 7
    return (where & (flags * 0x1110 + 0x4444)) | ((where ^ 0x7777) & _SAME)


@triton.jit
def _window(ptr, bit, mask):
    """The 32 bits that begin at `bit` of int32 words; 0 where not `mask`."""
    at = ptr + (bit >> 5)
    low = tl.load(at, mask=mask, other=0).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(at + 1, mask=mask, other=0).to(tl.uint32, bitcast=True).to(tl.uint64)
    return ((high << 32 | low) >> (bit & 31).to(tl.uint64)).to(tl.uint32)


@triton.jit(launch_metadata=declares(every_tensor_once))
def _tiered_kernel(
    byte_ptr,  # (size,) uint8
    first_ptr,  # (1024·T,) uint8
    table_ptr,  # (4,) int32
    offset_ptr,  # (2·(T + 1),) int32
    second_ptr,  # (words + 1,) int32
    third_ptr,  # (escapes / 4 + 2,) int32
    out_ptr,  # (size,) int16
    size,
    QUARTER: tl.constexpr,
):
    """Grid: (T,). Four weights, one byte of `first`, are decoded as the four bytes of a register."""
    tile = tl.program_id(0)
    word = tl.load(offset_ptr + 2 * tile)
    escape = tl.load(offset_ptr + 2 * tile + 1)
    last_escape = tl.load(offset_ptr + 2 * tile + 3)
    table0 = tl.load(table_ptr).to(tl.uint32, bitcast=True)
    table1 = tl.load(table_ptr + 1).to(tl.uint32, bitcast=True)
    table2 = tl.load(table_ptr + 2).to(tl.uint32, bitcast=True)
    k = tl.arange(0, QUARTER)
    # int64: 128 experts of 2048 x 8192 reach 2^31.
    start = tile.to(tl.int64) * (4 * QUARTER)
    codes = tl.load(first_ptr + tile.to(tl.int64) * QUARTER + k).to(tl.uint32)
    # Two bits to a nibble.
    codes = (codes | codes << 4) & 0x0F0F
    codes = (codes | codes << 2) & 0x3333
    others = codes & (codes >> 1) & 0x1111
    count = ((others * 0x1111 >> 12) & 7).to(tl.int32)
    rank = tl.cumsum(count, 0) - count
    # The codes of a byte's others are neighbours; three bits to a nibble, zero above the last.
    window = _window(second_ptr + word, rank * 3, count > 0) & ((1 << count * 3) - 1).to(tl.uint32)
    window = (window & 0x3F) | (window & 0xFC0) << 2
    window = (window & 0x0707) | (window & 0x3838) << 1
    second = _prmt(table1, table2, window)
    if escape < last_escape:
        escapes = window & (window >> 1) & (window >> 2) & 0x1111
        count = ((escapes * 0x1111 >> 12) & 7).to(tl.int32)
        rank = escape + tl.cumsum(count, 0) - count
        third = _window(third_ptr + (rank >> 2), (rank & 3) * 8, count > 0)
        second = _prmt(second, third, _insert(escapes))
    exponents = _prmt(_prmt(table0, table0, codes), second, _insert(others))
    for quarter in tl.static_range(4):
        place = start + quarter * QUARTER + k
        byte = tl.load(byte_ptr + place, mask=place < size, other=0).to(tl.uint32)
        exponent = exponents << 7 if quarter == 0 else exponents >> (8 * quarter - 7)
        bits = (byte * 0x101 & 0x807F) | (exponent & 0x7F80)
        tl.store(out_ptr + place, bits.to(tl.uint16).to(tl.int16, bitcast=True), mask=place < size)


def decode(planes: dict[str, Tensor], out: Tensor) -> None:
    """Planes of a weight that is not raw → out int16 of its shape, on one device."""
    args = [planes[name] for name in ("bytes", "first", "table", "offsets", "second", "third")]
    args[2], args[5] = args[2].view(torch.int32), args[5].view(torch.int32)
    grid = (planes["offsets"].numel() // 2 - 1,)
    _tiered_kernel[grid](*args, out, out.numel(), QUARTER=1024, num_warps=4)
