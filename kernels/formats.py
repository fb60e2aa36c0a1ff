"""The formats of experts' weights: one record each, which answers what ledgers, command lines, kernels and the
simulator ask about a format.

A format is lossless. Some are read by a GEMM in place, in its tile loop; the others are decoded into a slot first, and
never appear in an ExpertTable. To add one: write its codec (`packing`), then, if a GEMM shall read it in place, a tile
loop (`grouped_gemm`, `cpu.moe`), and enter a record here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from .cpu.planar import PanelBlocks
from .ops import KernelError
from .packing import Codec, Huffman, Planar8, Planar12, Tiered
from .packing.blocks import Blocks, PlaneBlocks

DENSE = "dense"
# For experts that are to be compressed where nobody says how: the GEMM reads it in place.
DEFAULT_COMPRESSED = "planar12"
# Mean rows an expert beyond which a GPU decodes experts to memory that its GEMM could decode (`triton.decoded`). What
# the tile loop takes beyond the dense GEMM grows with rows; decoding reads 1.5 bytes a weight and writes 2 for any. An
# H200 measured in place / decoded first, for a layer of Qwen3-30B-A3B: 0.85 / 1.07 ms at 64 rows, 1.24 / 1.20 at 128,
# 2.22 / 1.53 at 256. An H100's memory is slower: by what it must move there it is 170.
DECODE_ROWS = 128
# Of the buffer for them, at most, unless an expert takes more. Groups that L2 holds would save what is written and read
# again, but their GEMMs have one or two rounds of tiles, the last one half empty: at 8,192 tokens of Qwen3-30B-A3B a
# layer takes 2.62 ms in groups of 24 MiB, 2.42 of 64, 2.09 of 256, and 2.03 in one of all (H200; dense 1.49).
DECODE_BYTES = 256 << 20


@dataclass(frozen=True)
class Format:
    """One format of experts' weights.

    bits: of a weight, for bf16 weights with a Gaussian distribution, as `Codec.fitting` leaves them. about: what
    becomes of it, for help texts. codec: makes and reads its planes, in packed checkpoints too; None for dense. number:
    in an ExpertTable, never reused; None if no GEMM reads it. fused: by backend (cpu, triton) whose GEMM reads it in
    place, the blocks that this GEMM takes. tile: rows and columns of the weight in a step of Triton's tile loop, which
    has it as first operand ("swap AB").
    """

    name: str
    bits: float
    about: str
    codec: Codec | None = None
    number: int | None = None
    fused: Mapping[str, Blocks] = field(default_factory=dict)
    tile: tuple[int, int] | None = None

    def blocks(self, backend: str) -> Blocks:
        """How a backend (cpu, triton, torch) holds compressed experts: as its GEMM reads them, or else as planes."""
        assert self.codec is not None, f"{self.name} experts are not compressed"
        return self.fused.get(backend) or PlaneBlocks(self.codec)


FORMATS: dict[str, Format] = {
    each.name: each
    for each in (
        Format(DENSE, 16.0, "as they are", number=0),
        Format(
            "planar12", 12.006, "read by the GEMM in place", Planar12(), number=1,
            fused={"triton": PlaneBlocks(Planar12()), "cpu": PanelBlocks()}, tile=(64, 128),
        ),
        Format(
            "planar8", 8.006, "read by a GPU's GEMM in place, for weights that were FP8: four low mantissa bits zero",
            Planar8(), number=2, fused={"triton": PlaneBlocks(Planar8())}, tile=(64, 128),
        ),
        Format("tiered", 10.92, "decoded into a slot before a layer runs", Tiered()),
        Format("huffman", 10.75, "decoded into a slot before a layer runs, the paper's way", Huffman()),
    )
}  # fmt: skip


def compressed_formats() -> dict[str, Format]:
    """All formats but dense, by name."""
    return {name: each for name, each in FORMATS.items() if each.codec is not None}


def codec_of(name: str) -> Codec:
    """Of a compressed format."""
    codec = FORMATS[name].codec
    assert codec is not None, f"{name} experts are not compressed"
    return codec


def fitting(name: str, weight: torch.Tensor) -> torch.Tensor:
    """`Codec.fitting` of a format; dense experts may have any weights."""
    codec = FORMATS[name].codec
    return weight if codec is None else codec.fitting(weight)


def weight_tile(name: str) -> tuple[int, int]:
    """`Format.tile` of a compressed format that Triton's GEMM reads in place."""
    tile = FORMATS[name].tile
    assert tile is not None, f"Triton's GEMM does not read {name} experts in place"
    return tile


def fused_formats(backend: str) -> frozenset[str]:
    """Compressed formats that a backend's GEMM reads in place."""
    return frozenset(name for name, each in FORMATS.items() if backend in each.fused)


def compressed_blocks(name: str, backend: str, dtype: torch.dtype) -> Blocks:
    """`Format.blocks` for weights of `dtype`. KernelError if there is no such format, or none of this dtype."""
    if name not in FORMATS:
        raise KernelError(f"unknown expert format {name!r}; choose {', '.join(FORMATS)}")
    if dtype != torch.bfloat16:
        raise KernelError(f"expert format {name} compresses bfloat16 weights, got {dtype}; use {DENSE}")
    return FORMATS[name].blocks(backend)


def decoded_at_once(expert_bytes: int, experts: int, room: int | None = None) -> int:
    """Experts that the buffer holds, of a layer's; expert_bytes: of one's dense weight of one tensor type."""
    return min(experts, max(1, (DECODE_BYTES if room is None else room) // expert_bytes))


def formats_help() -> str:
    """All formats in a sentence, for command lines."""
    return "; ".join(f"{each.name}: {each.bits:.1f} bits a weight, {each.about}" for each in FORMATS.values())
