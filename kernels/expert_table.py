"""The table through which a grouped GEMM finds its experts (the page table of expert paging).

One table serves one layer. Entry (expert, tensor type) holds the address of a packed weight block and its
format, so the experts of one launch may lie in resident memory, in a streaming slot or in pinned host memory:

    addresses  int64 [E, 2]   address of block (expert, GATE_UP | DOWN)
    formats    uint8 [E, 2]   how the block is encoded (TABLE_FORMATS), each in the backend's own layout

PagedTensor of the paper (arXiv 2604.02715 §4.1) keeps one virtual address an expert and remaps pages below it;
here the kernels are ours, so the indirection is a table and no page is ever remapped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

GATE_UP, DOWN = 0, 1
FORMAT_DENSE, FORMAT_PLANAR12 = 0, 1
# What a GEMM may find in a table. dense: bf16 or fp32 as it is. planar12: bf16 in 12 bits and rare escapes, lossless.
TABLE_FORMATS = {"dense": FORMAT_DENSE, "planar12": FORMAT_PLANAR12}


@dataclass(frozen=True)
class ExpertTable:
    """Where every expert of one layer lies.

    `blocks[e]` is (gate_up, down): uint8 tensors that keep the memory alive and let a kernel that cannot follow
    raw addresses (the torch reference) view it; `addresses` and `formats` live on the blocks' device.
    `planar12`: whether any block is compressed so.
    """

    blocks: tuple[tuple[Tensor, Tensor], ...]
    addresses: Tensor
    formats: Tensor
    planar12: bool = field(init=False)

    @classmethod
    def from_blocks(
        cls,
        blocks: Sequence[tuple[Tensor, Tensor]],
        device: torch.device | str,
        formats: int | Sequence[int] = FORMAT_DENSE,
    ) -> ExpertTable:
        """Table over contiguous uint8 `blocks`; `device` is where the kernels read it. formats: one of each expert, or
        one of all."""
        for expert, pair in enumerate(blocks):
            for block in pair:
                if block.dtype != torch.uint8 or not block.is_contiguous():
                    raise ValueError(f"expert {expert}: a block must be contiguous uint8, got {block.dtype}")
        addresses = torch.tensor([[b.data_ptr() for b in pair] for pair in blocks], dtype=torch.int64)
        each = [formats] * len(blocks) if isinstance(formats, int) else list(formats)
        if len(each) != len(blocks):
            raise ValueError(f"{len(blocks)} experts need as many formats, got {len(each)}")
        pairs = torch.tensor([[f, f] for f in each], dtype=torch.uint8).reshape(-1, 2)
        return cls(tuple(blocks), addresses.reshape(-1, 2).to(device), pairs.to(device))

    def __post_init__(self) -> None:
        # Asked of the host once: a launch chooses its kernel by it without reading the device.
        object.__setattr__(self, "planar12", bool((self.formats == FORMAT_PLANAR12).any()))

    @property
    def num_experts(self) -> int:
        return len(self.blocks)
