"""What the kernels beside the grouped GEMM should take on an H100, from bytes, flops and machine code; no GPU runs.

    python -m fluxmoe.experiments.bench.predict_others --out results/predicted-h100/other_kernels

Routing, norms, RoPE with the KV write, attention and Gated DeltaNet at the sizes of Qwen3-30B-A3B and Qwen3-Next. As in
`predict_kernels` a prediction is the slowest of a kernel's limits plus a fixed cost, a bound that runs approach from
above: bytes over bandwidth, flops over peak, instructions over issue slots of the SMs that its programs fill. Merging
the parts of a long context is not in it, nor what programs wait for inside a chain (see `_delta_prompt`).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from fluxmoe.kernels.audit import Report, audit, cases_of
from fluxmoe.kernels.ops import DeltaNetDims

from ..lib.results import Parser, cli_main, provenance, write_csv, write_json
from .predict import CLOCK_HZ, FIXED_S, ISSUES_PER_CLOCK, ROOFS, SMS

TOKENS = (1, 32, 512, 4096)
CONTEXT = 4096


class Work(NamedTuple):
    """What one launch does. warp_instructions: issued by all warps; programs: that share the SMs."""

    size: str
    nbytes: float
    warp_instructions: float
    programs: float
    flops: float = 0.0


def _once(size: str, nbytes: float, programs: float, code: Report) -> Work:
    """A kernel without a loop: every warp issues its code once."""
    return Work(size, nbytes, programs * code.num_warps * code.instructions, programs)


def _token_wise(code: Report, tokens: int) -> Work | None:
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


def _attention(code: Report, sequences: int, queries: int) -> Work | None:
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
    return Work(size, nbytes, steps * code.loop["all"] * code.num_warps, programs, flops)


def _dims(code: Report) -> DeltaNetDims:
    dims = code.constexprs["DIMS"]
    assert isinstance(dims, DeltaNetDims), "kernels of Gated DeltaNet are compiled for them"
    return dims


def _delta_decode(code: Report, sequences: int) -> Work | None:
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


def _delta_prompt(code: Report, tokens: int) -> Work | None:
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
        return Work(f"{size}, token by token", 2 * tokens * d.projected, steps * code.instructions, programs)
    nbytes = 4 * tokens * (d.key_size + d.value_size) + pairs
    flops = 2 * tokens * d.value_heads * d.value_dim * (3 * d.key_dim + 2 * 64)
    steps = chunks * programs * code.num_warps
    return Work(f"{size}, chunks", nbytes, steps * code.loop["all"], programs, flops)


def predict(code: Report) -> list[dict]:
    """Rows of one kernel; none for those that `predict_kernels` has, or that belong to no layer's launch."""
    works = [_token_wise(code, tokens) for tokens in TOKENS]
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


def main(argv: list[str] | None = None) -> None:
    p = Parser(prog="fluxmoe.experiments.bench.predict_others", description=__doc__.splitlines()[0])
    p.add_argument("--out", required=True, metavar="DIR")
    out, rows = Path(p.parse_args(argv).out), []
    wanted = ("rms_norm", "rope_and_cache", "routing", "attention_decode", "attention_prefill", "delta_net")
    for case in cases_of("sm_90"):
        if case.name.startswith(wanted) and "mixtral" not in case.name:
            for code in audit(case, "sm_90"):
                rows += predict(code)
    for row in rows:
        print(f"{row['kernel']:<34} {row['size']:<32} {row['predicted_us']:9.1f} µs, limited by {row['limit']}")
    write_csv(out / "rows.csv", rows)
    about = {"kind": "predicted: no GPU ran", "gpu": "H100 SXM, datasheet", "arch": "sm_90"}
    write_json(out / "provenance.json", {**provenance("cpu", None), **about})


if __name__ == "__main__":
    cli_main(main)
