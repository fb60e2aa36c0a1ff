"""Weights in blocks of one size, as an expert store keeps them: planes at multiples of 256 bytes, room at the end.

How many bytes a lossless format needs depends on the weights, but a ledger is filled before they are read. So a block
has room for what trained weights need and a little more; weights that do not fit are refused. Which bytes of the block
are which plane is in the `Packed` that `encode_block` returns, a recipe without data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import KernelError
from . import FORMATS
from .formats import BLOCK_ALIGNMENT, Packed

# Bits a weight, a third of a bit more than Gaussian weights take, and bytes for tables.
_ROOM = {"tiered": (11.2, 4096), "huffman": (11.0, 8192)}
# planar12: beside the planes whose size the shape fixes, room for escapes (bytes a weight) and a raw tile.
_ESCAPES, _RAW_TILES = 0.003, 2 * 64 * 128


def _aligned(nbytes: int) -> int:
    return -(-nbytes // BLOCK_ALIGNMENT) * BLOCK_ALIGNMENT


def block_bytes(name: str, n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes of the block of a weight [n, k] in format `name`. KernelError if there is no such format of this dtype."""
    if name not in FORMATS:
        raise KernelError(f"unknown expert format {name!r}; choose dense, {', '.join(FORMATS)}")
    if dtype != torch.bfloat16:
        raise KernelError(f"expert format {name} compresses bfloat16 weights, got {dtype}; use dense")
    if name == "planar12":
        sizes = FORMATS[name]._plane_sizes((n, k))
        fixed = [sizes["bytes"], sizes["nibbles"], 4 * sizes["base"], 4 * sizes["offsets"]]
        return sum(map(_aligned, fixed)) + _aligned(int(_ESCAPES * n * k) + _RAW_TILES)
    bits, tables = _ROOM[name]
    return _aligned(int(n * k * bits / 8) + tables)


def encode_block(name: str, weight: Tensor, out: Tensor) -> Packed:
    """bf16 [n, k] → uint8 [block_bytes(name, n, k)]; returns the recipe that `decode_block` needs.

    KernelError when the weight does not fit.
    """
    packed = FORMATS[name].encode(weight)
    if packed.is_raw or packed.block_bytes > out.numel():
        raise KernelError(
            f"expert weights of shape {list(weight.shape)} do not fit format {name}: they are too small, or their "
            "exponents spread wider than those of trained weights; use the dense format"
        )
    packed.pack_into(out[: packed.block_bytes])
    return packed.to("meta")


def decode_block(recipe: Packed, block: Tensor, out: Tensor | None = None, parallel: bool = True) -> Tensor:
    """The weight bf16 [n, k] of a block, on the block's device; see `PackedFormat.decode`."""
    return FORMATS[recipe.format].decode(recipe.at(block), out, parallel)
