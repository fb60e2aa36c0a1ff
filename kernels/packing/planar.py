"""Formats of a fixed rate, in which a GEMM finds any tile without a table and decodes it in place: what they share.

Of the 256 exponents of bf16, 16 consecutive ones cover all but 1 in 13000 weights of a Gaussian, so a nibble names a
weight's exponent by its distance from the window's first, `base`. No code is reserved; a weight that the nibble and
what a format keeps of the mantissa do not hold is patched from a list. For E experts of [rows, cols], P = cols rounded
up to 128, behind the planes of the format itself, which have P columns:

    base     int32 [E]             0 … 240: the window ends at 255 at most and never wraps
    offsets  int32 [E·tiles + 1]   tile t of 64 x 128 weights, row-major in its expert, has escapes offsets[t] …
    escapes  int32 [escapes]       position in tile (row·128 + column) << 16 | bf16 bits; ascending in a tile
    raw_tiles  int16 [raw·8192]    tiles with more than 8 escapes, as they are, [64, 128]; such a tile has one entry
                                   in `escapes`, RAW_TILE << 16 | its number here, so that a GEMM need never loop

Padding decodes to ±2^(base - 127), which is finite: a GEMM may multiply it by zero. An expert's first tile is
e · ceil(rows/64) · P/128. A weight that this would not shrink is stored raw.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import numpy as np
import torch
from numba import prange, types
from torch import Tensor

from ..numba_cache import cached_njit
from .codec import Codec, PackingError, align, check_offsets
from .histogram import exponent_histogram

TILE_ROWS, TILE_COLS = 64, 128
WINDOW = 16
MAX_TILE_ESCAPES = 8
# No position in a tile.
RAW_TILE = 0xFFFF

_u16, _u32 = types.uint16, types.uint32


def padded_cols(cols: int) -> int:
    """`cols` rounded up to whole tiles."""
    return -(-cols // TILE_COLS) * TILE_COLS


def window_base(histogram: np.ndarray) -> np.ndarray:
    """int64 [E, 256] → int32 [E]: first exponent, 0 … 240, of the 16 that hold most weights."""
    sums = np.zeros((histogram.shape[0], 257), dtype=np.int64)
    np.cumsum(histogram, axis=1, out=sums[:, 1:])
    return np.argmax(sums[:, WINDOW:] - sums[:, :-WINDOW], axis=1).astype(np.int32)


@cached_njit(nogil=True)
def is_escape(v, base, lost):
    """Whether a weight's bits (uint16) have an exponent outside the window from base on, or bits of `lost`."""
    return (_u16(((v >> 7) & 255) - base) > 15) | ((v & _u16(lost)) != 0)


@cached_njit(parallel=True, nogil=True)
def _encode_escapes(bits, rows_each, bases, lost, row_escapes, offsets, escapes, raw_of, raw_tiles):
    """lost: mantissa bits that no plane holds; raw_of int64 [tiles]: number of the raw tile, or -1. Of other tiles only
    rows with an escape are read again: one in 55 for a Gaussian.
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
                    if is_escape(v, base, lost):
                        escapes[place] = (_u32((row - first) * 128 + col - block * 128) << _u32(16)) | _u32(v)
                        place += 1


@cached_njit(nogil=True)
def patch_tiles(task, offsets, escapes, raw_tiles, rows_each, out):
    """Escapes and raw tiles of row `task` of tiles, put into out uint16 [E·rows, cols], where it is decoded so far."""
    cols = out.shape[1]
    col_tiles = (cols + 127) // 128
    row_tiles = (rows_each + 63) // 64
    expert = task // row_tiles
    first = expert * rows_each + task % row_tiles * 64
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


class Planar(Codec):
    """See the module. bits: of a weight in the planes of the format itself; decoders: by one thread and by all of
    numba's; they take the format's own planes as matrices with the rows of the weight."""

    bits: int
    decoders: tuple[Callable, Callable]

    @abstractmethod
    def _own_planes(self, size: int) -> dict[str, tuple[torch.dtype, int]]:
        """Dtype and elements of the planes of `size` weights, padding counted."""

    @abstractmethod
    def _split(self, bits: np.ndarray, rows: int, base: np.ndarray, row_escapes: np.ndarray) -> dict[str, np.ndarray]:
        """bits uint16 [E·rows, cols] → those planes; row_escapes uint8 [E·rows, P/128] is filled."""

    def room(self, n: int, k: int) -> int:
        # Beside the planes whose size the shape fixes, 0.003 bytes a weight of escapes and a raw tile.
        fixed = [dtype.itemsize * size for dtype, size in self._planes((n, k)).values() if size is not None]
        return sum(map(align, fixed)) + align(int(0.003 * n * k) + 2 * TILE_ROWS * TILE_COLS)

    def _planes(self, shape):
        experts, (rows, cols) = shape[0] if len(shape) == 3 else 1, shape[-2:]
        tiles = experts * -(-rows // TILE_ROWS) * (padded_cols(cols) // TILE_COLS)
        return {
            **self._own_planes(experts * rows * padded_cols(cols)),
            "base": (torch.int32, experts),
            "offsets": (torch.int32, tiles + 1),
            "escapes": (torch.int32, None),
            "raw_tiles": (torch.int16, None),
        }

    def _encode(self, bits: np.ndarray) -> dict[str, np.ndarray] | None:
        experts, rows, cols = bits.shape
        padded = padded_cols(cols)
        # A narrow weight would be mostly padding.
        if padded * self.bits >= cols * 16:
            return None
        base = window_base(exponent_histogram(bits.reshape(experts, -1)))
        bits = bits.reshape(experts * rows, cols)
        col_tiles = padded // TILE_COLS
        row_escapes = np.empty((experts * rows, col_tiles), dtype=np.uint8)
        planes = self._split(bits, rows, base, row_escapes)
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
        _encode_escapes(bits, rows, base, self.lost_bits, row_escapes, offsets, escapes, raw_of, raw_tiles)
        lists = {"base": base, "offsets": offsets, "escapes": escapes, "raw_tiles": raw_tiles.reshape(-1)}
        return planes | lists

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
        own = (planes[name].reshape(experts * rows, -1) for name in self._own_planes(0))
        raw_tiles = planes["raw_tiles"].reshape(-1, TILE_ROWS, TILE_COLS)
        lists = (planes[name] for name in ("base", "offsets", "escapes"))
        self.decoders[parallel](*own, *lists, raw_tiles, rows, out.reshape(experts * rows, cols))

    def _decode_triton(self, planes: dict[str, Tensor], out: Tensor) -> None:
        from ._planar import decode

        decode(planes, out)
