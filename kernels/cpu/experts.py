"""CpuExperts: routing, experts' blocks and the grouped GEMM on the CPU kernels, with every buffer made once.

Activations are fp32, rounded inside as in `cpu.ops`; blocks are panels (see `moe`), dense or compressed.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..expert_blocks import ExpertBlocks, Shape
from ..expert_layer import ExpertLayer
from ..expert_table import DOWN, GATE_UP
from ..ops import ExpertDims, KernelError, LayerExperts
from . import gemm, moe


class CpuBlocks(ExpertBlocks):
    """Experts in panels. KernelError for weights that are neither bf16 nor fp32."""

    backend = "cpu"

    def __init__(self, dims: ExpertDims) -> None:
        if dims.dtype not in (torch.bfloat16, torch.float32):
            raise KernelError(f"CPU kernels take bfloat16 or float32 weights, got {dims.dtype}")
        super().__init__(dims)

    def restore_expert(self, blocks: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        d = self.dims
        return (
            moe.restore_gate_up(blocks[GATE_UP], d.intermediate, d.hidden, d.dtype),
            gemm.restore(blocks[DOWN], d.hidden, d.intermediate, d.dtype),
        )

    @property
    def _matrices(self) -> tuple[Shape, Shape]:
        """A panel a row."""
        d = self.dims
        return (
            (2 * gemm.padded(d.intermediate) // gemm.LANES, d.hidden * gemm.LANES),
            (gemm.padded(d.hidden) // gemm.LANES, d.intermediate * gemm.LANES),
        )

    def _arrange(self, tensor_type: int, weight: Tensor, out: Tensor) -> None:
        arrange, halves = ((moe.arrange_gate_up, 2), (gemm.arrange, 1))[tensor_type]
        arrange(weight, out.view(-1).view(torch.uint8))
        if spare := -(len(weight) // halves) % gemm.LANES:
            # Lanes past the last row are read by nobody; zeros there would all be escapes of a compressed format.
            panels = out.view(len(out), -1, gemm.LANES)[-halves:]
            panels[:, :, -spare:] = panels[:, :, :1]


class CpuExperts(ExpertLayer[moe.Routing], CpuBlocks):
    """ExpertOps for batches of up to `max_tokens`; one pager owns one (not thread-safe).

    KernelError for weights that are neither bf16 nor fp32.
    """

    device = torch.device("cpu")
    act_dtype = torch.float32

    def __init__(self, dims: ExpertDims, max_tokens: int, threads: int | None = None) -> None:
        super().__init__(dims)
        self.threads = gemm.use_threads(threads)
        self._scratch = gemm.Scratch(max_tokens * dims.top_k, self.threads)
        self._buffers = moe.MoeBuffers(
            max_tokens, dims.hidden, dims.intermediate, dims.experts, dims.top_k, self.threads, dims.dtype
        )
        self.workspace_bytes = self._scratch.nbytes + self._buffers.nbytes

    def route(self, logits: Tensor, num_tokens: Tensor | None = None) -> moe.Routing:
        """fp32 logits [T, E]: softmax, the best top_k, rows sorted by expert."""
        assert num_tokens is None, "padding is for captured graphs, which a CPU does not have"
        return moe.route(logits, self.dims.top_k, self.dims.renormalise, self._buffers)

    def route_to(self, topk_ids: Tensor, topk_weights: Tensor, num_tokens: Tensor | None = None) -> moe.Routing:
        """topk_ids integers [T, top_k], any outside 0 … E - 1 for experts elsewhere; topk_weights [T, top_k]."""
        assert num_tokens is None, "padding is for captured graphs, which a CPU does not have"
        return moe.route_to(topk_ids, topk_weights, self._buffers)

    def moe_add(self, x: Tensor, routing: moe.Routing, experts: LayerExperts, residual: Tensor) -> Tensor:
        """residual fp32 [T, H] += mixture of experts of x fp32 [T, H]; returns residual."""
        d = self.dims
        if experts.in_place:
            table = experts.table
            return moe.layer(x, table, d.intermediate, d.dtype, routing, residual, self._buffers, self._scratch)
        experts.need(routing.busy())
        for chosen in experts.ready(GATE_UP):
            moe.gate_up(x, experts.table, d.intermediate, d.dtype, routing, self._buffers, self._scratch, chosen)
        for chosen in experts.ready(DOWN):
            moe.down(experts.table, d.intermediate, d.dtype, routing, self._buffers, self._scratch, chosen)
        return moe.combine(residual, residual, routing, self._buffers)

    def count_routed(self, routing: moe.Routing, counts: Tensor) -> None:
        """counts fp32 [E] += how many tokens each expert got."""
        counts += torch.from_numpy(np.diff(routing.expert_start))

    def chosen(self, routing: moe.Routing) -> Tensor:
        """Integers [T, top_k]: the experts of each token; any outside 0 … E - 1 are elsewhere."""
        return torch.from_numpy(routing.topk_ids)
