"""Lossless formats on the experts of a checkpoint: bits a weight against the entropy bound, and rates.

    python -m fluxmoe.experiments.bench_packing --model DIR --out results/<hardware>/bench_packing

A row is one format on one tensor type: bits a weight, the bound that the entropies of its sign, exponent and mantissa
set, and GB/s of bf16 put in and got out, median of three. Every decode is compared bit for bit before it counts. On a
GPU decoding to a buffer is timed too, on weights larger than L2, beside a copy of as many bytes.
The GEMMs that read compressed experts in place are timed by bench_cpu_moe.
"""

from __future__ import annotations

import argparse
import csv
import io
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from fluxmoe.kernels.packing import FORMATS, Packed, PackedFormat
from fluxmoe.kernels.packing.histogram import exponent_histogram
from fluxmoe.models.checkpoint import Checkpoint
from torch import Tensor

from .common import Parser, UsageError, cli_main, provenance, write_atomically, write_json
from .fig5_exponents import entropy

_REPEATS = 3


def bound_of(weight: Tensor) -> float:
    """Bits a weight that no code of independent sign, exponent and mantissa goes below."""
    bits = weight.contiguous().view(torch.int16).numpy().view(np.uint16).reshape(1, -1)
    return 1 + entropy(exponent_histogram(bits)[0]) + entropy(np.bincount((bits & 0x7F).reshape(-1), minlength=128))


def median_seconds(work: Callable[[], object]) -> float:
    work()
    times = []
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return float(np.median(times))


def gpu_decode_rate(packed_format: PackedFormat, packed: Packed, weight: Tensor) -> dict[str, float]:
    """GB/s of output on the GPU, and the share of what a copy of as many bytes reaches."""
    from .gpu import time_calls

    on_gpu = packed.to("cuda")
    out, source = torch.empty(packed.shape, dtype=torch.bfloat16, device="cuda"), weight.cuda()
    assert torch.equal(packed_format.decode(on_gpu).view(torch.int16), source.view(torch.int16)), packed_format.name
    decode = time_calls([lambda: packed_format.decode(on_gpu, out)]).p50
    copy = time_calls([lambda: out.copy_(source)]).p50
    moved = packed.nbytes + weight.nbytes
    return {
        "gpu_decode_gb_per_s": weight.nbytes / decode / 1e9,
        "gpu_share_of_copy": (moved / decode) / (2 * weight.nbytes / copy),
    }


def bench_format(packed_format: PackedFormat, tensor: str, weight: Tensor) -> dict:
    """One row: weight bf16 [E, rows, cols]."""
    packed = packed_format.encode(weight)
    out = torch.empty_like(weight)
    packed_format.decode(packed, out)
    exact = torch.equal(out.view(torch.int16), weight.view(torch.int16))
    assert exact, f"format {packed_format.name} does not give back {tensor}"
    row = {
        "format": packed_format.name,
        "tensor": tensor,
        "weights": weight.numel(),
        "bits_per_weight": packed_format.bits_per_weight(packed),
        "bound_bits": bound_of(weight),
        "encode_gb_per_s": weight.nbytes / median_seconds(lambda: packed_format.encode(weight)) / 1e9,
        "decode_gb_per_s": weight.nbytes / median_seconds(lambda: packed_format.decode(packed, out)) / 1e9,
        "copy_gb_per_s": weight.nbytes / median_seconds(lambda: out.copy_(weight)) / 1e9,
    }
    if torch.cuda.is_available():
        row |= gpu_decode_rate(packed_format, packed, weight)
    return row


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="fluxmoe.experiments.bench_packing", description=__doc__.splitlines()[0])
    p.add_argument("--model", required=True, metavar="DIR", help="Hugging Face checkpoint in bf16")
    p.add_argument("--experts", type=int, default=64, help="experts to take, from the first layer on")
    p.add_argument("--formats", nargs="+", choices=sorted(FORMATS), default=list(FORMATS))
    p.add_argument("--out", required=True, metavar="DIR")
    return p


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if args.experts < 1:
        raise UsageError("--experts must be at least 1")
    checkpoint = Checkpoint(args.model)
    if checkpoint.config.dtype != torch.bfloat16:
        raise UsageError(f"{args.model} holds {checkpoint.config.dtype} weights; the formats compress bfloat16")
    experts = list(islice(checkpoint.experts(), args.experts))
    tensors = {
        "gate_up": torch.stack([expert[2] for expert in experts]),
        "down": torch.stack([expert[3] for expert in experts]),
    }
    rows = []
    for name in args.formats:
        for tensor, weight in tensors.items():
            row = bench_format(FORMATS[name], tensor, weight)
            rows.append(row)
            gpu = f", on the GPU {row['gpu_decode_gb_per_s']:.0f}" if "gpu_decode_gb_per_s" in row else ""
            print(
                f"{name:>9} {tensor:>8}  {row['bits_per_weight']:6.3f} bits (bound {row['bound_bits']:.3f})  "
                f"encode {row['encode_gb_per_s']:5.2f} GB/s, decode {row['decode_gb_per_s']:5.2f}{gpu}; "
                f"copy {row['copy_gb_per_s']:.1f}",
                flush=True,
            )
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    write_atomically(Path(args.out) / "rows.csv", text.getvalue())
    write_json(Path(args.out) / "provenance.json", {**provenance(device), "experts": len(experts)})


if __name__ == "__main__":
    cli_main(main)
