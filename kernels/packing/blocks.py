"""Weights in blocks of one size, as an expert store keeps them.

How many bytes a lossless format needs depends on the weights, but a ledger is filled before they are read. So a block
has room for what trained weights need and a little more (`Codec.room`); weights that do not fit are refused.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..ops import KernelError
from .codec import Codec, Packed, PackingError


class Blocks(Protocol):
    """How a backend compresses a bf16 matrix [n, k], which is a dense expert's as its kernels arrange it.

    nbytes: of the block; KernelError for sizes that it cannot take. encode: into `out`, uint8 [nbytes(n, k)]; returns
    what `decode` needs beside the block, if anything; KernelError when the weights do not fit. decode: bit for bit, on
    the block's device, into `out`, bf16 [n, k]; parallel: on the CPU, by all threads of numba. check: PackingError
    unless decoding a block, in host memory, and a GEMM that reads it in place touch nothing beyond it and [n, k].
    """

    def nbytes(self, n: int, k: int) -> int: ...
    def encode(self, matrix: Tensor, out: Tensor) -> Packed | None: ...
    def decode(self, block: Tensor, recipe: Packed | None, out: Tensor, parallel: bool = True) -> None: ...
    def check(self, block: Tensor, recipe: Packed | None, n: int, k: int) -> None: ...


class PlaneBlocks:
    """A codec's planes at multiples of 256 bytes, room at the end. Which bytes are which plane says the recipe, a
    `Packed` without data."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec

    def nbytes(self, n: int, k: int) -> int:
        return self.codec.room(n, k)

    def encode(self, matrix: Tensor, out: Tensor) -> Packed:
        packed = self.codec.encode(matrix)
        if packed.is_raw or packed.block_bytes > out.numel():
            shape, name = list(matrix.shape), self.codec.name
            fine = " their low mantissa bits are not zero," if self.codec.lost_bits else ""
            raise KernelError(
                f"expert weights of shape {shape} do not fit format {name}: they are too small,{fine} "
                "or their exponents spread wider than those of trained weights; use the dense format"
            )
        packed.pack_into(out[: packed.block_bytes])
        return packed.to("meta")

    def decode(self, block: Tensor, recipe: Packed | None, out: Tensor, parallel: bool = True) -> None:
        assert recipe is not None, "a codec's planes are found by the recipe that encode returned"
        self.codec.decode(recipe.at(block), out, parallel)

    def check(self, block: Tensor, recipe: Packed | None, n: int, k: int) -> None:
        """See `Codec.check`; a GEMM finds planes by their order and takes none for raw."""
        if recipe is None or recipe.is_raw or recipe.shape != (n, k):
            found = "none" if recipe is None else f"one of {'raw ' if recipe.is_raw else ''}{recipe.shape}"
            raise PackingError(f"a recipe of planes of {(n, k)} is needed, it has {found}")
        self.codec.check_planes(recipe)
        self.codec.check(recipe.at(block))
