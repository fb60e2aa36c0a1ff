"""Throughput against memory budget, for several placements of the experts (the paper's headline question).

    python -m fluxmoe.experiments.memory_budget --preset demo --out results/<hardware>/memory_budget

One row of points.csv is one run: a placement under a budget that must hold non-expert weights, resident experts,
slots, workspace and KV cache. Runs are interleaved over placements, so that a machine whose speed drifts does
not favour one. A stopped sweep resumes where it was. Points that cannot run are rows with the reason.

    python -m fluxmoe.experiments.memory_budget --simulate --profile H100-SXM --config mixtral-8x7b --out DIR

serves a published model on the virtual clock of `runtime.simulator` instead, on a machine that is not there.
"""

from __future__ import annotations

import argparse
import csv
import gc
import hashlib
import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from fluxmoe.kernels.packing import FORMATS
from fluxmoe.models.config import ModelConfig, load_config
from fluxmoe.models.published import PUBLISHED, published_config
from fluxmoe.runtime.budget import BudgetError, format_bytes, parse_bytes
from fluxmoe.runtime.engine import Engine, resolve_device
from fluxmoe.runtime.metrics import summarise
from fluxmoe.runtime.placement import POLICIES, Tier, place
from fluxmoe.runtime.request import RequestOutput
from fluxmoe.runtime.simulator import SimEngine
from tqdm import tqdm

from .common import Parser, UsageError, cli_main, provenance, write_atomically, write_json
from .generate import add_engine_arguments, engine_config
from .make_checkpoint import make_checkpoint
from .plots import plot_memory_budget
from .workloads import Lengths, drawn_lengths, make_requests, poisson_arrivals, sharegpt_lengths, trace_lengths

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


@dataclass(frozen=True)
class Preset:
    """A model that make_checkpoint makes and a workload that suits it."""

    model: dict
    requests: int
    context: int
    output_tokens: int
    max_batch: int
    budgets: tuple[str, ...]


_SMALL_MOE = dict(
    arch="qwen3_moe", layers=8, experts=32, top_k=4, hidden=512, moe_intermediate=512, heads=8, kv_heads=8,
    head_dim=64, vocab=8192, max_positions=4096,
)  # fmt: skip

PRESETS = {
    # Ends within 4 minutes on two cores.
    "demo": Preset(
        {**_SMALL_MOE, "layers": 6}, requests=32, context=320, output_tokens=96, max_batch=32,
        budgets=("96MiB", "144MiB", "224MiB", "320MiB", "352MiB", "416MiB", "512MiB"),
    ),
    # The committed figure: 403 MB of experts, KV of a full batch 537 MB.
    "small": Preset(
        _SMALL_MOE, requests=64, context=512, output_tokens=128, max_batch=64,
        budgets=("144MiB", "176MiB", "208MiB", "256MiB", "304MiB", "352MiB", "384MiB", "432MiB", "464MiB", "496MiB",
                 "560MiB", "688MiB", "960MiB"),
    ),
    # Qwen3-Next's kinds of layers: 403 MB of experts, recurrent states of a full batch 27 MB, its KV 134 MB.
    "next": Preset(
        dict(arch="qwen3_next", layers=8, experts=64, top_k=6, hidden=512, moe_intermediate=256, heads=8, kv_heads=8,
             head_dim=64, vocab=8192, max_positions=4096),
        requests=64, context=512, output_tokens=128, max_batch=64,
        budgets=("160MiB", "256MiB", "352MiB", "448MiB", "512MiB", "640MiB"),
    ),
    # Layers of Qwen3-30B-A3B's width on a GPU: 4.8 GB of experts, KV of a full batch 1.1 GB.
    "gpu": Preset(
        dict(arch="qwen3_moe", layers=8, experts=64, top_k=8, hidden=2048, moe_intermediate=768, heads=32, kv_heads=4,
             head_dim=128, vocab=32768, max_positions=2048),
        requests=128, context=1024, output_tokens=128, max_batch=64,
        budgets=("1GiB", "2GiB", "3GiB", "4GiB", "5GiB", "5632MiB", "6GiB", "7GiB"),
    ),
    # The shape of Qwen3-Next-80B-A3B in all but depth: 8 layers of 48, 25.8 GB.
    "gpu-next": Preset(
        dict(arch="qwen3_next", layers=8, experts=512, top_k=10, hidden=2048, moe_intermediate=512, heads=16,
             kv_heads=2, head_dim=256, vocab=32768, max_positions=4096),
        requests=128, context=2048, output_tokens=128, max_batch=64,
        budgets=("8GiB", "16GiB", "24GiB", "28GiB", "32GiB"),
    ),
}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="fluxmoe.experiments.memory_budget", description=__doc__.splitlines()[0])
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", metavar="DIR", help="Hugging Face checkpoint")
    source.add_argument("--config", choices=list(PUBLISHED), help="a published model by name, with --simulate")
    source.add_argument("--preset", choices=sorted(PRESETS), help="make a model and use a workload that suits it")
    p.add_argument("--budgets", nargs="+", metavar="BYTES", help="e.g. 256MiB 512MiB 1GiB")
    p.add_argument(
        "--placements", nargs="+", metavar="NAME[:ALPHA][+FORMAT]", default=list(DEFAULT_PLACEMENTS),
        help=f"{', '.join(POLICIES)}; with a share of experts on the device where it takes one, and + a format for "
        "compressed experts (default: %(default)s)",
    )  # fmt: skip
    p.add_argument("--requests", type=int, help="number of requests")
    p.add_argument("--context", type=int, help="longest prompt + output")
    p.add_argument("--output-tokens", type=int, help="output tokens of every request")
    p.add_argument("--trace", metavar="CSV", help="request lengths from a trace instead of drawn ones")
    p.add_argument("--sharegpt", action="store_true", help="lengths like ShareGPT's conversations, outputs included")
    p.add_argument("--rate", type=float, help="requests a second, a Poisson process (default: all at once)")
    p.add_argument("--simulate", action="store_true", help="on the machine of --profile, by a cost model")
    p.add_argument("--repeats", type=int, default=1)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--checkpoints", default="checkpoints", metavar="DIR", help="where presets keep their model")
    p.add_argument("--out", required=True, metavar="DIR")
    add_engine_arguments(p, swept=True)
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
    if (expert_format or "dense") not in ("dense", *FORMATS):
        raise UsageError(f"placement {text!r}: unknown expert format; these are: dense, {', '.join(FORMATS)}")
    place(name, 1, 1, alpha=alpha, bandwidths={Tier.RESIDENT: 1.0, Tier.HOST: 1.0})
    return name, alpha, expert_format or None


def preset_model(name: str, directory: Path, seed: int = 0) -> Path:
    """The preset's checkpoint, made on first use."""
    target = directory / name
    spec = PRESETS[name].model
    marker = target / "preset.json"
    if marker.exists() and json.loads(marker.read_text()) == {**spec, "seed": seed}:
        return target
    if target.exists():
        raise UsageError(f"{target} holds another model than preset {name} wants; remove it or give --checkpoints")
    make_checkpoint(out=target, seed=seed, **spec)
    write_json(marker, {**spec, "seed": seed})
    return target


def default_budgets(config: ModelConfig, max_batch: int, context: int) -> list[int]:
    """A row from a few slots to everything resident with all the KV that a full batch needs."""
    kv = max_batch * (context * config.kv_bytes_per_token + config.state_bytes_per_sequence)
    weights = config.non_expert_bytes + config.expert_bytes_total
    least = config.non_expert_bytes + 2 * config.expert_bytes_total // config.num_layers + kv // max_batch
    row = [least * 1.3, weights * 0.5, weights * 0.8, weights + kv * 0.05]
    row += [weights + kv * share for share in (0.15, 0.3, 0.6, 1.0)]
    return sorted({int(-(-value // (1 << 20))) << 20 for value in row})


def run_point(
    args: argparse.Namespace, model: Path, config: ModelConfig, lengths: list[Lengths], placement: str, budget: int
) -> dict:
    """Serve the workload once; a point that cannot run comes back with its reason."""
    requests = make_requests(lengths, config.vocab_size, args.seed)
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
        engine = SimEngine(config, settings.profile, settings) if args.simulate else Engine(model, settings)
    except BudgetError as error:
        return {**row, "status": "too_small", "reason": str(error), "least_budget": error.least}
    with engine:
        outputs: dict[int, RequestOutput] = {}
        steps = list(engine.steps(requests, outputs))
        totals = summarise(steps)
        generated = sum(len(output.token_ids) for output in outputs.values())
        digest = hashlib.sha256(json.dumps([outputs[r.request_id].token_ids for r in requests]).encode())
        wall = totals["wall_s"]
        hidden = 1 - totals["stall_s"] / totals["transfer_s"] if totals["transfer_s"] else None
        return {
            **row,
            **{key: totals[key] for key in totals if key in COLUMNS},
            "tokens_per_s": generated / wall,
            "total_tokens_per_s": (generated + sum(shape.prompt for shape in lengths)) / wall,
            "refused": sum(output.finish_reason == "refused" for output in outputs.values()),
            "generated_tokens": generated,
            "kv_blocks": engine.scheduler.num_blocks,
            "hidden_share": hidden,
            "alpha": engine.placement.alpha,
            **engine.budget.lines(),
            "host_bytes": engine.deployment.layout.tier_bytes(Tier.HOST),
            "disk_bytes": engine.deployment.layout.tier_bytes(Tier.DISK),
            "tokens_sha256": digest.hexdigest()[:16],
        }


def read_rows(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: list[dict]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())


def sweep(args: argparse.Namespace) -> list[dict]:
    """Run every missing point; returns all rows, those of earlier runs included."""
    device = "sim" if args.simulate else resolve_device(args.device).type
    if args.simulate and not args.profile:
        raise UsageError("--simulate needs --profile: the machine to simulate")
    if args.config and not args.simulate:
        raise UsageError("--config names a model without weights: it needs --simulate")
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
    model = preset_model(args.preset, Path(args.checkpoints)) if preset else Path(args.model or "")
    config = published_config(args.config) if args.config else load_config(model)
    context = min(args.context or 1024, config.max_position_embeddings)
    if args.trace:
        lengths = trace_lengths(args.trace, args.requests, context)
    elif args.sharegpt:
        lengths = sharegpt_lengths(args.requests or 64, context, args.seed)
    else:
        lengths = drawn_lengths(args.requests or 64, context, args.output_tokens or 64, args.seed)
    if args.rate is not None:
        lengths = poisson_arrivals(lengths, args.rate, args.seed)
    if args.budgets or preset:
        budgets = [parse_bytes(text) for text in (args.budgets or preset.budgets)]
        if None in budgets:
            raise UsageError("--budgets takes numbers of bytes; `all` is no point on an axis")
    else:
        budgets = default_budgets(config, args.max_batch, context)
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
        "device": f"sim of {args.profile}" if args.simulate else device,
    }
    identity = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]
    rows = _resume(out, identity)
    done = {(row["placement"], int(row["budget_bytes"]), int(row["repeat"])) for row in rows}
    points = [
        (placement, budget, repeat)
        for repeat in range(args.repeats)
        for budget in budgets
        for placement in args.placements
        if (placement, budget, repeat) not in done
    ]
    made_by = provenance(device, args.seed)
    # A sweep may be resumed by a later commit: each row says its own, the file says the newest.
    commit = (made_by["commit"] or "unknown")[:10] + ("+changes" if made_by["dirty"] else "")
    summary = {**settings, "workload": _summary(lengths)}
    write_json(out / "provenance.json", {**made_by, "identity": identity, **summary})
    _warm_up(args, model, config, points, lengths)
    bar = tqdm(points, "points", unit="point")
    for placement, budget, repeat in bar:
        bar.set_postfix_str(f"{placement} {format_bytes(budget)}")
        row = run_point(args, model, config, lengths, placement, budget)
        rows.append({"placement": placement, "budget_bytes": budget, "repeat": repeat, "commit": commit, **row})
        write_rows(out / "points.csv", rows)
        gc.collect()
    return read_rows(out / "points.csv")


def _resume(out: Path, identity: str) -> list[dict]:
    rows = read_rows(out / "points.csv")
    if rows:
        known = json.loads((out / "provenance.json").read_text()).get("identity")
        if known != identity:
            raise UsageError(f"{out} holds points of another model, workload or setting; give another --out")
    return rows


def _summary(lengths: list[Lengths]) -> dict:
    prompts, outputs = [s.prompt for s in lengths], [s.output for s in lengths]
    return {
        "requests": len(lengths),
        "prompt_tokens": sum(prompts),
        "output_tokens": sum(outputs),
        "prompt_range": [min(prompts), max(prompts)],
        "output_range": [min(outputs), max(outputs)],
    }


def _warm_up(args, model, config, points, lengths) -> None:
    """Compile kernels and touch the checkpoint's pages before the first timed point."""
    if points and not args.simulate:
        short = [Lengths(0.0, min(8, lengths[0].prompt), 2)] * 2
        run_point(args, model, config, short, "host", max(budget for _, budget, _ in points))


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
