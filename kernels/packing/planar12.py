"""planar12: 12 bits a weight for any bf16 weights like trained ones.

A weight is its sign and mantissa, a byte, and its exponent, a nibble (`planar` has the planes that follow these):

    bytes    uint8 [E·rows·P]      row-major; sign << 7 | mantissa; zero in padding
    nibbles  uint8 [E·rows·P/2]    row-major; byte j of a block of 128 columns: column j low, column 64 + j high, so
                                   that a thread turns one vector of nibbles into two vectors of neighbours

    bits = sign << 15 | (base + nibble) << 7 | mantissa
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange, types

from ..numba_cache import cached_njit
from .planar import TILE_COLS, Planar, patch_tiles

_u8, _u16 = types.uint8, types.uint16


@cached_njit(parallel=True, nogil=True)
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


@cached_njit(nogil=True)
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
    patch_tiles(task, offsets, escapes, raw_tiles, rows_each, out)


@cached_njit(nogil=True)
def _decode(bytes_in, nibbles_in, bases, offsets, escapes, raw_tiles, rows_each, out):
    for task in range(bases.shape[0] * ((rows_each + 63) // 64)):
        _decode_tiles(task, bytes_in, nibbles_in, bases, offsets, escapes, raw_tiles, rows_each, out)


@cached_njit(parallel=True, nogil=True)
def _decode_parallel(bytes_in, nibbles_in, bases, offsets, escapes, raw_tiles, rows_each, out):
    for task in prange(bases.shape[0] * ((rows_each + 63) // 64)):
        _decode_tiles(task, bytes_in, nibbles_in, bases, offsets, escapes, raw_tiles, rows_each, out)


class Planar12(Planar):
    """See the module."""

    name = "planar12"
    bits = 12
    decoders = _decode, _decode_parallel

    def _own_planes(self, size):
        return {"bytes": (torch.uint8, size), "nibbles": (torch.uint8, size // 2)}

    def _split(self, bits, rows, base, row_escapes):
        padded = row_escapes.shape[1] * TILE_COLS
        bytes_out = np.empty((len(bits), padded), dtype=np.uint8)
        nibbles_out = np.empty((len(bits), padded // 2), dtype=np.uint8)
        _encode_planes(bits, rows, base, bytes_out, nibbles_out, row_escapes)
        return {"bytes": bytes_out.reshape(-1), "nibbles": nibbles_out.reshape(-1)}
