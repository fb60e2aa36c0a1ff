"""Grouped GEMM over an ExpertTable: one launch for all experts of a layer, wherever their weights lie.

    gate_up   h[p] = silu(x[t] Wg^T) * (x[t] Wu^T)       t = order[p] // top_k, expert of sorted position p
    down      y[r] = w[r] * (h[p] Wd^T)                   r = order[p], the row; w its routing weight
    combine   out[t] = residual[t] + sum_j y[t, j]        j = 0 … top_k - 1 in this order

A program finds its block of positions in the routing's block map, and its expert's weight by the address in the
table: resident block, streaming slot and pinned host memory are all the same to it. Weights are [N, K], K contiguous;
those of gate_up interleave gate and up (row 2i is gate i, row 2i + 1 up i), so that one tile holds both of an output
and SwiGLU happens in registers: the intermediate is written once, at half the width. Sums are fp32; no atomics.
Few rows an expert: weights are the M operand ("swap AB"), see tiles.py. Grids are upper bounds: nothing is read back
to the host between router and combine.

Sources of the ideas: block maps and sorted tokens, vLLM's fused_moe; SwiGLU on interleaved columns, OpenAI's
triton_kernels; a buffer of rows summed afterwards, SonicMoE (arXiv 2512.14080).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial

import torch
import triton
from torch import Tensor

from ..expert_table import DOWN, GATE_UP, ExpertTable
from ..formats import DENSE, FORMATS, fused_formats, weight_tile
from ..launches import Case
from ..ops import ExpertDims, KernelError
from ._grouped_gemm import (
    TableArrays,
    _combine_and_norm_kernel,
    _combine_kernel,
    _grouped_gemm_kernel,
    _linear_kernel,
)
from .decoded import DecodedExperts, _decode_experts_kernel
from .norm import DTYPES, row_launch
from .portable import dependent_launch
from .routing import Routing, RoutingArrays
from .tiles import FUSED_BOUNDS, ROW_BOUNDS, Tile, capability_of, default_tile, fused_tile, invariant_tile

# Compressed formats that the kernel below has a tile loop for.
_LOOPS = ("planar12", "planar8")


def programs(tile: Tile, num_blocks: int, n: int, num_sms: int) -> int:
    """Grid of a launch: all tiles that there can be, or as many as run at once when the tile is persistent."""
    tiles = num_blocks * triton.cdiv(n, tile.block_n)
    return min(tiles, num_sms) if tile.persistent else tiles


def _options(tile: Tile, device: torch.device) -> dict[str, int]:
    return dict(num_warps=tile.num_warps, num_stages=tile.num_stages) | dependent_launch(capability_of(device))


def _scratch(nbytes: int, alignment: int, stream: int | None) -> Tensor:
    """What Triton asks for where programs make descriptors, in the order of the current stream."""
    return torch.empty(nbytes, dtype=torch.uint8, device="cuda")


def _launch(
    x: Tensor, table: ExpertTable, routing: Routing, y: Tensor, n: int, k: int, tensor: int, w_dtype: torch.dtype,
    tile: Tile, num_sms: int, decoded: DecodedExperts | None,
) -> Tensor:  # fmt: skip
    if w_dtype not in DTYPES or x.dtype != w_dtype:
        raise KernelError(f"weights are {w_dtype}, activations {x.dtype}; both must be the same of {list(DTYPES)}")
    if x.shape[1] != k or x.stride(1) != 1 or y.stride(1) != 1:
        raise KernelError(f"activations must be [rows, {k}] with contiguous rows, got {list(x.shape)} {x.stride()}")
    if n * k >= 2**31:
        raise KernelError(f"an expert tensor of {n} x {k} elements exceeds the 2^31 that a tile can index")
    if tile.block_m != routing.block_m:
        raise KernelError(f"the routing has blocks of {routing.block_m} rows, the tile of {tile.block_m}")
    if tile.tma and (n % tile.block_n or k % tile.block_k):
        raise KernelError(f"a TMA tile of {tile.block_n} x {tile.block_k} must divide the weight {n} x {k}")
    if routing.max_blocks == 0:
        return y
    step = tile.block_k
    if len(table.compressed) > 1:
        found = " and ".join(sorted(table.compressed))
        raise KernelError(f"one launch reads dense experts and those of one other format, got {found}")
    for name in table.compressed:
        if name not in _LOOPS:
            raise KernelError(f"this GEMM has no tile loop for format {name}; it has {', '.join(_LOOPS)} and dense")
        if w_dtype != torch.bfloat16:
            raise KernelError(f"{name} experts need bf16, got {w_dtype}")
        rows, columns = weight_tile(name)
        if decoded is None:
            step = max(step, columns)
            if tile.block_n != rows or not tile.swap_ab:
                raise KernelError(f"{name} experts need a tile of {rows} weight rows, swapped, got {tile}")
    if tile.tma:
        # Descriptors that a program makes lie in global memory. Set here, since contexts of threads start without.
        triton.set_allocator(_scratch)
    name = next(iter(table.compressed), DENSE)
    arrays = TableArrays(table.addresses, table.formats, routing.shared[tensor] if routing.shared else None)
    launches: Iterable[tuple[TableArrays, RoutingArrays]] = [(arrays, routing.arrays)]
    if decoded is not None and name != DENSE:
        # How many tiles each group has, only the device knows: programs beyond them would cost more than the work.
        launches = decoded.groups(arrays, routing, tensor, n, k, name)
        tile, name = replace(tile, persistent=True), DENSE
    for arrays, routing_arrays in launches:
        _grouped_gemm_kernel[(programs(tile, routing.max_blocks, n, num_sms),)](
            x, arrays, y, routing_arrays, n, k, x.stride(0), y.stride(0), TENSOR=tensor,
            TOP_K=routing.experts.shape[1], TILE=tile, EVEN_K=k % step == 0, COMPRESSED=FORMATS[name].number,
            **_options(tile, x.device),
        )  # fmt: skip
    return y


def gate_up(
    x: Tensor, table: ExpertTable, routing: Routing, h: Tensor, w_dtype: torch.dtype, tile: Tile, num_sms: int = 132,
    decoded: DecodedExperts | None = None,
) -> Tensor:  # fmt: skip
    """x [T, H] → h [R, I] by sorted position, SwiGLU applied. Rows of padding are left as they are.

    decoded: where packed experts are decoded to first; None: in the tile loop.
    """
    return _launch(x, table, routing, h, 2 * h.shape[1], x.shape[1], GATE_UP, w_dtype, tile, num_sms, decoded)


def down(
    h: Tensor, table: ExpertTable, routing: Routing, y: Tensor, w_dtype: torch.dtype, tile: Tile, num_sms: int = 132,
    decoded: DecodedExperts | None = None,
) -> Tensor:  # fmt: skip
    """h [R, I] by sorted position → y [R, H] by row, times the routing weight; decoded: as for `gate_up`."""
    return _launch(h, table, routing, y, y.shape[1], h.shape[1], DOWN, w_dtype, tile, num_sms, decoded)


def combine(y: Tensor, routing: Routing, residual: Tensor, out: Tensor | None = None) -> Tensor:
    """residual [T, H] + sum of each token's rows of y [T * top_k, H]; in place unless `out` is given."""
    tokens, hidden = residual.shape
    out = residual if out is None else out
    if tokens:
        block = min(1024, triton.next_power_of_2(hidden))
        _combine_kernel[(tokens, triton.cdiv(hidden, block))](
            y, residual, out, routing.arrays, routing.num_tokens, hidden, TOP_K=routing.experts.shape[1],
            SOME=routing.some_elsewhere, BLOCK_H=block, num_warps=4,
            **dependent_launch(capability_of(y.device)),
        )  # fmt: skip
    return out


def combine_and_norm(
    y: Tensor, routing: Routing, residual: Tensor, weight: Tensor, eps: float, normed: Tensor
) -> Tensor:
    """`combine` in place, and the RMSNorm (weight fp32 [H]) of the result in `normed` [T, H], which is returned."""
    tokens, hidden = residual.shape
    if tokens:
        constexprs, num_warps = row_launch(hidden)
        _combine_and_norm_kernel[(tokens,)](
            y, residual, weight, normed, routing.arrays, routing.num_tokens, eps, **constexprs,
            TOP_K=routing.experts.shape[1], SOME=routing.some_elsewhere, num_warps=num_warps,
            **dependent_launch(capability_of(y.device)),
        )  # fmt: skip
    return normed


def linear(x: Tensor, w: Tensor, y: Tensor, tile: Tile, add: bool = False) -> Tensor:
    """y [T, N] = (or +=) x [T, K] @ w [N, K]^T with the grouped GEMM's tile: batch-invariant if the tile is fixed."""
    (tokens, k), n = x.shape, w.shape[0]
    if n * k >= 2**31:
        raise KernelError(f"a weight of {n} x {k} elements exceeds the 2^31 that a tile can index")
    if tokens:
        _linear_kernel[(triton.cdiv(tokens, tile.block_m), triton.cdiv(n, tile.block_n))](
            x, w, y, tokens, n, k, x.stride(0), y.stride(0), TILE=tile, EVEN_K=k % tile.block_k == 0, ADD=add,
            **_options(tile, x.device),
        )  # fmt: skip
    return y


def interleave(gate_up_weight: Tensor, out: Tensor | None = None) -> Tensor:
    """[2I, H] with all gates first, as checkpoints have it → [2I, H] with gate and up rows in turns."""
    half = gate_up_weight.shape[0] // 2
    out = torch.empty_like(gate_up_weight) if out is None else out
    pairs = out.view(half, 2, -1)
    pairs[:, 0], pairs[:, 1] = gate_up_weight[:half], gate_up_weight[half:]
    return out


def deinterleave(weight: Tensor) -> Tensor:
    """Undo `interleave`."""
    return weight.view(weight.shape[0] // 2, 2, -1).transpose(0, 1).reshape(weight.shape)


def audit_cases() -> Iterator[Case]:
    """For `kernels.audit`: both GEMMs at every tile of the rule and its variants for prefill, on Qwen3-30B-A3B's
    experts; fused formats beside dense experts in one launch; and the operations around them."""
    hidden, intermediate, experts, top_k = 2048, 768, 128, 8
    dims = ExpertDims(hidden, intermediate, experts, top_k, torch.bfloat16)
    capability = capability_of(torch.device("meta"))
    tiles = {f"{bound:.0f} rows": default_tile(bound, capability, 2) for bound in ROW_BOUNDS}
    tiles["invariant"] = invariant_tile(capability, 2)
    largest = tiles["inf rows"]
    formats: dict[str, str] = {}
    for name in sorted(fused_formats("triton")):
        for bound in FUSED_BOUNDS:
            tile = fused_tile(weight_tile(name), bound, capability)
            tiles[f"{name}, {tile.block_m} rows"] = tile
            formats[f"{name}, {tile.block_m} rows"] = name
        tiles[f"{name}, decoded first"], formats[f"{name}, decoded first"] = largest, name
    tiles["persistent"] = replace(largest, persistent=True)
    tiles["tma"] = replace(largest, tma=True)
    tiles["persistent, tma"] = replace(largest, persistent=True, tma=True)
    tokens, block = 64, torch.zeros(16, dtype=torch.uint8)  # kernels see the table's addresses alone

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    ids = partial(empty, dtype=torch.int32)

    def routing_of(block_m: int) -> Routing:
        return Routing(
            ids(tokens, top_k), empty(tokens, top_k, dtype=torch.float32), ids(tokens * top_k), ids(experts + 1),
            ids(tokens * top_k, 4), ids(1), block_m, ids(1),
        )  # fmt: skip

    x, h, y = empty(tokens, hidden), empty(tokens * top_k, intermediate), empty(tokens * top_k, hidden)
    for label, tile in tiles.items():
        expert_format = formats.get(label, DENSE)
        table = ExpertTable.from_blocks([(block, block)] * experts, "cpu", expert_format)
        routing = routing_of(tile.block_m)
        # All in one group: more would be the same two kernels again.
        first = DecodedExperts(dims, "meta", room=1 << 40) if label.endswith("decoded first") else None
        in_loop = expert_format != DENSE and first is None
        by_step = math.prod(weight_tile(expert_format)) // (32 * tile.num_warps) if in_loop else 0
        for name, launch in (
            ("gate_up", partial(gate_up, x, table, routing, h, x.dtype, tile, decoded=first)),
            ("down", partial(down, h, table, routing, y, x.dtype, tile, decoded=first)),
        ):
            yield Case(f"grouped_gemm {name}, {label}", launch, (_grouped_gemm_kernel, _decode_experts_kernel), by_step)
    vocabulary = empty(151936, hidden)
    logits = empty(tokens, len(vocabulary), dtype=torch.float32)
    yield Case("linear", partial(linear, x, vocabulary, logits, tiles["invariant"]), (_linear_kernel,))
    yield Case("combine", partial(combine, y, routing_of(16), x), (_combine_kernel,))
    norm = empty(hidden, dtype=torch.float32)
    launch = partial(combine_and_norm, y, routing_of(16), x, norm, 1e-6, torch.empty_like(x))
    yield Case("combine_and_norm", launch, (_combine_and_norm_kernel,))
