"""TritonExperts: routing, experts' blocks and the grouped GEMM on the Triton kernels, with every buffer made once.

Where it runs and what it promises is as in `ops`. Weights are row-major, gate and up rows in turns.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ..expert_blocks import ExpertBlocks
from ..expert_layer import ExpertLayer
from ..expert_table import DOWN, GATE_UP
from ..formats import FORMATS
from ..ops import ExpertDims, Gated, KernelError, LayerExperts, MoeBlock, RowMajor
from . import grouped_gemm
from .decoded import DecodedExperts
from .gate import GateWeights, norm_and_route
from .ops import check_backend
from .routing import Router, Routing
from .tiles import (
    Tiles,
    capability_of,
    choose_tiles,
    decodes_first,
    fused_invariant_tile,
    fused_tile,
    invariant_tile,
    num_sms_of,
)


class TritonBlocks(ExpertBlocks):
    """Experts row-major, gate and up rows in turns."""

    backend = "triton"

    def restore_expert(self, blocks: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        mixed, down = (self._matrix(block, d) for d, block in enumerate(blocks))
        return grouped_gemm.deinterleave(mixed), down

    def _arrange(self, tensor_type: int, weight: Tensor, out: Tensor) -> None:
        if tensor_type == GATE_UP:
            grouped_gemm.interleave(weight, out)
        else:
            out.copy_(weight)


class TritonExperts(ExpertLayer[Routing], TritonBlocks):
    """ExpertOps for batches of up to `max_tokens`; one pager owns one (not thread-safe).

    formats: in which experts may be stored. Launches that may meet a fused one use its tiles, whatever the format of
    each expert, or where experts have many rows decode first and use those of dense experts: the order of summation,
    and so the result, is the same for all formats. batch_invariant: one tile, whatever the batch, and nothing is
    decoded first. Raises KernelError for dtypes, sizes and formats that the kernels cannot take, and without a GPU or
    interpreter.
    """

    def __init__(
        self, dims: ExpertDims, max_tokens: int, device: torch.device | str, *, batch_invariant: bool = False,
        formats: Collection[str] = (),
    ) -> None:  # fmt: skip
        super().__init__(dims)
        self.device, self.act_dtype = torch.device(device), dims.dtype
        self.batch_invariant, self._weight_tile = batch_invariant, self._choose_weight_tile(formats)
        check_backend(self.device, dims.dtype)
        self._capability, self._num_sms = capability_of(self.device), num_sms_of(self.device)
        self._gpu = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None
        self._router = Router(max_tokens, dims.experts, dims.top_k, dims.renormalise, self.device)
        rows = self._router.max_rows
        self._h = torch.empty(rows, dims.intermediate, dtype=dims.dtype, device=self.device)
        self._y = torch.empty(rows, dims.hidden, dtype=dims.dtype, device=self.device)
        self._x = torch.empty(max_tokens, dims.hidden, dtype=dims.dtype, device=self.device)
        self.workspace_bytes = self._router.nbytes + self._h.nbytes + self._y.nbytes + self._x.nbytes
        self._decoded = DecodedExperts(dims, self.device) if self._decodes(max_tokens) else None
        if self._decoded is not None:
            self.workspace_bytes += self._decoded.nbytes

    def _choose_weight_tile(self, formats: Collection[str]) -> tuple[int, int] | None:
        """`Format.tile` of the fused ones among `formats`."""
        tiles = {name: FORMATS[name].tile for name in sorted(self.fused_formats.intersection(formats))}
        if len(set(tiles.values())) > 1:
            raise KernelError(f"formats {' and '.join(tiles)} need different tiles; choose one of them for all experts")
        return next(iter(tiles.values()), None)

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
        return grouped_gemm.combine(self._rows(x, routing, experts), routing, residual)

    def gate(self, hidden: Tensor, block: MoeBlock, num_tokens: Tensor | None = None) -> Gated[Routing]:
        """As of every backend; in one launch where one program can sort the batch, but for `batch_invariant`.

        Then a shared expert of the others' sizes is routed beside them.
        """
        if self.batch_invariant or len(hidden) > self._router.most_fused:
            return super().gate(hidden, block, num_tokens)
        shared, x, pair, score = block.shared, self._x[: len(hidden)], None, None
        if shared is not None and shared.score is not None and shared.down.k == self.dims.intermediate:
            pair, score = (RowMajor.matrix(shared.gate_up), RowMajor.matrix(shared.down)), RowMajor.matrix(shared.score)
        weights = GateWeights(block.norm, RowMajor.matrix(block.router), score)
        block_m = self._tiles(len(hidden)).gate_up.block_m
        routing = norm_and_route(hidden, weights, block.ops.dims.eps, self._router, x, block_m, num_tokens, pair)
        if shared is not None and pair is None:
            hidden = block.ops.mlp_add(x, shared, hidden)
        return Gated(x, routing, hidden)

    def mix(self, gated: Gated[Routing], block: MoeBlock, experts: LayerExperts) -> tuple[Tensor, Tensor]:
        """As of every backend; the rows' sum and the norm in one launch. x is no longer read then, and is where the
        norm goes."""
        x, routing, hidden = gated
        y, normed = self._rows(x, routing, experts), self._x[: len(x)]
        return hidden, grouped_gemm.combine_and_norm(y, routing, hidden, block.next_norm, block.ops.dims.eps, normed)

    def _rows(self, x: Tensor, routing: Routing, experts: LayerExperts) -> Tensor:
        """y [R, H]: each row's expert's output, times its weight."""
        d, tiles, rows = self.dims, self._tiles(len(x)), routing.experts.numel()
        h, y = self._h[:rows], self._y[:rows]
        decoded = self._decoded if self._decodes(len(x)) else None
        for tensor, multiply, source, out, tile in (
            (GATE_UP, grouped_gemm.gate_up, x, h, tiles.gate_up), (DOWN, grouped_gemm.down, h, y, tiles.down),
        ):  # fmt: skip
            experts.wait(tensor)
            multiply(source, experts.table, routing, out, d.dtype, tile, self._num_sms, decoded)
        return y

    def count_routed(self, routing: Routing, counts: Tensor) -> None:
        """counts fp32 [E] += how many tokens each expert got."""
        counts.add_(routing.expert_start[1:]).sub_(routing.expert_start[:-1])

    def chosen(self, routing: Routing) -> Tensor:
        """Integers [T, top_k]: the experts of each token, -1 elsewhere; a shared expert, the last choice, left out."""
        return routing.experts[:, : self.dims.top_k]

    def _rows_per_expert(self, tokens: int) -> float:
        """Mean, of experts that have any."""
        rows = tokens * self.dims.top_k
        return rows / max(1, min(rows, self.dims.experts))

    def _decodes(self, tokens: int) -> bool:
        """Whether packed experts are decoded before the GEMM."""
        may_be_packed = self._weight_tile is not None and not self.batch_invariant
        return may_be_packed and decodes_first(self._rows_per_expert(tokens), self._gpu)

    def _tiles(self, tokens: int) -> Tiles:
        d, itemsize, rows_per_expert = self.dims, self.dims.dtype.itemsize, self._rows_per_expert(tokens)
        if self._weight_tile is not None and not self._decodes(tokens):
            if self.batch_invariant:
                tile = fused_invariant_tile(self._weight_tile, self._capability)
            else:
                tile = fused_tile(self._weight_tile, rows_per_expert, self._capability)
            return Tiles(tile, tile)
        if self.batch_invariant:
            tile = invariant_tile(self._capability, itemsize)
            return Tiles(tile, tile)
        return choose_tiles(d.hidden, d.intermediate, rows_per_expert, self._capability, itemsize, self._gpu)
