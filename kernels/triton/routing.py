"""Routing: softmax, top-k, and the stable sort by expert of a token's choices, which the grouped GEMM reads.

A row is one (token, choice) pair, row = token * top_k + choice. Data map (T tokens, E experts, R = T * top_k rows;
made here, read by the grouped GEMM and the combine; everything stays on the device and has a fixed shape):

    experts       int32 [T, top_k]     chosen experts, best first; equal logits: the lower id first; -1: elsewhere
    weights       fp32  [T, top_k]     softmax over all experts, or over the chosen ones (`renormalise`)
    order         int32 [R]            sorted position → row; by expert, then by row
    expert_start  int32 [E + 1]        first sorted position of each expert; the last entry is their number
    block_map     int32 [B, 4]         block → (expert, first position, end position, shared); blocks of ≤ block_m
                                       positions, none crosses an expert; expert -1 beyond `num_blocks`
    num_blocks    int32 [1]            blocks in use; B is the least bound that holds for any routing
    num_tokens    int32 [1] or None    tokens from there on are padding: they reach no expert

Routing starts from router logits, or from experts and weights that a host has chosen: then some may be another rank's,
and reach nothing here.

A shared expert, which every token uses, can be one more choice: expert E, the last of every token's top_k, here its
top_k of the model plus one; its positions are behind all others, its blocks are marked 1 and are not in the table.

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
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..launches import Case
from ..ops import KernelError
from ._routing import _place_kernel, _route_kernel, _scan_kernel, _top_k_kernel
from .portable import dependent_launch
from .tiles import capability_of

# Elements of the [BLOCK_T, BLOCK_E] matrices of a program, of which some six live at a time, and of one warp's part:
# 16 registers a thread and matrix.
_FUSED_ELEMENTS = 4096
_WARP_ELEMENTS = 512
_MAX_TOP_K = 32


class Choices(NamedTuple):
    """Experts and their weights, as a host has chosen them."""

    experts: Tensor
    weights: Tensor


class RoutingArrays(NamedTuple):
    """What a kernel is given of a `Routing`. group: int32 [4] for a launch of the grouped GEMM that is for some experts
    in a row alone: their first block and its number of blocks, the first of them and the one behind the last."""

    experts: Tensor
    weights: Tensor
    order: Tensor
    expert_start: Tensor
    block_map: Tensor
    num_blocks: Tensor
    group: Tensor | None = None


@dataclass(frozen=True)
class Routing:
    """See the module's data map. max_blocks: len(block_map); shared: (gate_up, down) of expert E, if there is one."""

    experts: Tensor
    weights: Tensor
    order: Tensor
    expert_start: Tensor
    block_map: Tensor
    num_blocks: Tensor
    block_m: int
    num_tokens: Tensor | None = None
    some_elsewhere: bool = False
    shared: tuple[Tensor, Tensor] | None = None

    @property
    def max_blocks(self) -> int:
        return len(self.block_map)

    @property
    def arrays(self) -> RoutingArrays:
        return RoutingArrays(self.experts, self.weights, self.order, self.expert_start, self.block_map, self.num_blocks)


@dataclass(frozen=True)
class RoutingSizes:
    """Tile of the routing kernels: `block_t` tokens by `block_e` experts (powers of two, as `top_k_pad`), `block_b`
    entries of the block map at a time. shared: 1 where every token has one more choice, the shared expert."""

    top_k: int
    renormalise: bool
    block_m: int
    top_k_pad: int
    block_t: int
    block_e: int
    block_b: int
    shared: int = 0

    @property
    def choices(self) -> int:
        """Of a token: its rows."""
        return self.top_k + self.shared

    @property
    def num_warps(self) -> int:
        return max(4, min(8, self.block_t * self.block_e // _WARP_ELEMENTS))


def max_blocks(num_rows: int, num_experts: int, block_m: int) -> int:
    """Blocks that any routing of `num_rows` rows can need: each expert in use leaves at most one part-filled."""
    return num_rows // block_m + min(num_rows, num_experts)


def block_t(num_experts: int) -> int:
    """Tokens of one chunk."""
    return max(1, min(128, _FUSED_ELEMENTS // triton.next_power_of_2(num_experts)))


class Router:
    """Routes batches of up to `max_tokens`; all its buffers are made here, none in `__call__`.

    most_fused: tokens that one program can sort; max_rows: most rows of any routing. Raises KernelError when top_k
    exceeds 32 or, from logits, the number of experts: where a host chooses, most of a token's experts may be elsewhere.
    """

    def __init__(
        self, max_tokens: int, num_experts: int, top_k: int, renormalise: bool, device: torch.device | str
    ) -> None:
        if not 1 <= top_k <= _MAX_TOP_K:
            raise KernelError(f"top_k must be 1 to {_MAX_TOP_K}, got {top_k}")
        self.num_experts, self.top_k, self.renormalise = num_experts, top_k, renormalise
        self.most_fused = block_t(num_experts)
        fused = min(max_tokens, self.most_fused)
        # The batches that one program routes may have a shared expert beside the chosen ones.
        self.max_rows = rows = max(max_tokens * top_k, fused * (top_k + 1))

        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self._max_tokens, self._experts, self._order = max_tokens, ints(rows), ints(rows)
        self._weights = torch.zeros(rows, dtype=torch.float32, device=device)
        self.expert_start, self._num_blocks = ints(num_experts + 1), ints(1)
        # Blocks hold at least one row: the bound for any block_m that a launch may choose.
        self._block_map = ints(max_blocks(rows, num_experts + 1, 16) + 1, 4)
        # Of `gate`: logits, with a shared expert's, and how many programs have stored theirs.
        self.logits, self.arrived = torch.empty(fused, num_experts + 1, device=device), ints(1)
        self._chunk_counts = ints(max(1, triton.cdiv(max_tokens, self.most_fused)), num_experts)

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
        if not logits.is_contiguous():
            raise KernelError(f"logits must be contiguous, got strides {logits.stride()}")
        return self._route(logits, None, *self.prepare(len(logits), block_m, num_tokens))

    def given(self, topk_ids: Tensor, topk_weights: Tensor, block_m: int, num_tokens: Tensor | None = None) -> Routing:
        """The same for experts that are chosen already: integers [T, top_k], a token's all different, any outside
        0 … E - 1 for experts that are elsewhere; weights [T, top_k] in any float dtype."""
        for name, given in (("topk_ids", topk_ids), ("topk_weights", topk_weights)):
            if given.shape[1:] != (self.top_k,) or len(given) != len(topk_ids) or not given.is_contiguous():
                raise KernelError(f"{name} must be contiguous [T, {self.top_k}], got {list(given.shape)}")
        if topk_ids.dtype not in (torch.int32, torch.int64):
            raise KernelError(f"topk_ids must be int32 or int64, got {topk_ids.dtype}")
        choices = Choices(topk_ids, topk_weights)
        return self._route(None, choices, *self.prepare(len(topk_ids), block_m, num_tokens, some_elsewhere=True))

    def clear(self) -> None:
        """What a kernel would say of no tokens."""
        self.expert_start.zero_()
        self._num_blocks.zero_()

    def prepare(
        self, tokens: int, block_m: int, num_tokens: Tensor | None, some_elsewhere: bool = False,
        shared: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Routing, RoutingSizes]:  # fmt: skip
        """A routing that a kernel is to fill, and the kernel's tile. KernelError for too many tokens."""
        if tokens > self._max_tokens:
            raise KernelError(f"{tokens} tokens exceed the {self._max_tokens} of this router")
        choices = self.top_k + (shared is not None)
        rows = tokens * choices
        blocks = max_blocks(rows, self.num_experts + (shared is not None), block_m)
        routing = Routing(
            self._experts[:rows].view(tokens, choices), self._weights[:rows].view(tokens, choices), self._order[:rows],
            self.expert_start, self._block_map[:blocks], self._num_blocks, block_m, num_tokens, some_elsewhere, shared,
        )  # fmt: skip
        block_rows = min(self.most_fused, triton.next_power_of_2(max(1, tokens)))
        return routing, RoutingSizes(
            self.top_k,
            self.renormalise,
            block_m,
            triton.next_power_of_2(self.top_k),
            block_rows,
            triton.next_power_of_2(self.num_experts),
            # The block map comes from [block_b, block_e] comparisons, beside which other arrays live.
            max(4, block_rows // 2),
            int(shared is not None),
        )

    def _route(self, logits: Tensor | None, given: Choices | None, routing: Routing, sizes: RoutingSizes) -> Routing:
        tokens, experts = len(routing.experts), self.num_experts
        options = {"num_warps": sizes.num_warps} | dependent_launch(capability_of(self._order.device))
        sources, arrays = (logits, given, routing.num_tokens), routing.arrays
        if tokens <= self.most_fused:
            _route_kernel[(1,)](*sources, arrays, tokens, experts, routing.max_blocks, sizes, **options)
            return routing
        chunks = triton.cdiv(tokens, sizes.block_t)
        _top_k_kernel[(chunks,)](*sources, arrays, self._chunk_counts, tokens, experts, sizes, **options)
        _scan_kernel[(1,)](
            self._chunk_counts, arrays, chunks, experts, routing.max_blocks, sizes, **options
        )  # fmt: skip
        _place_kernel[(chunks,)](
            self._chunk_counts, routing.num_tokens, arrays, tokens, experts, sizes, **options
        )  # fmt: skip
        return routing


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
