"""The engine on its Triton kernels against the engine on its CPU kernels: same logits, same tokens.

    python -m fluxmoe.experiments.check_engine [--device cuda] [--json FILE]

Small random models in fp32 and bf16. Logits must agree within the dtype's precision and greedy tokens be the CPU's, up
to the first place where the CPU's two best logits are that close; there either is right. Tokens must be exactly the
same for every placement and number of slots; and with graphs, which pad the batch, as without them where the kernels
are batch-invariant.
Exits 1 and says what differs. Without a GPU it runs where kernels are interpreted (TRITON_INTERPRET=1, slowly).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from fluxmoe.runtime.engine import Engine, EngineConfig, resolve_device
from fluxmoe.runtime.request import Request, SamplingParams

from .common import Parser, cli_main, provenance, write_json
from .make_checkpoint import make_checkpoint

MODELS = {
    "mixtral": dict(arch="mixtral", experts=8, top_k=2, hidden=64, moe_intermediate=48, heads=4, kv_heads=2),
    "qwen3_moe": dict(
        arch="qwen3_moe", experts=16, top_k=4, hidden=64, moe_intermediate=32, heads=4, kv_heads=2, head_dim=32
    ),
    "qwen3_next": dict(
        arch="qwen3_next",
        experts=16,
        top_k=4,
        hidden=64,
        moe_intermediate=32,
        heads=4,
        kv_heads=2,
        head_dim=32,
        dense_layers=(1,),
    ),
    "olmoe": dict(arch="olmoe", experts=8, top_k=3, hidden=64, moe_intermediate=32, heads=4),
}
_EAGER, _INVARIANT, _HOST = {"cuda_graphs": False}, {"batch_invariant": True}, {"placement": "host", "poison": True}
# Settings within a group give the same tokens.
GROUPS = {
    "graphs": {
        "resident": {},
        "host": _HOST,
        "host, 3 slots": {"placement": "host", "slots": 3},
        "balanced": {"placement": "balanced", "alpha": 0.5},
        "offload": {"placement": "offload", "alpha": 0.5},
    },
    "no graphs": {"resident": _EAGER, "host": _EAGER | _HOST},
    "batch-invariant": {"graphs": _INVARIANT, "no graphs": _INVARIANT | _EAGER, "host": _INVARIANT | _HOST},
}
# Relative to the largest logit: sums in another order (fp32), roundings of activations (bf16).
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.05}


def requests(new_tokens: int) -> list[Request]:
    params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    return [Request(i, tuple(range(3 + i, 3 + i + n)), params) for i, n in enumerate((5, 33, 1, 17))]


def serve(model: Path, new_tokens: int, **settings) -> tuple[list[list[int]], list[torch.Tensor]]:
    """(tokens of each request, logits behind each of them [new_tokens, vocab])."""
    config = EngineConfig(max_batch=4, max_batched_tokens=24, max_context=128, **settings)
    with Engine(model, config) as engine:
        rows: dict[int, list[torch.Tensor]] = {}
        schedule, steps = engine.scheduler.schedule, []
        engine.scheduler.schedule = lambda: steps.append(schedule()) or steps[-1]

        def recording(run):
            def call(*arguments):
                logits = run(*arguments)
                sampled = [chunk.sequence.request.request_id for chunk in steps[-1].chunks if chunk.sample]
                for request_id, row in zip(sampled, logits[: len(sampled)], strict=True):
                    rows.setdefault(request_id, []).append(row.cpu().clone())
                return logits

            return call

        if engine.graphs is not None:
            # A graph captures the plain forward pass; its results are recorded after the launch.
            engine.graphs.run = recording(engine.graphs.run)
            eager, graphed = engine._forward, engine.graphs._forward
            engine._forward, engine.graphs._forward = recording(eager), graphed
        else:
            engine._forward = recording(engine._forward)
        outputs = engine.generate(requests(new_tokens))
    return [list(output.token_ids) for output in outputs], [torch.stack(rows[i]) for i in sorted(rows)]


def first_difference(
    tokens: list[int], logits: torch.Tensor, expected: list[int], expected_logits: torch.Tensor, tolerance: float
) -> str | None:
    """What is wrong with one request's greedy tokens, or None. Compared up to the first undecidable token."""
    scale = expected_logits.abs().max().item()
    for place, (token, wanted) in enumerate(zip(tokens, expected, strict=True)):
        error = (logits[place] - expected_logits[place]).abs().max().item() / scale
        if error > tolerance:
            return f"logits of token {place} differ by {error:.2g} of the largest"
        if token != wanted:
            best = expected_logits[place].topk(2).values
            if (best[0] - best[1]).item() <= 2 * tolerance * scale:
                return None
            return f"token {place} is {token}, not {wanted}"
    return None


def check_model(name: str, dtype: str, device: str, directory: Path, new_tokens: int) -> list[str]:
    """Problems of one model."""
    settings = {"layers": 5, "vocab": 512, "max_positions": 128, "seed": 1, **MODELS[name]}
    model = make_checkpoint(out=directory / f"{name}-{dtype}", dtype=dtype, **settings)
    expected, expected_logits = serve(model, new_tokens, device="cpu")
    problems = []
    for group, variants in GROUPS.items():
        first = None
        for variant, extra in variants.items():
            tokens, logits = serve(model, new_tokens, device=device, kernels="triton", **extra)
            if first is None:
                first = tokens
                for i in range(len(tokens)):
                    wrong = first_difference(tokens[i], logits[i], expected[i], expected_logits[i], TOLERANCES[dtype])
                    if wrong:
                        problems.append(f"{name} {dtype}, {group}: request {i}: {wrong}")
            elif tokens != first:
                problems.append(f"{name} {dtype}, {group}: {variant} gives other tokens than the first of its group")
    print(f"{name} {dtype}: {'ok' if not problems else 'WRONG'}", flush=True)
    return problems


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="fluxmoe.experiments.check_engine", description=__doc__.splitlines()[0])
    p.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    p.add_argument("--models", nargs="+", choices=sorted(MODELS), default=list(MODELS))
    p.add_argument("--new-tokens", type=int, default=12)
    p.add_argument("--json", metavar="FILE", help="write problems and provenance there")
    return p


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    device = resolve_device(args.device).type
    problems = []
    with tempfile.TemporaryDirectory() as directory:
        for dtype in TOLERANCES:
            for name in args.models:
                problems += check_model(name, dtype, device, Path(directory), args.new_tokens)
    if args.json:
        write_json(args.json, {"problems": problems, "provenance": provenance(device, 1)})
    for problem in problems:
        print(f"WRONG: {problem}", file=sys.stderr)
    if problems:
        sys.exit(1)


if __name__ == "__main__":
    cli_main(main)
