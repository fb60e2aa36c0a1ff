"""Other people's MoE layers behind one interface, for benchmarks: torch's grouped_mm, OpenAI's triton_kernels, vLLM.

Each is an optional import. `weights` is one layer: gate_up [E, 2I, H] (gates first) and down [E, H, I], bf16.
A peer's `run` takes x [T, H], router logits fp32 [T, E], and the choice made from them, weights fp32 [T, top_k] and
experts int32 [T, top_k]; it returns [T, H] without the residual.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Run = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class PeerMissingError(Exception):
    """The peer is not installed, or has another interface than the one known here."""


def torch_grouped(gate_up: Tensor, down: Tensor) -> Run:
    """Sort by expert, two grouped_mm, a scatter-add: what transformers does with experts_implementation grouped_mm."""
    grouped_mm = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if grouped_mm is None:
        raise PeerMissingError(f"torch {torch.__version__} has no grouped_mm")
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


def vllm_fused(gate_up: Tensor, down: Tensor) -> Run:
    """vLLM's fused_experts with its Triton kernels and tuned tables."""
    try:
        from vllm.model_executor.layers.fused_moe import fused_experts
    except ImportError as error:
        raise PeerMissingError(f"vllm cannot be imported: {error}") from None

    def run(x: Tensor, logits: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        return fused_experts(x, gate_up, down, weights, chosen)

    return run


def triton_kernels_matmul(gate_up: Tensor, down: Tensor) -> Run:
    """OpenAI's triton_kernels: routing and two matmul_ogs, SwiGLU fused in the first.

    Its SwiGLU adds 1 to the linear half, as GPT-OSS does: the same work, other numbers.
    """
    try:
        from triton_kernels.matmul_ogs import FnSpecs, FusedActivation, PrecisionConfig, matmul_ogs
        from triton_kernels.routing import routing
        from triton_kernels.swiglu import swiglu_fn
    except ImportError as error:
        raise PeerMissingError(f"triton_kernels cannot be imported: {error}") from None
    half = gate_up.shape[1] // 2
    interleaved = torch.stack([gate_up[:, :half], gate_up[:, half:]], dim=2).flatten(1, 2)
    first, second = interleaved.transpose(1, 2), down.transpose(1, 2)
    activation = FusedActivation(FnSpecs("swiglu", swiglu_fn, ("alpha", "limit")), (1.0, None), 2)

    def run(x: Tensor, logits: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        data, gather, scatter = routing(logits, chosen.shape[1])
        h = matmul_ogs(
            x, first, None, data, gather_indx=gather, precision_config=PrecisionConfig(), fused_activation=activation
        )
        return matmul_ogs(
            h, second, None, data, scatter_indx=scatter, precision_config=PrecisionConfig(), gammas=data.gate_scal
        )

    return run


PEERS: dict[str, Callable[[Tensor, Tensor], Run]] = {
    "torch": torch_grouped,
    "triton_kernels": triton_kernels_matmul,
    "vllm": vllm_fused,
}
# Peers whose numbers are ours, and are checked before they are timed.
SAME_NUMBERS = ("torch", "vllm")
