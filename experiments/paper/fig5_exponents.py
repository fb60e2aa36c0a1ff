"""How the bits of expert weights are distributed: what lossless compression can save (the paper's Fig. 5).

    fluxmoe paper fig5 --model DIR --out results/measured/<hardware>/fig5_exponents

Reads the experts of a checkpoint, one at a time, and counts exponents (256 values) and mantissas (128 values) of their
bf16 weights. Writes histogram.csv, summary.json with the entropies in bits, and exponents.png. A mantissa's entropy
near 7 bits and an exponent's near 2.6 are why formats keep the one and code the other.

What `make-checkpoint` wrote is generated with the statistics of trained weights, not trained: summary and figure say
so, and the figure names what is published of trained ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from fluxmoe.kernels.packing.histogram import exponent_histogram
from fluxmoe.models.checkpoint import Checkpoint
from fluxmoe.models.json_files import read_json
from torch import Tensor
from tqdm import tqdm

from ..lib.args import option
from ..lib.checkpoints import GENERATED
from ..lib.results import UsageError, write_json, write_result
from ..plots.serving import plot_exponents


def entropy(counts: np.ndarray) -> float:
    """Shannon entropy of a histogram, bits."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def histograms(weight: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Exponents int64 [256] and mantissas int64 [128] of bf16 weights."""
    bits = weight.contiguous().view(torch.int16).numpy().view(np.uint16).reshape(1, -1)
    return exponent_histogram(bits)[0], np.bincount((bits & 0x7F).reshape(-1), minlength=128)


def count_experts(checkpoint: Checkpoint, limit: int | None) -> tuple[np.ndarray, np.ndarray, int]:
    """(exponents int64 [256], mantissas int64 [128], experts read)."""
    exponents, mantissas = np.zeros(256, dtype=np.int64), np.zeros(128, dtype=np.int64)
    config = checkpoint.config
    there = len(config.moe_layers) * config.num_experts
    read = 0
    for _, _, gate_up, down in tqdm(checkpoint.experts(), "experts", min(there, limit or there), unit="expert"):
        for weight in (gate_up, down):
            for total, counts in zip((exponents, mantissas), histograms(weight), strict=True):
                total += counts
        read += 1
        if read == limit:
            break
    return exponents, mantissas, read


@dataclass(frozen=True, kw_only=True)
class Arguments:
    model: str = option("Hugging Face checkpoint in bf16", metavar="DIR")
    experts: int | None = option("read only so many experts (default: all)", None, least=1)
    out: Path = option("folder of the results", metavar="DIR")


def run(args: Arguments) -> None:
    checkpoint = Checkpoint(args.model)
    if checkpoint.config.dtype != torch.bfloat16:
        raise UsageError(f"{args.model} holds {checkpoint.config.dtype} weights; the figure is of bfloat16")
    config_json = read_json(checkpoint.directory / "config.json")
    exponents, mantissas, read = count_experts(checkpoint, args.experts)
    rows = [
        {"field": field, "value": value, "count": int(count)}
        for field, counts in (("exponent", exponents), ("mantissa", mantissas))
        for value, count in enumerate(counts)
        if count
    ]
    windows = np.convolve(exponents, np.ones(16, dtype=np.int64), "valid")
    summary = {
        "experts": read,
        "weights": int(exponents.sum()),
        "exponent_entropy_bits": entropy(exponents),
        "mantissa_entropy_bits": entropy(mantissas),
        "bits_per_weight_bound": 1 + entropy(exponents) + entropy(mantissas),
        "share_outside_16_exponents": 1 - float(windows.max() / exponents.sum()),
        "generated": bool(config_json.get(GENERATED)),
        "model": {"arch": checkpoint.config.arch, "num_layers": checkpoint.config.num_layers},
    }
    write_json(args.out / "summary.json", summary)
    write_result(args.out, "paper fig5", {"histogram.csv": rows})
    figure = plot_exponents(args.out)
    print(
        f"{summary['weights']} weights of {read} experts: exponents {summary['exponent_entropy_bits']:.3f} bits, "
        f"mantissas {summary['mantissa_entropy_bits']:.3f}, sign 1: no code below "
        f"{summary['bits_per_weight_bound']:.2f} bits a weight; {summary['share_outside_16_exponents']:.4%} outside "
        f"the 16 most common neighbours\nfigure: {figure}"
    )
