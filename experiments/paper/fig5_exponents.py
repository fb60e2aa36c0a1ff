"""How the bits of trained experts are distributed: what lossless compression can save (the paper's Fig. 5).

    python -m fluxmoe.experiments.paper.fig5_exponents --model DIR --out results/<model>/fig5_exponents

Reads the experts of a checkpoint, one at a time, and counts exponents (256 values) and mantissas (128 values) of their
bf16 weights. Writes histogram.csv, summary.json with the entropies in bits, and exponents.png. A mantissa's entropy
near 7 bits and an exponent's near 2.6 are why formats keep the one and code the other.
"""

from __future__ import annotations

import argparse
import csv
import io
from pathlib import Path

import numpy as np
import torch
from fluxmoe.kernels.packing.histogram import exponent_histogram
from fluxmoe.models.checkpoint import Checkpoint
from tqdm import tqdm

from ..lib.results import Parser, UsageError, cli_main, provenance, write_atomically, write_json
from ..plots.serving import plot_exponents


def entropy(counts: np.ndarray) -> float:
    """Shannon entropy of a histogram, bits."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def count_experts(checkpoint: Checkpoint, limit: int | None) -> tuple[np.ndarray, np.ndarray, int]:
    """(exponents int64 [256], mantissas int64 [128], experts read)."""
    exponents, mantissas = np.zeros(256, dtype=np.int64), np.zeros(128, dtype=np.int64)
    config = checkpoint.config
    total = len(config.moe_layers) * config.num_experts
    read = 0
    for _, _, gate_up, down in tqdm(checkpoint.experts(), "experts", min(total, limit or total), unit="expert"):
        for weight in (gate_up, down):
            bits = weight.contiguous().view(torch.int16).numpy().view(np.uint16).reshape(1, -1)
            exponents += exponent_histogram(bits)[0]
            mantissas += np.bincount((bits & 0x7F).reshape(-1), minlength=128)
        read += 1
        if read == limit:
            break
    return exponents, mantissas, read


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="fluxmoe.experiments.paper.fig5_exponents", description=__doc__.splitlines()[0])
    p.add_argument("--model", required=True, metavar="DIR", help="Hugging Face checkpoint in bf16")
    p.add_argument("--experts", type=int, help="read only so many experts")
    p.add_argument("--out", required=True, metavar="DIR")
    return p


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if args.experts is not None and args.experts < 1:
        raise UsageError("--experts must be at least 1")
    checkpoint = Checkpoint(args.model)
    if checkpoint.config.dtype != torch.bfloat16:
        raise UsageError(f"{args.model} holds {checkpoint.config.dtype} weights; the figure is of bfloat16")
    exponents, mantissas, read = count_experts(checkpoint, args.experts)
    out, text = Path(args.out), io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("field", "value", "count"))
    for field, counts in (("exponent", exponents), ("mantissa", mantissas)):
        writer.writerows((field, value, int(count)) for value, count in enumerate(counts) if count)
    write_atomically(out / "histogram.csv", text.getvalue())
    windows = np.convolve(exponents, np.ones(16, dtype=np.int64), "valid")
    summary = {
        "experts": read,
        "weights": int(exponents.sum()),
        "exponent_entropy_bits": entropy(exponents),
        "mantissa_entropy_bits": entropy(mantissas),
        "bits_per_weight_bound": 1 + entropy(exponents) + entropy(mantissas),
        "share_outside_16_exponents": 1 - float(windows.max() / exponents.sum()),
        "model": {"arch": checkpoint.config.arch, "num_layers": checkpoint.config.num_layers},
    }
    write_json(out / "summary.json", summary | {"provenance": provenance("cpu")})
    figure = plot_exponents(out)
    print(
        f"{summary['weights']} weights of {read} experts: exponents {summary['exponent_entropy_bits']:.3f} bits, "
        f"mantissas {summary['mantissa_entropy_bits']:.3f}, sign 1: no code below "
        f"{summary['bits_per_weight_bound']:.2f} bits a weight; {summary['share_outside_16_exponents']:.4%} outside "
        f"the 16 most common neighbours\nfigure: {figure}"
    )


if __name__ == "__main__":
    cli_main(main)
