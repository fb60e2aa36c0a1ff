"""The MoE layer on a GPU: routing, grouped GEMMs and combine against the roofs of the machine and against peers.

    fluxmoe bench moe --out results/measured/<gpu>/moe

A row is one provider at one number of tokens: time of the whole layer from router logits to summed experts, the
bytes and flops that our kernels declare of it, and the floor that the roofs set for them. Bytes count the weights of
the experts that were really chosen, once, in the provider's own format. Every provider is checked against a plain loop
before it is timed, and a wrong one is a row without a time. Rows that are there are not measured again. Without a
GPU, `fluxmoe bench predict` writes what bytes, flops and the machine code let expect.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from fluxmoe.kernels.expert_table import ExpertTable
from fluxmoe.kernels.formats import DECODE_BYTES, DENSE, FORMATS, fitting, fused_formats
from fluxmoe.kernels.launches import work_of
from fluxmoe.kernels.triton.decoded import DecodedExperts
from fluxmoe.kernels.triton.experts import TritonBlocks, TritonExperts
from fluxmoe.kernels.triton.tiles import Tiles, TunedTable, read_tuned, tuned_tiles
from fluxmoe.kernels.work import Work
from torch import Tensor

from ..lib.args import group, option
from ..lib.results import UsageError, load_json
from ..lib.sweep import Sweep
from .experts import encoded, page_of, table_of
from .peers import PEERS
from .shapes import MODEL_SHAPES, SHAPES, TOKENS, Shape
from .timing import (
    GpuBench,
    Roofs,
    TimedPoint,
    Timing,
    check,
    cold_copies,
    columns_of,
    measure_roofs,
    time_calls,
    time_providers,
)

# Bytes of the buffer that packed experts are decoded to before the GEMM, where the rule is not asked; 0: none. What is
# decoded into 24 MiB L2 may hold until it is read; 1 GiB takes a whole layer of most models at once.
_WAYS = {" in place": 0, " decoded first": DECODE_BYTES} | {f" by {n} MiB": n << 20 for n in (24, 64, 1024)}
_PACKED = [f"fluxmoe {name}{way}" for name in sorted(fused_formats("triton")) for way in ("", *_WAYS)]
# Ours on dense experts, with one tile for all batches, and on experts in each format that the GEMM decodes.
OURS = ("fluxmoe", "fluxmoe invariant", *_PACKED)
# Experts of a layer with weights of their own; the others repeat them at addresses of their own, which is all that
# time depends on. So few need be compressed.
_DISTINCT = 8


def format_of(provider: str) -> str:
    """The format of the experts that one of OURS is given."""
    return next((word for word in provider.split() if word in FORMATS), DENSE)


def decode_room(provider: str) -> int | None:
    """Bytes that one of OURS decodes packed experts to before the GEMM, 0: in place; None: by the rule."""
    return next((room for way, room in _WAYS.items() if provider.endswith(way)), None)


class Layer:
    """One layer's experts, as checkpoints have them for peers and behind a table for us; one memory each."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape, self.device = shape, device
        self.gate_up = self._weights(2 * shape.intermediate, shape.hidden)
        self.down = self._weights(shape.hidden, shape.intermediate)
        self._tables: dict[str, tuple[ExpertTable, float]] = {}

    def _weights(self, n: int, k: int) -> Tensor:
        """bf16 [E, n, k]."""
        count = min(_DISTINCT, self.shape.experts)
        few = torch.randn(count, n, k, dtype=torch.bfloat16, device=self.device) * k**-0.5
        return few.repeat(-(-self.shape.experts // count), 1, 1)[: self.shape.experts].contiguous()

    def table(self, expert_format: str = DENSE) -> ExpertTable:
        """Every expert in a format."""
        return self._made(expert_format)[0]

    def bits(self, expert_format: str) -> float:
        """Of a weight, measured."""
        return self._made(expert_format)[1]

    def _made(self, expert_format: str) -> tuple[ExpertTable, float]:
        if expert_format not in self._tables:
            encoder, experts = TritonBlocks(self.shape.dims), self.shape.experts
            distinct = zip(self.gate_up[:_DISTINCT], self.down[:_DISTINCT], strict=True)
            fit = ((fitting(expert_format, a), fitting(expert_format, b)) for a, b in distinct)
            few = [encoded(encoder, weights, expert_format) for weights in fit]
            blocks = [(a.clone(), b.clone()) for (a, b), _ in (few[e % len(few)] for e in range(experts))]
            table = table_of(blocks, self.device, expert_format)
            self._tables[expert_format] = table, sum(bits for _, bits in few) / len(few)
        return self._tables[expert_format]


def cold_layers(shape: Shape, device: torch.device) -> list[Layer]:
    """Copies of a layer that together exceed L2."""
    return [Layer(shape, device) for _ in range(cold_copies(shape.expert_bytes * shape.experts))]


class Ours(TritonExperts):
    """An engine's experts, in one format, for batches of `tokens`; tiles, room (`decode_room`): not by its rules."""

    def __init__(
        self, shape: Shape, tokens: int, device: torch.device, expert_format: str = DENSE, tiles: Tiles | None = None,
        room: int | None = None, batch_invariant: bool = False,
    ) -> None:  # fmt: skip
        self.expert_format, self._given, self._room = expert_format, tiles, room
        super().__init__(shape.dims, tokens, device, batch_invariant=batch_invariant, formats=(expert_format,))
        self.tiles = self._tiles(tokens)
        if room and self._decoded is not None:
            self._decoded = DecodedExperts(shape.dims, device, room)
        self.out = torch.zeros(tokens, shape.hidden, dtype=torch.bfloat16, device=device)
        # For those who run the two products apart, or ask what was made.
        self.router, self.num_sms, self.decoded = self._router, self._num_sms, self._decoded
        rows = tokens * shape.top_k
        self.h, self.y = self._h[:rows], self._y[:rows]

    @classmethod
    def of(cls, provider: str, shape: Shape, tokens: int, device: torch.device, tuned: TunedTable) -> Ours:
        """One of OURS; tuned: tiles for dense experts, see `tuned_tiles`."""
        rows = shape.rows_per_expert(tokens)
        tiles = tuned_tiles(tuned, shape.hidden, shape.intermediate, rows) if provider == "fluxmoe" else None
        room, invariant = decode_room(provider), provider == "fluxmoe invariant"
        return cls(shape, tokens, device, format_of(provider), tiles, room, invariant)

    def run(self, layer: Layer, x: Tensor, logits: Tensor) -> Tensor:
        """The layer's output, added to what `out` holds."""
        return self.moe_add(x, self.route(logits), page_of(layer.table(self.expert_format)), self.out)

    def _decodes(self, tokens: int) -> bool:
        if self._room is None:
            return super()._decodes(tokens)
        return self._room > 0 and self.expert_format != DENSE

    def _tiles(self, tokens: int) -> Tiles:
        return self._given or super()._tiles(tokens)


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


def choose(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """(weights fp32, experts int32) [T, top_k]: softmax over the chosen, in plain torch."""
    values, chosen = logits.topk(top_k)
    return values.softmax(-1), chosen.int()


def reference(
    layer: Layer, x: Tensor, weights: Tensor, chosen: Tensor, plus_one: bool = False, expert_format: str = DENSE
) -> Tensor:
    """A loop over experts in fp32; plus_one: see Peer; expert_format: weights are those that it holds."""
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in chosen.unique().tolist():
        token, choice = torch.where(chosen == expert)
        gate_up, down = (fitting(expert_format, weight[expert]).float() for weight in (layer.gate_up, layer.down))
        gate, up = (x[token].float() @ gate_up.T).chunk(2, dim=-1)
        y = torch.nn.functional.silu(gate) * (up + 1 if plus_one else up) @ down.T
        out.index_add_(0, token, y * weights[token, choice, None])
    return out


class Point(TimedPoint):
    """One shape at one number of tokens, on all cold copies of its layer."""

    def __init__(self, layers: list[Layer], tokens: int, routing: str, tuned: Path | None) -> None:
        self.layers, self.tokens, self.device, self.shape = layers, tokens, layers[0].device, layers[0].shape
        self.x = torch.randn(tokens, self.shape.hidden, dtype=torch.bfloat16, device=self.device)
        self.logits = router_logits(self.shape, tokens, routing, tokens, self.device)
        self.weights, self.chosen = choose(self.logits, self.shape.top_k)
        self.touched = len(self.chosen.unique())
        self._tuned = read_tuned(tuned) if tuned else {}
        # By plus_one and expert_format.
        self.expected = cache(partial(reference, layers[0], self.x, self.weights, self.chosen))

    def time(self, provider: str) -> Timing:
        """Checked, then timed; raises WrongError, AbsentError and whatever a kernel raises."""
        if provider in PEERS:
            peer = PEERS[provider]
            runs = [peer.make(layer.gate_up, layer.down) for layer in self.layers]
            inputs = (self.x, self.logits, self.weights, self.chosen)
            check(runs[0](*inputs), self.expected(peer.plus_one))
            return time_calls([partial(run, *inputs) for run in runs], graph=peer.graph)
        calls = self.ours(provider)
        check(calls[0](), self.expected(expert_format=format_of(provider)))
        return time_calls(calls)

    @cached_property
    def work(self) -> Work:
        return work_of(self.ours("fluxmoe")[0])

    def ours(self, provider: str) -> list[Callable[[], Tensor]]:
        """One of OURS on each layer."""
        ours = Ours.of(provider, self.shape, self.tokens, self.device, self._tuned)
        return [partial(ours.run, layer, self.x, self.logits) for layer in self.layers]

    def columns(self, provider: str, timing: Timing, roofs: Roofs) -> dict[str, object]:
        # A peer's floor is that of our dense experts.
        work = work_of(self.ours(provider)[0]) if provider in OURS else self.work
        bits = self.layers[0].bits(format_of(provider))
        return layer_columns(work, self.touched, timing, self.base_s, roofs, bits)


def layer_columns(
    work: Work, touched: float, timing: Timing, base_s: float | None, roofs: Roofs, bits: float = 16.0
) -> dict:
    """Columns of a layer's row."""
    return {
        **columns_of(work, timing, base_s, roofs), "experts_touched": touched, "bits_per_weight": bits,
        "share_of_copy_bandwidth": work.nbytes / timing.p50 / roofs.bytes_per_s,
        "share_of_matmul_rate": work.flops / timing.p50 / roofs.flops_per_s,
    }  # fmt: skip


def bench_shape(name: str, args: Arguments, roofs: Roofs, results: Sweep, device: torch.device) -> None:
    """All points of one shape that are missing."""
    layers = cache(partial(cold_layers, SHAPES[name], device))
    for tokens in args.tokens:
        make = lambda tokens=tokens: Point(layers(), tokens, args.routing, args.tuned)  # noqa: E731
        where: dict[str, Any] = {"shape": name, "tokens": tokens, "routing": args.routing}
        time_providers(results, roofs, args.providers, make, **where)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    shapes: tuple[str, ...] = option("models", tuple(MODEL_SHAPES), choices=tuple(SHAPES))
    tokens: tuple[int, ...] = option("of the batch", tuple(TOKENS), least=1)
    routing: str = option("how experts are chosen", "uniform", metavar="uniform|zipf:S")
    providers: tuple[str, ...] = option(
        "what is timed", ("fluxmoe", "fluxmoe invariant", "torch"), choices=(*OURS, *sorted(PEERS))
    )
    tuned: Path | None = option("tiles that bench tune found, for fluxmoe", None, metavar="FILE")
    where: GpuBench = group()

    def __post_init__(self) -> None:
        router_logits(SHAPES["tiny"], 1, self.routing, 0, torch.device("cpu"))


def run(args: Arguments) -> None:
    device = args.where.device
    tiles = load_json(args.tuned) if args.tuned else None
    roofs = measure_roofs(device)
    print(f"roofs: copy {roofs.bytes_per_s / 1e12:.2f} TB/s, bf16 matmul {roofs.flops_per_s / 1e12:.0f} TFLOP/s")
    facts = {"roofs": asdict(roofs), "tuned": str(args.tuned or "")}
    with args.where.rows("bench moe", {"tuned": tiles}, **facts) as results:
        for name in args.shapes:
            bench_shape(name, args, roofs, results, device)
            if device.type == "cuda":
                torch.cuda.empty_cache()
        results.finish()
