"""What the MoE layer's time on an H100 should be, from bytes, flops and the compiled machine code; no GPU runs.

A prediction is the slowest of the limits below, plus a fixed cost a kernel: a bound that real runs approach from
above, not a measurement. Assumed of the GPU, an H100 SXM: the datasheet's rates, and the share that large copies and
matmuls reach. What a model of limits cannot see (bank conflicts, uneven experts, clocks under load) is missing.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
from fluxmoe.kernels.audit import Report, audit, cases_of
from fluxmoe.kernels.formats import DENSE, FORMATS, fused_formats, weight_tile
from fluxmoe.kernels.triton._grouped_gemm import gemm_work
from fluxmoe.kernels.triton.tiles import FUSED_BOUNDS, ROW_BOUNDS, Tile, default_tile, fused_tile
from fluxmoe.kernels.work import Work

from ..lib.results import provenance, write_csv, write_json
from .shapes import SHAPES, Shape
from .timing import Roofs, Timing

# Datasheet: HBM3 and dense bf16 of an H100 SXM; of these, large copies and matmuls reach some 90 % and 80 %.
ROOFS = Roofs(0.90 * 3.35e12, 0.80 * 989e12)
SMS, CLOCK_HZ, ISSUES_PER_CLOCK = 132, 1.755e9, 4
SHARED_BYTES = 227 << 10
# Assumed: what SMs together read from L2 (half of 64 bytes a clock and SM), and the time of one load from HBM.
L2_BYTES_PER_S = 7.5e12
LATENCY_S = 0.8e-6
# A kernel inside a graph: launch to launch, its index loads, its epilogue.
FIXED_S = 4e-6
GEMMS = ("gate_up", "down")


def audited(arch: str) -> dict[tuple[str, Tile], Report]:
    """The machine code of both GEMMs at each tile of the rule."""
    capability = int(arch.removeprefix("sm_"))
    tiles = {f"{bound:.0f} rows": default_tile(bound, capability, 2) for bound in ROW_BOUNDS}
    for name in fused_formats("triton"):
        fused = [fused_tile(weight_tile(name), bound, capability) for bound in FUSED_BOUNDS]
        tiles |= {f"{name}, {tile.block_m} rows": tile for tile in fused}
    wanted = {f"grouped_gemm {name}, {label}": (name, tile) for label, tile in tiles.items() for name in GEMMS}
    return {wanted[case.name]: audit(case, arch)[0] for case in cases_of(arch) if case.name in wanted}


def gemm_limits(n: int, k: int, blocks: float, work: Work, tile: Tile, code: Report, weight_bytes: float = 2.0) -> dict:
    """Seconds that each resource needs for one grouped GEMM [n, k] over `blocks` blocks of rows.

    hbm: what the kernel declares. matrix: flops of whole blocks. l2: tiles of both operands.
    issue: instructions of the inner loop. integer: those of them that run on half of the lanes. latency: loads one
    after another, a pipeline's depth at a time.
    """
    loop = code.decode_loop if weight_bytes < 2 else code.loop
    tiles = blocks * math.ceil(n / tile.block_n)
    steps = tiles * math.ceil(k / tile.block_k)
    resident = SMS * max(
        1, min(SHARED_BYTES // max(1, code.shared_bytes), 65536 // (code.registers * 32 * tile.num_warps))
    )
    waves = max(1.0, tiles / resident)
    return {
        "hbm": work.nbytes / ROOFS.bytes_per_s,
        "matrix": 2.0 * blocks * tile.block_m * n * k / ROOFS.flops_per_s,
        "l2": steps * (2 * tile.block_m + weight_bytes * tile.block_n) * tile.block_k / L2_BYTES_PER_S,
        "issue": steps * loop["all"] * tile.num_warps / (SMS * ISSUES_PER_CLOCK * CLOCK_HZ),
        "integer": steps * loop["integer"] * tile.num_warps / (SMS * ISSUES_PER_CLOCK / 2 * CLOCK_HZ),
        "latency": waves * math.ceil(k / tile.block_k) / max(1, tile.num_stages - 1) * LATENCY_S,
    }


def expected_blocks(tokens: int, probability: float, block_m: int) -> float:
    """Mean of ceil(X / block_m), X the tokens that one expert gets: binomial."""
    count = np.arange(tokens + 1)
    factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, tokens + 1)))])
    chance = factorials[-1] - factorials - factorials[::-1]
    if probability < 1:
        chance = chance + count * math.log(probability) + (tokens - count) * math.log1p(-probability)
        return float((np.exp(chance) * np.ceil(count / block_m)).sum())
    return float(math.ceil(tokens / block_m))


def _tile(expert_format: str, rows_per_expert: float, capability: int) -> Tile:
    if expert_format == DENSE:
        return default_tile(rows_per_expert, capability, 2)
    return fused_tile(weight_tile(expert_format), rows_per_expert, capability)


def predict_layer(
    shape: Shape, tokens: int, codes: dict[tuple[str, Tile], Report], expert_format: str = DENSE
) -> tuple[float, dict[str, str]]:
    """(seconds, limit of each GEMM) of a layer under uniform routing."""
    rows = tokens * shape.top_k
    touched = shape.touched(tokens)
    each = rows / min(rows, shape.experts)
    tile = _tile(expert_format, each, 90)
    blocks = shape.experts * expected_blocks(tokens, shape.top_k / shape.experts, tile.block_m)
    # Routing, two GEMMs, combine; the last reads rows, and reads and writes tokens.
    total = 4 * FIXED_S + 2 * shape.hidden * (rows + 2 * tokens) / ROOFS.bytes_per_s
    limits, weight_bytes = {}, FORMATS[expert_format].bits / 8
    sizes = ((2 * shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate))
    for tensor, (name, (n, k)) in enumerate(zip(GEMMS, sizes, strict=True)):
        work = gemm_work(n, k, tokens, rows, weight_bytes * touched * n * k, 2, tensor)
        seconds = gemm_limits(n, k, blocks, work, tile, codes[name, tile], weight_bytes)
        limits[name] = max(seconds, key=seconds.__getitem__)
        total += seconds[limits[name]]
    return total, limits


def predicted_layer_rows(shapes: list[str], tokens: list[int], arch: str, out: str) -> None:
    """rows.csv and provenance.json of bench_grouped_gemm's predictions."""
    from .moe import layer_columns

    codes, rows = audited(arch), []
    for name in shapes:
        for count in tokens:
            shape, base = SHAPES[name], None
            for expert_format in (DENSE, *sorted(fused_formats("triton"))):
                provider = "fluxmoe" if expert_format == DENSE else f"fluxmoe {expert_format}"
                seconds, limits = predict_layer(shape, count, codes, expert_format)
                base = base or seconds
                timing = Timing(seconds, seconds, seconds, "/".join(limits.values()))
                bits = FORMATS[expert_format].bits
                columns = layer_columns(shape, count, shape.touched(count), timing, base, ROOFS, bits)
                point = {"shape": name, "tokens": count, "routing": "uniform", "provider": provider}
                rows.append({"kind": "predicted", **point, **columns})
                print(
                    f"{name:>10} {count:>5} tokens  {provider:<18} {timing.p50 * 1e6:9.1f} µs  "
                    f"{columns['share_of_floor']:5.0%} of the floor, {columns['time_over_ours']:5.2f}x our time",
                    flush=True,
                )
    write_csv(Path(out) / "rows.csv", rows)
    facts = {"kind": "predicted: no GPU ran", "gpu": "H100 SXM, datasheet", "arch": arch, "roofs": asdict(ROOFS)}
    write_json(Path(out) / "provenance.json", {**provenance("cpu", 0), **facts})
