"""A layer's gate in one launch: RMSNorm, router, top-k and the sort by expert, for batches that one program can sort.

    x        [T, H]    = rms_norm(hidden, norm), in the dtype of hidden
    logits   [T, E]    = x @ router^T, fp32; with a shared expert one more column, x @ score^T
    routing            as `routing` makes it from logits

Each program has 16 outputs of the router, norms the rows as it reads them, and stores its share of x. It counts itself
in when its logits are stored; the last one finds all of them there, and does the rest. Nobody waits for anybody, as in
the last-block reductions of CUDA's samples (threadFenceReduction).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launches import Case
from ..ops import KernelError
from ..work import Work, declares
from ._routing import chosen_bytes, route_batch
from .portable import after_inputs, cast, dependent_launch, dot
from .routing import Router, Routing
from .tiles import Tile, capability_of, fit

_OUTPUTS = 16


class GateWeights(NamedTuple):
    """score: of the shared expert that is routed beside the others, if there is one."""

    norm: Tensor  # (H,) fp32
    router: Tensor  # (E, H)
    score: Tensor | None  # (1, H)


@triton.jit
def _normed(hidden_ptrs, norm_ptr, scale, k, HIDDEN: tl.constexpr):
    """Columns k of the rows at hidden_ptrs [BLOCK_M, 1], as activations; 0 beyond HIDDEN."""
    inside = k < HIDDEN
    x = tl.load(hidden_ptrs + k[None, :], mask=inside[None, :], other=0.0)
    normed = x.to(tl.float32) * scale[:, None] * tl.load(norm_ptr + k, mask=inside, other=0.0)[None, :]
    return cast(normed, x.dtype)


def _gate_work(args: Mapping[str, Any]) -> Work:
    """Tokens, the router's weights, the norm, logits, and what routing makes of them."""
    hidden, weights = args["hidden_ptr"], args["weights"]
    outputs = args["E"] + (weights.score is not None)
    matrix = outputs * args["HIDDEN"]
    nbytes = hidden.nbytes + matrix * weights.router.element_size() + args["x_ptr"].nbytes
    logits = args["T"] * outputs * args["logits_ptr"].element_size()
    return Work(nbytes + logits + chosen_bytes(args["routing"]), 2.0 * args["T"] * matrix)


@triton.jit(do_not_specialize=["T", "MAX_BLOCKS"], launch_metadata=declares(_gate_work))
def _gate_kernel(
    hidden_ptr,  # (T, HIDDEN)
    weights,  # `GateWeights`
    x_ptr,  # (T, HIDDEN)
    logits_ptr,  # (T, E) fp32, or (T, E + 1)
    arrived_ptr,  # (1,) int32: 0 before and after
    num_tokens_ptr,  # (1,) int32 or None
    routing,  # `RoutingArrays`
    eps,
    T,
    E,
    MAX_BLOCKS,
    HIDDEN: tl.constexpr,
    TILE: tl.constexpr,
    SIZES: tl.constexpr,
):
    """Grid: (cdiv(E, block_n),), or one more for the shared expert's score."""
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_N: tl.constexpr = TILE.block_n
    BLOCK_K: tl.constexpr = TILE.block_k
    after_inputs()
    pid = tl.program_id(0)
    rows = tl.arange(0, BLOCK_M)
    hidden_ptrs = hidden_ptr + tl.minimum(rows, T - 1).to(tl.int64)[:, None] * HIDDEN
    squares = tl.zeros([BLOCK_M], tl.float32)
    for k0 in tl.static_range(0, HIDDEN, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        values = tl.load(hidden_ptrs + k[None, :], mask=k[None, :] < HIDDEN, other=0.0).to(tl.float32)
        squares += tl.sum(values * values, axis=1)
    scale = 1.0 / tl.sqrt(squares / HIDDEN + eps)

    outputs = E + SIZES.shared
    n, end = pid * BLOCK_N + tl.arange(0, BLOCK_N), E
    w_ptrs = weights.router + tl.minimum(n, E - 1)[:, None] * HIDDEN
    if weights.score is not None:
        # The score's column is the last program's alone.
        last = pid == tl.num_programs(0) - 1
        n, end = tl.where(last, E + tl.arange(0, BLOCK_N), n), tl.where(last, outputs, E)
        w_ptrs = tl.where(last, weights.score + tl.zeros_like(n)[:, None], w_ptrs)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in tl.range(0, HIDDEN, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        w = tl.load(w_ptrs + k[None, :], mask=k[None, :] < HIDDEN, other=0.0)
        acc = dot(_normed(hidden_ptrs, weights.norm, scale, k, HIDDEN), w.T, acc)
    logits_ptrs = logits_ptr + rows[:, None] * outputs + n[None, :]
    tl.store(logits_ptrs, acc, mask=(rows[:, None] < T) & (n[None, :] < end))

    for k0 in tl.range(pid * BLOCK_K, HIDDEN, tl.num_programs(0) * BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x = _normed(hidden_ptrs, weights.norm, scale, k, HIDDEN)
        x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * HIDDEN + k[None, :]
        tl.store(x_ptrs, x, mask=(rows[:, None] < T) & (k[None, :] < HIDDEN))

    # All threads have stored before one of them releases; what it acquires holds for all that read after it.
    tl.debug_barrier()
    if tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(arrived_ptr, 0)
        route_batch(logits_ptr, None, num_tokens_ptr, routing, T, E, MAX_BLOCKS, SIZES)


def norm_and_route(
    hidden: Tensor, weights: GateWeights, eps: float, router: Router, x: Tensor, block_m: int,
    num_tokens: Tensor | None = None, shared: tuple[Tensor, Tensor] | None = None,
) -> Routing:  # fmt: skip
    """The routing of hidden [T, H], and its norm in x [T, H]; valid until the router's next.

    num_tokens int32 [1] on the device: later rows are padding, and reach no expert. shared: (gate_up, down) of an
    expert of the others' sizes that every token uses, as weights.score says. KernelError for other shapes, and for more
    tokens than one program can sort.
    """
    tokens, size = hidden.shape
    experts = router.num_experts
    if weights.router.shape != (experts, size) or weights.norm.shape != (size,):
        raise KernelError(f"a router of {experts} experts needs weights [{experts}, {size}] and a norm [{size}]")
    if tokens > router.most_fused:
        raise KernelError(f"one program sorts at most {router.most_fused} tokens, got {tokens}")
    if not (hidden.is_contiguous() and x.is_contiguous() and x.shape == hidden.shape):
        raise KernelError(f"hidden and x must be contiguous and of one shape, got {hidden.shape} and {x.shape}")
    assert (weights.score is None) == (shared is None), "a shared expert has a score"
    routing, sizes = router.prepare(tokens, block_m, num_tokens, shared=shared)
    if tokens:
        capability = capability_of(hidden.device)
        tile = gate_tile(tokens, capability, hidden.dtype.itemsize)
        programs = triton.cdiv(experts, tile.block_n) + sizes.shared
        _gate_kernel[(programs,)](
            hidden, weights, x, router.logits, router.arrived, num_tokens, routing.arrays, eps, tokens, experts,
            routing.max_blocks, size, tile, sizes, num_warps=sizes.num_warps, num_stages=tile.num_stages,
            **dependent_launch(capability),
        )  # fmt: skip
    else:
        router.clear()
    return routing


def gate_tile(tokens: int, capability: int, itemsize: int) -> Tile:
    """A router has few outputs: 16 of them a program give E / 16 programs, each with little to read."""
    block_m = max(16, triton.next_power_of_2(tokens))
    block_k = 128 if block_m > 32 else 256
    return fit(Tile(block_m, _OUTPUTS, block_k if itemsize == 2 else block_k // 4, 4, 3), capability, itemsize)


def audit_cases() -> Iterator[Case]:
    """For `kernels.audit`: the gates of Qwen3-30B-A3B, and of Qwen3-Next with its shared expert."""
    hidden = 2048
    bf16 = partial(torch.empty, dtype=torch.bfloat16, device="meta")
    for experts, top_k, intermediate in ((128, 8, 0), (512, 10, 512)):
        router = Router(64, experts, top_k, True, "meta")
        shared = (bf16(2 * intermediate, hidden), bf16(hidden, intermediate)) if intermediate else None
        weights = GateWeights(
            torch.empty(hidden, device="meta"), bf16(experts, hidden), bf16(1, hidden) if shared else None
        )
        for tokens in (1, router.most_fused):
            x = bf16(tokens, hidden)
            launch = partial(norm_and_route, x, weights, 1e-6, router, torch.empty_like(x), 16, None, shared)
            yield Case(f"gate/{experts} experts, {tokens} tokens", launch, (_gate_kernel,))
