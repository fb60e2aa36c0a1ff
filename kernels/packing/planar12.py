"""planar12: 12 bits a weight at a fixed rate, so that a GEMM finds any tile without a table and decodes it in place.

Of the 256 exponents of bf16, 16 consecutive ones cover all but 1 in 13000 weights of a Gaussian. A weight is its sign
and mantissa (a byte) and its exponent's distance from the window's first, `base` (a nibble). No code is reserved; a
weight outside the window is patched from a list. For E experts of [rows, cols], P = cols rounded up to 128:

    bytes    uint8 [E·rows·P]      row-major; sign << 7 | mantissa; zero in padding
    nibbles  uint8 [E·rows·P/2]    row-major; byte j of a block of 128 columns: column j low, column 64 + j high, so
                                   that a thread turns one vector of nibbles into two vectors of neighbours
    base     int32 [E]             0 … 240: the window ends at 255 at most and never wraps
    offsets  int32 [E·tiles + 1]   tile t of 64 x 128 weights, row-major in its expert, has escapes offsets[t] …
    escapes  int32 [escapes]       position in tile (row·128 + column) << 16 | bf16 bits; ascending in a tile
    raw_tiles  int16 [raw·8192]    tiles with more than 8 escapes, as they are, [64, 128]; such a tile has one entry
                                   in `escapes`, RAW_TILE << 16 | its number here, so that a GEMM need never loop

    bits = sign << 15 | (base + nibble) << 7 | mantissa

Padding decodes to ±2^(base - 127), which is finite: a GEMM may multiply it by zero. An expert's first tile is
e · ceil(rows/64) · P/128. A weight that this would not shrink is stored raw.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange, types
from torch import Tensor

from .codec import Codec, PackingError, align, check_offsets
from .histogram import exponent_histogram

TILE_ROWS, TILE_COLS = 64, 128
WINDOW = 16
MAX_TILE_ESCAPES = 8
# No position in a tile.
RAW_TILE = 0xFFFF

_u8, _u16, _u32 = types.uint8, types.uint16, types.uint32


def padded_cols(cols: int) -> int:
    """`cols` rounded up to whole tiles."""
    return -(-cols // TILE_COLS) * TILE_COLS


def window_base(histogram: np.ndarray) -> np.ndarray:
    """int64 [E, 256] → int32 [E]: first exponent, 0 … 240, of the 16 that hold most weights."""
    sums = np.zeros((histogram.shape[0], 257), dtype=np.int64)
    np.cumsum(histogram, axis=1, out=sums[:, 1:])
    return np.argmax(sums[:, WINDOW:] - sums[:, :-WINDOW], axis=1).astype(np.int32)


@njit(parallel=True, nogil=True, cache=True)
def _encode_planes(bits, rows_each, bases, bytes_out, nibbles_out, row_escapes):
    """bits uint16 [rows, cols] → planes [rows, P], [rows, P/2]; row_escapes uint8 [rows, P/128]."""
    cols = bits.shape[1]
    for row in prange(bits.shape[0]):
        base = _u16(bases[row // rows_each])
        fill = _u16(base << 7)
        padded = np.empty(128, dtype=np.uint16)
        for block in range(row_escapes.shape[1]):
            start = block * 128
            source = bits[row, start : start + 128]
            if start + 128 > cols:
                padded[:] = fill
                padded[: cols - start] = source
                source = padded
            out = bytes_out[row, start : start + 128]
            count = _u8(0)
            for j in range(128):
                v = source[j]
                out[j] = _u8(((v >> 8) & 0x80) | (v & 0x7F))
                count += _u8(_u16(((v >> 7) & 255) - base) > 15)
            row_escapes[row, block] = count
            out = nibbles_out[row, block * 64 : block * 64 + 64]
            for j in range(64):
                low = _u16(((source[j] >> 7) & 255) - base)
                high = _u16(((source[64 + j] >> 7) & 255) - base)
                low = low if low < 16 else _u16(0)
                high = high if high < 16 else _u16(0)
                out[j] = _u8(low | (high << 4))


@njit(parallel=True, nogil=True, cache=True)
def _encode_escapes(bits, rows_each, bases, row_escapes, offsets, escapes, raw_of, raw_tiles):
    """raw_of int64 [tiles]: number of the raw tile, or -1. Of other tiles only rows with an escape are read again: one
    in 55 for a Gaussian.
    """
    row_tiles = (rows_each + 63) // 64
    cols, col_tiles = bits.shape[1], row_escapes.shape[1]
    for tile in prange(offsets.shape[0] - 1):
        place = offsets[tile]
        expert = tile // (row_tiles * col_tiles)
        first = expert * rows_each + tile // col_tiles % row_tiles * 64
        block = tile % col_tiles
        base = _u16(bases[expert])
        if raw_of[tile] >= 0:
            escapes[place] = (_u32(0xFFFF) << _u32(16)) | _u32(raw_of[tile])
            for row in range(first, min(first + 64, (expert + 1) * rows_each)):
                for col in range(block * 128, min(block * 128 + 128, cols)):
                    raw_tiles[raw_of[tile], row - first, col - block * 128] = bits[row, col]
            continue
        for row in range(first, min(first + 64, (expert + 1) * rows_each)):
            if row_escapes[row, block]:
                for col in range(block * 128, min(block * 128 + 128, cols)):
                    v = bits[row, col]
                    if _u16(((v >> 7) & 255) - base) > 15:
                        escapes[place] = (_u32((row - first) * 128 + col - block * 128) << _u32(16)) | _u32(v)
                        place += 1


@njit(nogil=True, cache=True)
def _decode_tiles(task, bytes_in, nibbles_in, bases, offsets, escapes, raw_tiles, rows_each, out):
    """One row of tiles of planes [rows, P] and [rows, P/2] → out uint16 [rows, cols]."""
    cols, col_tiles = out.shape[1], bytes_in.shape[1] // 128
    row_tiles = (rows_each + 63) // 64
    expert = task // row_tiles
    first = expert * rows_each + task % row_tiles * 64
    base = _u16(bases[expert] << 7)
    for row in range(first, min(first + 64, (expert + 1) * rows_each)):
        for block in range(col_tiles):
            start = block * 128
            low, high = bytes_in[row, start : start + 64], bytes_in[row, start + 64 : start + 128]
            nibbles = nibbles_in[row, block * 64 : block * 64 + 64]
            if start + 128 <= cols:
                out_low, out_high = out[row, start : start + 64], out[row, start + 64 : start + 128]
                for j in range(64):
                    b, n = _u16(low[j]), _u16(nibbles[j])
                    out_low[j] = _u16(((b << 8) & 0x8000) | (b & 0x7F)) | _u16(((n & 15) << 7) + base)
                for j in range(64):
                    b, n = _u16(high[j]), _u16(nibbles[j])
                    out_high[j] = _u16(((b << 8) & 0x8000) | (b & 0x7F)) | _u16(((n >> 4) << 7) + base)
            else:
                for j in range(cols - start):
                    b = _u16(bytes_in[row, start + j])
                    n = _u16(nibbles[j] & 15 if j < 64 else nibbles[j - 64] >> 4)
                    out[row, start + j] = _u16(((b << 8) & 0x8000) | (b & 0x7F)) | _u16((n << 7) + base)
    for block in range(col_tiles):
        tile = task * col_tiles + block
        for i in range(offsets[tile], offsets[tile + 1]):
            position = escapes[i] >> _u32(16)
            if position == 0xFFFF:
                raw = raw_tiles[escapes[i] & _u32(0xFFFF)]
                for row in range(first, min(first + 64, (expert + 1) * rows_each)):
                    for col in range(block * 128, min(block * 128 + 128, cols)):
                        out[row, col] = raw[row - first, col - block * 128]
                continue
            out[first + (position >> _u32(7)), block * 128 + (position & _u32(127))] = _u16(escapes[i])


@njit(nogil=True, cache=True)
def _decode(bytes_in, nibbles_in, bases, offsets, escapes, raw_tiles, rows_each, out):
    for task in range(bases.shape[0] * ((rows_each + 63) // 64)):
        _decode_tiles(task, bytes_in, nibbles_in, bases, offsets, escapes, raw_tiles, rows_each, out)


@njit(parallel=True, nogil=True, cache=True)
def _decode_parallel(bytes_in, nibbles_in, bases, offsets, escapes, raw_tiles, rows_each, out):
    for task in prange(bases.shape[0] * ((rows_each + 63) // 64)):
        _decode_tiles(task, bytes_in, nibbles_in, bases, offsets, escapes, raw_tiles, rows_each, out)


class Planar12(Codec):
    """See the module."""

    name = "planar12"

    def room(self, n: int, k: int) -> int:
        # Beside the planes whose size the shape fixes, 0.003 bytes a weight of escapes and a raw tile.
        fixed = [dtype.itemsize * size for dtype, size in self._planes((n, k)).values() if size is not None]
        return sum(map(align, fixed)) + align(int(0.003 * n * k) + 2 * TILE_ROWS * TILE_COLS)

    def _planes(self, shape):
        experts, (rows, cols) = shape[0] if len(shape) == 3 else 1, shape[-2:]
        size = experts * rows * padded_cols(cols)
        tiles = experts * -(-rows // TILE_ROWS) * (padded_cols(cols) // TILE_COLS)
        return {
            "bytes": (torch.uint8, size),
            "nibbles": (torch.uint8, size // 2),
            "base": (torch.int32, experts),
            "offsets": (torch.int32, tiles + 1),
            "escapes": (torch.int32, None),
            "raw_tiles": (torch.int16, None),
        }

    def _encode(self, bits: np.ndarray) -> dict[str, np.ndarray] | None:
        experts, rows, cols = bits.shape
        padded = padded_cols(cols)
        # A narrow weight would be mostly padding.
        if padded * 12 >= cols * 16:
            return None
        histogram = exponent_histogram(bits.reshape(experts, -1))
        base = window_base(histogram)
        bits = bits.reshape(experts * rows, cols)
        col_tiles = padded // TILE_COLS
        bytes_out = np.empty((experts * rows, padded), dtype=np.uint8)
        nibbles_out = np.empty((experts * rows, padded // 2), dtype=np.uint8)
        row_escapes = np.empty((experts * rows, col_tiles), dtype=np.uint8)
        _encode_planes(bits, rows, base, bytes_out, nibbles_out, row_escapes)
        starts = np.arange(0, rows, TILE_ROWS)
        counts = np.add.reduceat(row_escapes.reshape(experts, rows, col_tiles), starts, axis=1, dtype=np.int64)
        counts = counts.reshape(-1)
        crowded = counts > MAX_TILE_ESCAPES
        raw_tiles = np.zeros((int(crowded.sum()), TILE_ROWS, TILE_COLS), dtype=np.uint16)
        if len(raw_tiles) > RAW_TILE:
            return None
        raw_of = np.where(crowded, np.cumsum(crowded) - 1, -1)
        offsets = np.zeros(counts.size + 1, dtype=np.int32)
        np.cumsum(np.where(crowded, 1, counts), out=offsets[1:])
        escapes = np.empty(int(offsets[-1]), dtype=np.uint32)
        _encode_escapes(bits, rows, base, row_escapes, offsets, escapes, raw_of, raw_tiles)
        return {
            "bytes": bytes_out.reshape(-1),
            "nibbles": nibbles_out.reshape(-1),
            "base": base,
            "offsets": offsets,
            "escapes": escapes,
            "raw_tiles": raw_tiles.reshape(-1),
        }

    def _check(self, planes, shape):
        rows, cols = shape[-2:]
        offsets, escapes, raw_tiles = planes["offsets"].view(np.int32), planes["escapes"], planes["raw_tiles"]
        base = planes["base"].view(np.int32)
        if base.size and not (base.min() >= 0 and base.max() <= 256 - WINDOW):
            raise PackingError(f"its base must be 0 to {256 - WINDOW}")
        check_offsets("offsets of escapes", offsets, escapes.size)
        raw_size = TILE_ROWS * TILE_COLS
        if raw_tiles.size % raw_size:
            raise PackingError(f"its raw tiles have {raw_tiles.size} weights, no multiple of {raw_size}")
        counts = np.diff(offsets)
        if counts.max(initial=0) > MAX_TILE_ESCAPES:
            raise PackingError(f"a tile has {counts.max()} escapes, over {MAX_TILE_ESCAPES}")
        tile, position = np.repeat(np.arange(counts.size), counts), (escapes >> 16).astype(np.int64)
        raw = position == RAW_TILE
        if (counts[tile[raw]] != 1).any() or ((escapes[raw] & 0xFFFF) >= raw_tiles.size // raw_size).any():
            raise PackingError("a raw tile does not exist, or has escapes")
        col_tiles = padded_cols(cols) // TILE_COLS
        row_tiles = -(-rows // TILE_ROWS)
        height = np.minimum(rows - tile // col_tiles % row_tiles * TILE_ROWS, TILE_ROWS)
        width = np.minimum(cols - tile % col_tiles * TILE_COLS, TILE_COLS)
        inside = (position // TILE_COLS < height) & (position % TILE_COLS < width)
        ascending = (tile[1:] > tile[:-1]) | (position[1:] > position[:-1])
        if not (inside | raw).all() or not ascending.all():
            raise PackingError("its escapes do not ascend inside their tiles")

    def _decode_cpu(self, planes: dict[str, np.ndarray], out: np.ndarray, parallel: bool) -> None:
        experts, rows, cols = out.shape
        padded = padded_cols(cols)
        decode = _decode_parallel if parallel else _decode
        decode(
            planes["bytes"].reshape(-1, padded),
            planes["nibbles"].reshape(-1, padded // 2),
            planes["base"],
            planes["offsets"],
            planes["escapes"],
            planes["raw_tiles"].reshape(-1, TILE_ROWS, TILE_COLS),
            rows,
            out.reshape(experts * rows, cols),
        )

    def _decode_triton(self, planes: dict[str, Tensor], out: Tensor) -> None:
        from ._planar12 import decode

        decode(planes, out)
