"""What kernels should take on an H100, from bytes, flops and the compiled machine code; no GPU runs.

    fluxmoe bench predict --what moe --out results/predicted/h100/moe
    fluxmoe bench predict --what others --out results/predicted/h100/other_kernels

moe: the MoE layer, in rows as bench moe has them. others: routing, norms, RoPE with the KV write, attention and Gated
DeltaNet at the sizes of Qwen3-30B-A3B and Qwen3-Next.

A prediction is the slowest of the limits below, plus a fixed cost a kernel: a bound that real runs approach from above,
not a measurement. Assumed of the GPU, an H100 SXM: the datasheet's rates, and the share that large copies and matmuls
reach. What a model of limits cannot see (bank conflicts, uneven experts, clocks under load) is missing, as are merging
the parts of a long context, and what programs wait for inside a chain (see `_delta_prompt`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from fluxmoe.kernels.audit import Report, audit, cases_of
from fluxmoe.kernels.formats import DENSE, FORMATS, fused_formats, weight_tile
from fluxmoe.kernels.ops import DeltaNetDims
from fluxmoe.kernels.triton._grouped_gemm import gemm_work
from fluxmoe.kernels.triton.tiles import FUSED_BOUNDS, ROW_BOUNDS, Tile, default_tile, fused_tile
from fluxmoe.kernels.work import Work

from ..lib.args import option
from ..lib.results import provenance, write_csv, write_json
from .moe import layer_columns
from .shapes import MODEL_SHAPES, SHAPES, TOKENS, Shape
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
ARCH = "sm_90"


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


OTHER_TOKENS = (1, 32, 512, 4096)
CONTEXT = 4096


class Launched(NamedTuple):
    """What one launch does. warp_instructions: issued by all warps; programs: that share the SMs."""

    size: str
    nbytes: float
    warp_instructions: float
    programs: float
    flops: float = 0.0


def _once(size: str, nbytes: float, programs: float, code: Report) -> Launched:
    """A kernel without a loop: every warp issues its code once."""
    return Launched(size, nbytes, programs * code.num_warps * code.instructions, programs)


def _token_wise(code: Report, tokens: int) -> Launched | None:
    """Norms, RoPE and routing of `tokens`; None for other kernels."""
    c = code.sizes
    if code.kernel == "_rms_norm_kernel":
        return _once(f"{tokens} tokens", 4 * tokens * c["HIDDEN"], tokens, code)
    if code.kernel == "_rope_and_cache_kernel":
        row = (c["HEADS"] + 2 * c["KV_HEADS"]) * c["HEAD_DIM"]
        return _once(f"{tokens} tokens", 4 * tokens * row, 3 * tokens, code)
    if code.kernel == "_route_kernel" and tokens <= c["block_t"]:
        return _once(f"{tokens} tokens", 4 * tokens * c["block_e"], 1, code)
    return None


def _attention(code: Report, sequences: int, queries: int) -> Launched | None:
    """Attention of `sequences` at CONTEXT; queries: 1, or a whole prompt."""
    c, kind = code.sizes, "attention_decode" if queries == 1 else "attention_prefill"
    if not code.name.startswith(kind):
        return None
    rows = math.ceil(queries * c["GROUP"] / c["BLOCK_ROWS"])
    seen = CONTEXT if queries == 1 else CONTEXT / 2  # causal: half of the keys, in the mean
    steps = sequences * c["KV_HEADS"] * rows * math.ceil(seen / c["BLOCK_KV"])
    heads = c["KV_HEADS"] * c["GROUP"]
    kv = 4 * sequences * CONTEXT * c["KV_HEADS"] * c["HEAD_DIM"]
    nbytes = kv + 4 * sequences * queries * heads * c["HEAD_DIM"]
    # Decode splits the context until all SMs have work.
    programs = sequences * c["KV_HEADS"] * rows if queries > 1 else SMS
    flops = 4 * sequences * queries * seen * heads * c["HEAD_DIM"]
    size = f"{sequences} sequences, {'decode' if queries == 1 else 'prompts'} of {CONTEXT}"
    return Launched(size, nbytes, steps * code.loop["all"] * code.num_warps, programs, flops)


def _dims(code: Report) -> DeltaNetDims:
    dims = code.constexprs["DIMS"]
    assert isinstance(dims, DeltaNetDims), "kernels of Gated DeltaNet are compiled for them"
    return dims


def _delta_decode(code: Report, sequences: int) -> Launched | None:
    """A decode step of Gated DeltaNet: the rule with its convolution, then the gated norm."""
    if not code.name.startswith("delta_net_decode"):
        return None
    d, size = _dims(code), f"{sequences} sequences, decode"
    if code.kernel == "_recurrent_kernel":
        slices = math.ceil(d.value_dim / code.sizes["BLOCK_V"])
        nbytes = 8 * sequences * d.value_heads * d.key_dim * d.value_dim
        return _once(size, nbytes, sequences * d.value_heads * slices, code)
    blocks = math.ceil(d.channels / code.sizes["BLOCK_C"])
    nbytes = 2 * sequences * (3 * d.value_size + 2 * d.taps * d.channels)
    return _once(size, nbytes, sequences * (1 + blocks), code)


def _delta_prompt(code: Report, tokens: int) -> Launched | None:
    """One prompt of Gated DeltaNet: in chunks by four kernels, or token by token by `_recurrent_kernel`, which issues
    its whole code for each token.

    Left out, and the more so the longer the chain: what a token, or a chunk, waits for the one before. Of a token that
    is its loads and two sums over DK, of a chunk three products one after another.
    """
    if not code.name.startswith("delta_net_prefill"):
        return None
    d, chunks, size = _dims(code), math.ceil(tokens / 64), f"prompt of {tokens}"
    pairs = 2 * 2 * tokens * d.value_heads * 64  # P and the inverse
    if code.kernel == "_conv_kernel":
        return _once(f"{size}, chunks", 4 * tokens * d.channels, chunks * (2 * d.key_heads + d.value_heads), code)
    if code.kernel == "_chunk_kernel":
        # q kᵀ and k kᵀ; four products in three parts for the inverse.
        flops = 2 * chunks * d.value_heads * 64 * 64 * (2 * d.key_dim + 12 * 64)
        work = _once(f"{size}, chunks", 4 * tokens * d.key_size + pairs, chunks * d.value_heads, code)
        return work._replace(flops=flops)
    if code.kernel == "_finish_kernel":
        return _once(f"{size}, chunks", 6 * tokens * d.value_size, tokens, code)
    programs = d.value_heads * math.ceil(d.value_dim / code.sizes["BLOCK_V"])
    if code.kernel == "_recurrent_kernel":
        steps = tokens * programs * code.num_warps
        return Launched(f"{size}, token by token", 2 * tokens * d.projected, steps * code.instructions, programs)
    nbytes = 4 * tokens * (d.key_size + d.value_size) + pairs
    flops = 2 * tokens * d.value_heads * d.value_dim * (3 * d.key_dim + 2 * 64)
    steps = chunks * programs * code.num_warps
    return Launched(f"{size}, chunks", nbytes, steps * code.loop["all"], programs, flops)


def predict_kernel(code: Report) -> list[dict]:
    """Rows of one kernel; none for the MoE layer's, or that belong to no layer's launch."""
    works = [_token_wise(code, tokens) for tokens in OTHER_TOKENS]
    works += [_attention(code, sequences, 1) for sequences in (1, 32, 128)]
    works += [_attention(code, 1, CONTEXT)]
    works += [_delta_decode(code, sequences) for sequences in (1, 32, 128)]
    works += [_delta_prompt(code, CONTEXT)]
    rows = []
    for work in (work for work in works if work is not None):
        slots = min(SMS, work.programs) * ISSUES_PER_CLOCK * CLOCK_HZ
        limits = {
            "hbm": work.nbytes / ROOFS.bytes_per_s,
            "matrix": work.flops / ROOFS.flops_per_s,
            "issue": work.warp_instructions / slots,
        }
        limit = max(limits, key=limits.__getitem__)
        rows.append(
            {
                "kind": "predicted", "kernel": code.name, "size": work.size,
                "predicted_us": 1e6 * (limits[limit] + FIXED_S),
                "limit": limit if limits[limit] > FIXED_S else "launch",
                **{f"{name}_us": 1e6 * seconds for name, seconds in limits.items()},
                "bytes": int(work.nbytes), "flops": int(work.flops), "registers": code.registers,
            }
        )  # fmt: skip
    return rows


def predicted_layer_rows(shapes: Iterable[str], tokens: Iterable[int], arch: str) -> list[dict]:
    """Rows as bench moe has them."""
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
    return rows


@dataclass(frozen=True, kw_only=True)
class Arguments:
    what: str = option("the MoE layer, or the kernels beside it", choices=("moe", "others"))
    shapes: tuple[str, ...] = option("moe: models", tuple(MODEL_SHAPES), choices=tuple(SHAPES))
    tokens: tuple[int, ...] = option("moe: of the batch", tuple(TOKENS), least=1)
    out: Path = option("folder of the results", metavar="DIR")


def run(args: Arguments) -> None:
    if args.what == "moe":
        rows = predicted_layer_rows(args.shapes, args.tokens, ARCH)
    else:
        wanted = ("rms_norm", "rope_and_cache", "routing", "attention_decode", "attention_prefill", "delta_net")
        cases = [case for case in cases_of(ARCH) if case.name.startswith(wanted) and "mixtral" not in case.name]
        rows = [row for case in cases for code in audit(case, ARCH) for row in predict_kernel(code)]
        for row in rows:
            print(f"{row['kernel']:<34} {row['size']:<32} {row['predicted_us']:9.1f} µs, limited by {row['limit']}")
    write_csv(args.out / "rows.csv", rows)
    facts = {"kind": "predicted: no GPU ran", "gpu": "H100 SXM, datasheet", "arch": ARCH, "roofs": asdict(ROOFS)}
    write_json(args.out / "provenance.json", {"experiment": "bench predict", **provenance("cpu", None), **facts})
