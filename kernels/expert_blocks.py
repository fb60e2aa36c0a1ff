"""Blocks of experts, as every backend makes and reads them: a dense expert is arranged for the GEMM, and the two
matrices that this gives are stored as they are or compressed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from .expert_table import DOWN, GATE_UP
from .formats import DENSE, compressed_blocks, fused_formats
from .ops import ExpertDims, KernelError, Recipes
from .packing import Packed
from .packing.blocks import Blocks

Shape = tuple[int, int]


class ExpertBlocks(ABC):
    """The part of ExpertOps that touches blocks.

    backend: the name under which formats know it. Subclasses say how it arranges an expert (`_matrices`, `_arrange`,
    `restore_expert`).
    """

    backend: str

    def __init__(self, dims: ExpertDims) -> None:
        self.dims = dims

    @property
    def fused_formats(self) -> frozenset[str]:
        """Compressed formats that `moe_add` reads in place."""
        return fused_formats(self.backend)

    def expert_bytes(self, expert_format: str = DENSE) -> tuple[int, int]:
        """Bytes of one expert's (gate/up, down) blocks. KernelError for a format that does not exist or suit."""
        if expert_format == DENSE:
            gate_up, down = (n * k * self.dims.dtype.itemsize for n, k in self._matrices)
        else:
            gate_up, down = (self._blocks(expert_format).nbytes(n, k) for n, k in self._matrices)
        return gate_up, down

    def encode_expert(
        self, gate_up: Tensor, down: Tensor, out: tuple[Tensor, Tensor], expert_format: str = DENSE
    ) -> Recipes:
        """gate_up [2I, H], down [H, I] → the two uint8 blocks of `expert_bytes`. KernelError for weights that cannot be
        compressed so far."""
        return (
            self._encode(GATE_UP, gate_up, out[GATE_UP], expert_format),
            self._encode(DOWN, down, out[DOWN], expert_format),
        )

    def decode_expert(
        self, expert_format: str, tensor_type: int, block: Tensor, out: Tensor, recipe: Packed | None
    ) -> None:
        """A compressed block → the dense block of the same weights; see ExpertOps."""
        self._blocks(expert_format).decode(block, recipe, self._matrix(out, tensor_type), parallel=False)

    def check_expert(self, expert_format: str, tensor_type: int, block: Tensor, recipe: Packed | None) -> None:
        """PackingError unless it is safe to decode a block in host memory, or to let `moe_add` read it; to be asked of
        all that comes from a file. See `Codec.check`."""
        if expert_format != DENSE:
            self._blocks(expert_format).check(block, recipe, *self._matrices[tensor_type])

    def weights_of(self, expert_format: str, blocks: tuple[Tensor, Tensor], recipes: Recipes) -> tuple[Tensor, Tensor]:
        """Inverse of `encode_expert`: gate_up [2I, H], down [H, I]."""
        if expert_format == DENSE:
            return self.restore_expert(blocks)
        dense = [torch.empty(nbytes, dtype=torch.uint8, device=blocks[0].device) for nbytes in self.expert_bytes()]
        for d, (block, out) in enumerate(zip(blocks, dense, strict=True)):
            self.decode_expert(expert_format, d, block, out, recipes[d])
        return self.restore_expert((dense[0], dense[1]))

    @abstractmethod
    def restore_expert(self, blocks: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Dense blocks → gate_up [2I, H], down [H, I]."""

    @property
    def _matrices(self) -> tuple[Shape, Shape]:
        """Shapes of the dense (gate/up, down) blocks as matrices, which is what is compressed."""
        return self.dims.shapes

    @abstractmethod
    def _arrange(self, tensor_type: int, weight: Tensor, out: Tensor) -> None:
        """A weight as checkpoints have it → the dense block's matrix."""

    def _encode(self, tensor_type: int, weight: Tensor, out: Tensor, expert_format: str) -> Packed | None:
        if expert_format == DENSE:
            self._arrange(tensor_type, weight, self._matrix(out, tensor_type))
            return None
        dense = torch.empty(self._matrices[tensor_type], dtype=weight.dtype, device=weight.device)
        self._arrange(tensor_type, weight, dense)
        return self._blocks(expert_format).encode(dense, out)

    def _blocks(self, expert_format: str) -> Blocks:
        return compressed_blocks(expert_format, self.backend, self.dims.dtype)

    def _matrix(self, block: Tensor, tensor_type: int) -> Tensor:
        return block.view(self.dims.dtype).view(self._matrices[tensor_type])


def blocks_of(backend: str, dims: ExpertDims) -> ExpertBlocks:
    """Blocks of a backend's experts without its kernels. KernelError for a backend that does not exist."""
    match backend:
        case "cpu":
            from .cpu.experts import CpuBlocks

            return CpuBlocks(dims)
        case "triton":
            from .triton.experts import TritonBlocks

            return TritonBlocks(dims)
        case "torch":
            from .reference.experts import TorchBlocks

            return TorchBlocks(dims)
    raise KernelError(f"unknown kernels {backend!r}; choose cpu, triton or torch")
