"""The tile loop of the grouped GEMM on experts in planar12 or planar8: decoded in registers, escapes handled inside.

A block holds the planes of one weight [N, K] (`packing.planar`, E = 1), each on a multiple of 256 bytes. A step of the
loop is one tile of the format, 64 x 128: bytes of its two halves of columns, and nibbles that serve both. Decoded
weights are the register operand of the matrix instruction (swap AB). They pass through shared memory once more on the
way, bf16, because the layout in which bytes are loaded widest is not that of the operand. Where experts have many rows
each block of rows would decode them again: `decoded`.

Escapes are patched after decoding. There is no loop over them: a loop inside would stop Triton from pipelining the
outer one. Eight branches, most of them not taken (a Gaussian's tile has 0.6 escapes), cover every tile that has few;
others are stored raw and read in place of what was decoded.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language import target_info

from ..packing._planar import planes_of, unpack_planar8, unpack_planar12
from .portable import INTERPRETED, dot


@triton.jit
def _patch(w, escape, column):
    """w bf16 [64, 64] with one weight replaced; escape uint32; column: its column in this half of the tile."""
    row = (escape >> 23).to(tl.int32)
    hit = (tl.arange(0, 64)[:, None] == row) & (tl.arange(0, 64)[None, :] == column)
    bits = tl.where(hit, (escape & 0xFFFF).to(tl.uint16), w.to(tl.uint16, bitcast=True))
    return bits.to(tl.bfloat16, bitcast=True)


@triton.jit
def _corrected(low, high, begin, end, escape_ptr, raw_ptr):
    """Both halves [64, 64] of a tile with its escapes begin … end put right."""
    if begin < end:
        first = tl.load(escape_ptr + begin)
        if first >> 16 == 0xFFFF:
            r, j = tl.arange(0, 64)[:, None], tl.arange(0, 64)[None, :]
            tile_ptrs = raw_ptr + (first & 0xFFFF).to(tl.int64) * 8192 + r * 128 + j
            low, high = tl.load(tile_ptrs), tl.load(tile_ptrs + 64)
        else:
            for i in tl.static_range(8):
                if begin + i < end:
                    escape = tl.load(escape_ptr + begin + i)
                    column = ((escape >> 16) & 127).to(tl.int32)
                    if column < 64:
                        low = _patch(low, escape, column)
                    else:
                        high = _patch(high, escape, column - 64)
    return low, high


@triton.jit
def _fence(acc):
    """acc, which nothing may know before all matrix instructions that make it are done.

    wgmma, which only Hopper has, runs asynchronously and reads decoded weights from registers. Without this ptxas
    either waits for each (C7515, in the dense loop of the same kernel too), or lets the next step overwrite the
    registers of those in flight (triton issues 9433 and 11781): the moves use the accumulator, so the wait comes first.
    """
    if INTERPRETED or not target_info.cuda_capability_geq(9) or target_info.cuda_capability_geq(10):
        return acc
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [acc], dtype=tl.float32, is_pure=False, pack=1)


@triton.jit
def planar_times_rows(
    x_ptr, sources, block_ptr, n, n0, N, K, TILE: tl.constexpr, EVEN_K: tl.constexpr, NIBBLES: tl.constexpr
):
    """`weight_times_rows` for a block, uint8 pointer, of planar12 (with NIBBLES) or planar8; TILE has the 64 rows of a
    format's tile, swapped.

    The sum runs over K in steps of 64, as that of a dense tile with BLOCK_K = 64.
    """
    BLOCK_M: tl.constexpr = TILE.block_m
    tl.static_assert(TILE.swap_ab and TILE.block_n == 64, "a tile of the format has 64 rows, and is the first operand")
    tiles_k = tl.cdiv(K, 128)
    nibble_ptr, base, offset_ptr, escape_ptr, raw_ptr = planes_of(block_ptr, N, K, NIBBLES)
    j = tl.arange(0, 64)
    x_ptrs = x_ptr + sources[:, None] + j[None, :]
    byte_ptrs = block_ptr + n[:, None] * (tiles_k * 128) + j[None, :]
    nibble_ptrs = nibble_ptr + n[:, None] * (tiles_k * 64) + j[None, :]
    offset_ptr += n0 // 64 * tiles_k
    acc = tl.zeros([64, BLOCK_M], tl.float32)
    for step in tl.range(0, tiles_k):
        if EVEN_K:
            x_low, x_high = tl.load(x_ptrs), tl.load(x_ptrs + 64)
        else:
            left = K - step * 128
            x_low = tl.load(x_ptrs, mask=j[None, :] < left, other=0.0)
            x_high = tl.load(x_ptrs + 64, mask=j[None, :] + 64 < left, other=0.0)
        if NIBBLES:
            nibbles = tl.load(nibble_ptrs)
            low = unpack_planar12(tl.load(byte_ptrs), nibbles, base)
            high = unpack_planar12(tl.load(byte_ptrs + 64), nibbles, base, HIGH=True)
        else:
            low = unpack_planar8(tl.load(byte_ptrs), base)
            high = unpack_planar8(tl.load(byte_ptrs + 64), base)
        begin, end = tl.load(offset_ptr + step), tl.load(offset_ptr + step + 1)
        low, high = _corrected(low, high, begin, end, escape_ptr, raw_ptr)
        acc = dot(low, x_low.T, acc)
        acc = _fence(dot(high, x_high.T, acc))
        x_ptrs += 128
        byte_ptrs += 128
        nibble_ptrs += 64
    return tl.trans(acc)
