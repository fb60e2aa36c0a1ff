"""Losslessly compressed expert panels that the CPU's GEMM reads in place: 12 bits a weight instead of 16.

The low byte of a bf16 (last exponent bit, mantissa) stays as it is. Of its high byte, the sign stays, and of the
seven upper exponent bits a trained weight almost always has one of 8 consecutive values, which 3 bits name: a nibble
that one byte shuffle turns back. A block holds panels [K, 16] of bf16 (the layout of `gemm` or `moe`), two rows of K
at a time:

    header   int64       base (first of the 8 values), panels, K, escapes; then zeros up to 128 bytes
    panels   [P, K/2, 48 bytes]   32 low bytes, then 16 bytes with two nibbles each
    index    int64 [P]   byte offset of each panel's escapes in the block
    escapes  int64       (k * 16 + lane) << 16 | bf16 bits, ascending; a panel's list ends with _END

Weights outside the window are escapes: their nibble means nothing, and the tile replaces them before it multiplies.
The order of the 32 bytes (`_ORDER`) makes two byte unpacks and four word unpacks of AVX2 yield rows of fp32 without
crossing its 128-bit halves: 9 vector operations for 32 weights, where uncompressed ones take 8 (see `planar_tile`).

Idea: exponent statistics and fixed-width codes of ZipServ (arXiv 2603.17435) and SplitZip (arXiv 2605.01708); the
split at the byte boundary and the layout are ours.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from torch import Tensor

from ..numba_cache import cached_njit
from ..ops import KernelError
from ..packing.codec import Packed, PackingError
from .planar_rows import PAIR_BYTES
from .planar_tile import HEADER_BYTES, decode_panel
from .simd import LANES

_WINDOW = 8
# Escapes that a block has room for: 0.1 % of its weights and a few. Trained weights have 0.01 to 0.05 %.
_ESCAPE_SHARE, _ESCAPE_LEAST = 0.001, 64
_END = (1 << 62) - 1

# Place of lane l of row k (byte of the first unpack's input): lanes 0-3, 8-11 | 4-7, 12-15 in the two halves.
_LANE_PLACE = [0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23]
# Of row k + 1: behind those, so that the high unpack takes them.
_ORDER = np.array([_LANE_PLACE, [place + 8 for place in _LANE_PLACE]], dtype=np.int64)


def block_bytes(panels: int, depth: int) -> int:
    """Bytes of a block with room for its escapes."""
    room = int(panels * depth * LANES * _ESCAPE_SHARE) + _ESCAPE_LEAST
    return HEADER_BYTES + panels * depth // 2 * PAIR_BYTES + 8 * panels + 8 * (room + panels)


@cached_njit(nogil=True)
def _best_base(words):
    """First of the 8 consecutive values of the upper exponent bits that cover most weights; how many they leave out."""
    counts = np.zeros(128, dtype=np.int64)
    flat = words.reshape(-1)
    for i in range(flat.size):
        counts[(flat[i] >> 8) & 0x7F] += 1
    covered = 0
    for e in range(_WINDOW):
        covered += counts[e]
    best, base = covered, 0
    for first in range(1, 128 - _WINDOW + 1):
        covered += counts[first + _WINDOW - 1] - counts[first - 1]
        if covered > best:
            best, base = covered, first
    return base, flat.size - best


@cached_njit(nogil=True)
def _encode_panel(words, base, order, out):
    """words uint16 [K, 16] → out uint8 [K/2, 48]."""
    for pair in range(words.shape[0] // 2):
        codes = np.zeros(32, dtype=np.uint8)
        for row in range(2):
            for lane in range(16):
                word = words[2 * pair + row, lane]
                code = ((word >> 8) & 0x7F) - base
                if code < 0 or code > 7:
                    code = 0
                place = order[row, lane]
                codes[place] = ((word >> 12) & 8) | code
                out[pair, place] = word & 0xFF
        for i in range(16):
            out[pair, 32 + i] = codes[i] | (codes[16 + i] << 4)


@cached_njit(parallel=True, nogil=True)
def _encode(words, base, order, out):
    for p in prange(words.shape[0]):
        _encode_panel(words[p], base, order, out[p])


@cached_njit(nogil=True)
def _list_escapes(words, base, index, entries, entries_offset):
    at = 0
    panels, depth = words.shape[0], words.shape[1]
    for p in range(panels):
        index[p] = entries_offset + 8 * at
        for k in range(depth):
            for lane in range(16):
                word = np.int64(words[p, k, lane])
                upper = (word >> 8) & 0x7F
                if upper < base or upper > base + 7:
                    entries[at] = ((k * 16 + lane) << 16) | word
                    at += 1
        entries[at] = _END
        at += 1


def encode(panels: Tensor, out: Tensor) -> None:
    """bf16 panels [P, K, 16] → `out`, uint8 [block_bytes(P, K)]; the bytes of `panels` come back from `decode`.

    KernelError when more weights lie outside the window than a block has room for.
    """
    count, depth, _ = panels.shape
    words = panels.contiguous().view(torch.int16).numpy().view(np.uint16)
    base, escapes = _best_base(words)
    data_bytes = count * depth // 2 * PAIR_BYTES
    index_at = HEADER_BYTES + data_bytes
    entries_at = index_at + 8 * count
    if 8 * (escapes + count) > out.numel() - entries_at:
        raise KernelError(
            f"{escapes / words.size:.2%} of an expert's weights have exponents outside any window of 16, and format "
            f"planar12 has room for {_ESCAPE_SHARE:.1%}; use the dense format"
        )
    out.zero_()
    raw = out.numpy()
    raw[:32].view(np.int64)[:] = (base, count, depth, escapes)
    _encode(words, base, _ORDER, raw[HEADER_BYTES:index_at].reshape(count, depth // 2, PAIR_BYTES))
    entries = raw[entries_at : entries_at + 8 * (escapes + count)].view(np.int64)
    _list_escapes(words, base, raw[index_at:entries_at].view(np.int64), entries, entries_at)


def decode(block: Tensor, out: Tensor | None = None, parallel: bool = True) -> Tensor:
    """The bf16 panels [P, K, 16] of a block, bit for bit, in `out` if given (contiguous, P·K·16 of bf16).

    parallel: by all threads of numba; without, by the calling thread alone.
    """
    _, count, depth, _ = block[:32].view(torch.int64).tolist()
    if out is None:
        out = torch.empty(count, depth, LANES, dtype=torch.bfloat16, device="cpu")
    panels = out.view(count, depth, LANES)
    (_decode_parallel if parallel else _decode)(block.data_ptr(), count, depth, panels.data_ptr())
    return panels


def check(block: Tensor, count: int, depth: int) -> None:
    """PackingError unless decoding `block`, uint8 in host memory, and a GEMM that reads it touch nothing beyond it and
    panels [P, K, 16]; see `Codec.check`. Reads header, index and escapes: under 1 % of the block."""
    raw = block.numpy()
    index_at = HEADER_BYTES + count * depth // 2 * PAIR_BYTES
    entries_at = index_at + 8 * count
    base, *sizes, escapes = raw[:32].view(np.int64).tolist()
    if sizes != [count, depth] or not 0 <= base <= 128 - _WINDOW:
        raise PackingError(f"its header must have {[count, depth]} and a base up to {128 - _WINDOW}")
    if not 0 <= escapes <= (len(raw) - entries_at) // 8 - count:
        raise PackingError(f"it has no room for {escapes} escapes")
    entries = raw[entries_at : entries_at + 8 * (escapes + count)].view(np.int64)
    last = np.flatnonzero(entries == _END)
    begins = np.append(0, last + 1)
    if len(last) != count or begins[-1] != len(entries):
        raise PackingError(f"its escapes must be {count} lists that end")
    if (raw[index_at:entries_at].view(np.int64) != entries_at + 8 * begins[:-1]).any():
        raise PackingError("its index does not lead to its lists of escapes")
    place = entries >> 16
    listed = entries != _END
    # Whatever follows the end of a list begins another.
    ascending = (place[1:] > place[:-1]) | ~listed[:-1]
    if not ascending.all() or (place[listed] < 0).any() or (place[listed] >= depth * LANES).any():
        raise PackingError("its escapes do not ascend inside their panels")


class PanelBlocks:
    """`packing.blocks.Blocks` of matrices whose rows are panels, [P, K·16]; rows of K come in pairs."""

    def nbytes(self, n: int, k: int) -> int:
        if k // LANES % 2:
            raise KernelError("expert format planar12 needs even hidden and intermediate sizes; use dense")
        return block_bytes(n, k // LANES)

    def encode(self, matrix: Tensor, out: Tensor) -> None:
        encode(matrix.view(len(matrix), -1, LANES), out)

    def decode(self, block: Tensor, recipe: Packed | None, out: Tensor, parallel: bool = True) -> None:
        decode(block, out, parallel)

    def check(self, block: Tensor, recipe: Packed | None, n: int, k: int) -> None:
        check(block, n, k // LANES)


@cached_njit(nogil=True)
def _decode(block, panels, depth, out):
    for p in range(panels):
        decode_panel(block, p, panels, depth, out + p * depth * 32)


@cached_njit(parallel=True, nogil=True)
def _decode_parallel(block, panels, depth, out):
    for p in prange(panels):
        decode_panel(block, p, panels, depth, out + p * depth * 32)
