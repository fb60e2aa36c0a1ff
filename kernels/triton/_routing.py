"""The kernels of `routing`, where shapes, their order and the method are. SIZES is a `RoutingSizes` in all of them.

routing: the arrays of a `Routing`, as a tuple. given: experts and weights that a host has chosen, as a `Choices`; None:
they are chosen from logits. num_tokens_ptr: (1,) int32, tokens from there on are padding; None: there is no padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from ..work import Work, declares
from .portable import after_inputs


def chosen_bytes(routing: Any) -> int:
    """Experts, weights and order of a batch's rows, each written once."""
    return routing.experts.nbytes + routing.weights.nbytes + routing.order.nbytes


def _source_bytes(args: Mapping[str, Any]) -> int:
    """Logits, or what a host has chosen."""
    sources = (args["logits_ptr"],) if args["given"] is None else args["given"]
    return sum(source.nbytes for source in sources)


def _route_work(args: Mapping[str, Any]) -> Work:
    return Work(_source_bytes(args) + chosen_bytes(args["routing"]))


def _top_k_work(args: Mapping[str, Any]) -> Work:
    routing = args["routing"]
    made = routing.experts.nbytes + routing.weights.nbytes
    return Work(_source_bytes(args) + made + _counts_bytes(args["chunk_counts_ptr"], args))


def _counts_bytes(counts: Any, args: Mapping[str, Any]) -> int:
    """Of the chunks in use."""
    chunks = args["CHUNKS"] if "CHUNKS" in args else triton.cdiv(args["T"], args["SIZES"].block_t)
    return chunks * counts[0].nbytes


def _scan_work(args: Mapping[str, Any]) -> Work:
    return Work(2 * _counts_bytes(args["chunk_counts_ptr"], args) + args["routing"].block_map.nbytes)


def _place_work(args: Mapping[str, Any]) -> Work:
    routing = args["routing"]
    return Work(_counts_bytes(args["chunk_starts_ptr"], args) + routing.experts.nbytes + routing.order.nbytes)


@triton.jit
def _select(logits_ptr, num_tokens, first, E, SIZES: tl.constexpr):
    """(ids int32, weights fp32) [BLOCK_T, TOP_K_PAD] from token `first` on, and who was chosen [.., BLOCK_E]."""
    TOP_K: tl.constexpr = SIZES.top_k
    BLOCK_T: tl.constexpr = SIZES.block_t
    TOP_K_PAD: tl.constexpr = SIZES.top_k_pad
    t = first + tl.arange(0, BLOCK_T)
    e = tl.arange(0, SIZES.block_e)
    j = tl.arange(0, TOP_K_PAD)
    real = e[None, :] < E
    x = tl.load(
        logits_ptr + t[:, None].to(tl.int64) * (E + SIZES.shared) + e[None, :],
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
        expert = tl.min(tl.where(free & (x == best[:, None]), e[None, :], SIZES.block_e), axis=1)
        chosen += (e[None, :] == expert[:, None]).to(tl.int32)
        ids = tl.where(j[None, :] == choice, expert[:, None], ids)
        weights = tl.where(j[None, :] == choice, tl.exp(best - largest)[:, None], weights)
    if SIZES.renormalise:
        total = tl.sum(weights, axis=1)
    else:
        total = tl.sum(tl.exp(x - largest[:, None]), axis=1)
    return ids, weights / total[:, None], tl.where(t[:, None] < num_tokens, chosen, 0)


@triton.jit
def _load_choices(given, num_tokens, first, E, SIZES: tl.constexpr):
    """As `_select`, of choices that were made before; ids outside 0 … E - 1 become -1, and are chosen by nobody."""
    TOP_K: tl.constexpr = SIZES.top_k
    BLOCK_T: tl.constexpr = SIZES.block_t
    BLOCK_E: tl.constexpr = SIZES.block_e
    t = first + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    j = tl.arange(0, SIZES.top_k_pad)
    valid = (t[:, None] < num_tokens) & (j[None, :] < SIZES.top_k)
    at = t[:, None] * SIZES.top_k + j[None, :]
    ids = tl.load(given.experts + at, mask=valid, other=-1).to(tl.int32)
    ids = tl.where((ids >= 0) & (ids < E), ids, -1)
    weights = tl.load(given.weights + at, mask=valid, other=0.0).to(tl.float32)
    chosen = tl.zeros([BLOCK_T, BLOCK_E], tl.int32)
    for choice in tl.static_range(TOP_K):
        expert = tl.sum(tl.where(j[None, :] == choice, ids, 0), axis=1)
        chosen += (e[None, :] == expert[:, None]).to(tl.int32)
    return ids, weights, chosen


@triton.jit
def _choices(logits_ptr, given, num_tokens, first, E, SIZES: tl.constexpr):
    if given is not None:
        ids, weights, chosen = _load_choices(given, num_tokens, first, E, SIZES)
    else:
        ids, weights, chosen = _select(logits_ptr, num_tokens, first, E, SIZES)
    return ids, weights, chosen


@triton.jit
def _store_choices(routing, ids, weights, first, T, SIZES: tl.constexpr):
    t = first + tl.arange(0, SIZES.block_t)
    j = tl.arange(0, SIZES.top_k_pad)
    mask = (t[:, None] < T) & (j[None, :] < SIZES.top_k)
    at = t[:, None] * SIZES.choices + j[None, :]
    tl.store(routing.experts + at, ids, mask=mask)
    tl.store(routing.weights + at, weights, mask=mask)


@triton.jit
def _store_order(routing, ids, chosen, starts, num_tokens, first, SOME: tl.constexpr, SIZES: tl.constexpr):
    """Place a chunk's rows; starts [BLOCK_E]: the first position of each expert that belongs to this chunk. SOME:
    experts may be elsewhere."""
    TOP_K: tl.constexpr = SIZES.top_k
    t = first + tl.arange(0, SIZES.block_t)
    e = tl.arange(0, SIZES.block_e)
    j = tl.arange(0, SIZES.top_k_pad)
    places = starts[None, :] + tl.cumsum(chosen, axis=0) - chosen
    for choice in tl.static_range(TOP_K):
        expert = tl.sum(tl.where(j[None, :] == choice, ids, 0), axis=1)
        place = tl.sum(tl.where(e[None, :] == expert[:, None], places, 0), axis=1)
        here = (t < num_tokens) & (expert >= 0) if SOME else t < num_tokens
        tl.store(routing.order + place, t * SIZES.choices + choice, mask=here)


@triton.jit
def _store_shared(routing, logits_ptr, routed, num_tokens, T, E, SIZES: tl.constexpr):
    """Every token's last choice, expert E, whose weight is the sigmoid of its own logit; behind all routed rows."""
    t = tl.arange(0, SIZES.block_t)
    score = tl.load(logits_ptr + t.to(tl.int64) * (E + 1) + E, mask=t < num_tokens, other=0.0)
    row = t * SIZES.choices + SIZES.top_k
    tl.store(routing.experts + row, E, mask=t < T)
    tl.store(routing.weights + row, 1.0 / (1.0 + tl.exp(-score)), mask=t < T)
    tl.store(routing.order + routed + t, row, mask=t < num_tokens)


@triton.jit
def _store_blocks(counts, starts, routing, shared_rows, E, MAX_BLOCKS, SIZES: tl.constexpr):
    """shared_rows: rows of expert E, behind those of all others."""
    e = tl.arange(0, SIZES.block_e)
    routed = tl.sum(counts, axis=0)
    tl.store(routing.expert_start + e, starts, mask=e < E)
    tl.store(routing.expert_start + E, routed)
    blocks = (counts + SIZES.block_m - 1) // SIZES.block_m
    ends = tl.cumsum(blocks, axis=0)
    before = tl.sum(blocks, axis=0)
    total = before + tl.cdiv(shared_rows, SIZES.block_m)
    tl.store(routing.num_blocks, total)
    for b0 in range(0, MAX_BLOCKS, SIZES.block_b):
        b = b0 + tl.arange(0, SIZES.block_b)
        expert = tl.sum((ends[None, :] <= b[:, None]).to(tl.int32), axis=1)
        mine = e[None, :] == expert[:, None]
        first = tl.sum(tl.where(mine, (starts - (ends - blocks) * SIZES.block_m)[None, :], 0), axis=1)
        end = tl.sum(tl.where(mine, (starts + counts)[None, :], 0), axis=1)
        shared = b >= before
        if SIZES.shared:
            expert = tl.where(shared, E, expert)
            first = tl.where(shared, routed - before * SIZES.block_m, first)
            end = tl.where(shared, routed + shared_rows, end)
        first += b * SIZES.block_m
        end = tl.minimum(first + SIZES.block_m, end)
        used, row = b < total, routing.block_map + b * 4
        mask = b < MAX_BLOCKS
        tl.store(row, tl.where(used, expert, -1), mask=mask)
        tl.store(row + 1, tl.where(used, first, 0), mask=mask)
        tl.store(row + 2, tl.where(used, end, 0), mask=mask)
        tl.store(row + 3, (used & shared).to(tl.int32), mask=mask)


@triton.jit
def _real_tokens(num_tokens_ptr, T):
    if num_tokens_ptr is not None:
        T = tl.minimum(tl.load(num_tokens_ptr), T)
    return T


@triton.jit
def route_batch(logits_ptr, given, num_tokens_ptr, routing, T, E, MAX_BLOCKS, SIZES: tl.constexpr):
    """All of the routing of a batch that fits one chunk, by one program."""
    num_tokens = _real_tokens(num_tokens_ptr, T)
    ids, weights, chosen = _choices(logits_ptr, given, num_tokens, 0, E, SIZES)
    _store_choices(routing, ids, weights, 0, T, SIZES)
    counts = tl.sum(chosen, axis=0)
    starts = tl.cumsum(counts, axis=0) - counts
    _store_order(routing, ids, chosen, starts, num_tokens, 0, given is not None, SIZES)
    shared_rows = 0
    if SIZES.shared:
        shared_rows = num_tokens
        _store_shared(routing, logits_ptr, tl.sum(counts, axis=0), num_tokens, T, E, SIZES)
    _store_blocks(counts, starts, routing, shared_rows, E, MAX_BLOCKS, SIZES)


@triton.jit(do_not_specialize=["T", "MAX_BLOCKS"], launch_metadata=declares(_route_work))
def _route_kernel(logits_ptr, given, num_tokens_ptr, routing, T, E, MAX_BLOCKS, SIZES: tl.constexpr):
    """Grid: (1,)."""
    after_inputs()
    route_batch(logits_ptr, given, num_tokens_ptr, routing, T, E, MAX_BLOCKS, SIZES)


@triton.jit(do_not_specialize=["T"], launch_metadata=declares(_top_k_work))
def _top_k_kernel(
    logits_ptr,
    given,
    num_tokens_ptr,
    routing,
    chunk_counts_ptr,  # (chunks, E) int32: rows of each expert in each chunk
    T,
    E,
    SIZES: tl.constexpr,
):
    """Grid: (chunks,)."""
    after_inputs()
    chunk = tl.program_id(0)
    first = chunk * SIZES.block_t
    ids, weights, chosen = _choices(logits_ptr, given, _real_tokens(num_tokens_ptr, T), first, E, SIZES)
    _store_choices(routing, ids, weights, first, T, SIZES)
    e = tl.arange(0, SIZES.block_e)
    tl.store(chunk_counts_ptr + chunk * E + e, tl.sum(chosen, axis=0), mask=e < E)


@triton.jit(do_not_specialize=["CHUNKS", "MAX_BLOCKS"], launch_metadata=declares(_scan_work))
def _scan_kernel(
    chunk_counts_ptr,  # (chunks, E) int32: in, counts; out, first position of each (chunk, expert)
    routing,
    CHUNKS,
    E,
    MAX_BLOCKS,
    SIZES: tl.constexpr,
):
    """Grid: (1,)."""
    after_inputs()
    BLOCK_E: tl.constexpr = SIZES.block_e
    e = tl.arange(0, BLOCK_E)
    counts = tl.zeros([BLOCK_E], tl.int32)
    for c0 in range(0, CHUNKS, SIZES.block_t):
        c = c0 + tl.arange(0, SIZES.block_t)
        mask = (c[:, None] < CHUNKS) & (e[None, :] < E)
        counts += tl.sum(tl.load(chunk_counts_ptr + c[:, None] * E + e[None, :], mask=mask, other=0), axis=0)
    starts = tl.cumsum(counts, axis=0) - counts
    begin = starts
    for c0 in range(0, CHUNKS, SIZES.block_t):
        c = c0 + tl.arange(0, SIZES.block_t)
        mask = (c[:, None] < CHUNKS) & (e[None, :] < E)
        at = chunk_counts_ptr + c[:, None] * E + e[None, :]
        part = tl.load(at, mask=mask, other=0)
        tl.store(at, begin[None, :] + tl.cumsum(part, axis=0) - part, mask=mask)
        begin += tl.sum(part, axis=0)
    _store_blocks(counts, starts, routing, 0, E, MAX_BLOCKS, SIZES)


@triton.jit(do_not_specialize=["T"], launch_metadata=declares(_place_work))
def _place_kernel(chunk_starts_ptr, num_tokens_ptr, routing, T, E, SIZES: tl.constexpr):
    """Grid: (chunks,)."""
    after_inputs()
    chunk = tl.program_id(0)
    first = chunk * SIZES.block_t
    num_tokens = _real_tokens(num_tokens_ptr, T)
    ids, _, chosen = _load_choices(routing, num_tokens, first, E, SIZES)
    e = tl.arange(0, SIZES.block_e)
    starts = tl.load(chunk_starts_ptr + chunk * E + e, mask=e < E, other=0)
    _store_order(routing, ids, chosen, starts, num_tokens, first, True, SIZES)
