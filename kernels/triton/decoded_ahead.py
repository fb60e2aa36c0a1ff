"""Packed experts with many rows, decoded a layer ahead: on a second stream, under what the compute stream does.

`decoded` decodes between routing and products, which costs what its bytes cost. Here a tensor type of the next layer is
decoded as soon as this layer's product has read it, while the other product and the next attention run: the one buffer
of each tensor type is to the streamer's slots (Algorithm 1 of the paper) what half of one is.

    compute   gate_up l ──► down l ──► … attention l+1 … ──► gate_up l+1 ──► down l+1
    aside              └► decode gate_up l+1       └► decode down l+1   (each waited for by its product)

All packed experts are decoded, for the routing is not known yet; with so many rows hardly one has none. Two programs an
SM, on a stream that goes first: beside them is room for those of attention's prefill and of the down product, not for
those of gate_up (registers of the audit), which wait for an SM until it has decoded its part. `bench predict --what
layer` says what that may come to, the gpu-suite's step `prefill_ahead` what it does.

What has not been begun ahead, as a pass's first layer, or is in a graph, is decoded when it is asked for.
The sum is that of the dense GEMM, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from ..expert_table import DOWN, GATE_UP, ExpertTable
from ..formats import FORMATS, fused_formats
from ..launches import Case
from ..ops import ExpertDims
from ..packing._planar import decode_tile, planes_of
from ..packing.codec import align as aligned
from ..work import Work, declares
from .tiles import capability_of, num_sms_of

_PLANAR12 = tl.constexpr(FORMATS["planar12"].number)
# Two of 8 warps and 32 registers a thread leave 192 for 8 warps of another kernel. Without the bound the loop takes 62
# on sm_90, and one program has the room of both; elsewhere it would spill.
PROGRAMS_AN_SM = 2
_REGISTERS = {90: 32}


def _decode_work(args: Mapping[str, Any]) -> Work:
    """All packed experts, read as they are and written as bf16."""
    number, weights = args["FORMAT"], args["N"] * args["K"]
    bits = next(each.bits for each in FORMATS.values() if each.number == number)
    packed = int((args["formats_ptr"][:, args["TENSOR"]].cpu() == number).sum())
    return Work(packed * (bits / 8 + 2) * weights)


@triton.jit(launch_metadata=declares(_decode_work))
def _decode_layer_kernel(
    table_ptr,  # (E, 2) int64
    formats_ptr,  # (E, 2) uint8
    buffer_ptr,  # (E, aligned N * K) int16
    addresses_ptr,  # (E, 2) int64
    experts,
    N,
    K,
    TENSOR: tl.constexpr,
    FORMAT: tl.constexpr,  # its number
):
    """Grid: (programs,), each takes tile pid, pid + programs, … of ceil(N / 64) · ceil(K / 128) an expert; its first
    says where the expert lies: in the buffer, or where the table says if it is dense."""
    tiles_k = tl.cdiv(K, 128)
    tiles = tl.cdiv(N, 64) * tiles_k
    for at in tl.range(tl.program_id(0), experts * tiles, tl.num_programs(0)):
        expert, tile = at // tiles, at % tiles
        entry = expert * 2 + TENSOR
        address = tl.load(table_ptr + entry)
        packed = tl.load(formats_ptr + entry) == FORMAT
        out_ptr = buffer_ptr + expert.to(tl.int64) * (tl.cdiv(N * K, 128) * 128)
        if tile == 0:
            tl.store(addresses_ptr + entry, tl.where(packed, out_ptr.to(tl.int64), address))
        if packed:
            block_ptr = tl.multiple_of(address.to(tl.pointer_type(tl.uint8)), 16)
            nibble_ptr, base, offset_ptr, escape_ptr, raw_ptr = planes_of(block_ptr, N, K, FORMAT == _PLANAR12)
            decode_tile(
                block_ptr, nibble_ptr, base, offset_ptr + tile, escape_ptr, raw_ptr, out_ptr, tile // tiles_k,
                tile % tiles_k, N, K, FORMAT == _PLANAR12,
            )  # fmt: skip


class DecodedAhead:
    """A layer's experts of `dims`, dense, made once; nbytes: of all of it. Not thread-safe.

    cuda: torch.cuda, or in tests what records what is asked of it here; without a GPU all is done in order.
    """

    def __init__(self, dims: ExpertDims, device: torch.device | str, cuda: Any = None) -> None:
        device = torch.device(device)
        self._shapes = dims.shapes
        strides = [aligned(n * k * dims.dtype.itemsize) for n, k in dims.shapes]
        self._buffers = [torch.empty(dims.experts * each, dtype=torch.uint8, device=device) for each in strides]
        addresses = torch.zeros(dims.experts, 2, dtype=torch.int64, device=device)
        # Dense's number. Where launches are only compiled, formats have values, on the host.
        formats = torch.zeros(dims.experts, 2, dtype=torch.uint8, device="cpu" if device.type == "meta" else device)
        self._dense = ExpertTable((), addresses, formats, frozenset())
        self._programs, self._capability = PROGRAMS_AN_SM * num_sms_of(device), capability_of(device)
        # By tensor type: the table of the layer that is, or is being, decoded and was not asked for yet.
        self._begun: list[ExpertTable | None] = [None, None]
        # Once a graph has captured the buffer: it may be launched at any time, so nothing is decoded beside it.
        self._in_order = False
        self._cuda: Any = cuda or (torch.cuda if device.type == "cuda" else None)
        if self._cuda is not None:
            # Before what the compute stream has, whose programs else fill every SM until the last of them has begun.
            self._aside = self._cuda.Stream(priority=-1)
            self._free, self._done = ([self._cuda.Event() for _ in (GATE_UP, DOWN)] for _ in range(2))

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in (*self._buffers, self._dense.addresses, self._dense.formats))

    def begin(self, table: ExpertTable | None, tensor: int) -> None:
        """Decode a tensor type of the next layer from here on, where all has been enqueued that reads the buffer as it
        is. None: it is not known, and left to `of`."""
        if table is None or len(table.compressed) != 1 or self._in_order:
            return
        self._begun[tensor] = table
        if self._cuda is None:
            self._launch(table, tensor)
            return
        self._free[tensor].record(self._cuda.current_stream())
        self._aside.wait_event(self._free[tensor])
        with self._cuda.stream(self._aside):
            self._launch(table, tensor)
        self._done[tensor].record(self._aside)

    def of(self, table: ExpertTable, tensor: int) -> ExpertTable:
        """The layer's experts, of which those that are packed are decoded, as a dense table: what is enqueued from here
        on may read them, until `begin` or the next `of`."""
        if len(table.compressed) != 1:
            return table  # dense, or refused by the product
        begun, self._begun[tensor] = self._begun[tensor], None
        if self._cuda is not None:
            # A capture begins with the device idle: what was begun before is done.
            self._in_order |= self._cuda.is_current_stream_capturing()
            if begun is not None and not self._in_order:
                self._cuda.current_stream().wait_event(self._done[tensor])
        # Another layer's: of a pass that was given up.
        if begun is not table or self._in_order:
            self._launch(table, tensor)
        return self._dense

    def _launch(self, table: ExpertTable, tensor: int) -> None:
        (n, k), (name,) = self._shapes[tensor], table.compressed
        _decode_layer_kernel[(self._programs,)](
            table.addresses, table.formats, self._buffers[tensor].view(torch.int16), self._dense.addresses,
            len(table.addresses), n, k, TENSOR=tensor, FORMAT=FORMATS[name].number, num_warps=8,
            maxnreg=_REGISTERS.get(self._capability),
        )  # fmt: skip


def audit_cases() -> Iterator[Case]:
    """For `kernels.audit`: gate_up of Qwen3-30B-A3B, in each format that its GEMM reads."""
    dims, block = ExpertDims(2048, 768, 128, 8, torch.bfloat16), torch.zeros(16, dtype=torch.uint8)
    for name in sorted(fused_formats("triton")):
        table = ExpertTable.from_blocks([(block, block)] * dims.experts, "cpu", name)
        launch = partial(DecodedAhead(dims, "meta").of, table, GATE_UP)
        yield Case(f"decoded_ahead/{name}", launch, (_decode_layer_kernel,))
