"""What each of our ideas is worth: one at a time taken away, under one memory budget.

    python -m fluxmoe.experiments.serving.ablation --preset small --budget 384MiB --out results/<hardware>/ablation
    python -m fluxmoe.experiments.serving.ablation --device sim --profile H100-SXM --config qwen3-30b-a3b --budget 40GiB …

    full                half of each layer on the device, half streamed; 12 bits everywhere, decoded inside the GEMM
    decoded slots       streamed experts are decoded into their slot, as the paper does
    dense transfer      host experts dense: uncompressed bytes cross the link
    no compression      dense on the device and in the host
    whole layers        the last layers in the host, as many bytes in all: no balance inside a layer
    on demand           kernels read routed host experts in place, nothing is prefetched
    adaptive            all experts begin on the device; the planner moves them, KV grows
    adaptive, KV held   likewise, but KV does not grow

Variants take turns, --repeats times. rows.csv has a row a run; tokens must be the same in all.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
from fluxmoe.kernels.formats import DEFAULT_COMPRESSED, DENSE
from fluxmoe.runtime.memory.budget import BudgetError, parse_bytes
from fluxmoe.runtime.serving.metrics import summarise
from tqdm import tqdm

from ..commands.generate import add_engine_arguments, engine_config
from ..lib.machines import Machine, machine_of
from ..lib.presets import Source, add_model_source, model_source
from ..lib.results import Parser, cli_main, provenance, write_csv, write_json
from ..lib.workloads import drawn_lengths, make_requests

_HALF = {"placement": "balanced", "alpha": 0.5, "expert_format": DEFAULT_COMPRESSED}
_ADAPTIVE = {"placement": "packed", "adaptive": True, "least_alpha": 0.8}
VARIANTS = {
    "full": _HALF,
    "decoded slots": _HALF | {"slot_format": "decoded"},
    "dense transfer": _HALF | {"host_format": DENSE},
    "no compression": {"placement": "balanced", "alpha": 0.5},
    "whole layers": _HALF | {"placement": "hybrid"},
    "on demand": _HALF | {"transfer": "on_demand"},
    "adaptive": _ADAPTIVE,
    "adaptive, KV held": _ADAPTIVE | {"grow_kv": False},
}


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="fluxmoe.experiments.serving.ablation", description=__doc__.splitlines()[0])
    add_model_source(p, simulate=True)
    p.add_argument("--budget", required=True, help="device bytes for everything")
    p.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    p.add_argument("--requests", type=int, default=64)
    p.add_argument("--context", type=int, default=512)
    p.add_argument("--output-tokens", type=int, default=128)
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", required=True, metavar="DIR")
    add_engine_arguments(p, swept=True, simulate=True)
    return p


def run(args: argparse.Namespace, machine: Machine, source: Source, requests: list, variant: str) -> dict:
    """A row: one variant served once."""
    settings = engine_config(
        args, args.context, budget_bytes=parse_bytes(args.budget), min_kv_tokens=args.context, **VARIANTS[variant]
    )
    try:
        engine = machine.open(source, settings)
    except BudgetError as error:
        return {"variant": variant, "status": "too_small", "reason": str(error)}
    with engine:
        handles = [engine.add(request) for request in requests]
        totals = summarise(list(engine.steps()))
    tokens = [handle.output.token_ids for handle in handles]
    return {
        "variant": variant, "status": "ok", "reason": "",
        "tokens_per_s": sum(map(len, tokens)) / totals["wall_s"],
        **{key: totals[key] for key in ("wall_s", "peak_batch", "preemptions", "streamed_bytes", "stall_s")},
        "tokens_sha256": hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:16],
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    machine, source = machine_of(args), model_source(args)
    lengths = drawn_lengths(args.requests, args.context, args.output_tokens, args.seed)
    requests, out = make_requests(lengths, source.config.vocab_size, args.seed), Path(args.out)
    turns = [(turn, name) for turn in range(1 if machine.simulated else args.repeats) for name in args.variants]
    bar = tqdm(turns, "runs", unit="run")
    rows = [run(args, machine, source, requests, name) | {"turn": turn} for turn, name in bar]
    write_csv(out / "rows.csv", rows)
    ok = [row for row in rows if row["status"] == "ok"]
    speeds = {name: [r["tokens_per_s"] for r in ok if r["variant"] == name] for name in args.variants}
    full = np.median(speeds["full"]) if speeds.get("full") else float("nan")
    for name, each in speeds.items():
        if not each:
            print(f"{name:<18} does not start with {args.budget}")
            continue
        spread = f"({min(each):.1f} … {max(each):.1f})"
        print(f"{name:<18} {np.median(each):9.1f} tokens/s {spread:<22} {np.median(each) / full:5.2f} of full")
    verdict = "identical" if len({row["tokens_sha256"] for row in ok}) == 1 else "DIFFER"
    print(f"tokens: {verdict}")
    about = {"budget": args.budget, "requests": args.requests, "context": args.context, "tokens": verdict}
    made = {**provenance(machine.device, args.seed), **machine.about, "model": source.name, **about}
    write_json(out / "provenance.json", made)


if __name__ == "__main__":
    cli_main(main)
