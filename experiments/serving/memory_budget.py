"""Throughput against memory budget, for several placements of the experts (the paper's headline question).

    python -m fluxmoe.experiments.serving.memory_budget --preset demo --out results/<hardware>/memory_budget

One row of points.csv is one run: a placement under a budget that must hold non-expert weights, resident experts,
slots, workspace and KV cache. Runs are interleaved over placements, so that a machine whose speed drifts does
not favour one. A stopped sweep resumes where it was. Points that cannot run are rows with the reason.

    python -m fluxmoe.experiments.serving.memory_budget --device sim --profile H100-SXM --config mixtral-8x7b --out DIR

serves a published model on the virtual clock of `runtime.simulator` instead, on a machine that is not there.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from fluxmoe.kernels.formats import FORMATS
from fluxmoe.models.config import ModelConfig
from fluxmoe.runtime.experts.placement import POLICIES, Tier, place
from fluxmoe.runtime.memory.budget import BudgetError, format_bytes, parse_bytes
from fluxmoe.runtime.serving.metrics import summarise
from tqdm import tqdm

from ..commands.generate import add_engine_arguments, engine_config
from ..lib.machines import Machine, machine_of
from ..lib.presets import PRESETS, Source, add_model_source, model_source
from ..lib.results import Parser, UsageError, cli_main, provenance, read_csv, resume, write_csv, write_json
from ..lib.workloads import Lengths, add_workload_arguments, make_requests, workload_of
from ..plots.serving import plot_memory_budget

# offload and balanced at one α, so that they differ only in how the streamed half is spread over the layers.
DEFAULT_PLACEMENTS = (
    "resident", "offload:0.5", "balanced:0.5", "host", "packed", "balanced:0.5+planar12", "host+planar12",
)  # fmt: skip
COLUMNS = (
    "placement", "alpha", "budget_bytes", "repeat", "status", "reason", "least_budget", "tokens_per_s",
    "total_tokens_per_s",
    "decode_tokens_per_s", "wall_s", "iterations", "requests", "refused", "generated_tokens", "max_batch",
    "peak_batch", "preemptions", "swapped_blocks", "kv_blocks", "peak_kv_blocks", "block_size", "streamed_bytes",
    "stall_s", "transfer_s", "hidden_share", "non_expert_weights", "resident_experts", "packed_experts", "slots",
    "workspace", "states", "kv_cache", "host_bytes", "disk_bytes", "tokens_sha256",
    "commit",
)  # fmt: skip


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="fluxmoe.experiments.serving.memory_budget", description=__doc__.splitlines()[0])
    add_model_source(p, simulate=True)
    p.add_argument("--budgets", nargs="+", metavar="BYTES", help="e.g. 256MiB 512MiB 1GiB")
    p.add_argument(
        "--placements", nargs="+", metavar="NAME[:ALPHA][+FORMAT]", default=list(DEFAULT_PLACEMENTS),
        help=f"{', '.join(POLICIES)}; with a share of experts on the device where it takes one, and + a format for "
        "compressed experts (default: %(default)s)",
    )  # fmt: skip
    add_workload_arguments(p)
    p.add_argument("--repeats", type=int, default=1)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", required=True, metavar="DIR")
    add_engine_arguments(p, swept=True, simulate=True)
    p.set_defaults(max_batch=None)
    return p


def split_placement(text: str) -> tuple[str, float | None, str | None]:
    """'balanced:0.5+planar12' → ('balanced', 0.5, 'planar12'); checked by trying it on a model of one layer."""
    where, _, expert_format = text.partition("+")
    name, _, share = where.partition(":")
    try:
        alpha = float(share) if share else None
    except ValueError:
        raise UsageError(f"placement {text!r}: {share!r} is no share; write for example balanced:0.5") from None
    if expert_format and expert_format not in FORMATS:
        raise UsageError(f"placement {text!r}: unknown expert format; these are: {', '.join(FORMATS)}")
    place(name, 1, 1, alpha=alpha, bandwidths={Tier.RESIDENT: 1.0, Tier.HOST: 1.0})
    return name, alpha, expert_format or None


def default_budgets(config: ModelConfig, max_batch: int, context: int) -> list[int]:
    """A row from a few slots to everything resident with all the KV that a full batch needs."""
    kv = max_batch * (context * config.kv_bytes_per_token + config.state_bytes_per_sequence)
    weights = config.non_expert_bytes + config.expert_bytes_total
    least = config.non_expert_bytes + 2 * config.expert_bytes_total // len(config.moe_layers) + kv // max_batch
    row = [least * 1.3, weights * 0.5, weights * 0.8, weights + kv * 0.05]
    row += [weights + kv * share for share in (0.15, 0.3, 0.6, 1.0)]
    return sorted({int(-(-value // (1 << 20))) << 20 for value in row})


def run_point(
    args: argparse.Namespace, machine: Machine, source: Source, lengths: list[Lengths], placement: str, budget: int
) -> dict:
    """Serve the workload once; a point that cannot run comes back with its reason."""
    requests = make_requests(lengths, source.config.vocab_size, args.seed)
    longest = max(shape.prompt + shape.output for shape in lengths)
    name, alpha, expert_format = split_placement(placement)
    settings = engine_config(
        args,
        longest,
        placement=name,
        alpha=alpha,
        expert_format=expert_format,
        budget_bytes=budget,
        min_kv_tokens=longest,
    )
    row = {"status": "ok", "requests": len(requests), "max_batch": args.max_batch, "block_size": args.block_size}
    try:
        engine = machine.open(source, settings)
    except BudgetError as error:
        return {**row, "status": "too_small", "reason": str(error), "least_budget": error.least}
    with engine:
        handles = [engine.add(request) for request in requests]
        steps = list(engine.steps())
        outputs = [handle.output for handle in handles]
        totals = summarise(steps)
        generated = sum(len(output.token_ids) for output in outputs)
        digest = hashlib.sha256(json.dumps([output.token_ids for output in outputs]).encode())
        wall = totals["wall_s"]
        hidden = 1 - totals["stall_s"] / totals["transfer_s"] if totals["transfer_s"] else None
        return {
            **row,
            **{key: totals[key] for key in totals if key in COLUMNS},
            "tokens_per_s": generated / wall,
            "total_tokens_per_s": (generated + sum(shape.prompt for shape in lengths)) / wall,
            "refused": sum(output.finish_reason == "refused" for output in outputs),
            "generated_tokens": generated,
            "kv_blocks": engine.scheduler.num_blocks,
            "hidden_share": hidden,
            "alpha": engine.placement.alpha,
            **engine.budget.lines(),
            "host_bytes": engine.deployment.layout.tier_bytes(Tier.HOST),
            "disk_bytes": engine.deployment.layout.tier_bytes(Tier.DISK),
            "tokens_sha256": digest.hexdigest()[:16],
        }


def sweep(args: argparse.Namespace) -> list[dict]:
    """Run every missing point; returns all rows, those of earlier runs included."""
    out = Path(args.out)
    for placement in args.placements:
        split_placement(placement)
    if args.repeats < 1:
        raise UsageError("--repeats must be at least 1")
    preset = PRESETS[args.preset] if args.preset else None
    args.max_batch = args.max_batch or (preset.max_batch if preset else 64)
    if preset:
        args.requests = args.requests or preset.requests
        args.context = args.context or preset.context
        args.output_tokens = args.output_tokens or preset.output_tokens
    machine, source = machine_of(args), model_source(args)
    config = source.config
    context = min(args.context or 1024, config.max_position_embeddings)
    lengths = workload_of(args, context)
    asked = [parse_bytes(text) for text in args.budgets or (preset.budgets if preset else ())]
    budgets = [budget for budget in asked if budget is not None]
    if len(budgets) < len(asked):
        raise UsageError("--budgets takes numbers of bytes; `all` is no point on an axis")
    budgets = budgets or default_budgets(config, args.max_batch, context)
    settings = {
        "model": {k: str(v) if k == "dtype" else v for k, v in asdict(config).items()},
        "workload": [asdict(shape) for shape in lengths],
        "seed": args.seed,
        "engine": {
            key: getattr(args, key)
            for key in (
                "slots",
                "host_format",
                "slot_format",
                "transfer",
                "max_batch",
                "max_batched_tokens",
                "block_size",
                "preemption",
                "threads",
                "kernels",
                "batch_invariant",
                "no_cuda_graphs",
            )
        },
        **machine.about,
    }
    rows, identity = resume(out, settings)
    done = {(row["placement"], int(row["budget_bytes"]), int(row["repeat"])) for row in rows}
    points = [
        (placement, budget, repeat)
        for repeat in range(args.repeats)
        for budget in budgets
        for placement in args.placements
        if (placement, budget, repeat) not in done
    ]
    made_by = provenance(machine.device, args.seed)
    # A sweep may be resumed by a later commit: each row says its own, the file says the newest.
    commit = (made_by["commit"] or "unknown")[:10] + ("+changes" if made_by["dirty"] else "")
    summary = {**settings, "workload": _summary(lengths)}
    write_json(out / "provenance.json", {**made_by, "identity": identity, **summary})
    _warm_up(args, machine, source, points, lengths)
    bar = tqdm(points, "points", unit="point")
    for placement, budget, repeat in bar:
        bar.set_postfix_str(f"{placement} {format_bytes(budget)}")
        row = run_point(args, machine, source, lengths, placement, budget)
        rows.append({"placement": placement, "budget_bytes": budget, "repeat": repeat, "commit": commit, **row})
        write_csv(out / "points.csv", rows, COLUMNS)
        gc.collect()
    return read_csv(out / "points.csv")


def _summary(lengths: list[Lengths]) -> dict:
    prompts, outputs = [s.prompt for s in lengths], [s.output for s in lengths]
    return {
        "requests": len(lengths),
        "prompt_tokens": sum(prompts),
        "output_tokens": sum(outputs),
        "prompt_range": [min(prompts), max(prompts)],
        "output_range": [min(outputs), max(outputs)],
    }


def _warm_up(args, machine, source, points, lengths) -> None:
    """Compile kernels and touch the checkpoint's pages before the first timed point."""
    if points and not machine.simulated:
        short = [Lengths(0.0, min(8, lengths[0].prompt), 2)] * 2
        run_point(args, machine, source, short, "host", max(budget for _, budget, _ in points))


def print_table(rows: list[dict]) -> None:
    """Best of the repeats, a line a point, and whether all runs gave the same tokens."""
    print(
        f"{'placement':>22} {'budget':>10} {'tokens/s':>9} {'batch':>6} {'KV blocks':>10} {'preempt.':>9} "
        f"{'stall s':>8} {'transfer s':>11}"
    )
    for row in sorted(rows, key=lambda r: (int(r["budget_bytes"]), r["placement"], int(r["repeat"]))):
        head = f"{row['placement']:>22} {format_bytes(int(row['budget_bytes'])):>10}"
        if row["status"] != "ok":
            print(f"{head} {'–':>9}  needs {format_bytes(int(row['least_budget']))}")
            continue
        print(
            f"{head} {float(row['tokens_per_s']):9.1f} {row['peak_batch']:>6} {row['kv_blocks']:>10} "
            f"{row['preemptions']:>9} {float(row['stall_s']):8.2f} {float(row['transfer_s']):11.2f}"
        )
    digests = {row["tokens_sha256"] for row in rows if row["status"] == "ok"}
    if digests:
        verdict = "identical in all runs" if len(digests) == 1 else f"DIFFER: {len(digests)} variants"
        print(f"tokens: {verdict}")


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    rows = sweep(args)
    print_table(rows)
    figure = plot_memory_budget(Path(args.out))
    print(f"figure: {figure}")


if __name__ == "__main__":
    cli_main(main)
