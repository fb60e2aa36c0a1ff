"""Lossless formats of bf16 weights, behind one interface.

    planar12  12.0 bits, fixed rate; a GEMM reads it in place (`_planar12.unpack_planar12` is its inner step)
    tiered    10.9 bits; tiles decode by themselves, by counting
    huffman   10.7 bits; lanes of 512 weights decode by themselves, code by code

Bits are of Gaussian weights. An example, whose last line is `weight` again, bit for bit:

    packed = FORMATS["planar12"].encode(weight)
    packed.save(path)
    packed = Packed.load(path, mmap=True).to(device)
    FORMATS[packed.format].decode(packed)
"""

from __future__ import annotations

from .formats import Packed, PackedFormat, PackingError
from .huffman import Huffman
from .planar12 import Planar12
from .tiered import Tiered

FORMATS: dict[str, PackedFormat] = {each.name: each for each in (Planar12(), Tiered(), Huffman())}

__all__ = ["FORMATS", "Packed", "PackedFormat", "PackingError"]
