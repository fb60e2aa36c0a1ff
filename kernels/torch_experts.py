"""TorchExperts: routing and experts in plain torch, on any device: a loop over experts, the reference of the others.

Weights are row-major, gate rows before up rows, as in checkpoints.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .expert_table import DOWN, GATE_UP
from .ops import DENSE, ExpertDims, LayerExperts, Recipes
from .packing.blocks import block_bytes, decode_block, encode_block
from .packing.formats import Packed


class Choice(NamedTuple):
    """Experts int64 [T, top_k] of each token, and their weights."""

    ids: Tensor
    weights: Tensor


class TorchExperts:
    """ExpertOps; `act_dtype` defaults to fp32 on the CPU and to the weights' dtype elsewhere.

    torch allocates its temporaries itself: `workspace_bytes` is an upper bound on those of one layer of `max_tokens`.
    """

    # Every format goes through `decode_expert`: nothing is read in place.
    fused_formats: frozenset[str] = frozenset()

    def __init__(
        self,
        dims: ExpertDims,
        max_tokens: int,
        device: torch.device | str = "cpu",
        act_dtype: torch.dtype | None = None,
    ) -> None:
        self.dims, self.device = dims, torch.device(device)
        self.act_dtype = act_dtype or (torch.float32 if self.device.type == "cpu" else dims.dtype)
        rows = max_tokens * dims.top_k
        self.workspace_bytes = 4 * (3 * max_tokens * dims.experts + rows * (3 * dims.intermediate + 2 * dims.hidden))

    def expert_bytes(self, expert_format: str = DENSE) -> tuple[int, int]:
        if expert_format == DENSE:
            gate_up, down = (n * k * self.dims.dtype.itemsize for n, k in self.dims.shapes)
        else:
            gate_up, down = (block_bytes(expert_format, n, k, self.dims.dtype) for n, k in self.dims.shapes)
        return gate_up, down

    def pack_expert(
        self, gate_up: Tensor, down: Tensor, out: tuple[Tensor, Tensor], expert_format: str = DENSE
    ) -> Recipes:
        if expert_format != DENSE:
            return encode_block(expert_format, gate_up, out[GATE_UP]), encode_block(expert_format, down, out[DOWN])
        for d, weight in enumerate((gate_up, down)):
            self._matrix(out[d], d).copy_(weight)
        return None, None

    def decode_expert(
        self, expert_format: str, tensor_type: int, block: Tensor, out: Tensor, recipe: Packed | None
    ) -> None:
        decode_block(recipe, block, self._matrix(out, tensor_type), parallel=False)

    def unpack_expert(self, blocks: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self._matrix(blocks[GATE_UP], GATE_UP), self._matrix(blocks[DOWN], DOWN)

    def _matrix(self, block: Tensor, tensor_type: int) -> Tensor:
        return block.view(self.dims.dtype).view(self.dims.shapes[tensor_type])

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
        experts.wait(GATE_UP)
        experts.wait(DOWN)
        out = residual.clone()
        for expert in range(self.dims.experts):
            token, choice = torch.where(routing.ids == expert)
            if len(token):
                gate_up, down = self.unpack_expert(experts.table.blocks[expert])
                gate, up = F.linear(x[token], gate_up.to(x.dtype)).chunk(2, dim=-1)
                y = F.linear(F.silu(gate) * up, down.to(x.dtype))
                out.index_add_(0, token, y * routing.weights[token, choice, None].to(y.dtype))
        return out

    def count_routed(self, routing: Choice, counts: Tensor) -> None:
        here = routing.ids[(routing.ids >= 0) & (routing.ids < self.dims.experts)]
        counts += torch.bincount(here, minlength=self.dims.experts)
