"""What compressed experts cost or gain at equal batch, all of them on the device (the paper: 63.9 % at batch 32).

    python -m fluxmoe.experiments.serving.packed_overhead --preset small --out results/<hardware>/packed_overhead

Engines that differ only in how they hold experts serve the same requests in turns: dense; planar12, which the GEMM
decodes in its tile loop; and, as the paper does it, formats that are decoded into a buffer before each layer runs.
A row is one engine at one batch: tokens/s of iterations that only decode, and its ratio to `resident` turn by turn.
Tokens must be the same in all of them.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from fluxmoe.runtime.serving.engine import Engine
from fluxmoe.runtime.serving.metrics import summarise
from tqdm import tqdm

from ..commands.generate import add_engine_arguments, engine_config
from ..lib.presets import add_model_source, model_source
from ..lib.results import Parser, UsageError, cli_main, provenance, write_csv, write_json
from ..lib.workloads import Lengths, make_requests
from .memory_budget import split_placement

_EXPERT_LINES = ("resident_experts", "packed_experts", "slots")
DEFAULT_PLACEMENTS = ("resident", "packed", "packed+tiered", "packed+huffman")


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="fluxmoe.experiments.serving.packed_overhead", description=__doc__.splitlines()[0])
    add_model_source(p)
    p.add_argument("--placements", nargs="+", metavar="NAME[:ALPHA][+FORMAT]", default=list(DEFAULT_PLACEMENTS))
    p.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32, 64])
    p.add_argument("--prompt-tokens", type=int, default=32)
    p.add_argument("--output-tokens", type=int, default=48)
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", required=True, metavar="DIR")
    add_engine_arguments(p, swept=True)
    return p


def run_once(engine: Engine, requests: list) -> tuple[float, list]:
    """(tokens/s of iterations that only decode at full batch, tokens of all requests)."""
    handles = [engine.add(request) for request in requests]
    steps = list(engine.steps())
    full = [s for s in steps if s.prefill_tokens == 0 and s.batch == len(requests)]
    return summarise(full)["decode_tokens_per_s"], [handle.output.token_ids for handle in handles]


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if min(args.repeats, args.output_tokens - 1, args.prompt_tokens, *args.batches) < 1:
        raise UsageError("batches, prompts and repeats must be at least 1, --output-tokens at least 2")
    if args.placements[0] != "resident":
        args.placements = ["resident", *[p for p in args.placements if p != "resident"]]
    source = model_source(args)
    args.max_batch = max(args.batches)
    context = args.prompt_tokens + args.output_tokens
    rows: list[dict] = []
    with ExitStack() as stack:
        engines = {}
        for placement in tqdm(args.placements, "engines", leave=False):
            name, alpha, expert_format = split_placement(placement)
            settings = engine_config(args, context, placement=name, alpha=alpha, expert_format=expert_format)
            engines[placement] = stack.enter_context(Engine(source.weights, settings))
        for batch in args.batches:
            lengths = [Lengths(0.0, args.prompt_tokens, args.output_tokens)] * batch
            requests = make_requests(lengths, source.config.vocab_size, args.seed)
            rates: dict[str, list[float]] = {placement: [] for placement in engines}
            tokens: dict[str, list] = {}
            for turn in range(args.repeats + 1):
                for placement, engine in engines.items():
                    rate, tokens[placement] = run_once(engine, requests)
                    if turn:  # the first run of a batch warms up
                        rates[placement].append(rate)
            for placement in engines:
                ratios = np.array(rates[placement]) / np.array(rates["resident"])
                low, middle, high = np.percentile(ratios, [0, 50, 100])
                assert tokens[placement] == tokens["resident"], f"{placement} gives other tokens than resident"
                row = {
                    "placement": placement, "batch": batch, "decode_tokens_per_s": float(np.median(rates[placement])),
                    "over_resident": middle, "least": low, "most": high,
                    "expert_bytes": sum(engines[placement].budget.lines()[line] for line in _EXPERT_LINES),
                }  # fmt: skip
                rows.append(row)
                print(
                    f"batch {batch:>3} {placement:>16} {row['decode_tokens_per_s']:9.1f} tokens/s  "
                    f"{middle:.3f}x resident ({low:.3f} … {high:.3f}), experts {row['expert_bytes'] / 1e6:.0f} MB",
                    flush=True,
                )
            write_csv(Path(args.out) / "rows.csv", rows)
        device = next(iter(engines.values())).device.type
    facts = {"prompt_tokens": args.prompt_tokens, "output_tokens": args.output_tokens, "repeats": args.repeats}
    write_json(Path(args.out) / "provenance.json", {**provenance(device, args.seed), **facts, "tokens": "identical"})


if __name__ == "__main__":
    cli_main(main)
