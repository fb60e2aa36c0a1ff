"""The CPU's grouped expert GEMM against its floor and against torch's own matmul.

    fluxmoe bench cpu-moe --out results/measured/<hardware>/bench_cpu_moe

One MoE layer (gate/up, SwiGLU, down) with the same number of rows for every expert, uncompressed and in planar12.
Weights are cold: the layers that are rotated through exceed every cache. The floor is the larger of weight bytes over
the read bandwidth and flops over the tile's rate, both measured in this run; torch loops over experts with bf16 and
with fp32 weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from fluxmoe.kernels.cpu import gemm, moe
from fluxmoe.kernels.cpu.experts import CpuBlocks
from fluxmoe.kernels.cpu.gemm import default_threads
from fluxmoe.kernels.cpu.tile import kind_of
from fluxmoe.kernels.expert_table import ExpertTable
from fluxmoe.kernels.formats import DENSE
from fluxmoe.kernels.host_memory import PAGE, host_zeros
from fluxmoe.kernels.ops import ExpertDims
from fluxmoe.runtime.experts.placement import Tier
from fluxmoe.runtime.hardware import measure_bandwidths

from ..lib.args import option
from ..lib.results import write_result
from ..lib.sweep import say
from .experts import random_expert
from .timing import host_times

# (hidden, intermediate, experts): the demo's shape, a layer of OLMoE-1B-7B, two of Qwen3-30B-A3B's width.
SHAPES = {"small": (512, 512, 32), "olmoe": (2048, 1024, 16), "qwen3_30b": (2048, 768, 32)}
_COLD_BYTES = 192 << 20
_SECONDS = 0.4


@dataclass
class Layer:
    """One layer's experts: arranged for us, dense and compressed, and as they are for torch."""

    table: ExpertTable
    planar: ExpertTable
    bf16: list[tuple[torch.Tensor, torch.Tensor]]


def make_layer(hidden: int, intermediate: int, experts: int) -> Layer:
    dims = ExpertDims(hidden, intermediate, experts, 1, torch.bfloat16)
    weights, encoder = [random_expert(dims) for _ in range(experts)], CpuBlocks(dims)

    def table(name: str) -> ExpertTable:
        # One arena a tensor type, as the engine has them.
        sizes = [(nbytes, -(-nbytes // PAGE) * PAGE) for nbytes in encoder.expert_bytes(name)]
        arenas = [host_zeros(experts * stride).view(experts, stride)[:, :nbytes] for nbytes, stride in sizes]
        blocks = [(gate_up, down) for gate_up, down in zip(*arenas, strict=True)]
        for pair, block in zip(weights, blocks, strict=True):
            encoder.encode_expert(*pair, block, name)
        return ExpertTable.from_blocks(blocks, "cpu", name)

    return Layer(table(DENSE), table("planar12"), weights)


def median_seconds(calls: Sequence[Callable[[], object]]) -> tuple[float, float]:
    """Median and interquartile range of one call over at least `_SECONDS`."""
    low, middle, high = np.percentile(host_times(calls, _SECONDS), [25, 50, 75])
    return float(middle), float(high - low)


def peak_flops(threads: int) -> float:
    """Rate of the tile on a product that is far from memory-bound, flop/s."""
    n, k, rows = 2048, 512, 256
    block = torch.empty(gemm.arranged_bytes(n, k, torch.bfloat16), dtype=torch.uint8)
    gemm.arrange(torch.randn(n, k).bfloat16(), block)
    x, y, scratch = torch.randn(rows, k), torch.empty(rows, n), gemm.Scratch(rows, threads, k)
    seconds, _ = median_seconds([lambda: gemm.linear(x, block, n, kind_of(torch.bfloat16), y, scratch)])
    return 2 * n * k * rows / seconds


def bench(shape: str, rows: tuple[int, ...], bandwidth: float, flops_rate: float, peers: bool) -> list[dict]:
    hidden, intermediate, experts = SHAPES[shape]
    layer_bytes = 6 * hidden * intermediate * experts
    layers = [make_layer(hidden, intermediate, experts) for _ in range(max(2, -(-_COLD_BYTES // layer_bytes)))]
    fp32 = [[(a.float(), b.float()) for a, b in layer.bf16] for layer in layers[: max(1, len(layers) // 2)]]
    threads, results = default_threads(), []
    for count in rows:
        tokens = count * experts
        x = torch.randn(tokens, hidden)
        buffers = moe.MoeBuffers(tokens, hidden, intermediate, experts, 1, threads)
        scratch = gemm.Scratch(tokens, threads)
        # Token t goes to expert t mod E: every expert gets `count` rows, gathered from all over x.
        logits = F.one_hot(torch.arange(tokens) % experts, experts).float()
        routing = moe.route(logits, 1, True, buffers)

        def run(table: ExpertTable) -> None:
            moe.gate_up(x, table, intermediate, torch.bfloat16, routing, buffers, scratch)  # noqa: B023
            moe.down(table, intermediate, torch.bfloat16, routing, buffers, scratch)  # noqa: B023

        def torch_loop(weights, inputs) -> None:
            for expert, (gate_up, down) in enumerate(weights):
                gate, up = F.linear(inputs[expert::experts], gate_up).chunk(2, dim=-1)
                F.linear(F.silu(gate) * up, down)

        seconds, spread = median_seconds([partial(run, layer.table) for layer in layers])
        packed, packed_spread = median_seconds([partial(run, layer.planar) for layer in layers])
        flops = 6 * hidden * intermediate * tokens
        floor = max(layer_bytes / bandwidth, flops / flops_rate)
        row = {
            "shape": shape,
            "rows_per_expert": count,
            "time_us": seconds * 1e6,
            "iqr_us": spread * 1e6,
            "planar12_us": packed * 1e6,
            "planar12_iqr_us": packed_spread * 1e6,
            "dense_over_planar12": seconds / packed,
            "weight_gb_per_s": layer_bytes / seconds / 1e9,
            "gflop_per_s": flops / seconds / 1e9,
            "share_of_floor": floor / seconds,
            "floor": "bandwidth" if layer_bytes / bandwidth >= flops / flops_rate else "flops",
        }
        if peers:
            torch.set_num_threads(threads)
            half = x.bfloat16()
            bf16, _ = median_seconds([partial(torch_loop, layer.bf16, half) for layer in layers])
            single, _ = median_seconds([partial(torch_loop, weights, x) for weights in fp32])
            row |= {"torch_bf16_us": bf16 * 1e6, "torch_fp32_us": single * 1e6}
            row |= {"over_torch_bf16": bf16 / seconds, "over_torch_fp32": single / seconds}
        results.append(row)
        say(row)
    return results


@dataclass(frozen=True, kw_only=True)
class Arguments:
    shapes: tuple[str, ...] = option("models", tuple(SHAPES), choices=tuple(SHAPES))
    rows: tuple[int, ...] = option("rows of each expert", (1, 2, 4, 8, 16, 32), least=1)
    peers: bool = option("torch's matmuls too", True)
    out: Path = option("folder of the results", metavar="DIR")


def run(args: Arguments) -> None:
    torch.manual_seed(0)
    bandwidth = measure_bandwidths(torch.device("cpu"))[Tier.RESIDENT]
    flops_rate = peak_flops(default_threads())
    print(f"floor: {bandwidth / 1e9:.1f} GB/s read, {flops_rate / 1e9:.0f} GFLOP/s, {default_threads()} threads")
    rows = [row for shape in args.shapes for row in bench(shape, args.rows, bandwidth, flops_rate, args.peers)]
    floor = {"read_bytes_per_s": bandwidth, "flops_per_s": flops_rate}
    write_result(args.out, "bench cpu-moe", {"rows.csv": rows}, floor, 0)
