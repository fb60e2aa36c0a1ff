"""The engine on its Triton kernels against the engine on its CPU kernels: same logits, same tokens.

    fluxmoe bench check-engine --out results/measured/<gpu>/check_engine [--device cuda]

Small random models in fp32 and bf16, one configuration a row: every placement and format, compressed experts first.
Logits must agree within the dtype's precision (in bf16 nine rows of ten: a router near a tie may choose otherwise), and
greedy tokens be the CPU's, up to the first place where the CPU's two best logits are that close; there either is right.
Tokens must be exactly the same within a group of configurations, whatever the placement and the number of slots; and
with graphs, which pad the batch, as without them where the kernels are batch-invariant.
Exits 1 and says what differs. Without a GPU it runs where kernels are interpreted (TRITON_INTERPRET=1, slowly).
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from unittest.mock import patch

import torch
from fluxmoe.kernels.formats import DEFAULT_COMPRESSED
from fluxmoe.runtime.devices import resolve_device
from fluxmoe.runtime.serving.config import EngineConfig
from fluxmoe.runtime.serving.engine import Engine
from fluxmoe.runtime.serving.request import Request, SamplingParams
from fluxmoe.runtime.serving.scheduler import Step

from ..lib.args import option
from ..lib.checkpoints import ModelShape, write_checkpoint
from ..lib.sweep import Sweep, WrongError, say

# Sizes that every format takes in bf16.
_SMALL = partial(ModelShape, layers=5, hidden=128, moe_intermediate=128, heads=4, vocab=512, max_positions=128)
MODELS = {
    "mixtral": _SMALL(arch="mixtral", experts=8, top_k=2, kv_heads=2),
    "qwen3_moe": _SMALL(arch="qwen3_moe", experts=16, top_k=4, kv_heads=2, head_dim=32),
    "qwen3_next": _SMALL(arch="qwen3_next", experts=16, top_k=4, kv_heads=2, head_dim=32, dense_layers=(1,)),
    "olmoe": _SMALL(arch="olmoe", experts=8, top_k=3),
}
_EAGER, _INVARIANT = {"cuda_graphs": False}, {"batch_invariant": True}
_HOST, _FUSED = {"placement": "host", "poison": True}, {"expert_format": DEFAULT_COMPRESSED}
_PACKED, _HALF = {"placement": "packed"}, {"alpha": 0.5}
# Settings within a group give the same tokens. Launches that may meet compressed experts have tiles of their own.
PACKED_GROUPS = {
    "packed": {
        "packed": _PACKED,
        "host": _HOST | _FUSED,
        "balanced": {"placement": "balanced"} | _HALF | _FUSED,
        "hybrid": {"placement": "hybrid"} | _HALF,
        "dense share": _PACKED | {"dense_share": 0.5},
        "on demand": {"placement": "host", "transfer": "on_demand"} | _FUSED,
        "host, decoded slots": _HOST | _FUSED | {"slot_format": "decoded"},
        "disk": {"placement": "disk"} | _FUSED,
    },
    "packed, no graphs": {"packed": _PACKED | _EAGER, "host": _HOST | _FUSED | _EAGER},
    "packed, batch-invariant": {
        "graphs": _PACKED | _INVARIANT,
        "no graphs": _PACKED | _INVARIANT | _EAGER,
        "host": _HOST | _FUSED | _INVARIANT,
    },
    "decoded first": {
        "resident": {},
        "packed huffman": _PACKED | {"expert_format": "huffman", "poison": True},
        "packed tiered": _PACKED | {"expert_format": "tiered"},
        "host huffman": _HOST | {"expert_format": "huffman"},
    },
}
DENSE_GROUPS = {
    "graphs": {
        "resident": {},
        "host": _HOST,
        "host, 3 slots": {"placement": "host", "slots": 3},
        "balanced": {"placement": "balanced"} | _HALF,
        "offload": {"placement": "offload"} | _HALF,
        "on demand": {"placement": "host", "transfer": "on_demand"},
        "disk": {"placement": "disk"},
    },
    "no graphs": {"resident": _EAGER, "host": _EAGER | _HOST},
    "batch-invariant": {"graphs": _INVARIANT, "no graphs": _INVARIANT | _EAGER, "host": _INVARIANT | _HOST},
}
# (relative to the largest logit, share of the rows of logits that may be further off): roundings of activations (bf16),
# sums in another order (fp32). Rounded, a near tie in a router may fall the other way: one row in ten.
TOLERANCES = {"bfloat16": (0.05, 0.1), "float32": (1e-4, 0.0)}
GROUPS = {"bfloat16": PACKED_GROUPS | DENSE_GROUPS, "float32": DENSE_GROUPS}
_REHEARSAL: dict[str, dict] = {"bfloat16": {"decoded first": {"resident": {}}}}


def requests(new_tokens: int, lengths: tuple[int, ...]) -> list[Request]:
    params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    return [Request(tuple(range(3 + i, 3 + i + n)), params) for i, n in enumerate(lengths)]


def serve(model: Path, asked: list[Request], **settings) -> tuple[list[list[int]], list[torch.Tensor]]:
    """(tokens of each request, logits behind each of them [new_tokens, vocab])."""
    config = EngineConfig(max_batch=4, max_batched_tokens=24, max_context=128, **settings)
    with Engine(model, config) as engine:
        rows: dict[int, list[torch.Tensor]] = {}
        steps: list[Step] = []
        schedule = engine.scheduler.schedule

        def scheduling() -> Step:
            steps.append(schedule())
            return steps[-1]

        def recording(run):
            def call(*arguments):
                logits = run(*arguments)
                sampled = [chunk.sequence.order for chunk in steps[-1].chunks if chunk.sample]
                for order, row in zip(sampled, logits[: len(sampled)], strict=True):
                    rows.setdefault(order, []).append(row.cpu().clone())
                return logits

            return call

        with ExitStack() as watched:
            watched.enter_context(patch.object(engine.scheduler, "schedule", scheduling))
            watched.enter_context(patch.object(engine, "_forward", recording(engine._forward)))
            if engine.graphs is not None:
                # A graph has captured the plain forward pass; its results are recorded after the launch.
                watched.enter_context(patch.object(engine.graphs, "run", recording(engine.graphs.run)))
            outputs = engine.generate(asked)
    return [list(output.token_ids) for output in outputs], [torch.stack(rows[i]) for i in sorted(rows)]


def compare(
    tokens: list[int], logits: torch.Tensor, expected: list[int], expected_logits: torch.Tensor, tolerance: float
) -> list[float]:
    """Errors of one request's logits, relative to the largest, up to where its greedy tokens part from those expected.
    WrongError where they part though the logits agree and are not near a tie."""
    errors = []
    for place, (token, wanted) in enumerate(zip(tokens, expected, strict=True)):
        scale = expected_logits[place].abs().max().item()
        errors.append((logits[place] - expected_logits[place]).abs().max().item() / scale)
        if token != wanted:
            best = expected_logits[place].topk(2).values
            if errors[-1] <= tolerance and (best[0] - best[1]).item() > 2 * tolerance * scale:
                raise WrongError(f"token {place} is {token}, not {wanted}")
            break
    return errors


@dataclass
class Model:
    """A checkpoint, made when it is first asked for, and what the CPU says to the requests."""

    name: str
    dtype: str
    directory: Path
    asked: list[Request]
    layers: int

    @cached_property
    def path(self) -> Path:
        shape = replace(MODELS[self.name], layers=self.layers, dtype=self.dtype)
        return write_checkpoint(shape, self.directory / f"{self.name}-{self.dtype}", seed=1)

    @cached_property
    def expected(self) -> tuple[list[list[int]], list[torch.Tensor]]:
        return serve(self.path, self.asked, device="cpu")

    def check(self, settings: dict, device: str, first_digest: str | None) -> dict[str, object]:
        """Columns of a configuration's row. first_digest: of the tokens of its group's first, where that was right."""
        tokens, logits = serve(self.path, self.asked, device=device, kernels="triton", **settings)
        digest = hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:16]
        tolerance, share = TOLERANCES[self.dtype]
        errors: list[float] = []
        for i, expected in enumerate(zip(*self.expected, strict=True)):
            errors += compare(tokens[i], logits[i], *expected, tolerance)
        far = sum(not error <= tolerance for error in errors)  # nor is NaN near
        if far > share * len(errors):
            raise WrongError(f"{far} of {len(errors)} rows of logits differ by up to {max(errors):.2g} of the largest")
        if first_digest not in (None, digest):
            raise WrongError("other tokens than the first of its group")
        return {"tokens_sha256": digest, "logits": len(errors), "far": far, "largest_error": max(errors)}


def check_model(model: Model, groups: dict, device: str, results: Sweep) -> None:
    """A row for each configuration of one model that has none yet."""
    for group, variants in groups.items():
        first = None
        for variant, settings in variants.items():
            point = {"model": model.name, "dtype": model.dtype, "group": group, "variant": variant}
            say(results.measure(partial(model.check, settings, device, first), **point))
            row = results.find(**point)
            assert row is not None, "every configuration that was measured has a row"
            first = first or row.get("tokens_sha256") or None


@dataclass(frozen=True, kw_only=True)
class Arguments:
    device: str = option("what is checked", "auto", choices=("auto", "cpu", "cuda"))
    models: tuple[str, ...] = option("which", tuple(MODELS), choices=tuple(MODELS))
    new_tokens: int = option("of each request", 12, least=1)
    rehearse: bool = option("one configuration of one layer, interpreted on the CPU", False)
    out: Path = option("folder of the results", metavar="DIR")


def run(args: Arguments) -> None:
    device = "cpu" if args.rehearse else resolve_device(args.device).type
    kind = "rehearsed" if args.rehearse else "measured"
    asked = requests(args.new_tokens, (3, 1) if args.rehearse else (5, 33, 1, 17))
    made = {"kind": kind, "new_tokens": args.new_tokens}
    rows = Sweep(args.out, "bench check-engine", "rows.csv", made, device=device, kind=kind)
    with rows as results, tempfile.TemporaryDirectory() as directory:
        for dtype, groups in _REHEARSAL.items() if args.rehearse else GROUPS.items():
            for name in args.models:
                model = Model(name, dtype, Path(directory), asked, 1 if args.rehearse else 5)
                check_model(model, groups, device, results)
        results.finish()
