"""TritonExperts: routing, experts' blocks and the grouped GEMM on the Triton kernels, with every buffer made once.

Where it runs and what it promises is as in `triton_ops`. Weights are row-major, gate and up rows in turns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import grouped_gemm
from .expert_table import DOWN, GATE_UP
from .ops import DENSE, ExpertDims, LayerExperts, Recipes
from .packing.blocks import block_bytes, decode_block, encode_block
from .packing.formats import Packed
from .routing import Router, Routing
from .tiles import Tiles, capability_of, choose_tiles, invariant_tile, num_sms_of, planar12_tile
from .triton_ops import check_backend


class TritonExperts:
    """ExpertOps for batches of up to `max_tokens`; one pager owns one (not thread-safe).

    planar12: launches may meet experts in that format, so they use its tiles, whatever the format of each expert: the
    order of summation, and so the result, is the same for all. batch_invariant: one tile, whatever the batch. Raises
    KernelError for dtypes and sizes that the kernels cannot take, and without a GPU or interpreter.
    """

    fused_formats = frozenset({"planar12"})

    def __init__(
        self, dims: ExpertDims, max_tokens: int, device: torch.device | str, *, batch_invariant: bool = False,
        planar12: bool = False,
    ) -> None:  # fmt: skip
        self.dims, self.device, self.act_dtype = dims, torch.device(device), dims.dtype
        self.batch_invariant, self._planar12 = batch_invariant, planar12
        check_backend(self.device, dims.dtype)
        self._capability, self._num_sms = capability_of(self.device), num_sms_of(self.device)
        self._gpu = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None
        self._router = Router(max_tokens, dims.experts, dims.top_k, dims.renormalise, self.device)
        rows = max_tokens * dims.top_k
        self._h = torch.empty(rows, dims.intermediate, dtype=dims.dtype, device=self.device)
        self._y = torch.empty(rows, dims.hidden, dtype=dims.dtype, device=self.device)
        self.workspace_bytes = self._router.nbytes + self._h.nbytes + self._y.nbytes

    # Blocks.

    def expert_bytes(self, expert_format: str = DENSE) -> tuple[int, int]:
        """Bytes of one expert's (gate/up, down) blocks. KernelError for a format that does not exist or suit."""
        if expert_format == DENSE:
            gate_up, down = (n * k * self.dims.dtype.itemsize for n, k in self.dims.shapes)
        else:
            gate_up, down = (block_bytes(expert_format, n, k, self.dims.dtype) for n, k in self.dims.shapes)
        return gate_up, down

    def pack_expert(
        self, gate_up: Tensor, down: Tensor, out: tuple[Tensor, Tensor], expert_format: str = DENSE
    ) -> Recipes:
        """gate_up [2I, H], down [H, I] → the two uint8 blocks of `expert_bytes`; gate and up rows in turns."""
        if expert_format == DENSE:
            grouped_gemm.interleave(gate_up, self._matrix(out[GATE_UP], GATE_UP))
            self._matrix(out[DOWN], DOWN).copy_(down)
            return None, None
        mixed = grouped_gemm.interleave(gate_up)
        return encode_block(expert_format, mixed, out[GATE_UP]), encode_block(expert_format, down, out[DOWN])

    def decode_expert(
        self, expert_format: str, tensor_type: int, block: Tensor, out: Tensor, recipe: Packed | None
    ) -> None:
        """A compressed block → the dense block of the same weights; see ExpertOps."""
        decode_block(recipe, block, self._matrix(out, tensor_type), parallel=False)

    def unpack_expert(self, blocks: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Dense blocks → gate_up [2I, H], down [H, I]."""
        mixed, down = (self._matrix(block, d) for d, block in enumerate(blocks))
        return grouped_gemm.deinterleave(mixed), down

    def _matrix(self, block: Tensor, tensor_type: int) -> Tensor:
        return block.view(self.dims.dtype).view(self.dims.shapes[tensor_type])

    # The layer.

    def route(self, logits: Tensor, num_tokens: Tensor | None = None) -> Routing:
        """fp32 logits [T, E]; num_tokens int32 [1] on the device: later rows are padding, and reach no expert."""
        return self._router(logits, self._tiles(len(logits)).gate_up.block_m, num_tokens)

    def route_to(self, topk_ids: Tensor, topk_weights: Tensor, num_tokens: Tensor | None = None) -> Routing:
        """topk_ids int32 or int64 [T, top_k], a token's all different, any outside 0 … E - 1 for experts that are
        elsewhere; topk_weights [T, top_k]."""
        block_m = self._tiles(len(topk_ids)).gate_up.block_m
        return self._router.given(topk_ids, topk_weights, block_m, num_tokens)

    def moe_add(self, x: Tensor, routing: Routing, experts: LayerExperts, residual: Tensor) -> Tensor:
        """residual [T, H] += mixture of experts of x [T, H]; returns residual."""
        d, tiles, rows = self.dims, self._tiles(len(x)), len(x) * self.dims.top_k
        h, y = self._h[:rows], self._y[:rows]
        experts.wait(GATE_UP)
        grouped_gemm.gate_up(x, experts.table, routing, h, d.dtype, tiles.gate_up, self._num_sms)
        experts.wait(DOWN)
        grouped_gemm.down(h, experts.table, routing, y, d.dtype, tiles.down, self._num_sms)
        return grouped_gemm.combine(y, routing, residual)

    def count_routed(self, routing: Routing, counts: Tensor) -> None:
        """counts fp32 [E] += how many tokens each expert got."""
        counts.add_(routing.expert_start[1:]).sub_(routing.expert_start[:-1])

    def _tiles(self, tokens: int) -> Tiles:
        d, itemsize, slots = self.dims, self.dims.dtype.itemsize, tokens * self.dims.top_k
        rows = slots / max(1, min(slots, d.experts))
        if self._planar12:
            # Batch-invariant: whatever the batch, the tile of the largest.
            tile = planar12_tile(math.inf if self.batch_invariant else rows, self._capability)
            return Tiles(tile, tile)
        if self.batch_invariant:
            tile = invariant_tile(self._capability, itemsize)
            return Tiles(tile, tile)
        return choose_tiles(d.hidden, d.intermediate, rows, self._capability, itemsize, self._gpu)
