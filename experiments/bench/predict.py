"""What kernels should take on an H100, from bytes, flops and the compiled machine code; no GPU runs.

    fluxmoe bench predict --what moe --out results/predicted/h100/moe
    fluxmoe bench predict --what prefill --profile H200-SXM --out results/predicted/h200/packed_prefill
    fluxmoe bench predict --what others --out results/predicted/h100/other_kernels

moe: the MoE layer, in rows as bench moe has them. prefill: packed experts with many rows, in every way that is built,
and by the floors of ways that are not. others: routing, norms, RoPE with the KV write, attention and Gated DeltaNet at
the sizes of Qwen3-30B-A3B and Qwen3-Next.

A prediction is the slowest of the limits below, plus a fixed cost a kernel: a bound that real runs approach from above,
not a measurement. Bytes and flops are those that kernels declare of their launches at these sizes (`kernels.work`).
Assumed of the GPU: the rates of a hardware profile, by default an H100 SXM's. What a model
of limits cannot see (bank conflicts, uneven experts, clocks under load) is missing, as is what programs wait for inside
a chain: of Gated DeltaNet, what a token, or a chunk, waits for the one before (of a token its loads and two sums over
DK, of a chunk three products one after another). So a layer has a second number, calibrated by what
the one GPU that has run such layers (--measured) took over its own bounds (`predict_layer`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from fluxmoe.kernels.audit import Report, audit
from fluxmoe.kernels.launches import Case, compile_only
from fluxmoe.kernels.triton.norm import rms_norm
from fluxmoe.kernels.triton.rope_kv import rope_and_cache
from fluxmoe.kernels.triton.routing import Router
from fluxmoe.runtime.hardware import HardwareProfile

from ..lib.args import option
from ..lib.results import write_result
from ..lib.sweep import say
from . import attention, delta_net
from .predict_layer import ARCH, CLOCK_HZ, FIXED_S, ISSUES_PER_CLOCK, META, SMS, audited, layer_rows, prefill_rows
from .shapes import MODEL_SHAPES, SHAPES, TOKENS
from .timing import Roofs

# Of the kernels beside the MoE layer; datasheet: HBM3 and dense bf16 of an H100 SXM; of these, large copies and matmuls
# reach some 90 % and 80 %.
ROOFS = Roofs(0.90 * 3.35e12, 0.80 * 989e12)
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


@dataclass(frozen=True, kw_only=True)
class Arguments:
    what: str = option("the MoE layer, its prefill, or the kernels beside it", choices=("moe", "prefill", "others"))
    shapes: tuple[str, ...] = option("the layer: models", tuple(MODEL_SHAPES), choices=tuple(SHAPES))
    tokens: tuple[int, ...] = option("the layer: of the batch", tuple(TOKENS), least=1)
    profile: str = option("the layer: whose memory and matrix units", "H100-SXM", choices=("H100-SXM", "H200-SXM"))
    audit: Path = option(
        "the layer: rows of kernels.audit --json", Path("results/predicted/h100/audit.json"), metavar="FILE"
    )
    measured: tuple[Path, ...] = option(
        "the layer: folders of what bench moe has measured, to calibrate by",
        tuple(Path("results/measured/nvidia-h200") / name for name in ("packed", "packed_prefill", "packed_shapes")),
        metavar="DIR",
    )
    out: Path = option("folder of the results", metavar="DIR")


def run(args: Arguments) -> None:
    profile = HardwareProfile.load(args.profile)
    roofs = Roofs(profile.memory_bandwidth, profile.matmul_flops)
    if args.what != "others":
        rows_of = layer_rows if args.what == "moe" else prefill_rows
        rows = rows_of(args.shapes, args.tokens, roofs, audited(args.audit), args.measured)
    else:
        with compile_only(90, SMS):
            points = list(other_points())
        rows = [predict_kernel(code, size, repeats) for size, case, repeats in points for code in audit(case, ARCH)]
        for row in rows:
            say(row)
    facts = {"kind": "predicted: no GPU ran", "gpu": profile.name, "arch": ARCH, "roofs": asdict(roofs)}
    write_result(args.out, "bench predict", {"rows.csv": rows}, facts)
