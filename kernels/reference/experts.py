"""TorchExperts: routing and experts in plain torch, on any device: a loop over experts, the reference of the others.

Weights are row-major, gate rows before up rows, as in checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..expert_blocks import ExpertBlocks
from ..expert_layer import ExpertLayer
from ..expert_table import DOWN, GATE_UP
from ..ops import ExpertDims, LayerExperts


class Choice(NamedTuple):
    """Experts int64 [T, top_k] of each token, and their weights."""

    ids: Tensor
    weights: Tensor


def add_mixture(
    out: Tensor, x: Tensor, weights: Callable[[int], tuple[Tensor, Tensor]], experts: Tensor, row_weights: Tensor
) -> Tensor:
    """out [T, H] += Σ row_weights · expert(x), in the dtype of x [T, H]; returns out. weights(e) → gate_up [2I, H],
    down [H, I] as in checkpoints; experts, row_weights [T, top_k], experts below 0 elsewhere."""
    for expert in experts[experts >= 0].unique().tolist():
        token, choice = torch.where(experts == expert)
        gate_up, down = (weight.to(x.dtype) for weight in weights(expert))
        gate, up = F.linear(x[token], gate_up).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * up, down)
        out.index_add_(0, token, y * row_weights[token, choice, None].to(y.dtype))
    return out


class TorchBlocks(ExpertBlocks):
    """Experts as checkpoints have them."""

    backend = "torch"

    def restore_expert(self, blocks: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self._matrix(blocks[GATE_UP], GATE_UP), self._matrix(blocks[DOWN], DOWN)

    def _arrange(self, tensor_type: int, weight: Tensor, out: Tensor) -> None:
        out.copy_(weight)


class TorchExperts(ExpertLayer[Choice], TorchBlocks):
    """ExpertOps; `act_dtype` defaults to fp32 on the CPU and to the weights' dtype elsewhere.

    torch allocates its temporaries itself: `workspace_bytes` is an upper bound on those of one layer of `max_tokens`.
    """

    def __init__(
        self,
        dims: ExpertDims,
        max_tokens: int,
        device: torch.device | str = "cpu",
        act_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dims)
        self.device = torch.device(device)
        self.act_dtype = act_dtype or (torch.float32 if self.device.type == "cpu" else dims.dtype)
        rows = max_tokens * dims.top_k
        self.workspace_bytes = 4 * (3 * max_tokens * dims.experts + rows * (3 * dims.intermediate + 2 * dims.hidden))

    def route(self, logits: Tensor, num_tokens: Tensor | None = None) -> Choice:
        assert num_tokens is None, "padding is for captured graphs, and this path cannot be captured"
        weights, ids = logits.float().softmax(dim=-1).topk(self.dims.top_k, dim=-1)
        if self.dims.renormalise:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return Choice(ids, weights)

    def route_to(self, topk_ids: Tensor, topk_weights: Tensor, num_tokens: Tensor | None = None) -> Choice:
        assert num_tokens is None, "padding is for captured graphs, and this path cannot be captured"
        return Choice(topk_ids.long(), topk_weights)

    def moe_add(self, x: Tensor, routing: Choice, experts: LayerExperts, residual: Tensor) -> Tensor:
        ids = torch.where(routing.ids < self.dims.experts, routing.ids, -1)
        experts.need(ids[ids >= 0].unique().cpu().numpy())
        for d in (GATE_UP, DOWN):
            for _ in experts.ready(d):
                pass  # all of them, before the first is used
        blocks = experts.table.blocks
        return add_mixture(residual.clone(), x, lambda e: self.restore_expert(blocks[e]), ids, routing.weights)

    def count_routed(self, routing: Choice, counts: Tensor) -> None:
        here = routing.ids[(routing.ids >= 0) & (routing.ids < self.dims.experts)]
        counts += torch.bincount(here, minlength=self.dims.experts)

    def chosen(self, routing: Choice) -> Tensor:
        """Integers [T, top_k]: the experts of each token; any outside 0 … E - 1 are elsewhere."""
        return routing.ids
