"""Lossless formats on the experts of a checkpoint: bits a weight against the entropy bound, and rates.

    fluxmoe bench packing --model DIR --out results/measured/<hardware>/bench_packing

A row of rows.csv is one format on one tensor type: bits a weight, the bound that the entropies of its sign, exponent
and mantissa set, low mantissa bits that are zero in every weight (as in files that were FP8), and GB/s of bf16 put in
and got out, median of three. Every decode is compared bit for bit before it counts. On a GPU decoding to a buffer is
timed too, on weights larger than L2, beside a copy of as many bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from fluxmoe.kernels.formats import codec_of, compressed_formats
from fluxmoe.kernels.packing import Codec, Packed
from fluxmoe.kernels.packing.mantissa import zero_low_bits
from fluxmoe.models.checkpoint import Checkpoint
from torch import Tensor

from ..lib.args import group, option
from ..lib.models import ModelChoice
from ..lib.results import UsageError, write_result
from ..lib.sweep import say
from ..paper.fig5_exponents import entropy, histograms
from .timing import host_times, time_calls

_REPEATS = 3


def bound_of(weight: Tensor) -> float:
    """Bits a weight that no code of independent sign, exponent and mantissa goes below."""
    return 1 + sum(map(entropy, histograms(weight)))


def median_seconds(work: Callable[[], object]) -> float:
    return float(np.median(host_times([work], rounds=_REPEATS)))


def gpu_decode_rate(codec: Codec, packed: Packed, weight: Tensor) -> dict[str, float]:
    """GB/s of output on the GPU, and the share of what a copy of as many bytes reaches."""
    on_gpu = packed.to("cuda")
    out, source = torch.empty(packed.shape, dtype=torch.bfloat16, device="cuda"), weight.cuda()
    assert torch.equal(codec.decode(on_gpu).view(torch.int16), source.view(torch.int16)), codec.name
    decode = time_calls([lambda: codec.decode(on_gpu, out)]).p50
    copy = time_calls([lambda: out.copy_(source)]).p50
    moved = packed.nbytes + weight.nbytes
    return {
        "gpu_decode_gb_per_s": weight.nbytes / decode / 1e9,
        "gpu_share_of_copy": (moved / decode) / (2 * weight.nbytes / copy),
    }


def bench_format(codec: Codec, tensor: str, weight: Tensor) -> dict:
    """One row: weight bf16 [E, rows, cols]."""
    packed = codec.encode(weight)
    out = torch.empty_like(weight)
    codec.decode(packed, out)
    exact = torch.equal(out.view(torch.int16), weight.view(torch.int16))
    assert exact, f"format {codec.name} does not give back {tensor}"
    row = {
        "format": codec.name,
        "tensor": tensor,
        "weights": weight.numel(),
        "bits_per_weight": codec.bits_per_weight(packed),
        "bound_bits": bound_of(weight),
        "zero_mantissa_bits": zero_low_bits(weight),
        "encode_gb_per_s": weight.nbytes / median_seconds(lambda: codec.encode(weight)) / 1e9,
        "decode_gb_per_s": weight.nbytes / median_seconds(lambda: codec.decode(packed, out)) / 1e9,
        "copy_gb_per_s": weight.nbytes / median_seconds(lambda: out.copy_(weight)) / 1e9,
    }
    if torch.cuda.is_available():
        row |= gpu_decode_rate(codec, packed, weight)
    return row


@dataclass(frozen=True, kw_only=True)
class Arguments:
    model: ModelChoice = group("config")
    experts: int = option("to take, from the first layer on", 64, least=1)
    formats: tuple[str, ...] = option("which", tuple(compressed_formats()), choices=tuple(compressed_formats()))
    out: Path = option("folder of the results", metavar="DIR")


def run(args: Arguments) -> None:
    model = args.model.source().weights
    checkpoint = Checkpoint(model)
    if checkpoint.config.dtype != torch.bfloat16:
        raise UsageError(f"{model} holds {checkpoint.config.dtype} weights; the formats compress bfloat16")
    experts = list(islice(checkpoint.experts(), args.experts))
    tensors = {"gate_up": torch.stack([e[2] for e in experts]), "down": torch.stack([e[3] for e in experts])}
    rows = []
    for name in args.formats:
        for tensor, weight in tensors.items():
            rows.append(bench_format(codec_of(name), tensor, weight))
            say(rows[-1])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    write_result(args.out, "bench packing", {"rows.csv": rows}, {"device": device, "experts": len(experts)})
