"""Tile choice of the grouped GEMM: a small table per GPU, tuned and committed, and a rule where there is none.

`kernels/triton/tuned/<GPU>.json` maps "hidden,intermediate" and a bound on the mean rows per expert to a pair of tiles,
which agree in block_m since both GEMMs read one block map; and may say from how many rows on packed experts are decoded
first:

    {"tiles": {"2048,768": {"16": {"gate_up": {"block_m": 16, …}, "down": {…}}, "max": {…}}}, "decode_rows": 80,
     "provenance": {…}}

Nothing is tuned at import or at the first call: a lookup is a pure function of the GPU's name and the sizes.
The rule (`default_tile`), and why:
  - up to 48 rows, weights are the M of the matrix instruction ("swap AB"): 64 rows of them feed one wgmma whatever
    the number of tokens, which is its N. Bound by weight bytes, so the tile is narrow (64 weight rows): even one
    token with 8 experts of Qwen3-30B makes 192 programs for 132 SMs, and no split of K is needed, hence one
    order of summation and no second kernel. 128 of K in 4 stages keep 64 KB of weights of each program in flight;
    bandwidth times latency asks for some 32 KB an SM.
  - beyond, tokens are M, and the larger the tile the fewer times weights and activations cross L2, which is what
    limits smaller ones: 128 x 256 in 8 warps leaves 128 accumulators a thread. At 64 rows an expert, where its blocks
    of 128 are half empty, it is 10 % faster on an H200 than 64 tokens and 128 weight rows, swapped. Where matrix
    instructions take operands from registers (below sm_90) it would spill: 128 x 128, from 64 rows on.
Stages are reduced until they fit the shared memory of the architecture.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from ..formats import DECODE_ROWS
from ..launches import compiled_for

TUNED_DIR = Path(__file__).with_name("tuned")
# What a program may use, by compute capability (CUDA C programming guide, table of capabilities).
_SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}


@dataclass(frozen=True, order=True)
class Tile:
    """One schedule of the grouped GEMM; block_m counts tokens, block_n rows of the weight, whichever is swapped.

    swap_ab: weights are the M operand. group_m: token blocks that share a stretch of weight columns in L2.
    persistent: programs loop over tiles; otherwise one each. tma: weights by descriptors made on the device.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    swap_ab: bool = False
    group_m: int = 8
    persistent: bool = False
    tma: bool = False

    def shared_bytes(self, itemsize: int) -> int:
        """Shared memory of the pipeline's buffers."""
        return self.num_stages * (self.block_m + self.block_n) * self.block_k * itemsize


def default_tile(rows_per_expert: float, capability: int, itemsize: int) -> Tile:
    """The rule above. capability: 80, 90, …"""
    if itemsize == 4:
        # fp32 has no matrix instructions without rounding to TF32: plain FMAs, for parity rather than speed.
        return Tile(16, 32, 32, 4, 2)
    if rows_per_expert <= 16:
        tile = Tile(16, 64, 128, 4, 4, swap_ab=True)
    elif rows_per_expert <= 32:
        tile = Tile(32, 64, 64, 4, 6, swap_ab=True)
    elif rows_per_expert <= (48 if capability >= 90 else 64):
        tile = Tile(64, 128, 64, 4, 4, swap_ab=True)
    else:
        tile = Tile(128, 256, 64, 8, 4) if capability >= 90 else Tile(128, 128, 64, 8, 3)
    return fit(tile, capability, itemsize)


# Mean rows per expert at which the rule changes from sm_90 on.
ROW_BOUNDS = (16, 32, 48, math.inf)


def invariant_tile(capability: int, itemsize: int) -> Tile:
    """One tile for every batch: each output sums over K in one order by one instruction, whoever shares the batch."""
    return Tile(16, 32, 32, 4, 2) if itemsize == 4 else fit(Tile(64, 64, 128, 4, 3, swap_ab=True), capability, itemsize)


# Mean rows per expert at which `fused_tile` changes.
FUSED_BOUNDS = (16, 32, DECODE_ROWS)


def fused_tile(weight_tile: tuple[int, int], rows_per_expert: float, capability: int) -> Tile:
    """The tile for launches that meet experts of a format that the tile loop decodes: of the weight what the format
    asks for (`Format.tile`), swapped.

    Decoding waits for itself (half of all stalls are for results of a few cycles ago), so other programs must fill in:
    three stages leave room for three programs an SM, and are 14 % faster than four at 16 rows on an H200.
    """
    # Below sm_90 decoded weights stay in registers beside both operands: 64 tokens would spill.
    most = 64 if capability >= 90 else 32
    block_m = min(16 if rows_per_expert <= 16 else 32 if rows_per_expert <= 32 else 64, most)
    return fit(Tile(block_m, weight_tile[0], 64, 4, 3, swap_ab=True), capability, 2)


def fused_invariant_tile(weight_tile: tuple[int, int], capability: int) -> Tile:
    """`invariant_tile` for such launches."""
    return fused_tile(weight_tile, FUSED_BOUNDS[-1], capability)


def shared_limit(capability: int) -> int:
    """Bytes of shared memory that a program may use; an unknown capability counts as the next lower one known."""
    return _SHARED_BYTES[max((c for c in _SHARED_BYTES if c <= capability), default=80)]


def fit(tile: Tile, capability: int, itemsize: int) -> Tile:
    """`tile` with as many stages as shared memory allows (at least one)."""
    while tile.num_stages > 1 and tile.shared_bytes(itemsize) > shared_limit(capability):
        tile = replace(tile, num_stages=tile.num_stages - 1)
    return tile


class Tiles(NamedTuple):
    """Tiles of a layer's two GEMMs; block_m is the same."""

    gate_up: Tile
    down: Tile


def choose_tiles(
    hidden: int, intermediate: int, rows_per_expert: float, capability: int, itemsize: int, gpu: str | None = None
) -> Tiles:
    """The tuned tiles of this GPU and layer, or the rule's."""
    table = _tuned(gpu) if itemsize == 2 and gpu else {}
    if tuned := tuned_tiles(table, hidden, intermediate, rows_per_expert):
        return tuned
    tile = default_tile(rows_per_expert, capability, itemsize)
    return Tiles(tile, tile)


def decodes_first(rows_per_expert: float, gpu: str | None = None) -> bool:
    """Whether packed experts are decoded to memory before the GEMM: past this GPU's bound, or `DECODE_ROWS`."""
    return rows_per_expert > ((gpu and _decode_rows(gpu)) or DECODE_ROWS)


TunedTable = dict[str, list[tuple[float, Tiles]]]


def tuned_tiles(table: TunedTable, hidden: int, intermediate: int, rows_per_expert: float) -> Tiles | None:
    """The tiles of the least bound that holds; None beyond the bounds that have been tuned so far."""
    for bound, tiles in table.get(f"{hidden},{intermediate}", ()):
        if rows_per_expert <= bound:
            return tiles
    return None


def read_tuned(path: Path) -> TunedTable:
    """A table that tune_grouped_gemm wrote, finished or not: bounds in order, with their tiles."""
    return {
        shape: sorted(
            (math.inf if bound == "max" else float(bound), Tiles(Tile(**pair["gate_up"]), Tile(**pair["down"])))
            for bound, pair in by_rows.items()
        )
        for shape, by_rows in json.loads(path.read_text())["tiles"].items()
    }


@cache
def _tuned(gpu: str) -> TunedTable:
    path = TUNED_DIR / f"{table_name(gpu)}.json"
    return read_tuned(path) if path.exists() else {}


@cache
def _decode_rows(gpu: str) -> float | None:
    path = TUNED_DIR / f"{table_name(gpu)}.json"
    return json.loads(path.read_text()).get("decode_rows") if path.exists() else None


def table_name(gpu: str) -> str:
    """File name of a GPU's table: "NVIDIA H100 80GB HBM3" → nvidia-h100-80gb-hbm3."""
    return "-".join(gpu.lower().split())


def tile_fields(tile: Tile) -> dict:
    """A tile as a table stores it."""
    return asdict(tile)


@cache
def _cuda_facts(device: torch.device) -> tuple[int, int]:
    """(SMs, compute capability) of a GPU: asked at every launch, and never different."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, 10 * properties.major + properties.minor


def _facts(device: torch.device) -> tuple[int, int]:
    if device.type == "cuda":
        return _cuda_facts(device)
    target = compiled_for(device)
    return (target.num_sms, target.capability) if target else (1, 90)


def capability_of(device: torch.device) -> int:
    """Compute capability as one number (90 for sm_90): the device's, or that which is compiled for on the meta device;
    90 where kernels are interpreted, on a CPU."""
    return _facts(device)[1]


def num_sms_of(device: torch.device) -> int:
    """SMs, likewise; 1 where kernels are interpreted."""
    return _facts(device)[0]
