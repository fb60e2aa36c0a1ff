"""Experts leave the device while requests are served, and KV takes the memory (the paper's Exp#3, Fig. 9).

    python -m fluxmoe.experiments.paper.fig9_adaptation --preset small --out results/<hardware>/exp3_adaptation

Every expert begins compressed on the device. From iteration --start on, every --every iterations one expert of each
layer goes to host memory, --times times. Variants, which serve the same requests, with the same tokens:

    static      nothing moves: α = 1
    hold        experts leave, spread over the layers; nobody takes the memory (the paper's system)
    grow        experts leave, spread over the layers; KV grows into the memory, and more requests run at once
    unspread    as many experts leave at each step, all of them from the last layers that have any (the ablation)
    planned     the planner moves experts when it sees fit, at most as many; KV grows

    python -m fluxmoe.experiments.paper.fig9_adaptation --device sim --profile 4xL40 --config qwen3-next-80b-a3b …

serves a published model on the simulator's virtual clock instead.

Requests are always waiting (more than fit), so that throughput follows the KV cache. steps.csv has a row an iteration;
the figure shows tokens/s in windows of iterations, and the bytes that experts and KV hold.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
from fluxmoe.runtime.experts.placement import Tier
from fluxmoe.runtime.experts.planner import Move
from fluxmoe.runtime.memory.budget import parse_bytes
from fluxmoe.runtime.serving.engine import Engine
from tqdm import tqdm

from ..commands.generate import add_engine_arguments, engine_config
from ..lib.machines import Machine, machine_of
from ..lib.presets import Source, add_model_source, model_source
from ..lib.results import Parser, UsageError, cli_main, provenance, write_csv, write_json
from ..lib.workloads import Lengths, make_requests
from ..plots.serving import plot_adaptation

VARIANTS = ("static", "hold", "grow", "unspread", "planned")
_GROWING = ("grow", "unspread", "planned")


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="fluxmoe.experiments.paper.fig9_adaptation", description=__doc__.splitlines()[0])
    add_model_source(p, simulate=True)
    p.add_argument("--budget", default="352MiB", help="device bytes for everything")
    p.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    p.add_argument("--requests", type=int, default=96)
    p.add_argument("--prompt-tokens", type=int, default=32)
    p.add_argument("--output-tokens", type=int, default=224)
    p.add_argument("--start", type=int, default=400, help="iteration of the first step")
    p.add_argument("--every", type=int, default=150, help="iterations between steps")
    p.add_argument("--times", type=int, default=7, help="steps; each takes one expert of every layer")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", required=True, metavar="DIR")
    add_engine_arguments(p, swept=True, simulate=True)
    return p


def moves_of_step(tiers: np.ndarray, spread: bool) -> list[Move]:
    """One expert of every layer, the highest id on the device; unspread: as many from the last layers."""
    layers = len(tiers)
    moves: list[Move] = []
    for layer in range(layers - 1, -1, -1):
        members = np.flatnonzero(tiers[layer] == Tier.PACKED)[::-1]
        chosen = members[:1] if spread else members[: layers - len(moves)]
        moves += [Move(layer, int(expert), Tier.PACKED, Tier.HOST) for expert in chosen]
    return moves


def run_variant(args: argparse.Namespace, machine: Machine, source: Source, variant: str) -> tuple[list[dict], str]:
    """(a row an iteration, digest of all tokens)."""
    lengths = [Lengths(0.0, args.prompt_tokens, args.output_tokens)] * args.requests
    requests = make_requests(lengths, source.config.vocab_size, args.seed)
    # All variants have the same slots, so the same KV to begin with: unspread, whole layers come to stream.
    share = 1.0 if "unspread" in args.variants else args.times / source.config.num_experts
    settings = engine_config(
        args, args.prompt_tokens + args.output_tokens, placement="packed", budget_bytes=parse_bytes(args.budget),
        adaptive=True, planning=variant == "planned", grow_kv=variant in _GROWING, least_alpha=max(0.0, 1 - share),
    )  # fmt: skip
    rows = []
    with machine.open(source, settings) as engine:
        pager = engine.pager if isinstance(engine, Engine) else engine
        handles = [engine.add(request) for request in requests]
        bar = tqdm(engine.steps(), variant, unit="step")
        for step in bar:
            done = (step.iteration - args.start) // args.every
            due = (step.iteration - args.start) % args.every == 0 and 0 <= done < args.times
            if due and variant not in ("static", "planned"):
                pager.request(moves_of_step(pager.tiers, variant != "unspread"))
            lines = engine.budget.lines()
            rows.append(
                {
                    "variant": variant, "iteration": step.iteration, "time_s": step.time_s, "batch": step.batch,
                    "duration_s": step.duration_s, "prefill_tokens": step.prefill_tokens,
                    "decode_tokens": step.decode_tokens, "device_experts": step.device_experts,
                    "expert_bytes": lines["packed_experts"], "kv_bytes": lines["kv_cache"],
                    "stall_s": step.stall_s, "transfer_s": step.transfer_s, "preemptions": step.preemptions,
                }
            )  # fmt: skip
        if isinstance(engine, Engine) and variant != "planned":
            mover = engine.pager.mover
            if mover.refused:
                raise UsageError(f"a move was refused: {mover.refused[0]}")
    digest = hashlib.sha256(json.dumps([handle.output.token_ids for handle in handles]).encode())
    return rows, digest.hexdigest()[:16]


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if min(args.requests, args.start, args.every, args.times) < 1:
        raise UsageError("requests, start, every and times must be at least 1")
    machine, source = machine_of(args), model_source(args)
    if args.times >= source.config.num_experts:
        raise UsageError(f"--times {args.times} would leave no expert of {source.config.num_experts} on the device")
    out, rows, digests = Path(args.out), [], set()
    for variant in args.variants:
        more, digest = run_variant(args, machine, source, variant)
        rows += more
        digests.add(digest)
        write_csv(out / "steps.csv", rows)
        end = more[-1]
        total = {key: sum(row[key] for row in more) for key in end if key != "variant"}
        most = {key: max(row[key] for row in more) for key in end if key != "variant"}
        print(
            f"{variant:>9}: {total['decode_tokens'] / end['time_s']:.1f} tokens/s in {end['time_s']:.1f} s, largest "
            f"batch {most['batch']}, KV {more[0]['kv_bytes'] / 1e6:.1f} → {most['kv_bytes'] / 1e6:.1f} MB, "
            f"{total['preemptions']} preemptions, stalls {total['stall_s']:.2f} s of {total['transfer_s']:.2f} s",
            flush=True,
        )
    verdict = "identical" if len(digests) == 1 else f"DIFFER: {len(digests)} variants"
    print(f"tokens: {verdict}")
    settings = {
        k: getattr(args, k)
        for k in ("budget", "link_bandwidth", "requests", "prompt_tokens", "output_tokens", "start", "every", "times")
    }
    about = {**settings, "model": source.name, "tokens": verdict, **machine.about}
    write_json(out / "provenance.json", {**provenance(machine.device, args.seed), **about})
    print(f"figure: {plot_adaptation(out)}")


if __name__ == "__main__":
    cli_main(main)
