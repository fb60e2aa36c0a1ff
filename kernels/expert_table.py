"""The table through which a grouped GEMM finds its experts (the page table of expert paging).

One table serves one layer. Entry (expert, tensor type) holds the address of a packed weight block and its
format, so the experts of one launch may lie in resident memory, in a streaming slot or in pinned host memory:

    addresses  int64 [E, 2]   address of block (expert, GATE_UP | DOWN), a multiple of 16
    formats    uint8 [E, 2]   how the block is encoded (`Format.number`), each in the backend's own layout

Both tensors are made once and updated in place, so a captured CUDA graph that reads them stays right.

PagedTensor of the paper (arXiv 2604.02715 §4.1) keeps one virtual address an expert and remaps pages below it;
here the kernels are ours, so the indirection is a table and no page is ever remapped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from .formats import DENSE, FORMATS

GATE_UP, DOWN = 0, 1
# Kernels promise the compiler that addresses are multiples of it, and load vectors of as many bytes.
_ALIGNMENT = 16
Pair = tuple[Tensor, Tensor]


@dataclass(eq=False)
class ExpertTable:
    """Where every expert of one layer lies.

    `blocks[e]` is (gate_up, down): uint8 tensors that keep the memory alive and let a kernel that cannot follow
    raw addresses (the torch reference) view it; `addresses` and `formats` live on the device of the kernels.
    `compressed`: names of all formats in it but dense. The host chooses its kernel by them, without reading the device;
    a captured graph has chosen.
    """

    blocks: tuple[Pair, ...]
    addresses: Tensor
    formats: Tensor
    compressed: frozenset[str]

    @classmethod
    def from_blocks(
        cls, blocks: Sequence[Pair], device: torch.device | str, formats: str | Sequence[str] = DENSE
    ) -> ExpertTable:
        """Table over contiguous uint8 `blocks`; `device` is where the kernels read it. formats: one of each expert, or
        one of all. ValueError for blocks that no kernel can read."""
        names = _each(formats, len(blocks))
        addresses, numbers = _entries(blocks, names)
        return cls(tuple(blocks), addresses.to(device), numbers.to(device), frozenset(names) - {DENSE})

    def __post_init__(self) -> None:
        # On a GPU: where the host writes what is copied, and when the copy before it was done.
        self._staging: tuple[Pair, torch.cuda.Event] | None = None

    # What was made inside a forward pass is an inference tensor, which torch lets nobody write outside of such a mode.
    @torch.inference_mode()
    def update(self, blocks: Sequence[Pair], formats: str | Sequence[str] = DENSE) -> None:
        """Other blocks and formats of the same experts, into the same two tensors.

        On a GPU in the order of the current stream, which must not be capturing: a graph would copy for ever what the
        host wrote once. ValueError as in `from_blocks`; the table is then as it was.
        """
        assert len(blocks) == self.num_experts, f"{len(blocks)} blocks for a table of {self.num_experts} experts"
        names = _each(formats, len(blocks))
        entries = _entries(blocks, names)
        if self.addresses.is_cuda:
            assert not torch.cuda.is_current_stream_capturing(), "a table is updated before a capture, not inside"
            if self._staging is None:
                addresses, numbers = (torch.empty_like(entry, pin_memory=True) for entry in entries)
                self._staging = (addresses, numbers), torch.cuda.Event()
            staging, copied = self._staging
            copied.synchronize()
            for staged, entry in zip(staging, entries, strict=True):
                staged.copy_(entry)
            self.addresses.copy_(staging[0], non_blocking=True)
            self.formats.copy_(staging[1], non_blocking=True)
            copied.record()
        else:
            self.addresses.copy_(entries[0])
            self.formats.copy_(entries[1])
        self.blocks = tuple(blocks)
        self.compressed = frozenset(names) - {DENSE}

    def replace(self, expert: int, pair: Pair) -> None:
        """Other blocks of one expert, of the same format; in host memory."""
        for d, block in enumerate(pair):
            self.addresses[expert, d] = block.data_ptr()
        self.blocks = (*self.blocks[:expert], pair, *self.blocks[expert + 1 :])

    @cached_property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """addresses and formats as numpy sees them; in host memory."""
        return self.addresses.numpy(), self.formats.numpy()

    @property
    def num_experts(self) -> int:
        return len(self.blocks)


def _each(formats: str | Sequence[str], experts: int) -> list[str]:
    """The format of each expert, all of which a GEMM can meet."""
    names = [formats] * experts if isinstance(formats, str) else list(formats)
    if len(names) != experts:
        raise ValueError(f"{experts} experts need as many formats, got {len(names)}")
    for name in names:
        if name not in FORMATS or FORMATS[name].number is None:
            numbered = ", ".join(each.name for each in FORMATS.values() if each.number is not None)
            raise ValueError(f"no GEMM reads format {name!r}: decode it first, to one of {numbered}")
    return names


def _entries(blocks: Sequence[Pair], names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """(addresses, formats) on the host."""
    for expert, pair in enumerate(blocks):
        for block in pair:
            if block.dtype != torch.uint8 or not block.is_contiguous():
                raise ValueError(f"expert {expert}: a block must be contiguous uint8, got {block.dtype}")
            if block.data_ptr() % _ALIGNMENT:
                raise ValueError(
                    f"expert {expert}: a block must begin at a multiple of {_ALIGNMENT} bytes, which kernels rely on, "
                    f"got address {block.data_ptr():#x}"
                )
    addresses = torch.tensor([[block.data_ptr() for block in pair] for pair in blocks], dtype=torch.int64, device="cpu")
    numbers = torch.tensor([[FORMATS[name].number] * 2 for name in names], dtype=torch.uint8, device="cpu")
    return addresses.reshape(-1, 2), numbers.reshape(-1, 2)
