"""Packed experts with many rows: decoded to a buffer, group after group, and read there by the dense grouped GEMM.

The tile loop (`planar_gemm`) decodes a weight again for every block of rows. Past `formats.DECODE_ROWS` rows an expert
it is cheaper to decode each once: 1.5 bytes read and 2 written beside the 2 that the GEMM reads.

    buffer     uint8 [bytes]    the decoded weights, of one tensor type, of as many experts in a row as fit
    addresses  int64 [E, 2]     where the GEMM finds each expert: in the buffer, or where the table says if it is dense
    group      int32 [4]        `RoutingArrays.group` of these experts

Decoder and GEMM take turns on one stream, so that one buffer serves all groups, tensor types and layers. What is
decoded follows from the routing on the device: an expert without rows is neither read nor written, and nothing is read
back to the host. The sum is that of the dense GEMM, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ..formats import FORMATS, decoded_at_once
from ..ops import ExpertDims
from ..packing._planar import decode_tile, planes_of
from ..packing.codec import align as aligned
from ..work import Work, declares, touched_experts
from ._grouped_gemm import TableArrays
from .portable import after_inputs, dependent_launch
from .routing import Routing, RoutingArrays
from .tiles import capability_of

_PLANAR12 = tl.constexpr(FORMATS["planar12"].number)


def _decode_work(args: Mapping[str, Any]) -> Work:
    """Experts of the group that are packed and have rows: read as they are, written as bf16."""
    table, routing, first, tensor = (args[name] for name in ("table", "routing", "first", "TENSOR"))
    number = args["FORMAT"]
    bits = next(each.bits for each in FORMATS.values() if each.number == number)
    packed = table.formats[first : first + args["count"], tensor].cpu() == number
    start = routing.expert_start
    if start.device.type == "meta":
        tokens, choices = routing.experts.shape
        decoded = int(packed.sum()) * touched_experts(start, tokens, choices) / (len(start) - 1)
    else:
        used = torch.diff(start[first : first + args["count"] + 1].cpu()) > 0
        decoded = int((packed & used).sum())
    return Work(decoded * (bits / 8 + 2) * args["N"] * args["K"])


@triton.jit(do_not_specialize=["first", "count"], launch_metadata=declares(_decode_work))
def _decode_experts_kernel(
    table,  # `TableArrays`
    routing,  # `RoutingArrays`
    buffer_ptr,  # (count, aligned N * K) int16
    addresses_ptr,  # (E, 2) int64
    group_ptr,  # (4,) int32
    first,
    count,
    N,
    K,
    TENSOR: tl.constexpr,
    FORMAT: tl.constexpr,  # its number
    BLOCK_M: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Grid: (ceil(K / 128), ceil(N / 64), count): a program a tile of experts first … first + count - 1; the first
    program says which blocks of rows are theirs, the first of each expert where it lies."""
    after_inputs()
    expert = first + tl.program_id(2)
    begins = (tl.program_id(0) == 0) & (tl.program_id(1) == 0)
    if begins & (tl.program_id(2) == 0):
        _find_blocks(routing, group_ptr, first, count, BLOCK_M, EXPERTS, BLOCK_E)
    entry = expert * 2 + TENSOR
    address = tl.load(table.addresses + entry)
    packed = tl.load(table.formats + entry) == FORMAT
    out_ptr = buffer_ptr + tl.program_id(2).to(tl.int64) * (tl.cdiv(N * K, 128) * 128)
    if begins:
        tl.store(addresses_ptr + entry, tl.where(packed, out_ptr.to(tl.int64), address))
    has_rows = tl.load(routing.expert_start + expert) < tl.load(routing.expert_start + expert + 1)
    if packed & has_rows:
        block_ptr = tl.multiple_of(address.to(tl.pointer_type(tl.uint8)), 16)
        nibble_ptr, base, offset_ptr, escape_ptr, raw_ptr = planes_of(block_ptr, N, K, FORMAT == _PLANAR12)
        offset_ptr += tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        decode_tile(
            block_ptr, nibble_ptr, base, offset_ptr, escape_ptr, raw_ptr, out_ptr, tl.program_id(1), tl.program_id(0),
            N, K, FORMAT == _PLANAR12,
        )  # fmt: skip


@triton.jit
def _find_blocks(routing, group_ptr, first, count, BLOCK_M: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr):
    """`RoutingArrays.group` of `count` experts: blocks are in the order of experts, each with its own. Of the last
    experts, with those of an expert behind the table's."""
    e = tl.arange(0, BLOCK_E)
    start = tl.load(routing.expert_start + e, mask=e < EXPERTS, other=0)
    end = tl.load(routing.expert_start + e + 1, mask=e < EXPERTS, other=0)
    blocks = (end - start + BLOCK_M - 1) // BLOCK_M
    before = tl.sum(tl.where(e < first, blocks, 0), axis=0)
    mine = tl.sum(tl.where((e >= first) & (e < first + count), blocks, 0), axis=0)
    if first + count >= EXPERTS:
        mine = tl.load(routing.num_blocks) - before
    tl.store(group_ptr, before)
    tl.store(group_ptr + 1, mine)
    tl.store(group_ptr + 2, first)
    tl.store(group_ptr + 3, first + count)


class DecodedExperts:
    """The buffer and what goes with it, made once for experts of `dims`. nbytes: of all."""

    def __init__(self, dims: ExpertDims, device: torch.device | str, room: int | None = None) -> None:
        self._expert_bytes = [aligned(n * k * dims.dtype.itemsize) for n, k in dims.shapes]
        self._groups = [decoded_at_once(nbytes, dims.experts, room) for nbytes in self._expert_bytes]
        size = max(count * nbytes for count, nbytes in zip(self._groups, self._expert_bytes, strict=True))
        self._buffer = torch.empty(size, dtype=torch.uint8, device=device)
        self._addresses = torch.zeros(dims.experts, 2, dtype=torch.int64, device=device)
        self._group = torch.zeros(4, dtype=torch.int32, device=device)
        # Formats: dense's number. Where launches are only compiled, those of tables have values, on the host.
        where = "cpu" if self._buffer.device.type == "meta" else device
        self._dense = torch.zeros(dims.experts, 2, dtype=torch.uint8, device=where)

    @property
    def nbytes(self) -> int:
        return self._buffer.nbytes + self._addresses.nbytes + self._group.nbytes + self._dense.nbytes

    def groups(
        self, table: TableArrays, routing: Routing, tensor: int, n: int, k: int, name: str
    ) -> Iterator[tuple[TableArrays, RoutingArrays]]:
        """Decodes the experts of format `name`, group after group. What a launch of the dense GEMM is given for each,
        dense experts included, holds until the next is asked for."""
        experts, most = len(table.addresses), self._groups[tensor]
        for first in range(0, experts, most):
            count = min(most, experts - first)
            _decode_experts_kernel[(triton.cdiv(k, 128), triton.cdiv(n, 64), count)](
                table, routing.arrays, self._buffer.view(torch.int16), self._addresses, self._group, first, count, n, k,
                TENSOR=tensor, FORMAT=FORMATS[name].number, BLOCK_M=routing.block_m, EXPERTS=experts,
                BLOCK_E=triton.next_power_of_2(experts), num_warps=8,
                **dependent_launch(capability_of(self._buffer.device)),
            )  # fmt: skip
            # The shared expert's blocks are behind all others.
            shared = table.shared if first + count == experts else None
            dense = TableArrays(self._addresses, self._dense[:count], shared)
            yield dense, routing.arrays._replace(group=self._group)
