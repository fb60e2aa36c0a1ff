"""planar8: 8 bits a weight for bf16 weights whose four low mantissa bits are zero, as they are of models that were FP8
(e4m3, e5m2) or FP4 with scales of powers of two.

A weight is one byte: what planar12 has in two planes, without the nibble that is zero (`planar` has the planes that
follow this one):

    bytes    uint8 [E·rows·P]      row-major; sign << 7 | upper three bits of the mantissa << 4 | exponent - base

    bits = sign << 15 | (base + (byte & 15)) << 7 | byte & 0x70

A weight with other mantissa bits is an escape: any comes back bit for bit, but a tensor of them does not shrink.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange, types

from ..numba_cache import cached_njit
from .planar import TILE_COLS, Planar, is_escape, patch_tiles

_u8, _u16 = types.uint8, types.uint16


@cached_njit(parallel=True, nogil=True)
def _encode_plane(bits, rows_each, bases, lost, out, row_escapes):
    """bits uint16 [rows, cols] → out uint8 [rows, P]; row_escapes uint8 [rows, P/128]."""
    cols = bits.shape[1]
    for row in prange(bits.shape[0]):
        base = _u16(bases[row // rows_each])
        for block in range(row_escapes.shape[1]):
            start = block * 128
            count = _u8(0)
            for j in range(start, min(start + 128, cols)):
                v = bits[row, j]
                code = _u16(((v >> 7) & 255) - base)
                count += _u8(is_escape(v, base, lost))
                out[row, j] = _u8(((v >> 8) & 0x80) | (v & 0x70) | (code if code < 16 else _u16(0)))
            out[row, max(start, cols) : start + 128] = 0
            row_escapes[row, block] = count


@cached_njit(nogil=True)
def _decode_tiles(task, bytes_in, bases, offsets, escapes, raw_tiles, rows_each, out):
    """One row of tiles of a plane [rows, P] → out uint16 [rows, cols]."""
    row_tiles = (rows_each + 63) // 64
    expert = task // row_tiles
    first = expert * rows_each + task % row_tiles * 64
    base = _u16(bases[expert] << 7)
    for row in range(first, min(first + 64, (expert + 1) * rows_each)):
        source, target = bytes_in[row], out[row]
        for j in range(target.shape[0]):
            b = _u16(source[j])
            target[j] = _u16(((b << 8) & 0x8000) | (b & 0x70)) | _u16(((b & 15) << 7) + base)
    patch_tiles(task, offsets, escapes, raw_tiles, rows_each, out)


@cached_njit(nogil=True)
def _decode(bytes_in, bases, offsets, escapes, raw_tiles, rows_each, out):
    for task in range(bases.shape[0] * ((rows_each + 63) // 64)):
        _decode_tiles(task, bytes_in, bases, offsets, escapes, raw_tiles, rows_each, out)


@cached_njit(parallel=True, nogil=True)
def _decode_parallel(bytes_in, bases, offsets, escapes, raw_tiles, rows_each, out):
    for task in prange(bases.shape[0] * ((rows_each + 63) // 64)):
        _decode_tiles(task, bytes_in, bases, offsets, escapes, raw_tiles, rows_each, out)


class Planar8(Planar):
    """See the module."""

    name = "planar8"
    bits = 8
    decoders = _decode, _decode_parallel
    lost_bits = 0xF

    def _own_planes(self, size):
        return {"bytes": (torch.uint8, size)}

    def _split(self, bits, rows, base, row_escapes):
        out = np.empty((len(bits), row_escapes.shape[1] * TILE_COLS), dtype=np.uint8)
        _encode_plane(bits, rows, base, self.lost_bits, out, row_escapes)
        return {"bytes": out.reshape(-1)}
