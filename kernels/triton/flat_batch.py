"""Tiles of a flat batch: which tokens of which sequence a program has, without the host having read the lengths.

Sequence s owns tile ids from query_start[s] // BLOCK + s on: enough for its tokens whatever their number, and
T // BLOCK + B ids in all (as in vLLM's unified Triton attention). Example: BLOCK 16, query_start 0 20 23: sequence 0
has tiles 0 and 1 (tokens 0 to 15, 16 to 19), sequence 1 tile 2 (tokens 20 to 22).
"""

from __future__ import annotations

import triton
import triton.language as tl


def num_tiles(tokens: int, sequences: int, block: int) -> int:
    """Tile ids of any batch of `tokens` in `sequences`."""
    return tokens // block + sequences


@triton.jit
def sequence_of(tile, query_start_ptr, num_sequences, BLOCK: tl.constexpr):
    """(sequence of a tile, first and one past the last token of the sequence, first token of the tile).

    A tile that no sequence needs begins at or behind the end of its sequence.
    """
    BLOCK_B: tl.constexpr = 256
    sequence = -1
    for first in tl.range(0, num_sequences, BLOCK_B):
        candidate = first + tl.arange(0, BLOCK_B)
        known = candidate < num_sequences
        first_tile = tl.load(query_start_ptr + candidate, mask=known, other=0) // BLOCK + candidate
        sequence += tl.sum((known & (first_tile <= tile)).to(tl.int32), axis=0)
    start = tl.load(query_start_ptr + sequence)
    stop = tl.load(query_start_ptr + sequence + 1)
    return sequence, start, stop, start + (tile - start // BLOCK - sequence) * BLOCK
