"""Lossless codecs of bf16 weights, behind one interface.

    Planar12  12.0 bits, fixed rate; a GEMM reads it in place (`_planar.unpack_planar12` is its inner step)
    Planar8    8.0 bits, the same for weights whose four low mantissa bits are zero
    Tiered    10.9 bits; tiles decode by themselves, by counting
    Huffman   10.7 bits; lanes of 512 weights decode by themselves, code by code

Bits are of Gaussian weights; `kernels.formats` says what each is used for. An example, whose last line is `weight`
again, bit for bit:

    packed = Planar12().encode(weight).to(device)
    Planar12().decode(packed)
"""

from __future__ import annotations

from .codec import Codec, Packed, PackingError
from .huffman import Huffman
from .planar8 import Planar8
from .planar12 import Planar12
from .tiered import Tiered

__all__ = ["Codec", "Huffman", "Packed", "PackingError", "Planar8", "Planar12", "Tiered"]
