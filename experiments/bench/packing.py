"""Lossless formats on the experts of a checkpoint: bits a weight against the entropy bound, and rates.

    fluxmoe bench packing --model DIR --out results/measured/<hardware>/bench_packing

A row of rows.csv is one format on one tensor type: bits a weight, the bound that the entropies of its sign, exponent
and mantissa set, low mantissa bits that are zero in every weight (as in files that were FP8), and GB/s of bf16 put in
and got out, median of three. Every decode is compared bit for bit before it counts. On a GPU decoding to a buffer is
timed too, on weights larger than L2, beside a copy of as many bytes.

A row of gemm.csv is one MoE layer at one number of tokens, uncompressed and in planar12, timed in turns over layers
that together exceed the caches; the results of both are compared bit for bit first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from fluxmoe.kernels.formats import DENSE, codec_of, compressed_formats
from fluxmoe.kernels.ops import ExpertOps
from fluxmoe.kernels.packing import Codec, Packed
from fluxmoe.kernels.packing.mantissa import zero_low_bits
from fluxmoe.models.checkpoint import Checkpoint
from fluxmoe.models.decoder import expert_dims
from fluxmoe.runtime.devices import device_of
from fluxmoe.runtime.experts.config import PagingConfig
from fluxmoe.runtime.experts.streamer import LayerPage
from torch import Tensor
from tqdm import tqdm

from ..lib.args import group, option
from ..lib.models import ModelChoice
from ..lib.results import UsageError, write_csv, write_result
from ..lib.sweep import say
from ..paper.fig5_exponents import entropy, histograms
from .experts import encoded, page_of, table_of
from .timing import cold_copies, host_seconds, host_times, time_calls, times_in_turns

# The format whose GEMM is timed.
FUSED = "planar12"

_REPEATS = 3
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
# More than the last-level cache of any CPU that this is likely to run on.
_COLD_BYTES = 384 << 20
# Pairs of timings a point, and seconds after which a point has enough of them.
_PAIRS, _SECONDS = 30, 4.0


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


class FusedGemm:
    """The layers of a checkpoint, dense and in planar12, behind the kernels of the device."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, most_tokens: int) -> None:
        config, self.device = checkpoint.config, device
        dims = expert_dims(config)
        self.dense_ops, self.ops = (
            device_of(device).make_expert_ops(dims, most_tokens, PagingConfig(placement=placement))
            for placement in ("resident", "packed")
        )
        layer_bytes = config.expert_bytes_total // len(config.moe_layers)
        wanted = cold_copies(layer_bytes) if device.type == "cuda" else -(-_COLD_BYTES // layer_bytes)
        self.hidden = config.hidden_size
        layers = config.moe_layers[:wanted]
        self.pages = {name: [self._page(checkpoint, i, name) for i in tqdm(layers, name)] for name in (DENSE, FUSED)}
        self.num_experts = config.num_experts

    def _page(self, checkpoint: Checkpoint, layer: int, name: str) -> LayerPage:
        pairs: list = [None] * checkpoint.config.num_experts
        for _, expert, gate_up, down in checkpoint.experts(lambda i, expert: i == layer):
            pairs[expert] = encoded(self.ops, (gate_up.to(self.device), down.to(self.device)), name)[0]
        return page_of(table_of(pairs, self.device, name))

    def run(self, ops: ExpertOps, x: Tensor, logits: Tensor, page: LayerPage, out: Tensor) -> Tensor:
        return ops.moe_add(x, ops.route(logits), page, out)

    def bench(self, tokens: int) -> dict:
        """One row: µs of the layer in both formats, and their ratio pair by pair."""
        x = torch.randn(tokens, self.hidden, device=self.device).to(self.ops.act_dtype)
        logits = torch.randn(tokens, self.num_experts, device=self.device)
        zero = torch.zeros_like(x)
        dense, packed = self.pages[DENSE], self.pages[FUSED]
        results = [self.run(self.ops, x, logits, pages[0], zero.clone()) for pages in (dense, packed)]
        assert torch.equal(*results), f"{tokens} tokens: compressed and dense experts differ"
        out = zero.clone()
        if self.device.type == "cuda":
            times = [
                time_calls([partial(self.run, ops, x, logits, page, out) for page in pages])
                for ops, pages in ((self.dense_ops, dense), (self.ops, packed))
            ]
            medians, ratios = [t.p50 for t in times], [times[0].p50 / times[1].p50]
        else:

            def once(name: str, turn: int) -> float:
                page = self.pages[name][turn % len(dense)]
                return host_seconds(partial(self.run, self.ops, x, logits, page, out))

            seconds = times_in_turns(once, (DENSE, FUSED), _PAIRS, _SECONDS)
            medians, ratios = [np.median(each) for each in seconds.values()], seconds[DENSE] / seconds[FUSED]
        low, middle, high = np.percentile(ratios, [20, 50, 80])
        return {
            "tokens": tokens, "dense_us": medians[0] * 1e6, "planar12_us": medians[1] * 1e6,
            "dense_over_planar12": middle, "ratio_p20": low, "ratio_p80": high,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Arguments:
    model: ModelChoice = group("config")
    tokens: tuple[int, ...] = option("of the GEMM's points", TOKENS, least=1)
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
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    write_result(args.out, "bench packing", {"rows.csv": rows}, {"device": device.type, "experts": len(experts)})
    if not args.tokens:
        return
    fused, points = FusedGemm(checkpoint, device, max(args.tokens)), []
    for tokens in args.tokens:
        points.append(fused.bench(tokens))
        say(points[-1])
        write_csv(args.out / "gemm.csv", points)
