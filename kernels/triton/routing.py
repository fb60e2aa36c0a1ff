"""Routing: softmax, top-k, and the stable sort by expert of a token's choices, which the grouped GEMM reads.

A row is one (token, choice) pair, row = token * top_k + choice. Data map (T tokens, E experts, R = T * top_k rows;
made here, read by the grouped GEMM and the combine; everything stays on the device and has a fixed shape):

    experts       int32 [T, top_k]     chosen experts, best first; equal logits: the lower id first; -1: elsewhere
    weights       fp32  [T, top_k]     softmax over all experts, or over the chosen ones (`renormalise`)
    order         int32 [R]            sorted position → row; by expert, then by row
    expert_start  int32 [E + 1]        first sorted position of each expert; the last entry is their number
    block_map     int32 [B, 4]         block → (expert, first position, end position, 0); blocks of ≤ block_m
                                       positions, none crosses an expert; expert -1 beyond `num_blocks`
    num_blocks    int32 [1]            blocks in use; B is the least bound that holds for any routing
    num_tokens    int32 [1] or None    tokens from there on are padding: they reach no expert

Routing starts from router logits, or from experts and weights that a host has chosen: then some may be another rank's,
and reach nothing here.

Example: top_k 1, block_m 2, tokens choose experts 1 0 1 1: order 1 0 2 3, expert_start 0 1 4,
block_map (0, 0, 1) (1, 1, 3) (1, 3, 4).

Up to `_FUSED_ELEMENTS` of logits one program does it all in one launch (decode). Beyond, three: top-k and a
histogram of each chunk of tokens; a scan of the histograms over chunks and experts; the placement of each chunk.
Counting sort in chunks, where the rank in a chunk is an exclusive sum down the one-hot matrix: an expert occurs at
most once in a token's row, so the sum over earlier tokens is the rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launches import Case
from ..ops import KernelError

# Elements of the [BLOCK_T, BLOCK_E] matrices of a program, of which some six live at a time, and of one warp's part:
# 16 registers a thread and matrix.
_FUSED_ELEMENTS = 4096
_WARP_ELEMENTS = 512
_MAX_TOP_K = 32


@dataclass(frozen=True)
class Routing:
    """See the module's data map. `max_blocks` is len(block_map)."""

    experts: Tensor
    weights: Tensor
    order: Tensor
    expert_start: Tensor
    block_map: Tensor
    num_blocks: Tensor
    block_m: int
    num_tokens: Tensor | None = None
    some_elsewhere: bool = False

    @property
    def max_blocks(self) -> int:
        return len(self.block_map)


def max_blocks(num_rows: int, num_experts: int, block_m: int) -> int:
    """Blocks that any routing of `num_rows` rows can need: each expert in use leaves at most one part-filled."""
    return num_rows // block_m + min(num_rows, num_experts)


def block_t(num_experts: int) -> int:
    """Tokens of one chunk."""
    return max(1, min(128, _FUSED_ELEMENTS // triton.next_power_of_2(num_experts)))


@triton.jit
def _select(
    logits_ptr, num_tokens, first, E, stride_t, TOP_K: tl.constexpr, TOP_K_PAD: tl.constexpr,
    RENORMALISE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """(ids int32, weights fp32) [BLOCK_T, TOP_K_PAD] from token `first` on, and who was chosen [.., BLOCK_E]."""
    t = first + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    j = tl.arange(0, TOP_K_PAD)
    real = e[None, :] < E
    x = tl.load(
        logits_ptr + t[:, None].to(tl.int64) * stride_t + e[None, :],
        mask=(t[:, None] < num_tokens) & real,
        other=float("-inf"),
    ).to(tl.float32)
    # NaN is never chosen before a number, and whatever the logits are, ids are valid and distinct.
    x = tl.where(x == x, x, float("-inf"))
    largest = tl.max(x, axis=1)
    chosen = (x != x).to(tl.int32)
    ids = tl.zeros([BLOCK_T, TOP_K_PAD], tl.int32)
    weights = tl.zeros([BLOCK_T, TOP_K_PAD], tl.float32)
    for choice in tl.static_range(TOP_K):
        free = real & (chosen == 0)
        best = tl.max(tl.where(free, x, float("-inf")), axis=1)
        expert = tl.min(tl.where(free & (x == best[:, None]), e[None, :], BLOCK_E), axis=1)
        chosen += (e[None, :] == expert[:, None]).to(tl.int32)
        ids = tl.where(j[None, :] == choice, expert[:, None], ids)
        weights = tl.where(j[None, :] == choice, tl.exp(best - largest)[:, None], weights)
    if RENORMALISE:
        total = tl.sum(weights, axis=1)
    else:
        total = tl.sum(tl.exp(x - largest[:, None]), axis=1)
    return ids, weights / total[:, None], tl.where(t[:, None] < num_tokens, chosen, 0)


@triton.jit
def _load_choices(
    ids_ptr, weights_ptr, num_tokens, first, E, TOP_K: tl.constexpr, TOP_K_PAD: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """As `_select`, of choices that were made before; ids outside 0 … E - 1 become -1, and are chosen by nobody."""
    t = first + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    j = tl.arange(0, TOP_K_PAD)
    valid = (t[:, None] < num_tokens) & (j[None, :] < TOP_K)
    at = t[:, None] * TOP_K + j[None, :]
    ids = tl.load(ids_ptr + at, mask=valid, other=-1).to(tl.int32)
    ids = tl.where((ids >= 0) & (ids < E), ids, -1)
    weights = tl.load(weights_ptr + at, mask=valid, other=0.0).to(tl.float32)
    chosen = tl.zeros([BLOCK_T, BLOCK_E], tl.int32)
    for choice in tl.static_range(TOP_K):
        expert = tl.sum(tl.where(j[None, :] == choice, ids, 0), axis=1)
        chosen += (e[None, :] == expert[:, None]).to(tl.int32)
    return ids, weights, chosen


@triton.jit
def _choices(
    logits_ptr, ids_ptr, given_ptr, num_tokens, first, E, stride_t, GIVEN: tl.constexpr, TOP_K: tl.constexpr,
    TOP_K_PAD: tl.constexpr, RENORMALISE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    if GIVEN:
        ids, weights, chosen = _load_choices(
            ids_ptr, given_ptr, num_tokens, first, E, TOP_K, TOP_K_PAD, BLOCK_T, BLOCK_E
        )
    else:
        ids, weights, chosen = _select(
            logits_ptr, num_tokens, first, E, stride_t, TOP_K, TOP_K_PAD, RENORMALISE, BLOCK_T, BLOCK_E
        )
    return ids, weights, chosen


@triton.jit
def _store_choices(
    experts_ptr, weights_ptr, ids, weights, first, T, TOP_K: tl.constexpr, TOP_K_PAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    t = first + tl.arange(0, BLOCK_T)
    j = tl.arange(0, TOP_K_PAD)
    mask = (t[:, None] < T) & (j[None, :] < TOP_K)
    tl.store(experts_ptr + t[:, None] * TOP_K + j[None, :], ids, mask=mask)
    tl.store(weights_ptr + t[:, None] * TOP_K + j[None, :], weights, mask=mask)


@triton.jit
def _store_order(
    order_ptr, ids, chosen, starts, num_tokens, first, SOME: tl.constexpr, TOP_K: tl.constexpr,
    TOP_K_PAD: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Place a chunk's rows; starts [BLOCK_E]: the first position of each expert that belongs to this chunk."""
    t = first + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    j = tl.arange(0, TOP_K_PAD)
    places = starts[None, :] + tl.cumsum(chosen, axis=0) - chosen
    for choice in tl.static_range(TOP_K):
        expert = tl.sum(tl.where(j[None, :] == choice, ids, 0), axis=1)
        place = tl.sum(tl.where(e[None, :] == expert[:, None], places, 0), axis=1)
        here = (t < num_tokens) & (expert >= 0) if SOME else t < num_tokens
        tl.store(order_ptr + place, t * TOP_K + choice, mask=here)


@triton.jit
def _store_blocks(
    counts, starts, expert_start_ptr, block_map_ptr, num_blocks_ptr, E, MAX_BLOCKS, BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    e = tl.arange(0, BLOCK_E)
    tl.store(expert_start_ptr + e, starts, mask=e < E)
    tl.store(expert_start_ptr + E, tl.sum(counts, axis=0))
    blocks = (counts + BLOCK_M - 1) // BLOCK_M
    ends = tl.cumsum(blocks, axis=0)
    total = tl.sum(blocks, axis=0)
    tl.store(num_blocks_ptr, total)
    for b0 in range(0, MAX_BLOCKS, BLOCK_B):
        b = b0 + tl.arange(0, BLOCK_B)
        expert = tl.sum((ends[None, :] <= b[:, None]).to(tl.int32), axis=1)
        mine = e[None, :] == expert[:, None]
        begin = tl.sum(tl.where(mine, (starts - (ends - blocks) * BLOCK_M)[None, :], 0), axis=1) + b * BLOCK_M
        end = tl.minimum(begin + BLOCK_M, tl.sum(tl.where(mine, (starts + counts)[None, :], 0), axis=1))
        used, row = b < total, block_map_ptr + b * 4
        mask = b < MAX_BLOCKS
        tl.store(row, tl.where(used, expert, -1), mask=mask)
        tl.store(row + 1, tl.where(used, begin, 0), mask=mask)
        tl.store(row + 2, tl.where(used, end, 0), mask=mask)
        tl.store(row + 3, 0, mask=mask)


@triton.jit(do_not_specialize=["T", "MAX_BLOCKS"])
def _route_kernel(
    logits_ptr,  # (T, E) fp32; unread if GIVEN
    ids_ptr,  # (T, TOP_K) integers, and their weights, likewise unread unless GIVEN
    given_ptr,  # (T, TOP_K)
    num_tokens_ptr,  # (1,) int32: tokens from there on are padding
    experts_ptr,  # (T, TOP_K) int32
    weights_ptr,  # (T, TOP_K) fp32
    order_ptr,  # (R,) int32
    expert_start_ptr,  # (E + 1,) int32
    block_map_ptr,  # (MAX_BLOCKS, 4) int32
    num_blocks_ptr,  # (1,) int32
    T, E, MAX_BLOCKS, stride_t,
    GIVEN: tl.constexpr, TOP_K: tl.constexpr, TOP_K_PAD: tl.constexpr, RENORMALISE: tl.constexpr,
    PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Grid: (1,). All of the routing of a batch that fits one chunk."""
    num_tokens = tl.minimum(tl.load(num_tokens_ptr), T) if PADDED else T
    ids, weights, chosen = _choices(
        logits_ptr, ids_ptr, given_ptr, num_tokens, 0, E, stride_t, GIVEN, TOP_K, TOP_K_PAD, RENORMALISE, BLOCK_T,
        BLOCK_E,
    )  # fmt: skip
    _store_choices(experts_ptr, weights_ptr, ids, weights, 0, T, TOP_K, TOP_K_PAD, BLOCK_T)
    counts = tl.sum(chosen, axis=0)
    starts = tl.cumsum(counts, axis=0) - counts
    _store_order(order_ptr, ids, chosen, starts, num_tokens, 0, GIVEN, TOP_K, TOP_K_PAD, BLOCK_T, BLOCK_E)
    _store_blocks(
        counts, starts, expert_start_ptr, block_map_ptr, num_blocks_ptr, E, MAX_BLOCKS, BLOCK_M, BLOCK_E, BLOCK_B
    )


@triton.jit(do_not_specialize=["T"])
def _top_k_kernel(
    logits_ptr, ids_ptr, given_ptr, num_tokens_ptr, experts_ptr, weights_ptr,
    chunk_counts_ptr,  # (chunks, E) int32: rows of each expert in each chunk
    T, E, stride_t,
    GIVEN: tl.constexpr, TOP_K: tl.constexpr, TOP_K_PAD: tl.constexpr, RENORMALISE: tl.constexpr,
    PADDED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Grid: (chunks,)."""
    chunk = tl.program_id(0)
    num_tokens = tl.minimum(tl.load(num_tokens_ptr), T) if PADDED else T
    first = chunk * BLOCK_T
    ids, weights, chosen = _choices(
        logits_ptr, ids_ptr, given_ptr, num_tokens, first, E, stride_t, GIVEN, TOP_K, TOP_K_PAD, RENORMALISE, BLOCK_T,
        BLOCK_E,
    )  # fmt: skip
    _store_choices(experts_ptr, weights_ptr, ids, weights, first, T, TOP_K, TOP_K_PAD, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    tl.store(chunk_counts_ptr + chunk * E + e, tl.sum(chosen, axis=0), mask=e < E)


@triton.jit(do_not_specialize=["CHUNKS", "MAX_BLOCKS"])
def _scan_kernel(
    chunk_counts_ptr,  # (chunks, E) int32: in, counts; out, first position of each (chunk, expert)
    expert_start_ptr, block_map_ptr, num_blocks_ptr, CHUNKS, E, MAX_BLOCKS,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Grid: (1,)."""
    e = tl.arange(0, BLOCK_E)
    counts = tl.zeros([BLOCK_E], tl.int32)
    for c0 in range(0, CHUNKS, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        mask = (c[:, None] < CHUNKS) & (e[None, :] < E)
        counts += tl.sum(tl.load(chunk_counts_ptr + c[:, None] * E + e[None, :], mask=mask, other=0), axis=0)
    starts = tl.cumsum(counts, axis=0) - counts
    begin = starts
    for c0 in range(0, CHUNKS, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        mask = (c[:, None] < CHUNKS) & (e[None, :] < E)
        at = chunk_counts_ptr + c[:, None] * E + e[None, :]
        part = tl.load(at, mask=mask, other=0)
        tl.store(at, begin[None, :] + tl.cumsum(part, axis=0) - part, mask=mask)
        begin += tl.sum(part, axis=0)
    _store_blocks(
        counts, starts, expert_start_ptr, block_map_ptr, num_blocks_ptr, E, MAX_BLOCKS, BLOCK_M, BLOCK_E, BLOCK_B
    )


@triton.jit(do_not_specialize=["T"])
def _place_kernel(
    experts_ptr, weights_ptr, chunk_starts_ptr, num_tokens_ptr, order_ptr, T, E,
    TOP_K: tl.constexpr, TOP_K_PAD: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Grid: (chunks,)."""
    chunk = tl.program_id(0)
    num_tokens = tl.minimum(tl.load(num_tokens_ptr), T) if PADDED else T
    first = chunk * BLOCK_T
    ids, _, chosen = _load_choices(
        experts_ptr, weights_ptr, num_tokens, first, E, TOP_K, TOP_K_PAD, BLOCK_T, BLOCK_E
    )  # fmt: skip
    e = tl.arange(0, BLOCK_E)
    starts = tl.load(chunk_starts_ptr + chunk * E + e, mask=e < E, other=0)
    _store_order(order_ptr, ids, chosen, starts, num_tokens, first, True, TOP_K, TOP_K_PAD, BLOCK_T, BLOCK_E)


class Router:
    """Routes batches of up to `max_tokens`; all its buffers are made here, none in `__call__`.

    Raises KernelError when top_k exceeds 32 or, from logits, the number of experts: where a host chooses, most of a
    token's experts may be elsewhere.
    """

    def __init__(
        self, max_tokens: int, num_experts: int, top_k: int, renormalise: bool, device: torch.device | str
    ) -> None:
        if not 1 <= top_k <= _MAX_TOP_K:
            raise KernelError(f"top_k must be 1 to {_MAX_TOP_K}, got {top_k}")
        self.num_experts, self.top_k, self.renormalise = num_experts, top_k, renormalise
        rows = max_tokens * top_k
        self._block_t = block_t(num_experts)

        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self._experts, self._order = ints(rows), ints(rows)
        self._weights = torch.zeros(rows, dtype=torch.float32, device=device)
        self.expert_start, self._num_blocks = ints(num_experts + 1), ints(1)
        # Blocks hold at least one row: the bound for any block_m that a launch may choose.
        self._block_map = ints(max_blocks(rows, num_experts, 16) + 1, 4)
        self._chunk_counts = ints(max(1, triton.cdiv(max_tokens, self._block_t)), num_experts)

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, Tensor))

    def __call__(self, logits: Tensor, block_m: int, num_tokens: Tensor | None = None) -> Routing:
        """Route fp32 logits [T, E]; `num_tokens` int32 [1] on the device: later rows are padding, and reach no expert.

        The result is valid until the next call.
        """
        if logits.shape[1:] != (self.num_experts,) or logits.dtype != torch.float32:
            raise KernelError(f"logits must be fp32 [T, {self.num_experts}], got {logits.dtype} {list(logits.shape)}")
        if self.top_k > self.num_experts:
            raise KernelError(f"logits of {self.num_experts} experts cannot choose top_k {self.top_k} of them")
        return self._route(logits, None, block_m, num_tokens)

    def given(self, topk_ids: Tensor, topk_weights: Tensor, block_m: int, num_tokens: Tensor | None = None) -> Routing:
        """The same for experts that are chosen already: integers [T, top_k], a token's all different, any outside
        0 … E - 1 for experts that are elsewhere; weights [T, top_k] in any float dtype."""
        for name, given in (("topk_ids", topk_ids), ("topk_weights", topk_weights)):
            if given.shape[1:] != (self.top_k,) or len(given) != len(topk_ids) or not given.is_contiguous():
                raise KernelError(f"{name} must be contiguous [T, {self.top_k}], got {list(given.shape)}")
        if topk_ids.dtype not in (torch.int32, torch.int64):
            raise KernelError(f"topk_ids must be int32 or int64, got {topk_ids.dtype}")
        return self._route(topk_ids, topk_weights, block_m, num_tokens)

    def _route(self, source: Tensor, weights: Tensor | None, block_m: int, num_tokens: Tensor | None) -> Routing:
        """source: logits; or, with weights, ids."""
        tokens, experts, given = len(source), self.num_experts, weights is not None
        rows = tokens * self.top_k
        if rows > self._order.numel():
            raise KernelError(f"{tokens} tokens exceed the {self._order.numel() // self.top_k} of this router")
        blocks = max_blocks(rows, experts, block_m)
        routing = Routing(
            self._experts[:rows].view(tokens, self.top_k), self._weights[:rows].view(tokens, self.top_k),
            self._order[:rows], self.expert_start, self._block_map[:blocks], self._num_blocks, block_m, num_tokens,
            given,
        )  # fmt: skip
        if tokens == 0:
            self.expert_start.zero_()
            self._num_blocks.zero_()
            return routing
        sizes = launch_sizes(experts, self.top_k, tokens)
        common = dict(TOP_K=self.top_k, TOP_K_PAD=sizes["TOP_K_PAD"], PADDED=num_tokens is not None)
        common["num_warps"] = sizes["num_warps"]
        padding = self._num_blocks if num_tokens is None else num_tokens  # any pointer: unread unless PADDED
        block_e, rows = sizes["BLOCK_E"], sizes["BLOCK_T"]
        # Of three sources either the first is read, or the others.
        sources = (self._weights, source, weights) if given else (source, self._experts, self._weights)
        choose = dict(GIVEN=given, RENORMALISE=self.renormalise, BLOCK_T=rows, BLOCK_E=block_e)
        outputs = (routing.experts, routing.weights)
        layout = (self.expert_start, routing.block_map, self._num_blocks)
        if tokens <= self._block_t:
            _route_kernel[(1,)](
                *sources, padding, *outputs, routing.order, *layout, tokens, experts, blocks, source.stride(0),
                BLOCK_M=block_m, BLOCK_B=sizes["BLOCK_B"], **choose, **common,
            )  # fmt: skip
            return routing
        chunks = triton.cdiv(tokens, rows)
        _top_k_kernel[(chunks,)](
            *sources, padding, *outputs, self._chunk_counts, tokens, experts, source.stride(0), **choose, **common
        )
        _scan_kernel[(1,)](
            self._chunk_counts, *layout, chunks, experts, blocks, BLOCK_M=block_m, BLOCK_C=rows, BLOCK_E=block_e,
            BLOCK_B=sizes["BLOCK_B"], num_warps=sizes["num_warps"],
        )  # fmt: skip
        _place_kernel[(chunks,)](
            *outputs, self._chunk_counts, padding, routing.order, tokens, experts, BLOCK_T=rows, BLOCK_E=block_e,
            **common,
        )  # fmt: skip
        return routing


def launch_sizes(num_experts: int, top_k: int, tokens: int) -> dict[str, int]:
    """Tile sizes of the routing kernels for a batch of `tokens`, and their warps."""
    block_e = triton.next_power_of_2(num_experts)
    rows = min(block_t(num_experts), triton.next_power_of_2(max(1, tokens)))
    return {
        "num_warps": max(4, min(8, rows * block_e // _WARP_ELEMENTS)),
        "TOP_K_PAD": triton.next_power_of_2(top_k),
        "BLOCK_E": block_e,
        "BLOCK_T": rows,
        # The block map comes from [BLOCK_B, BLOCK_E] comparisons, beside which other arrays live.
        "BLOCK_B": max(4, rows // 2),
    }


def routing_torch(logits: Tensor, top_k: int, renormalise: bool, block_m: int) -> Routing:
    """Reference: float64 softmax, a stable sort, and Python loops for the block map. Same shapes as `Router`."""
    num_experts = logits.shape[1]
    x = logits.double()
    # Stable, so that equal logits keep the lower id first; torch.topk promises no order.
    order = torch.argsort(torch.where(x.isnan(), -torch.inf, x), dim=-1, descending=True, stable=True)[:, :top_k]
    weights = x.softmax(dim=-1).gather(-1, order)
    if renormalise:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    flat = order.reshape(-1)
    counts = torch.bincount(flat, minlength=num_experts)
    start = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    blocks = [
        (expert, first, min(first + block_m, int(start[expert + 1])), 0)
        for expert in range(num_experts)
        for first in range(int(start[expert]), int(start[expert + 1]), block_m)
    ]
    padded = blocks + [(-1, 0, 0, 0)] * (max_blocks(len(flat), num_experts, block_m) - len(blocks))
    return Routing(
        order.int(), weights.float(), torch.argsort(flat, stable=True).int(), start.int(),
        torch.tensor(padded, dtype=torch.int32).reshape(-1, 4), torch.tensor([len(blocks)], dtype=torch.int32), block_m,
    )  # fmt: skip


def audit_cases() -> Iterator[Case]:
    """For `kernels.audit`: one chunk and many, at the sizes of Qwen3-30B-A3B and Qwen3-Next."""
    for experts, top_k in ((128, 8), (512, 10)):
        most = block_t(experts)
        for tokens in (most, 8 * most):
            router = Router(tokens, experts, top_k, True, "meta")
            logits = torch.empty(tokens, experts, device="meta")
            num_tokens = torch.empty(1, dtype=torch.int32, device="meta")
            yield Case(f"routing/{experts} experts, {tokens} tokens", partial(router, logits, 16, num_tokens))
