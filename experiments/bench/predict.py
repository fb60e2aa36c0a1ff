"""What kernels should take on an H100, from bytes, flops and the compiled machine code; no GPU runs.

    fluxmoe bench predict --what moe --out results/predicted/h100/moe
    fluxmoe bench predict --what others --out results/predicted/h100/other_kernels

moe: the MoE layer, in rows as bench moe has them. others: routing, norms, RoPE with the KV write, attention and Gated
DeltaNet at the sizes of Qwen3-30B-A3B and Qwen3-Next.

A prediction is the slowest of the limits below, plus a fixed cost a kernel: a bound that real runs approach from above,
not a measurement. Bytes and flops are those that kernels declare of their launches at these sizes (`kernels.work`).
Assumed of the GPU: the rates of a hardware profile, by default an H100 SXM's. What a model
of limits cannot see (bank conflicts, uneven experts, clocks under load) is missing, as is what programs wait for inside
a chain: of Gated DeltaNet, what a token, or a chunk, waits for the one before (of a token its loads and two sums over
DK, of a chunk three products one after another).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from fluxmoe.kernels.audit import Report, audit, cases_of
from fluxmoe.kernels.formats import DENSE, FORMATS, fused_formats, weight_tile
from fluxmoe.kernels.launches import Case, compile_only
from fluxmoe.kernels.triton.norm import rms_norm
from fluxmoe.kernels.triton.rope_kv import rope_and_cache
from fluxmoe.kernels.triton.routing import Router
from fluxmoe.kernels.triton.tiles import FUSED_BOUNDS, ROW_BOUNDS, Tile, default_tile, fused_tile
from fluxmoe.kernels.work import Work
from fluxmoe.runtime.hardware import HardwareProfile

from ..lib.args import option
from ..lib.results import write_result
from ..lib.sweep import say
from . import attention, delta_net
from .moe import Layer, Ours, layer_columns
from .shapes import MODEL_SHAPES, SHAPES, TOKENS, Shape
from .timing import Roofs, Timing

META = torch.device("meta")
# Of the kernels beside the MoE layer; datasheet: HBM3 and dense bf16 of an H100 SXM; of these, large copies and matmuls
# reach some 90 % and 80 %.
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


class Codes(NamedTuple):
    """Machine code: of both GEMMs at each tile of the rule, and of the decoder before them, by format."""

    gemms: dict[tuple[str, Tile], Report]
    decoders: dict[str, Report]


def audited(arch: str) -> Codes:
    capability = int(arch.removeprefix("sm_"))
    tiles = {f"{bound:.0f} rows": default_tile(bound, capability, 2) for bound in ROW_BOUNDS}
    for name in fused_formats("triton"):
        fused = [fused_tile(weight_tile(name), bound, capability) for bound in FUSED_BOUNDS]
        tiles |= {f"{name}, {tile.block_m} rows": tile for tile in fused}
    wanted = {f"grouped_gemm {name}, {label}": (name, tile) for label, tile in tiles.items() for name in GEMMS}
    gemms, decoders = dict[tuple[str, Tile], Report](), dict[str, Report]()
    first = {f"grouped_gemm gate_up, {name}, decoded first": name for name in fused_formats("triton")}
    for case in cases_of(arch):
        if case.name in wanted:
            gemms[wanted[case.name]] = audit(case, arch)[0]
        elif case.name in first:
            # Programs that stay and take tile after tile.
            decoders[first[case.name]], gemm = audit(case, arch)
            gemms["gate_up", replace(tiles["inf rows"], persistent=True)] = gemm
        elif case.name.replace("down", "gate_up") in first:
            gemms["down", replace(tiles["inf rows"], persistent=True)] = audit(case, arch)[1]
    return Codes(gemms, decoders)


def gemm_limits(
    n: int, k: int, blocks: float, work: Work, tile: Tile, code: Report, roofs: Roofs, expert_format: str = DENSE
) -> dict:
    """Seconds that each resource needs for one grouped GEMM [n, k] over `blocks` blocks of rows.

    hbm: what the kernel declares. matrix: flops of whole blocks. l2: tiles of both operands.
    issue: instructions of the inner loop. integer: those of them that run on half of the lanes. latency: loads one
    after another, a pipeline's depth at a time. What SMs do counts the last round of tiles as if it were full.
    """
    dense, weight_bytes = expert_format == DENSE, FORMATS[expert_format].bits / 8
    loop, block_k = (code.loop, tile.block_k) if dense else (code.decode_loop, weight_tile(expert_format)[1])
    tiles = blocks * math.ceil(n / tile.block_n)
    tiles = math.ceil(tiles / SMS) * SMS if tiles > SMS else tiles
    steps = tiles * math.ceil(k / block_k)
    resident = SMS * max(
        1, min(SHARED_BYTES // max(1, code.shared_bytes), 65536 // (code.registers * 32 * tile.num_warps))
    )
    waves = max(1.0, tiles / resident)
    return {
        "hbm": work.nbytes / roofs.bytes_per_s,
        "matrix": 2.0 * tiles * tile.block_m * tile.block_n * k / roofs.flops_per_s,
        "l2": steps * (2 * tile.block_m + weight_bytes * tile.block_n) * block_k / L2_BYTES_PER_S,
        "issue": steps * loop["all"] * tile.num_warps / (SMS * ISSUES_PER_CLOCK * CLOCK_HZ),
        "integer": steps * loop["integer"] * tile.num_warps / (SMS * ISSUES_PER_CLOCK / 2 * CLOCK_HZ),
        "latency": waves * math.ceil(k / block_k) / max(1, tile.num_stages - 1) * LATENCY_S,
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


def predict_layer(
    shape: Shape, tokens: int, codes: Codes, roofs: Roofs, expert_format: str = DENSE, first: bool | None = None
) -> tuple[float, dict[str, str], Work]:
    """(seconds, limit of each GEMM, work) of a layer under uniform routing; first: as `decode_first` of `Ours`."""
    x = torch.empty(tokens, shape.hidden, dtype=torch.bfloat16, device=META)
    with compile_only(90, SMS) as launches:
        ours = Ours(shape, tokens, META, expert_format, decode_first=first)
        ours.run(Layer(shape, META), x, torch.empty(tokens, shape.experts, device=META))
    tile = ours.tiles.gate_up
    blocks = shape.experts * expected_blocks(tokens, shape.top_k / shape.experts, tile.block_m)
    works = [work for launch in launches if (work := launch.work)]
    total, limits = len(launches) * FIXED_S, dict[str, str]()
    for launch, work in zip(launches, works, strict=True):
        if launch.kernel.__name__ == "_decode_experts_kernel":
            code = codes.decoders[expert_format]
            issued = math.prod(launch.grid) * code.num_warps * code.instructions
            total += max(work.nbytes / roofs.bytes_per_s, issued / (SMS * ISSUES_PER_CLOCK * CLOCK_HZ))
        elif launch.kernel.__name__ != "_grouped_gemm_kernel":
            total += work.nbytes / roofs.bytes_per_s
        else:
            name, used = "down" if launch.constexprs["TENSOR"] else "gate_up", launch.constexprs["TILE"]
            assert isinstance(used, Tile), "a GEMM is given a tile"
            n, k = (2 * shape.intermediate, shape.hidden) if name == "gate_up" else (shape.hidden, shape.intermediate)
            # Of a group of experts, its share.
            mine = blocks * work.flops / (2.0 * tokens * shape.top_k * n * k)
            met = expert_format if launch.constexprs["COMPRESSED"] else DENSE
            seconds = gemm_limits(n, k, mine, work, used, codes.gemms[name, used], roofs, met)
            limits[name] = max(seconds, key=seconds.__getitem__)
            total += seconds[limits[name]]
    return total, limits, Work(*map(sum, zip(*works, strict=True)))


OTHER_TOKENS = (1, 32, 512, 4096)
CONTEXT = 4096
# sequences, queries of each, context
ATTENTION = ((1, 1, CONTEXT), (32, 1, CONTEXT), (128, 1, CONTEXT), (1, 1, 32768), (1, CONTEXT, CONTEXT))
# heads, KV heads, head dim, QK-norm
_LAYERS = {"qwen3-30b-a3b": (32, 4, 128, "head"), "qwen3-next": (16, 2, 256, "head")}


class Point(NamedTuple):
    """An operation at one size. repeats: how often a program without matrix instructions goes through its code."""

    size: str
    case: Case
    repeats: int = 1


def other_points() -> Iterator[Point]:
    """Everything beside the MoE layer; inside `compile_only`."""
    for tokens in OTHER_TOKENS:
        for name, launch in _token_wise(tokens):
            yield Point(f"{tokens} tokens", Case(name, launch))
    for name in ("qwen3_30b", "qwen3_next"):
        for sequences, queries, context in ATTENTION:
            each = attention.make_case(attention.SHAPES[name], sequences, queries, context, META)
            size = f"{sequences} sequences, {'decode' if queries == 1 else 'prompts'} of {context}"
            yield Point(size, Case(f"attention/{name}", each.ours))
    for sequences in (1, 32, 128):
        step = delta_net.Case(delta_net.DIMS, sequences, 1, META)
        yield Point(f"{sequences} sequences, decode", Case("delta_net/qwen3_next", step.ours))
    prompt = delta_net.Case(delta_net.DIMS, 1, CONTEXT, META)
    yield Point(f"prompt of {CONTEXT}, chunks", Case("delta_net/qwen3_next", prompt.ours))
    by_token = Case("delta_net/qwen3_next", partial(prompt.ours, token_by_token=True))
    yield Point(f"prompt of {CONTEXT}, token by token", by_token, CONTEXT)


def _token_wise(tokens: int) -> Iterator[tuple[str, Callable[[], object]]]:
    bf16 = partial(torch.empty, dtype=torch.bfloat16, device=META)
    fp32 = partial(torch.empty, device=META)
    yield "rms_norm/qwen3-30b-a3b", partial(rms_norm, bf16(tokens, 2048), fp32(2048), 1e-6)
    for experts, top_k in ((128, 8), (512, 10)):
        router = Router(tokens, experts, top_k, True, META)
        yield f"routing/{experts} experts", partial(router, fp32(tokens, experts), 16)
    for model, (heads, kv_heads, dim, qk_norm) in _LAYERS.items():
        qkv, cache, angles = bf16(tokens, (heads + 2 * kv_heads) * dim), bf16(256, kv_heads, 16, dim), fp32(1, dim // 2)
        positions = torch.empty(tokens, dtype=torch.int32, device=META)
        yield f"rope_and_cache/{model}", partial(
            rope_and_cache, qkv, fp32(dim), fp32(dim), angles, angles, positions, positions.long(), cache, cache,
            bf16(tokens, heads, dim), heads=heads, kv_heads=kv_heads, head_dim=dim, block_size=16, qk_norm=qk_norm,
        )  # fmt: skip


def issued(code: Report, repeats: int = 1) -> float:
    """Instructions of all warps: of a loop with matrix instructions as often as the declared flops ask for, of other
    kernels the whole code once a program."""
    if not code.nbytes:
        return 0.0  # every program finds nothing to do
    c = code.sizes
    if code.kernel in ("_decode_kernel", "_prefill_kernel"):
        rows = c["group"] * (1 if code.kernel == "_decode_kernel" else c["block_q"])
        steps = code.flops / (4 * c["head_dim"] * rows * c["block_kv"])
    elif code.kernel == "_state_kernel":
        steps = code.flops / (2 * 64 * c["block_v"] * (3 * c["key_dim"] + 2 * 64))
    else:
        times = repeats if code.kernel == "_recurrent_kernel" else 1
        return float(times * code.programs * code.num_warps * code.instructions)
    return steps * code.num_warps * code.loop["all"]


def predict_kernel(code: Report, size: str, repeats: int = 1) -> dict:
    """The row of one kernel."""
    slots = min(SMS, code.programs) * ISSUES_PER_CLOCK * CLOCK_HZ
    limits = {
        "hbm": code.nbytes / ROOFS.bytes_per_s,
        "matrix": code.flops / ROOFS.flops_per_s,
        "issue": issued(code, repeats) / slots,
    }
    limit = max(limits, key=limits.__getitem__)
    return {
        "kind": "predicted", "kernel": code.name, "size": size, "predicted_us": 1e6 * (limits[limit] + FIXED_S),
        "limit": limit if limits[limit] > FIXED_S else "launch",
        **{f"{name}_us": 1e6 * seconds for name, seconds in limits.items()},
        "bytes": int(code.nbytes), "flops": int(code.flops), "registers": code.registers,
    }  # fmt: skip


def predicted_layer_rows(shapes: Iterable[str], tokens: Iterable[int], arch: str, roofs: Roofs) -> list[dict]:
    """Rows as bench moe has them."""
    codes, rows = audited(arch), []
    for name in shapes:
        for count in tokens:
            shape, base = SHAPES[name], None
            for expert_format in (DENSE, *sorted(fused_formats("triton"))):
                provider = "fluxmoe" if expert_format == DENSE else f"fluxmoe {expert_format}"
                seconds, limits, work = predict_layer(shape, count, codes, roofs, expert_format)
                base = base or seconds
                timing = Timing(seconds, seconds, seconds, "/".join(limits.values()))
                bits = FORMATS[expert_format].bits
                columns = layer_columns(work, shape.touched(count), timing, base, roofs, bits)
                point = {"shape": name, "tokens": count, "routing": "uniform", "provider": provider}
                rows.append({"kind": "predicted", **point, **columns})
                say(rows[-1])
    return rows


@dataclass(frozen=True, kw_only=True)
class Arguments:
    what: str = option("the MoE layer, or the kernels beside it", choices=("moe", "others"))
    shapes: tuple[str, ...] = option("moe: models", tuple(MODEL_SHAPES), choices=tuple(SHAPES))
    tokens: tuple[int, ...] = option("moe: of the batch", tuple(TOKENS), least=1)
    profile: str = option("moe: whose memory and matrix units", "H100-SXM", choices=("H100-SXM", "H200-SXM"))
    out: Path = option("folder of the results", metavar="DIR")


def run(args: Arguments) -> None:
    profile = HardwareProfile.load(args.profile)
    roofs = Roofs(profile.memory_bandwidth, profile.matmul_flops)
    if args.what == "moe":
        rows = predicted_layer_rows(args.shapes, args.tokens, ARCH, roofs)
    else:
        with compile_only(90, SMS):
            points = list(other_points())
        rows = [predict_kernel(code, size, repeats) for size, case, repeats in points for code in audit(case, ARCH)]
        for row in rows:
            say(row)
    facts = {"kind": "predicted: no GPU ran", "gpu": profile.name, "arch": ARCH, "roofs": asdict(roofs)}
    write_result(args.out, "bench predict", {"rows.csv": rows}, facts)
