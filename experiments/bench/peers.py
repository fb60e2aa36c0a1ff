"""Other people's MoE layers behind one interface, for benchmarks: torch's grouped_mm, Liger, triton_kernels, vLLM.

Each is an optional import. Weights are one layer: gate_up [E, 2I, H] (gates first) and down [E, H, I], bf16.
A peer's run takes x [T, H], router logits fp32 [T, E], and the choice made from them, weights fp32 [T, top_k] and
experts int32 [T, top_k]; it returns [T, H] without the residual.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ..lib.sweep import AbsentError

Run = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """make: one layer's weights → its run. plus_one: its SwiGLU adds 1 to the linear half, as GPT-OSS does: the same
    work, other numbers. graph: whether it can be captured; False for one that reads something back to the host."""

    make: Callable[[Tensor, Tensor], Run]
    plus_one: bool = False
    graph: bool = True


def imported(module: str) -> ModuleType:
    """AbsentError where a peer's module is not there."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise AbsentError(f"{module.partition('.')[0]} cannot be imported: {error}") from None


def torch_grouped(gate_up: Tensor, down: Tensor) -> Run:
    """Sort by expert, two grouped_mm, a scatter-add: what transformers does with experts_implementation grouped_mm."""
    grouped_mm = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if grouped_mm is None:
        raise AbsentError(f"torch {torch.__version__} has no grouped_mm")
    experts = len(gate_up)

    def run(x: Tensor, logits: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        flat = chosen.flatten()
        order = torch.argsort(flat, stable=True)
        counts = torch.zeros(experts, dtype=torch.int32, device=x.device).scatter_add_(
            0, flat.long(), torch.ones_like(flat, dtype=torch.int32)
        )
        ends = counts.cumsum(0, dtype=torch.int32)
        token = order // chosen.shape[1]
        gate, up = grouped_mm(x[token], gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        y = grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
        y = y * weights.flatten()[order, None].to(y.dtype)
        return torch.zeros_like(x).index_add_(0, token, y)

    return run


def liger_fused(gate_up: Tensor, down: Tensor) -> Run:
    """Liger's fused MoE (liger_kernel ≥ 0.8). It tunes itself at the first call of a shape."""
    fused_moe = imported("liger_kernel.ops").LigerFusedMoEFunction

    def run(x: Tensor, logits: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        with torch.no_grad():
            return fused_moe.apply(x, gate_up, down, chosen, weights)

    return run


def vllm_fused(gate_up: Tensor, down: Tensor) -> Run:
    """vLLM's fused_experts with its Triton kernels and tuned tables."""
    fused_experts = imported("vllm.model_executor.layers.fused_moe").fused_experts

    def run(x: Tensor, logits: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        return fused_experts(x, gate_up, down, weights, chosen)

    return run


def triton_kernels_matmul(gate_up: Tensor, down: Tensor) -> Run:
    """OpenAI's triton_kernels, from Triton's repository: top-k, two matmuls with SwiGLU fused in the first, a sum.

    Its module is called matmul_ogs up to Triton 3.6. Its top-k takes powers of two alone.
    """
    half = gate_up.shape[1] // 2
    mixed = torch.stack([gate_up[:, :half], gate_up[:, half:]], dim=2).flatten(1, 2)
    first, second = mixed.transpose(1, 2), down.transpose(1, 2)
    swiglu = imported("triton_kernels.swiglu").swiglu_fn
    for adapter in (_triton_kernels_new, _triton_kernels_36):
        with suppress(ImportError):
            return adapter(first, second, swiglu)
    raise AbsentError("this version of triton_kernels is not known")


def _triton_kernels_new(first: Tensor, second: Tensor, swiglu_fn: object) -> Run:
    from triton_kernels.matmul import FnSpecs, FusedActivation, matmul
    from triton_kernels.reduce import reduce
    from triton_kernels.tensor import make_ragged_tensor_metadata
    from triton_kernels.topk import topk

    activation = FusedActivation(FnSpecs("swiglu", swiglu_fn, ("alpha", "limit"), reduction_n=2), (1.0, None))

    def run(x: Tensor, logits: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        top_k = chosen.shape[1]
        sparse = topk(logits, top_k, apply_softmax=True)
        # Sorted position → row, a token's choices side by side.
        rows = sparse.mask_metadata.col_sorted_indx
        ragged = make_ragged_tensor_metadata(sparse.mask_metadata.col_sum, len(rows))
        with_ragged = partial(matmul, a_ragged_metadata=ragged)
        h = with_ragged(x, first, None, gather_indx=rows // top_k, fused_activation=activation)
        y = with_ragged(h, second, None, scatter_indx=rows, gammas=sparse.vals.flatten()[rows])
        return reduce(y.view(len(x), top_k, -1), dim=1)[0]

    return run


def _triton_kernels_36(first: Tensor, second: Tensor, swiglu_fn: object) -> Run:
    from triton_kernels.matmul_ogs import (
        FnSpecs,
        FusedActivation,
        GatherIndx,
        PrecisionConfig,
        RoutingData,
        ScatterIndx,
        matmul_ogs,
    )
    from triton_kernels.tensor import make_ragged_tensor_metadata
    from triton_kernels.topk import topk

    activation = FusedActivation(FnSpecs("swiglu", swiglu_fn, ("alpha", "limit"), reduction_n=2), (1.0, None))
    matmul = partial(matmul_ogs, precision_config=PrecisionConfig())

    def run(x: Tensor, logits: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        top_k = chosen.shape[1]
        sparse = topk(logits, top_k, apply_softmax=True)
        to_sorted, to_rows = sparse.mask_metadata.row_sorted_indx, sparse.mask_metadata.col_sorted_indx
        ragged = make_ragged_tensor_metadata(sparse.mask_metadata.col_sum, len(to_rows))
        data = RoutingData(sparse.vals.flatten()[to_rows], ragged.slice_sizes, len(first), top_k, ragged)
        gather, scatter = GatherIndx(to_rows, to_sorted), ScatterIndx(to_sorted, to_rows)
        h = matmul(x, first, None, data, gather_indx=gather, fused_activation=activation)
        return matmul(h, second, None, data, scatter_indx=scatter, gammas=data.gate_scal)

    return run


PEERS = {
    "torch": Peer(torch_grouped),
    "liger": Peer(liger_fused, graph=False),
    "triton_kernels": Peer(triton_kernels_matmul, plus_one=True),
    "vllm": Peer(vllm_fused),
}
