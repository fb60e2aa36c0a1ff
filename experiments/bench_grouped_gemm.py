"""The MoE layer on a GPU: routing, grouped GEMMs and combine against the roofs of the machine and against peers.

    python -m fluxmoe.experiments.bench_grouped_gemm --out results/<gpu>/bench_grouped_gemm
    python -m fluxmoe.experiments.bench_grouped_gemm --predict sm_90 --out results/predicted-h100/bench_grouped_gemm

A row is one provider at one number of tokens: time of the whole layer from router logits to summed experts, the
bytes and flops that it cannot avoid, and the floor that the roofs set for them. Bytes count the weights of the
experts that were really chosen, once. Every provider is checked against a plain loop before it is timed. Without a GPU
`--predict` writes what bytes, flops and the machine code let expect (predict_kernels), in rows marked predicted.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from fluxmoe.kernels import grouped_gemm
from fluxmoe.kernels.expert_table import ExpertTable
from fluxmoe.kernels.routing import Router
from fluxmoe.kernels.tiles import Tiles, capability_of, choose_tiles, invariant_tile
from torch import Tensor

from .common import Parser, UsageError, cli_main
from .gpu import ResultRows, Roofs, Timing, cold_copies, measure_roofs, require_gpu, time_calls
from .moe_peers import PEERS, SAME_NUMBERS, PeerMissingError
from .moe_shapes import SHAPES, TOKENS, Shape


class Layer:
    """One layer's experts, as checkpoints have them for peers and behind a table for us; one memory each."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        options = {"dtype": torch.bfloat16, "device": device}
        self.shape = shape
        self.gate_up = torch.randn(shape.experts, 2 * shape.intermediate, shape.hidden, **options)
        self.gate_up *= shape.hidden**-0.5
        self.down = torch.randn(shape.experts, shape.hidden, shape.intermediate, **options)
        self.down *= shape.intermediate**-0.5
        mixed = [grouped_gemm.interleave(w) for w in self.gate_up]
        blocks = [
            (a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8)) for a, b in zip(mixed, self.down, strict=True)
        ]
        self.table = ExpertTable.from_blocks(blocks, device)


class Ours:
    """Router, tiles and buffers of one engine, for batches of `tokens`."""

    def __init__(self, shape: Shape, tokens: int, device: torch.device, tiles: Tiles | None = None) -> None:
        self.shape, self.device = shape, device
        slots = tokens * shape.top_k
        on_gpu = device.type == "cuda"
        name = torch.cuda.get_device_name() if on_gpu else None
        self.num_sms = torch.cuda.get_device_properties(0).multi_processor_count if on_gpu else 1
        rows = slots / max(1, min(slots, shape.experts))
        self.tiles = tiles or choose_tiles(shape.hidden, shape.intermediate, rows, capability_of(device), 2, name)
        self.router = Router(tokens, shape.experts, shape.top_k, True, device)
        self.h = torch.empty(slots, shape.intermediate, dtype=torch.bfloat16, device=device)
        self.y = torch.empty(slots, shape.hidden, dtype=torch.bfloat16, device=device)
        self.out = torch.zeros(tokens, shape.hidden, dtype=torch.bfloat16, device=device)

    def run(self, layer: Layer, x: Tensor, logits: Tensor) -> Tensor:
        """The layer's output, added to what `out` holds."""
        routing = self.router(logits, self.tiles.gate_up.block_m)
        grouped_gemm.gate_up(x, layer.table, routing, self.h, torch.bfloat16, self.tiles.gate_up, self.num_sms)
        grouped_gemm.down(self.h, layer.table, routing, self.y, torch.bfloat16, self.tiles.down, self.num_sms)
        return grouped_gemm.combine(self.y, routing, self.out)


def router_logits(shape: Shape, tokens: int, routing: str, seed: int, device: torch.device) -> Tensor:
    """fp32 [T, E]. uniform: any expert alike; zipf:S: expert r is chosen in proportion to 1 / (r + 1)^S."""
    kind, _, exponent = routing.partition(":")
    if kind not in ("uniform", "zipf"):
        raise UsageError(f"--routing must be uniform or zipf:S, got {routing}")
    try:
        popularity = -float(exponent or 1.0) * torch.arange(1, shape.experts + 1).log() if kind == "zipf" else 0.0
    except ValueError:
        raise UsageError(f"--routing zipf:S takes a number, got {routing}") from None
    # Gumbel noise makes top-k a draw without replacement.
    noise = torch.rand(tokens, shape.experts, generator=torch.Generator().manual_seed(seed)).clamp_min(1e-9)
    return (popularity - (-noise.log()).log()).float().to(device)


def reference(layer: Layer, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """A loop over experts in fp32."""
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in chosen.unique().tolist():
        token, choice = torch.where(chosen == expert)
        gate, up = (x[token].float() @ layer.gate_up[expert].float().T).chunk(2, dim=-1)
        y = torch.nn.functional.silu(gate) * up @ layer.down[expert].float().T
        out.index_add_(0, token, y * weights[token, choice, None])
    return out


def check(name: str, got: Tensor, expected: Tensor) -> None:
    """AssertionError unless `got` agrees within the roundings of bf16."""
    error = (got.float() - expected).abs().max().item() / max(1e-6, expected.abs().max().item())
    assert error < 0.02, f"{name} is wrong: its output differs by {error:.1%} of the largest value"


def bench_shape(name: str, args: argparse.Namespace, roofs: Roofs, results: ResultRows) -> None:
    """All token counts of one shape."""
    device, shape = require_gpu(), SHAPES[name]
    layers = [Layer(shape, device) for _ in range(cold_copies(shape.expert_bytes * shape.experts))]
    missing: set[str] = set()
    for tokens in args.tokens:
        x = torch.randn(tokens, shape.hidden, dtype=torch.bfloat16, device=device)
        logits = router_logits(shape, tokens, args.routing, tokens, device)
        ours = Ours(shape, tokens, device)
        routing = ours.router(logits, ours.tiles.gate_up.block_m)
        weights, chosen = routing.weights.clone(), routing.experts.clone()
        touched = len(chosen.unique())
        expected = reference(layers[0], x, weights, chosen) if tokens <= 256 else None
        fixed = invariant_tile(capability_of(device), 2)
        engines = {"fluxmoe": ours, "fluxmoe invariant": Ours(shape, tokens, device, Tiles(fixed, fixed))}
        timings: dict[str, Timing] = {}
        for provider, engine in engines.items():
            if expected is not None:
                engine.out.zero_()
                check(provider, engine.run(layers[0], x, logits), expected)
            timings[provider] = time_calls([partial(engine.run, layer, x, logits) for layer in layers])
        for peer in args.peers:
            if peer in missing:
                continue
            try:
                runs = [PEERS[peer](layer.gate_up, layer.down) for layer in layers]
                if expected is not None and peer in SAME_NUMBERS:
                    check(peer, runs[0](x, logits, weights, chosen), expected)
                timings[peer] = time_calls([partial(run, x, logits, weights, chosen) for run in runs])
            except (PeerMissingError, RuntimeError, TypeError, AttributeError, AssertionError) as error:
                missing.add(peer)
                print(f"peer {peer} is left out: {' '.join(str(error).split())[:200]}", flush=True)
        report(name, shape, tokens, touched, args.routing, timings, roofs, results)


def report(
    name: str, shape: Shape, tokens: int, touched: float, routing: str, timings: dict[str, Timing], roofs: Roofs,
    results: ResultRows, kind: str = "measured",
) -> None:  # fmt: skip
    """Rows and a printed line for each provider."""
    nbytes, flops = shape.work(tokens, touched)
    floor = roofs.floor_s(nbytes, flops)
    base = timings["fluxmoe"].p50
    for provider, timing in timings.items():
        results.add(
            {
                "kind": kind, "shape": name, "tokens": tokens, "routing": routing, "provider": provider,
                "time_us": timing.p50 * 1e6, "p20_us": timing.p20 * 1e6, "p80_us": timing.p80 * 1e6,
                "method": timing.method, "experts_touched": touched, "bytes": nbytes, "flops": flops,
                "share_of_copy_bandwidth": nbytes / timing.p50 / roofs.bytes_per_s,
                "share_of_matmul_rate": flops / timing.p50 / roofs.flops_per_s,
                "floor_us": floor * 1e6, "share_of_floor": floor / timing.p50, "time_over_ours": timing.p50 / base,
            }
        )  # fmt: skip
        print(
            f"{kind:>9} {name:>10} {tokens:>5} tokens  {provider:<18} {timing.p50 * 1e6:9.1f} µs  "
            f"{nbytes / timing.p50 / roofs.bytes_per_s:5.0%} of copy, {flops / timing.p50 / 1e12:6.1f} TFLOP/s, "
            f"{floor / timing.p50:5.0%} of the floor, {timing.p50 / base:5.2f}x our time",
            flush=True,
        )


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="fluxmoe.experiments.bench_grouped_gemm", description=__doc__.splitlines()[0])
    p.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=list(SHAPES))
    p.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    p.add_argument("--routing", default="uniform", metavar="uniform|zipf:S")
    p.add_argument("--peers", nargs="*", choices=sorted(PEERS), default=["torch"])
    p.add_argument("--predict", choices=["sm_90"], help="no GPU: write predictions for an H100")
    p.add_argument("--out", required=True, metavar="DIR")
    return p


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if min(args.tokens) < 1:
        raise UsageError("--tokens must be at least 1")
    if args.predict:
        from .predict_kernels import predicted_layer_rows

        predicted_layer_rows(args.shapes, args.tokens, args.predict, args.out)
        return
    require_gpu()
    roofs = measure_roofs()
    print(f"roofs: copy {roofs.bytes_per_s / 1e12:.2f} TB/s, bf16 matmul {roofs.flops_per_s / 1e12:.0f} TFLOP/s")
    results = ResultRows(args.out, roofs, kind="measured")
    for name in args.shapes:
        bench_shape(name, args, roofs, results)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    cli_main(main)
