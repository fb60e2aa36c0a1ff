"""CpuExperts: routing, experts' blocks and the grouped GEMM on the CPU kernels, with every buffer made once.

Activations are fp32, as in `cpu.ops`; blocks are panels (see `moe`), dense or compressed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..expert_table import DOWN, GATE_UP
from ..ops import DENSE, ExpertDims, KernelError, LayerExperts, Recipes
from ..packing.blocks import block_bytes, decode_block, encode_block
from ..packing.formats import Packed
from . import gemm, moe, planar

PLANAR12 = "planar12"


class CpuExperts:
    """ExpertOps for batches of up to `max_tokens`; one pager owns one (not thread-safe).

    KernelError for weights that are neither bf16 nor fp32.
    """

    device = torch.device("cpu")
    act_dtype = torch.float32
    fused_formats = frozenset({PLANAR12})

    def __init__(self, dims: ExpertDims, max_tokens: int, threads: int | None = None) -> None:
        if dims.dtype not in (torch.bfloat16, torch.float32):
            raise KernelError(f"CPU kernels take bfloat16 or float32 weights, got {dims.dtype}")
        self.dims = dims
        # The dense blocks as matrices, a panel a row.
        self._panels = (
            (2 * gemm.padded(dims.intermediate) // gemm.LANES, dims.hidden * gemm.LANES),
            (gemm.padded(dims.hidden) // gemm.LANES, dims.intermediate * gemm.LANES),
        )
        self.threads = gemm.use_threads(threads)
        self._scratch = gemm.Scratch(max_tokens * dims.top_k, self.threads)
        self._buffers = moe.MoeBuffers(
            max_tokens, dims.hidden, dims.intermediate, dims.experts, dims.top_k, self.threads
        )
        self.workspace_bytes = self._scratch.nbytes + self._buffers.nbytes

    # Blocks.

    def expert_bytes(self, expert_format: str = DENSE) -> tuple[int, int]:
        """Bytes of one expert's (gate/up, down) blocks. KernelError for a format that does not exist or suit."""
        d, (gate_up, down) = self.dims, self._panels
        if expert_format == DENSE:
            return (
                moe.gate_up_bytes(d.intermediate, d.hidden, d.dtype),
                gemm.packed_bytes(d.hidden, d.intermediate, d.dtype),
            )
        sizes = block_bytes(expert_format, *gate_up, d.dtype), block_bytes(expert_format, *down, d.dtype)
        if expert_format != PLANAR12:
            return sizes
        if not (planar.fits(d.hidden) and planar.fits(d.intermediate)):
            raise KernelError("expert format planar12 needs even hidden and intermediate sizes; use dense")
        return planar.block_bytes(gate_up[0], d.hidden), planar.block_bytes(down[0], d.intermediate)

    def pack_expert(
        self, gate_up: Tensor, down: Tensor, out: tuple[Tensor, Tensor], expert_format: str = DENSE
    ) -> Recipes:
        """gate_up [2I, H], down [H, I] → the two uint8 blocks of `expert_bytes`."""
        if expert_format == DENSE:
            moe.pack_gate_up(gate_up, out[GATE_UP])
            gemm.pack(down, out[DOWN])
            return None, None
        return (
            self._compress(expert_format, gate_up, moe.pack_gate_up, 2, out[GATE_UP]),
            self._compress(expert_format, down, gemm.pack, 1, out[DOWN]),
        )

    def _compress(
        self, expert_format: str, weight: Tensor, pack: Callable[[Tensor, Tensor], None], halves: int, out: Tensor
    ) -> Packed | None:
        """Panels of `weight`, compressed into `out`; halves: how many matrices it holds."""
        rows, depth = weight.shape[0] // halves, weight.shape[1]
        dense = torch.empty(halves * gemm.packed_bytes(rows, depth, weight.dtype), dtype=torch.uint8, device="cpu")
        pack(weight, dense)
        panels = dense.view(weight.dtype).view(-1, depth, gemm.LANES)
        if rows % gemm.LANES:
            # Lanes past the last row are read by nobody; zeros there would all be escapes.
            panels[-halves:, :, rows % gemm.LANES :] = panels[-halves:, :, :1]
        if expert_format == PLANAR12:
            return planar.encode(panels, out)
        return encode_block(expert_format, panels.view(len(panels), -1), out)

    def decode_expert(
        self, expert_format: str, tensor_type: int, block: Tensor, out: Tensor, recipe: Packed | None
    ) -> None:
        """A compressed block → the dense block of the same weights; see ExpertOps."""
        panels = out.view(self.dims.dtype).view(self._panels[tensor_type])
        if expert_format == PLANAR12:
            planar.decode(block, panels, parallel=False)
        else:
            decode_block(recipe, block, panels, parallel=False)

    def unpack_expert(self, blocks: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Dense blocks → gate_up [2I, H], down [H, I]."""
        d = self.dims
        return (
            moe.unpack_gate_up(blocks[GATE_UP], d.intermediate, d.hidden, d.dtype),
            gemm.unpack(blocks[DOWN], d.hidden, d.intermediate, d.dtype),
        )

    # The layer.

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
        experts.wait(GATE_UP)
        moe.gate_up(x, experts.table, d.intermediate, d.dtype, routing, self._buffers, self._scratch)
        experts.wait(DOWN)
        moe.down(experts.table, d.intermediate, d.dtype, routing, self._buffers, self._scratch)
        return moe.combine(residual, residual, routing, self._buffers)

    def count_routed(self, routing: moe.Routing, counts: Tensor) -> None:
        """counts fp32 [E] += how many tokens each expert got."""
        counts += torch.diff(routing.expert_start)
