"""Paged attention: on a GPU against its roofs and torch's attention, on a CPU in slabs against one contiguous cache.

    python -m fluxmoe.experiments.bench.attention --out results/<gpu>/bench_attention
    python -m fluxmoe.experiments.bench.attention --device cpu --out results/<cpu>/bench_attention

On a GPU: decode is one query a sequence, contexts of equal length; limited by the bytes of K and V. Prefill is whole
prompts; limited by flops (the causal half is counted). torch's scaled_dot_product_attention reads K and V from
contiguous tensors, with its heads repeated by enable_gqa: it has no pages to follow, which favours it.

On a CPU the caches hold all layers of a model and are read whole, layer by layer, the two layouts in turns. Every other
slab is another's; a slab is as large as the model's expert in planar12.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from fluxmoe.kernels.cpu.ops import CpuOps
from fluxmoe.kernels.ops import AttentionMetadata, LayerDims, Limits, RopeTable
from fluxmoe.kernels.triton.paged_attention import paged_attention, workspace_bytes
from fluxmoe.kernels.triton.tiles import num_sms_of
from fluxmoe.runtime.devices import HOST
from fluxmoe.runtime.serving.kv_cache import KVLayout, PagedKVCache
from torch import Tensor

from ..lib.results import Parser, UsageError, cli_main, provenance, write_csv, write_json
from .timing import (
    ResultRows,
    Roofs,
    Timing,
    WrongError,
    base_seconds,
    cold_copies,
    measure_roofs,
    ratio,
    require_gpu,
    time_calls,
)

# heads, kv_heads, head_dim
SHAPES = {"mixtral": (32, 8, 128), "qwen3_30b": (32, 4, 128), "qwen3_next": (16, 2, 256), "olmoe": (16, 16, 128)}
# For rehearsals.
SHAPES["tiny"] = (4, 2, 16)
_BLOCK_SIZE = 32
# Layers with attention, and bytes of an expert in planar12, of those that a CPU has memory for.
CPU_MODELS = {
    "qwen3_30b": (48, 3 * 2048 * 768 * 12 // 8), "qwen3_next": (12, 3 * 2048 * 512 * 12 // 8),
    "olmoe": (16, 3 * 2048 * 1024 * 12 // 8), "tiny": (3, 3 * 64 * 64 * 12 // 8),
}  # fmt: skip
_CPU_BLOCK_SIZE = 16
# What is measured unless the command line says otherwise.
_POINTS: dict[str, dict[str, list]] = {
    "cuda": {
        "shapes": ["mixtral", "qwen3_30b"], "sequences": [1, 8, 32, 128], "contexts": [512, 4096, 16384],
        "prompts": [512, 2048, 8192],
    },
    "cpu": {"shapes": ["qwen3_30b", "qwen3_next", "olmoe"], "sequences": [8], "contexts": [1024], "prompts": [512]},
}  # fmt: skip


@dataclass
class Case:
    """B sequences with `queries` tokens each at the end of a context of `context`; K and V also as torch wants them."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor
    context_lens: Tensor
    query_start: Tensor
    out: Tensor
    workspace: Tensor
    queries: int
    context: int

    def ours(self, batch_invariant: bool = False) -> Tensor:
        return paged_attention(
            self.q, self.k_cache, self.v_cache, self.block_table, self.context_lens, self.query_start,
            scale=self.q.shape[-1] ** -0.5, block_size=_BLOCK_SIZE, max_query_len=self.queries, out=self.out,
            workspace=self.workspace, max_context=self.context, batch_invariant=batch_invariant,
        )  # fmt: skip

    def contiguous(self) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, heads, queries, D], k and v [B, kv_heads, context, D], gathered from the pages."""
        sequences = len(self.context_lens)
        q = self.q.view(sequences, self.queries, *self.q.shape[1:]).transpose(1, 2).contiguous()
        pages = (cache[self.block_table.long()] for cache in (self.k_cache, self.v_cache))
        k, v = (p.transpose(1, 2).flatten(2, 3)[:, :, : self.context].contiguous() for p in pages)
        return q, k, v


def make_case(shape: tuple[int, int, int], sequences: int, queries: int, context: int, device: torch.device) -> Case:
    heads, kv_heads, dim = shape
    blocks = -(-context // _BLOCK_SIZE)
    randn = partial(torch.randn, dtype=torch.bfloat16, device=device)
    k, v = (randn(sequences * blocks, kv_heads, _BLOCK_SIZE, dim) for _ in range(2))
    # Pages of a sequence lie anywhere, as after hours of serving.
    table = torch.randperm(sequences * blocks, device=device).int().view(sequences, blocks)
    q = randn(sequences * queries, heads, dim)
    space = workspace_bytes(sequences, heads, kv_heads, dim, context, num_sms_of(device))
    return Case(
        q, k, v, table,
        torch.full((sequences,), context, dtype=torch.int32, device=device),
        torch.arange(sequences + 1, dtype=torch.int32, device=device) * queries,
        torch.empty_like(q), torch.empty(space, dtype=torch.uint8, device=device), queries, context,
    )  # fmt: skip


def torch_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, heads, queries, D]; causal when the queries are the whole context."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] == k.shape[2], enable_gqa=True)


def as_tokens(out: Tensor) -> Tensor:
    """[B, heads, queries, D] → [B * queries, heads, D]."""
    return out.transpose(1, 2).flatten(0, 1)


def work(shape: tuple[int, int, int], sequences: int, queries: int, context: int) -> tuple[float, float]:
    """(bytes, flops): K and V once, q and output once; QK and PV over what is visible."""
    heads, kv_heads, dim = shape
    visible = queries * context - queries * (queries - 1) / 2
    nbytes = 2 * sequences * dim * (2 * kv_heads * context + 2 * heads * queries)
    return nbytes, 4.0 * sequences * heads * dim * visible


PROVIDERS = ("fluxmoe", "fluxmoe invariant", "torch sdpa")


class Point:
    """One shape, all cold copies of its inputs."""

    def __init__(self, name: str, sequences: int, queries: int, context: int, device: torch.device) -> None:
        shape = SHAPES[name]
        self.nbytes, self.flops = work(shape, sequences, queries, context)
        copies = min(64, cold_copies(int(self.nbytes)))
        self.cases = [make_case(shape, sequences, queries, context, device) for _ in range(copies)]
        self.inputs = [case.contiguous() for case in self.cases]
        self.expected = as_tokens(torch_attention(*self.inputs[0])).float()

    def time(self, provider: str) -> Timing:
        """Checked against torch, then timed."""
        if provider == "torch sdpa":
            return time_calls([partial(torch_attention, *each) for each in self.inputs])
        invariant = provider == "fluxmoe invariant"
        error = (self.cases[0].ours(invariant).float() - self.expected).abs().max() / self.expected.abs().max()
        if not error < 0.02:  # nor for NaN
            raise WrongError(f"it differs by {error:.1%} of the largest value")
        return time_calls([partial(case.ours, invariant) for case in self.cases])

    @cached_property
    def base_s(self) -> float | None:
        """Seconds of ours in this run: what ratios refer to."""
        return base_seconds(lambda: self.time("fluxmoe"))


def bench(kind: str, roofs: Roofs, results: ResultRows, device: torch.device, **sizes) -> None:
    """One point: ours, ours batch-invariant, torch; those that have no row yet."""
    missing = [name for name in PROVIDERS if not results.has(kind=kind, **sizes, provider=name)]
    if not missing:
        return
    point = Point(sizes["shape"], sizes["sequences"], sizes["queries"], sizes["context"], device)
    floor = roofs.floor_s(point.nbytes, point.flops)

    def columns(provider: str) -> dict:
        timing = point.time(provider)
        if provider == "fluxmoe":
            point.base_s = timing.p50
        return {
            **timing.columns, "bytes": point.nbytes, "flops": point.flops, "floor_us": floor * 1e6,
            "share_of_floor": floor / timing.p50, "time_over_ours": ratio(timing, point.base_s),
        }  # fmt: skip

    for provider in missing:
        results.measure(partial(columns, provider), kind=kind, **sizes, provider=provider)


def cache_of(layout: KVLayout, blocks: int, slab_bytes: int | None) -> tuple[PagedKVCache, Tensor]:
    """A cache of random K and V and the ids of its blocks: one slab, or every other slab of a pool."""
    per_slab = 1 if slab_bytes is None else slab_bytes // layout.block_bytes
    count = 1 if slab_bytes is None else 2 * -(-blocks // per_slab)
    cache = PagedKVCache(layout, HOST.make_slabs(count, slab_bytes or blocks * layout.block_bytes))
    while cache.num_blocks < blocks:
        cache.grow()
        if cache.pool.num_free:
            cache.pool.take("experts")
    ids = torch.tensor(cache.blocks.allocate(blocks), dtype=torch.int32)
    values = torch.Generator().manual_seed(0)
    for layer in range(layout.num_layers):
        for part in cache.layer(layer):
            part[ids.long()] = torch.randn((blocks, *part.shape[1:]), generator=values).to(layout.dtype)
    return cache, ids


def compare_layouts(name: str, sequences: int, queries: int, context: int, turns: int) -> dict:
    """A row: attention of all layers over a whole cache, in one slab and in many."""
    (heads, kv_heads, dim), (layers, expert_bytes) = SHAPES[name], CPU_MODELS[name]
    dims = LayerDims(hidden=16, heads=heads, kv_heads=kv_heads, head_dim=dim, experts=1, vocab=16, dtype=torch.bfloat16)
    ops = CpuOps(dims, Limits(sequences * queries, sequences, context, _CPU_BLOCK_SIZE))
    layout = KVLayout.of(ops, layers, _CPU_BLOCK_SIZE, kv_heads, dim, dims.dtype)
    each = -(-context // _CPU_BLOCK_SIZE)
    caches = {kind: cache_of(layout, sequences * each, size)
              for kind, size in (("contiguous", None), ("slabs", layout.slab_bytes(expert_bytes)))}  # fmt: skip
    order = torch.randperm(sequences * each, generator=torch.Generator().manual_seed(1)).view(sequences, each)
    new = torch.arange(context - queries, context).repeat(sequences)
    owner = torch.arange(sequences).repeat_interleave(queries)
    rope, rows = (
        RopeTable(torch.ones(context, dim // 2), torch.zeros(context, dim // 2)),
        torch.randn(sequences * queries, dims.qkv_size),
    )

    def metadata(ids: Tensor) -> AttentionMetadata:
        table = ids[order]
        slots = table[owner, new // _CPU_BLOCK_SIZE].long() * _CPU_BLOCK_SIZE + new % _CPU_BLOCK_SIZE
        return AttentionMetadata(
            query_start=torch.arange(sequences + 1, dtype=torch.int32) * queries,
            context_lens=torch.full((sequences,), context, dtype=torch.int32), block_table=table,
            positions=new.int(), slot_mapping=slots, block_size=_CPU_BLOCK_SIZE,
        )  # fmt: skip

    batches = {kind: metadata(ids) for kind, (_, ids) in caches.items()}

    def run(kind: str, layer: int) -> tuple[float, Tensor]:
        qkv = rows.clone()
        begin = time.perf_counter()
        out = ops.attention(qkv, None, None, rope, batches[kind], *caches[kind][0].layer(layer))
        return time.perf_counter() - begin, out

    for layer in range(layers):  # kernels compiled, pages touched
        expected = run("contiguous", layer)[1].clone()
        if not torch.equal(run("slabs", layer)[1], expected):
            raise WrongError(f"layer {layer} of {name} has other bits in slabs")
    times = {kind: np.zeros(turns) for kind in caches}
    rng = np.random.default_rng(0)
    for turn in range(turns):
        for layer in range(layers):
            for kind in rng.permutation(list(caches)):
                times[kind][turn] += run(kind, layer)[0]
    ratios = times["slabs"] / times["contiguous"]
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    medians = {f"{kind}_us": float(np.median(each)) * 1e6 for kind, each in times.items()}
    return {
        "shape": name, "sequences": sequences, "queries": queries, "context": context, "layers": layers,
        "kv_bytes": sequences * each * layout.block_bytes, "blocks_per_slab": caches["slabs"][0].blocks_per_slab,
        "turns": turns, **medians, "slabs_over_contiguous": middle, "ratio_p25": low, "ratio_p75": high,
    }  # fmt: skip


def compare_on_cpu(args: argparse.Namespace) -> None:
    unknown = [name for name in args.shapes if name not in CPU_MODELS]
    if unknown:
        raise UsageError(f"--device cpu has no memory for {', '.join(unknown)}; choose {', '.join(CPU_MODELS)}")
    points = [(n, s, 1, c) for n in args.shapes for s in args.sequences for c in args.contexts]
    points += [(n, 1, p, p) for n in args.shapes for p in args.prompts]
    rows = []
    for point in points:
        rows.append(compare_layouts(*point, turns=args.turns))
        print(
            "{shape:>10} {sequences:>3} x {context:<6} {queries:>5} queries  {contiguous_us:9.0f} us contiguous  "
            "{slabs_over_contiguous:.4f} in slabs ({ratio_p25:.4f} to {ratio_p75:.4f})".format(**rows[-1]),
            flush=True,
        )
    write_csv(Path(args.out) / "rows.csv", rows)
    write_json(Path(args.out) / "provenance.json", provenance("cpu", 0))


def _default(name: str) -> str:
    return f" (cuda: {_POINTS['cuda'][name]}; cpu: {_POINTS['cpu'][name]})"


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="fluxmoe.experiments.bench.attention", description=__doc__.splitlines()[0])
    p.add_argument("--device", default="cuda", choices=sorted(_POINTS))
    p.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), help=_default("shapes"))
    p.add_argument("--sequences", nargs="+", type=int, help="decode batch sizes" + _default("sequences"))
    p.add_argument("--contexts", nargs="+", type=int, help="of decode" + _default("contexts"))
    p.add_argument("--prompts", nargs="+", type=int, help="prefill lengths" + _default("prompts"))
    p.add_argument("--turns", type=int, help="with --device cpu: passes of each layout (15)")
    p.add_argument("--rehearse", action="store_true", help="no GPU: interpreted on the CPU; times mean nothing")
    p.add_argument("--out", required=True, metavar="DIR")
    return p


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    for name, points in _POINTS[args.device].items():
        if getattr(args, name) is None:
            setattr(args, name, points)
    if min(args.sequences + args.contexts + args.prompts) < 1:
        raise UsageError("--sequences, --contexts and --prompts must be at least 1")
    if args.device == "cpu":
        if args.rehearse:
            raise UsageError("--rehearse stands in for a GPU; with --device cpu all is measured")
        args.turns = 15 if args.turns is None else args.turns
        if args.turns < 5:
            raise UsageError(f"--turns must be at least 5, got {args.turns}")
        return compare_on_cpu(args)
    if args.turns is not None:
        raise UsageError("--turns is for --device cpu")
    device = require_gpu(args.rehearse)
    roofs = measure_roofs(device)
    made = "rehearsed" if args.rehearse else "measured"
    results = ResultRows(args.out, device.type, kind=made, roofs=asdict(roofs))
    for name in args.shapes:
        for sequences in args.sequences:
            for context in args.contexts:
                # 16 GiB of K and V in all copies; larger points do not fit beside them.
                if work(SHAPES[name], sequences, 1, context)[0] < 8 << 30:
                    bench(
                        "decode", roofs, results, device, shape=name, sequences=sequences, queries=1, context=context
                    )  # fmt: skip
        for prompt in args.prompts:
            bench("prefill", roofs, results, device, shape=name, sequences=1, queries=prompt, context=prompt)
    results.finish()


if __name__ == "__main__":
    cli_main(main)
