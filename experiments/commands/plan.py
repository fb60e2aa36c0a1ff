"""Before renting anything: does a model fit, where do its experts go, what throughput to expect, what would help most.

    python -m fluxmoe.experiments.commands.plan --config qwen3-next-80b-a3b --gpu H100-SXM --batch 128 --context 4096
    python -m fluxmoe.experiments.commands.plan --model DIR --gpu 4xL40 --devices 2 --budget 40GiB --json plan.json

Everything is simulated (see `runtime.simulator`): placements with the runtime's own ledger and scheduler, times by a
cost model over the GPU's profile. `validate_simulator` says how far that is from measurements.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from fluxmoe.kernels.formats import DEFAULT_COMPRESSED
from fluxmoe.models.config import ModelConfig, load_config
from fluxmoe.models.published import PUBLISHED, published_config
from fluxmoe.runtime.hardware import HardwareProfile, list_profiles
from fluxmoe.runtime.memory.budget import BudgetError, format_bytes, parse_bytes
from fluxmoe.runtime.serving.config import EngineConfig
from fluxmoe.runtime.serving.metrics import summarise
from fluxmoe.runtime.sim.simulator import SimEngine

from ..lib.results import Parser, UsageError, cli_main, provenance, write_json
from ..lib.workloads import Lengths, make_requests

_FORMAT = DEFAULT_COMPRESSED
# (name, placement, α, format of experts): what a user can ask the engine for.
CANDIDATES = (
    ("resident", "resident", None, None),
    ("packed", "packed", None, _FORMAT),
    *((f"balanced:{alpha}+{_FORMAT}", "balanced", alpha, _FORMAT) for alpha in (0.95, 0.9, 0.8, 0.7, 0.5, 0.25)),
    (f"host+{_FORMAT}", "host", None, _FORMAT),
)


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="fluxmoe.experiments.commands.plan", description=__doc__.splitlines()[0])
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", metavar="DIR", help="Hugging Face checkpoint (its config.json is enough)")
    source.add_argument("--config", choices=list(PUBLISHED), help="a published model by name")
    p.add_argument("--gpu", required=True, metavar="NAME[×N]|FILE", help=f"{', '.join(list_profiles())}, or a profile")
    p.add_argument("--devices", type=int, help="how many of the profile's devices share the model (default: all)")
    p.add_argument("--budget", default="all", metavar="BYTES", help="of each device (default: 90 %% of its memory)")
    p.add_argument("--batch", type=int, default=64, help="requests at a time")
    p.add_argument("--context", type=int, default=4096, help="prompt + output")
    p.add_argument("--output-tokens", type=int, help="of each request (default: a quarter of the context)")
    p.add_argument("--json", metavar="FILE")
    return p


def evaluate(
    model: ModelConfig, profile: HardwareProfile, devices: int, budget: int | None, batch: int, context: int,
    output: int,
) -> list[dict]:  # fmt: skip
    """One row a candidate that starts, the fastest first; those that do not fit last, with what they need."""
    rows = []
    for name, placement, alpha, expert_format in CANDIDATES:
        config = EngineConfig(
            device="cpu", placement=placement, alpha=alpha, expert_format=expert_format, budget_bytes=budget,
            max_batch=batch, max_batched_tokens=2048, max_context=context, min_kv_tokens=context,
        )  # fmt: skip
        try:
            engine = SimEngine(model, profile, config, devices=devices)
        except BudgetError as error:
            rows.append({"placement": name, "fits": False, "needs_bytes": error.least, "tokens_per_s": 0.0})
            continue
        requests = make_requests([Lengths(0.0, context - output, output)] * batch, model.vocab_size, 0)
        for request in requests:
            engine.add(request)
        totals = summarise(list(engine.steps()))
        lines = engine.budget.lines()
        rows.append(
            {
                "placement": name, "fits": True, "tokens_per_s": batch * output / totals["wall_s"],
                "bottleneck": bottleneck(totals, engine, batch), "kv_sequences": totals["peak_batch"],
                "preemptions": totals["preemptions"], "stall_share": totals["stall_s"] / totals["wall_s"], **lines,
            }
        )  # fmt: skip
    return sorted(rows, key=lambda row: -row["tokens_per_s"])


def bottleneck(totals: dict, engine: SimEngine, batch: int) -> str:
    """What a run waits for most."""
    if totals["stall_s"] > 0.3 * totals["wall_s"]:
        return "link to the host"
    if totals["peak_batch"] < 0.9 * batch or totals["preemptions"] > batch / 4:
        return "KV cache"
    model, tokens = engine.model, totals["generated_by_decode"] / max(1, totals["iterations"])
    flops = 6 * tokens * model.top_k * model.hidden_size * model.moe_intermediate_size / engine.devices
    touched = model.num_experts * (1 - (1 - model.top_k / model.num_experts) ** tokens)
    read = touched * model.expert_params * 2 / engine.devices
    if flops / engine.profile.matmul_flops > read / engine.profile.memory_bandwidth:
        return "arithmetic"
    serial = model.num_layers * 14 * engine.profile.launch_s + engine.profile.iteration_s
    return "launches and host" if serial > 0.5 * totals["wall_s"] / totals["iterations"] else "memory bandwidth"


def changes(profile: HardwareProfile, budget: int | None, batch: int) -> dict[str, dict]:
    """Single changes that a user could make: arguments of `evaluate` by name."""
    total = budget or int(0.9 * profile.memory_bytes)
    return {
        "a quarter more memory": {"budget": int(1.25 * total)},
        "a link twice as fast": {
            "profile": replace(
                profile, host_bandwidth=2 * profile.host_bandwidth, host_link_shared=2 * profile.host_link_shared
            )
        },
        "memory twice as fast": {"profile": replace(profile, memory_bandwidth=2 * profile.memory_bandwidth)},
        "twice the requests": {"batch": 2 * batch},
        "half the requests": {"batch": max(1, batch // 2)},
    }


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    model = load_config(Path(args.model)) if args.model else published_config(args.config)
    profile = HardwareProfile.load(args.gpu)
    output = args.output_tokens or max(1, args.context // 4)
    if args.batch < 1 or not 0 < output < args.context:
        raise UsageError("--batch must be positive, and --output-tokens less than --context")
    context = min(args.context, model.max_position_embeddings)
    asked = {
        "model": model, "profile": profile, "devices": args.devices or profile.num_devices,
        "budget": parse_bytes(args.budget), "batch": args.batch, "context": context, "output": min(output, context - 1),
    }  # fmt: skip
    rows = evaluate(**asked)
    total = model.expert_bytes_total + model.non_expert_bytes
    where = profile.name if asked["devices"] == profile.num_devices else f"{asked['devices']} of {profile.name}"
    print(
        f"{args.config or args.model}: {format_bytes(total)} of weights, "
        f"{100 * model.expert_bytes_total / total:.0f} % experts; {where}; "
        f"{args.batch} requests of {context} tokens. Simulated."
    )
    for row in rows:
        if row["fits"]:
            print(
                f"{row['placement']:<24} {row['tokens_per_s']:9.1f} tokens/s  {row['kv_sequences']:4} at a time  "
                f"KV {format_bytes(row['kv_cache']):>10}  waits {100 * row['stall_share']:3.0f} %  "
                f"bound by {row['bottleneck']}"
            )
        else:
            print(f"{row['placement']:<24} does not fit: needs {format_bytes(row['needs_bytes'])} a device")
    best, gains = rows[0], {}
    if best["fits"]:
        for name, change in changes(profile, asked["budget"], args.batch).items():
            gains[name] = evaluate(**asked | change)[0]["tokens_per_s"] / best["tokens_per_s"]
        for name, gain in sorted(gains.items(), key=lambda item: -item[1]):
            print(f"  {name:<24} {gain:5.2f} x")
        print(f"best: --placement {best['placement']}; what helps most: {max(gains, key=gains.__getitem__)}")
    else:
        print(f"nothing fits; the least is {format_bytes(min(row['needs_bytes'] for row in rows))} a device")
    if args.json:
        about = {"profile": profile.name, "devices": asked["devices"], "batch": args.batch, "context": context}
        write_json(args.json, {"rows": rows, "gains": gains, **about, "provenance": provenance("sim", 0)})


if __name__ == "__main__":
    cli_main(main)
