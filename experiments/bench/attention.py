"""Paged attention on a GPU against the roofs of the machine and against torch's scaled_dot_product_attention.

    fluxmoe bench attention --out results/measured/<gpu>/attention

Decode: one query a sequence, contexts of equal length; limited by the bytes of K and V. Prefill: whole prompts;
limited by flops (the causal half is counted). torch reads K and V from contiguous tensors, with its heads repeated by
enable_gqa: it has no pages to follow, which favours it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import product

import torch
import torch.nn.functional as F
from fluxmoe.kernels.launches import work_of
from fluxmoe.kernels.triton.paged_attention import paged_attention, workspace_bytes
from fluxmoe.kernels.triton.tiles import num_sms_of
from fluxmoe.kernels.work import Work
from torch import Tensor

from ..lib.args import group, option
from .timing import GpuBench, TimedPoint, Timing, check, cold_copies, measure_roofs, time_calls, time_providers

# heads, kv_heads, head_dim
SHAPES = {"mixtral": (32, 8, 128), "qwen3_30b": (32, 4, 128), "qwen3_next": (16, 2, 256), "olmoe": (16, 16, 128)}
# For rehearsals.
SHAPES["tiny"] = (4, 2, 16)
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


def kv_bytes(shape: tuple[int, int, int], sequences: int, context: int) -> int:
    """Of K and V."""
    _, kv_heads, dim = shape
    return 2 * 2 * sequences * context * kv_heads * dim


PROVIDERS = ("fluxmoe", "fluxmoe invariant", "torch sdpa")


class Point(TimedPoint):
    """One shape, all cold copies of its inputs."""

    def __init__(self, name: str, sequences: int, queries: int, context: int, device: torch.device) -> None:
        shape = SHAPES[name]
        copies = min(64, cold_copies(kv_bytes(shape, sequences, context)))
        self.cases = [make_case(shape, sequences, queries, context, device) for _ in range(copies)]
        self.inputs = [case.contiguous() for case in self.cases]
        self.expected = as_tokens(torch_attention(*self.inputs[0])).float()

    @cached_property
    def work(self) -> Work:
        return work_of(self.cases[0].ours)

    def time(self, provider: str) -> Timing:
        """Checked against torch, then timed."""
        if provider == "torch sdpa":
            return time_calls([partial(torch_attention, *each) for each in self.inputs])
        invariant = provider == "fluxmoe invariant"
        check(self.cases[0].ours(invariant), self.expected)
        return time_calls([partial(case.ours, invariant) for case in self.cases])


@dataclass(frozen=True, kw_only=True)
class Arguments:
    shapes: tuple[str, ...] = option("models", ("mixtral", "qwen3_30b"), choices=tuple(SHAPES))
    sequences: tuple[int, ...] = option("decode batch sizes", (1, 8, 32, 128), least=1)
    contexts: tuple[int, ...] = option("of decode", (512, 4096, 16384), least=1)
    prompts: tuple[int, ...] = option("prefill lengths", (512, 2048, 8192), least=1)
    where: GpuBench = group()


def run(args: Arguments) -> None:
    device = args.where.device
    roofs = measure_roofs(device)
    points = [("decode", *point) for point in product(args.shapes, args.sequences, (1,), args.contexts)]
    points += [("prefill", name, 1, prompt, prompt) for name in args.shapes for prompt in args.prompts]
    with args.where.rows("bench attention", roofs=asdict(roofs)) as results:
        for kind, name, sequences, queries, context in points:
            # 16 GiB of K and V in all copies; larger points do not fit beside them.
            if kv_bytes(SHAPES[name], sequences, context) < 8 << 30:
                make = partial(Point, name, sequences, queries, context, device)
                sizes = {"sequences": sequences, "queries": queries, "context": context}
                time_providers(results, roofs, PROVIDERS, make, kind=kind, shape=name, **sizes)
        results.finish()
