"""planar12 in blocks of one size, as an expert store keeps them: planes at places that the shape decides, escapes last.

    bytes | nibbles | base | offsets | escapes | raw tiles      each on a multiple of 256 bytes

A block has room for escapes and raw tiles: `_ROOM` of its weight's bytes, and two raw tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import KernelError
from . import FORMATS
from .formats import BLOCK_ALIGNMENT, Packed

_ROOM = 0.004
_ROOM_LEAST = 2 * 2 * 64 * 128
_PLANES = {
    "bytes": torch.uint8, "nibbles": torch.uint8, "base": torch.int32, "offsets": torch.int32, "escapes": torch.int32,
    "raw_tiles": torch.int16,
}  # fmt: skip


def _aligned(nbytes: int) -> int:
    return -(-nbytes // BLOCK_ALIGNMENT) * BLOCK_ALIGNMENT


def _fixed_bytes(n: int, k: int) -> tuple[int, int, int, int]:
    """Bytes of the planes whose size follows from the shape."""
    sizes = FORMATS["planar12"]._plane_sizes((n, k))
    return sizes["bytes"], sizes["nibbles"], 4 * sizes["base"], 4 * sizes["offsets"]


def planar12_block_bytes(n: int, k: int) -> int:
    """Bytes of the block of a weight [n, k]."""
    fixed = sum(_aligned(nbytes) for nbytes in _fixed_bytes(n, k))
    return fixed + _aligned(int(2 * n * k * _ROOM) + _ROOM_LEAST)


def encode_block(weight: Tensor, out: Tensor) -> None:
    """bf16 [n, k] → uint8 [planar12_block_bytes(n, k)].

    KernelError when the weight's exponents spread so far that it would not fit.
    """
    packed = FORMATS["planar12"].encode(weight)
    if packed.is_raw or packed.block_bytes > out.numel():
        raise KernelError(
            f"expert weights of shape {list(weight.shape)} do not fit format planar12: they are too small, or too many "
            "exponents lie outside any 16 neighbours; use the dense format"
        )
    packed.pack_into(out[: packed.block_bytes])


def decode_block(block: Tensor, n: int, k: int) -> Tensor:
    """The weight bf16 [n, k] of a block in host memory."""
    planes, at = {}, 0
    for name, nbytes in zip(("bytes", "nibbles", "base", "offsets"), _fixed_bytes(n, k), strict=True):
        planes[name] = block[at : at + nbytes].view(_PLANES[name])
        at += _aligned(nbytes)
    escapes = 4 * int(planes["offsets"][-1])
    planes["escapes"] = block[at : at + escapes].view(torch.int32)
    at += _aligned(escapes)
    numbers = planes["escapes"][(planes["escapes"] >> 16) & 0xFFFF == 0xFFFF]
    planes["raw_tiles"] = block[at : at + 2 * 8192 * len(numbers)].view(torch.int16)
    return FORMATS["planar12"].decode(Packed("planar12", (n, k), planes))
