"""planar12 and planar8 by Triton: `unpack_planar12` and `unpack_planar8` for the tile loop of a GEMM, and around them a
tile's decode to a buffer. NIBBLES: the format has a plane of nibbles, as planar12."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..triton.portable import INTERPRETED
from ..work import declares, every_tensor_once
from .codec import BLOCK_ALIGNMENT

TILE_ROWS, TILE_COLS = 64, 128
# Escapes of a tile that is not raw: 8 at most, in the least that a program handles at once.
_PATCH = tl.constexpr(16)
ALIGNMENT = tl.constexpr(BLOCK_ALIGNMENT)

# Four weights in two registers. $2: four bytes sign|mantissa, $3: four bytes of nibbles, $4: base << 7 in both halves.
# A byte copied into both bytes of its half leaves the sign at bit 15 and the mantissa at bits 6 … 0 under one mask. A
# byte of nibbles in its half needs one multiply-add to have a nibble as exponent in place: the lower one, once it is
# alone; the upper one as it is, for what is left of the lower one lies below the exponent, and the byte's mask takes it
# away. 10 and 8 instructions, two of them the same; shifts and ors on 16-bit elements, each widened, take 24.
_UNPACK = """{{
    .reg .b32 byte0, byte1, exp0, exp1;
    prmt.b32 byte0, $2, 0, 0x1100;
    prmt.b32 byte1, $2, 0, 0x3322;
    prmt.b32 exp0, $3, 0, 0x4140;
    prmt.b32 exp1, $3, 0, 0x4342;
    {alone}
    mad.lo.u32 exp0, exp0, {scale}, $4;
    mad.lo.u32 exp1, exp1, {scale}, $4;
    lop3.b32 $0, byte0, 0x807f807f, exp0, {choice};
    lop3.b32 $1, byte1, 0x807f807f, exp1, {choice};
}}"""
_ALONE = "and.b32 exp0, exp0, 0x000f000f; and.b32 exp1, exp1, 0x000f000f;"
# Of (byte, mask, exponent): byte & mask | exponent, and byte & mask | exponent & ~mask.
UNPACK_LOW = tl.constexpr(_UNPACK.format(alone=_ALONE, scale=128, choice="0xea"))
UNPACK_HIGH = tl.constexpr(_UNPACK.format(alone="", scale=8, choice="0xe2"))
# Likewise of planar8; $2: four bytes, $3: base << 7 in both halves. 8 instructions.
UNPACK_8 = tl.constexpr("""{
    .reg .b32 byte0, byte1, exp0, exp1;
    prmt.b32 byte0, $2, 0, 0x1100;
    prmt.b32 byte1, $2, 0, 0x3322;
    and.b32  exp0, byte0, 0x000f000f;
    and.b32  exp1, byte1, 0x000f000f;
    mad.lo.u32 exp0, exp0, 128, $3;
    mad.lo.u32 exp1, exp1, 128, $3;
    lop3.b32 $0, byte0, 0x80708070, exp0, 0xea;
    lop3.b32 $1, byte1, 0x80708070, exp1, 0xea;
}""")


@triton.jit
def unpack_planar12(sign_mantissa, nibbles, base, HIGH: tl.constexpr = False):
    """uint8 tile of bytes, uint8 tile of nibbles of the same shape, int32 scalar base → bf16 tile, integer work only.

    HIGH takes the upper nibble of each byte, otherwise the lower one; the other nibble is ignored. Shifting a uint8
    tile beforehand works too but costs an instruction a weight.
    """
    if INTERPRETED:
        byte = sign_mantissa.to(tl.uint16)
        code = (nibbles >> 4 if HIGH else nibbles & 15).to(tl.uint16)
        exponent = (code + base.to(tl.uint16)) << 7
        return ((byte & 0x80) << 8 | byte & 0x7F | exponent).to(tl.bfloat16, bitcast=True)
    return tl.inline_asm_elementwise(
        UNPACK_HIGH if HIGH else UNPACK_LOW,
        "=r,=r,r,r,r,r,r,r",
        [sign_mantissa, nibbles, base * 0x00800080],
        dtype=tl.bfloat16,
        is_pure=True,
        pack=4,
    )


@triton.jit
def unpack_planar8(packed, base):
    """uint8 tile, int32 scalar base → bf16 tile, integer work only."""
    if INTERPRETED:
        byte = packed.to(tl.uint16)
        exponent = ((byte & 15) + base.to(tl.uint16)) << 7
        return ((byte & 0x80) << 8 | byte & 0x70 | exponent).to(tl.bfloat16, bitcast=True)
    return tl.inline_asm_elementwise(
        UNPACK_8, "=r,=r,r,r,r,r,r", [packed, base * 0x00800080], dtype=tl.bfloat16, is_pure=True, pack=4
    )


@triton.jit
def align(nbytes):
    """Up to where the next plane of a block may begin."""
    return (nbytes + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


@triton.jit
def planes_of(block_ptr, N, K, NIBBLES: tl.constexpr):
    """Of a block of one weight [N, K]: where nibbles are, its base, and where offsets, escapes and raw tiles are."""
    tiles_k = tl.cdiv(K, 128)
    tiles = tl.cdiv(N, 64) * tiles_k
    nibble_ptr = block_ptr + align(N * tiles_k * 128)
    base_ptr = nibble_ptr + (align(N * tiles_k * 64) if NIBBLES else 0)
    offset_ptr = (base_ptr + ALIGNMENT).to(tl.pointer_type(tl.int32))
    escape_ptr = (base_ptr + ALIGNMENT + align(4 * (tiles + 1))).to(tl.pointer_type(tl.uint32))
    escapes = tl.load(offset_ptr + tiles)
    raw_ptr = (base_ptr + ALIGNMENT + align(4 * (tiles + 1)) + align(4 * escapes)).to(tl.pointer_type(tl.bfloat16))
    return nibble_ptr, tl.load(base_ptr.to(tl.pointer_type(tl.int32))), offset_ptr, escape_ptr, raw_ptr


@triton.jit
def decode_tile(
    byte_ptr, nibble_ptr, base, offset_ptr, escape_ptr, raw_ptr, out_ptr, row_tile, col_tile, ROWS, COLS,
    NIBBLES: tl.constexpr,
):  # fmt: skip
    """One tile of a weight [ROWS, COLS] into out_ptr int16, where the weight begins; pointers are to its own planes,
    offset_ptr to the tile's offset."""
    # int64: a weight may have 2^31 elements. Inside the tile 32 bits do, which saves 1 instruction in 20.
    first_row, first_col = row_tile.to(tl.int64) * 64, col_tile * 128
    padded = tl.cdiv(COLS, 128) * 128
    start, end = tl.load(offset_ptr), tl.load(offset_ptr + 1)
    out_ptr += first_row * COLS + first_col
    r, j = tl.arange(0, 64)[:, None], tl.arange(0, 64)[None, :]
    inside = row_tile * 64 + r < ROWS
    at = byte_ptr + first_row * padded + first_col + (r * padded + j)
    if NIBBLES:
        nibble_at = nibble_ptr + first_row * (padded // 2) + first_col // 2 + (r * (padded // 2) + j)
        nibbles = tl.load(nibble_at, mask=inside, other=0)
        low = unpack_planar12(tl.load(at, mask=inside, other=0), nibbles, base)
        high = unpack_planar12(tl.load(at + 64, mask=inside, other=0), nibbles, base, HIGH=True)
    else:
        low = unpack_planar8(tl.load(at, mask=inside, other=0), base)
        high = unpack_planar8(tl.load(at + 64, mask=inside, other=0), base)
    to = out_ptr + (r * COLS + j)
    tl.store(to, low.to(tl.int16, bitcast=True), mask=inside & (first_col + j < COLS))
    tl.store(to + 64, high.to(tl.int16, bitcast=True), mask=inside & (first_col + 64 + j < COLS))
    if start < end:
        # Patches overwrite what other threads of this program have just stored.
        tl.debug_barrier()
        first = tl.load(escape_ptr + start).to(tl.uint32, bitcast=True)
        if first >> 16 == 0xFFFF:
            raw = raw_ptr + (first & 0xFFFF).to(tl.int64) * 8192 + (r * 128 + j)
            tl.store(to, tl.load(raw).to(tl.int16, bitcast=True), mask=inside & (first_col + j < COLS))
            tl.store(to + 64, tl.load(raw + 64).to(tl.int16, bitcast=True), mask=inside & (first_col + 64 + j < COLS))
        else:
            index = start + tl.arange(0, _PATCH)
            escape = tl.load(escape_ptr + index, mask=index < end, other=0).to(tl.uint32, bitcast=True)
            position = (escape >> 16).to(tl.int32)
            patched = out_ptr + (position // 128 * COLS + position % 128)
            tl.store(patched, (escape & 0xFFFF).to(tl.uint16).to(tl.int16, bitcast=True), mask=index < end)


@triton.jit(launch_metadata=declares(every_tensor_once))
def _planar_kernel(
    byte_ptr,  # (E·ROWS, P) uint8
    nibble_ptr,  # (E·ROWS, P/2) uint8, or None
    base_ptr,  # (E,) int32
    offset_ptr,  # (E·tiles + 1,) int32
    escape_ptr,  # (escapes,) int32
    raw_ptr,  # (raw tiles, 64, 128) int16
    out_ptr,  # (E·ROWS, COLS) int16
    ROWS,
    COLS,
    NIBBLES: tl.constexpr,
):
    """Grid: (P/128, ceil(ROWS / 64), E), a program a tile; one number would need divisions, of 20 instructions each."""
    expert = tl.program_id(2)
    padded = tl.num_programs(0) * 128
    tile = (expert * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    # int64: 128 experts of 2048 x 8192 reach 2^31.
    row0 = expert.to(tl.int64) * ROWS
    if NIBBLES:
        nibble_ptr += row0 * (padded // 2)
    decode_tile(
        byte_ptr + row0 * padded, nibble_ptr, tl.load(base_ptr + expert), offset_ptr + tile, escape_ptr, raw_ptr,
        out_ptr + row0 * COLS, tl.program_id(1), tl.program_id(0), ROWS, COLS, NIBBLES,
    )  # fmt: skip


def decode(planes: dict[str, Tensor], out: Tensor) -> None:
    """Planes of a weight that is not raw → out int16 of its shape, on one device."""
    rows, cols = out.shape[-2:]
    grid = (triton.cdiv(cols, TILE_COLS), triton.cdiv(rows, TILE_ROWS), planes["base"].numel())
    args = (planes.get(name) for name in ("bytes", "nibbles", "base", "offsets", "escapes", "raw_tiles"))
    _planar_kernel[grid](*args, out, rows, cols, NIBBLES="nibbles" in planes, num_warps=4)
