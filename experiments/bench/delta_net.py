"""Gated DeltaNet on a GPU against the roofs of the machine and against flash-linear-attention.

    fluxmoe bench delta-net --out results/measured/<gpu>/delta_net

Layers of Qwen3-Next. Decode: one token a sequence; limited by the bytes of the states, read and written. Prefill: one
prompt, in chunks, and beside it token by token, as `batch_invariant` goes. Ours is the whole of it: convolution, gates,
recurrence, gated norm. flash-linear-attention is timed for the recurrence alone, which favours it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from fluxmoe.kernels.launches import work_of
from fluxmoe.kernels.ops import AttentionMetadata, DeltaNetDims, DeltaNetWeights, Linear
from fluxmoe.kernels.reference.delta_net import gated_delta_net_torch
from fluxmoe.kernels.triton.delta_net import gated_delta_net, workspace_bytes
from fluxmoe.kernels.work import Work
from torch import Tensor

from ..lib.args import group, option
from .peers import imported
from .timing import GpuBench, TimedPoint, Timing, check, cold_copies, measure_roofs, time_calls, time_providers

DIMS = DeltaNetDims(key_heads=16, value_heads=32, key_dim=128, value_dim=128, taps=4)
_TINY = DeltaNetDims(key_heads=1, value_heads=2, key_dim=16, value_dim=16, taps=4)
TOKEN_BY_TOKEN = "fluxmoe token by token"
PROVIDERS = {"decode": ("fluxmoe", "fla"), "prefill": ("fluxmoe", TOKEN_BY_TOKEN, "fla")}
ALL = PROVIDERS["prefill"]
_EPS = 1e-6


class Case:
    """B sequences of `tokens` new tokens each; in decode, states that go on."""

    def __init__(self, dims: DeltaNetDims, sequences: int, tokens: int, device: torch.device) -> None:
        self.dims, self.sequences, self.tokens, self.first = dims, sequences, tokens, tokens > 1

        def ints(*values: int) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        past, none = (0 if self.first else 8), torch.zeros(0)
        starts = range(0, (sequences + 1) * tokens, tokens)
        self.metadata = AttentionMetadata(
            ints(*starts), ints(*[past + tokens] * sequences), none, none, none, 16, None, ints(*range(sequences))
        )
        vectors = (
            0.3 * torch.randn(dims.channels, dims.taps), torch.rand(dims.value_heads) + 0.1,
            torch.randn(dims.value_heads), torch.rand(dims.value_dim) + 0.5,
        )  # fmt: skip
        projection = Linear(none, 0, 0, torch.bfloat16)  # `projected` is what it would give
        self.weights = DeltaNetWeights(projection, *(vector.to(device) for vector in vectors))
        total, randn = sequences * tokens, partial(torch.randn, device=device)
        self.projected = randn(total, dims.projected).bfloat16()
        self.conv = randn(sequences, dims.taps - 1, dims.channels).bfloat16()
        self.state = 0.1 * randn(sequences, dims.value_heads, dims.key_dim, dims.value_dim)
        nbytes = workspace_bytes(dims, total, torch.bfloat16)
        self.workspace = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.out = torch.empty(total, dims.value_size, dtype=torch.bfloat16, device=device)

    def ours(self, token_by_token: bool = False) -> Tensor:
        return gated_delta_net(
            self.projected, self.weights, self.dims, self.metadata, self.conv, self.state, self.out, _EPS,
            self.workspace, batch_invariant=token_by_token,
        )  # fmt: skip

    def expected(self) -> Tensor:
        """By plain torch, without touching the states."""
        states = self.conv.clone(), self.state.clone()
        return gated_delta_net_torch(self.projected, self.weights, self.dims, self.metadata, *states, _EPS)

    def fla(self) -> tuple[Callable[[], Tensor], Callable[[Tensor], Tensor]]:
        """(the recurrence alone, from what the convolution leaves; the gated norm that makes our output of it)."""
        rules = imported("fla.ops.gated_delta_rule")
        d, heads = self.dims, self.dims.value_heads
        shape = (self.sequences, self.tokens)
        x, z, beta, a = self.projected.split([d.channels, d.value_size, heads, heads], dim=-1)
        past = torch.zeros_like(self.conv) if self.first else self.conv
        inputs = torch.cat([past.float(), x.view(*shape, -1).float()], dim=1)
        taps = [inputs[:, tap : tap + self.tokens] * self.weights.conv[:, tap] for tap in range(d.taps)]
        q, k, v = F.silu(sum(taps[1:], taps[0])).bfloat16().split([d.key_size, d.key_size, d.value_size], dim=-1)
        q, k = (part.view(*shape, d.key_heads, d.key_dim).contiguous() for part in (q, k))
        g = -self.weights.rate * F.softplus(a.float() + self.weights.dt_bias)
        arguments = dict(
            q=q, k=k, v=v.view(*shape, heads, d.value_dim).contiguous(), g=g.view(*shape, heads),
            beta=beta.float().sigmoid().view(*shape, heads), scale=d.key_dim**-0.5, output_final_state=True,
            initial_state=None if self.first else self.state, use_qk_l2norm_in_kernel=True,
        )  # fmt: skip
        rule = rules.chunk_gated_delta_rule if self.first else rules.fused_recurrent_gated_delta_rule

        def recurrence() -> Tensor:
            with torch.no_grad():
                return rule(**arguments)[0]

        def finish(o: Tensor) -> Tensor:
            o = o.float().view(-1, heads, d.value_dim)
            o = o / (o.square().mean(-1, keepdim=True) + _EPS).sqrt() * self.weights.norm
            return (o * F.silu(z.float()).view_as(o)).flatten(1)

        return recurrence, finish


class Point(TimedPoint):
    """One number of sequences and tokens, all cold copies."""

    def __init__(self, dims: DeltaNetDims, sequences: int, tokens: int, device: torch.device) -> None:
        states = 4 * sequences * dims.value_heads * dims.key_dim * dims.value_dim
        self.cases = [Case(dims, sequences, tokens, device) for _ in range(min(64, cold_copies(states)))]

    @cached_property
    def work(self) -> Work:
        with self._states_kept():
            return work_of(self.cases[0].ours)

    @contextmanager
    def _states_kept(self) -> Iterator[None]:
        """The first case's states are afterwards as before."""
        case = self.cases[0]
        states = case.conv.clone(), case.state.clone()
        try:
            yield
        finally:
            case.conv, case.state = states

    @cached_property
    def expected(self) -> Tensor:
        return self.cases[0].expected()

    def time(self, provider: str) -> Timing:
        """Checked against plain torch, then timed."""
        expected = self.expected  # before ours moves the states on
        if provider == "fla":
            pairs = [case.fla() for case in self.cases]
            recurrence, finish = pairs[0]
            check(finish(recurrence()), expected)
            return time_calls([recurrence for recurrence, _ in pairs])
        with self._states_kept():
            calls = [partial(case.ours, token_by_token=provider == TOKEN_BY_TOKEN) for case in self.cases]
            check(calls[0](), expected)
            return time_calls(calls)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    sequences: tuple[int, ...] = option("decode batch sizes", (1, 32, 128), least=1)
    prompts: tuple[int, ...] = option("prefill lengths", (512, 2048), least=2)
    providers: tuple[str, ...] = option("which", ALL, choices=ALL)
    where: GpuBench = group()


def run(args: Arguments) -> None:
    device, dims = args.where.device, _TINY if args.where.rehearse else DIMS
    roofs = measure_roofs(device)
    points = [("decode", n, 1) for n in args.sequences] + [("prefill", 1, n) for n in args.prompts]
    with args.where.rows("bench delta-net", roofs=asdict(roofs), dims=asdict(dims)) as results:
        for kind, sequences, tokens in points:
            make = partial(Point, dims, sequences, tokens, device)
            sizes = {"kind": kind, "sequences": sequences, "tokens": tokens}
            wanted = [each for each in PROVIDERS[kind] if each in args.providers]
            time_providers(results, roofs, wanted, make, **sizes)
        results.finish()
