"""Paged attention on a GPU against the roofs of the machine and against torch's scaled_dot_product_attention.

    python -m fluxmoe.experiments.bench_attention --out results/<gpu>/bench_attention

Decode: one query a sequence, contexts of equal length; limited by the bytes of K and V. Prefill: whole prompts;
limited by flops (the causal half is counted). torch reads K and V from contiguous tensors, with its heads repeated by
enable_gqa: it has no pages to follow, which favours it.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from fluxmoe.kernels.paged_attention import paged_attention, workspace_bytes
from torch import Tensor

from .common import Parser, UsageError, cli_main
from .gpu import ResultRows, Roofs, Timing, cold_copies, measure_roofs, require_gpu, time_calls

# heads, kv_heads, head_dim
SHAPES = {"mixtral": (32, 8, 128), "qwen3_30b": (32, 4, 128), "qwen3_next": (16, 2, 256), "olmoe": (16, 16, 128)}
_BLOCK_SIZE = 32


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
    options = {"dtype": torch.bfloat16, "device": device}
    k, v = (torch.randn(sequences * blocks, kv_heads, _BLOCK_SIZE, dim, **options) for _ in range(2))
    # Pages of a sequence lie anywhere, as after hours of serving.
    table = torch.randperm(sequences * blocks, device=device).int().view(sequences, blocks)
    q = torch.randn(sequences * queries, heads, dim, **options)
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count if device.type == "cuda" else 1
    space = workspace_bytes(sequences, heads, kv_heads, dim, context, num_sms)
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


def bench(name: str, kind: str, sequences: int, queries: int, context: int, roofs: Roofs, results: ResultRows) -> None:
    """One point: ours, ours batch-invariant, torch; checked before it is timed."""
    device, shape = require_gpu(), SHAPES[name]
    nbytes, flops = work(shape, sequences, queries, context)
    cases = [make_case(shape, sequences, queries, context, device) for _ in range(min(64, cold_copies(int(nbytes))))]
    inputs = [case.contiguous() for case in cases]
    expected = as_tokens(torch_attention(*inputs[0])).float()
    for invariant in (False, True):
        error = (cases[0].ours(invariant).float() - expected).abs().max() / expected.abs().max()
        assert error < 0.02, f"paged attention is wrong: it differs by {error:.1%} of the largest value"
    timings: dict[str, Timing] = {
        "fluxmoe": time_calls([case.ours for case in cases]),
        "fluxmoe invariant": time_calls([lambda c=case: c.ours(True) for case in cases]),
        "torch sdpa": time_calls([lambda i=i: torch_attention(*i) for i in inputs]),
    }
    floor = roofs.floor_s(nbytes, flops)
    for provider, timing in timings.items():
        ratio = timing.p50 / timings["fluxmoe"].p50
        results.add(
            {
                "kind": kind, "shape": name, "sequences": sequences, "queries": queries, "context": context,
                "provider": provider, "time_us": timing.p50 * 1e6, "p20_us": timing.p20 * 1e6,
                "p80_us": timing.p80 * 1e6, "method": timing.method, "bytes": nbytes, "flops": flops,
                "floor_us": floor * 1e6, "share_of_floor": floor / timing.p50, "time_over_ours": ratio,
            }
        )  # fmt: skip
        print(
            f"{name:>10} {kind:>7} {sequences:>3} x {context:>5}  {provider:<18} {timing.p50 * 1e6:9.1f} µs  "
            f"{floor / timing.p50:5.0%} of the floor, {ratio:5.2f}x our time",
            flush=True,
        )


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="fluxmoe.experiments.bench_attention", description=__doc__.splitlines()[0])
    p.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=["mixtral", "qwen3_30b"])
    p.add_argument("--sequences", nargs="+", type=int, default=[1, 8, 32, 128], help="decode batch sizes")
    p.add_argument("--contexts", nargs="+", type=int, default=[512, 4096, 16384])
    p.add_argument("--prompts", nargs="+", type=int, default=[512, 2048, 8192], help="prefill lengths")
    p.add_argument("--out", required=True, metavar="DIR")
    return p


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if min(args.sequences + args.contexts + args.prompts) < 1:
        raise UsageError("--sequences, --contexts and --prompts must be at least 1")
    require_gpu()
    roofs = measure_roofs()
    results = ResultRows(args.out, roofs, kind="measured")
    for name in args.shapes:
        for sequences in args.sequences:
            for context in args.contexts:
                # 16 GiB of K and V in all copies; larger points do not fit beside them.
                if work(SHAPES[name], sequences, 1, context)[0] < 8 << 30:
                    bench(name, "decode", sequences, 1, context, roofs, results)
        for prompt in args.prompts:
            bench(name, "prefill", 1, prompt, prompt, roofs, results)


if __name__ == "__main__":
    cli_main(main)
