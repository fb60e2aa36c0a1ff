"""Experts leave the device while requests are served, and KV takes the memory (the paper's Exp#3, Fig. 9).

    fluxmoe paper fig9 --preset small --out results/measured/<hardware>/fig9_adaptation

Every expert begins compressed on the device. From iteration --start on, every --every iterations one expert of each
layer goes to host memory, --times times. Variants, which serve the same requests, with the same tokens:

    static      nothing moves: α = 1
    hold        experts leave, spread over the layers; nobody takes the memory (the paper's system)
    grow        experts leave, spread over the layers; KV grows into the memory, and more requests run at once
    unspread    as many experts leave at each step, all of them from the last layers that have any (the ablation)
    planned     the planner moves experts when it sees fit, at most as many; KV grows

    fluxmoe paper fig9 --device sim --profile 4xL40 --config qwen3-next-80b-a3b …

serves a published model on the simulator's virtual clock instead.

Requests are always waiting (more than fit), so that throughput follows the KV cache. steps.csv has a row an iteration;
the figure shows tokens/s in windows of iterations, and the bytes that experts and KV hold.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from fluxmoe.runtime.experts.placement import Tier
from fluxmoe.runtime.experts.planner import Move
from fluxmoe.runtime.memory.budget import parse_bytes
from fluxmoe.runtime.serving.config import EngineConfig
from fluxmoe.runtime.serving.engine import Engine
from fluxmoe.runtime.serving.loop import StepMetrics
from fluxmoe.runtime.sim.simulator import SimEngine

from ..lib.args import group, option
from ..lib.effects import Setup, setups_of
from ..lib.machines import SWEPT, Machine, MachineChoice
from ..lib.models import ModelChoice, Source
from ..lib.results import UsageError, read_csv, write_csv
from ..lib.serve import serve
from ..lib.sweep import Sweep
from ..lib.workloads import Lengths, make_requests
from ..plots.serving import plot_adaptation

VARIANTS = ("static", "hold", "grow", "unspread", "planned")
_GROWING = ("grow", "unspread", "planned")
# What steps.csv has of an iteration.
_SHOWN = (
    "iteration", "time_s", "batch", "duration_s", "prefill_tokens", "decode_tokens", "device_experts", "stall_s",
    "transfer_s", "preemptions",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Arguments:
    model: ModelChoice = group()
    machine: MachineChoice = group()
    engine: EngineConfig = group(*SWEPT)
    budget: int | None = option(
        "device bytes for everything, or all (default: 352MiB)", 352 << 20, parse=parse_bytes, metavar="BYTES"
    )
    variants: tuple[str, ...] = option("which", VARIANTS, choices=VARIANTS)
    requests: int = option("number of requests", 96, least=1)
    prompt_tokens: int = option("of each request", 32, least=1)
    output_tokens: int = option("of each request", 224, least=1)
    start: int = option("iteration of the first step", 400, least=1)
    every: int = option("iterations between steps", 150, least=1)
    times: int = option("steps; each takes one expert of every layer", 7, least=1)
    seed: int = option("of prompts", 0)
    out: Path = option("folder of the results", metavar="DIR")

    @property
    def setups(self) -> list[Setup]:
        settings = [settings_of(self, variant, self.model.architecture.num_experts) for variant in self.variants]
        return setups_of(self.model, self.machine, settings)


def moves_of_step(tiers: np.ndarray, spread: bool) -> list[Move]:
    """One expert of every layer, the highest id on the device; unspread: as many from the last layers."""
    layers = len(tiers)
    moves: list[Move] = []
    for layer in range(layers - 1, -1, -1):
        members = np.flatnonzero(tiers[layer] == Tier.PACKED)[::-1]
        chosen = members[:1] if spread else members[: layers - len(moves)]
        moves += [Move(layer, int(expert), Tier.PACKED, Tier.HOST) for expert in chosen]
    return moves


def settings_of(args: Arguments, variant: str, experts: int) -> EngineConfig:
    # All variants have the same slots, so the same KV to begin with: unspread, whole layers come to stream.
    share = 1.0 if "unspread" in args.variants else args.times / experts
    return replace(
        args.engine, placement="packed", budget_bytes=args.budget, max_context=args.prompt_tokens + args.output_tokens,
        adaptive=True, planning=variant == "planned", grow_kv=variant in _GROWING, least_alpha=max(0.0, 1 - share),
    )  # fmt: skip


def run_variant(args: Arguments, machine: Machine, source: Source, variant: str, steps: list[dict]) -> dict:
    """Totals of a variant; `steps` gets a row an iteration."""
    lengths = [Lengths(0.0, args.prompt_tokens, args.output_tokens)] * args.requests
    requests = make_requests(lengths, source.config.vocab_size, args.seed)

    def watch(engine: Engine | SimEngine, step: StepMetrics) -> None:
        pager = engine.pager if isinstance(engine, Engine) else engine
        done = (step.iteration - args.start) // args.every
        due = (step.iteration - args.start) % args.every == 0 and 0 <= done < args.times
        if due and variant not in ("static", "planned"):
            pager.request(moves_of_step(pager.tiers, variant != "unspread"))
        if isinstance(engine, Engine) and variant != "planned" and engine.pager.mover.refused:
            raise UsageError(f"a move was refused: {engine.pager.mover.refused[0]}")
        lines, shown = engine.budget.lines(), asdict(step)
        bytes_by_owner = {"expert_bytes": lines["packed_experts"], "kv_bytes": lines["kv_cache"]}
        steps.append({"variant": variant} | {name: shown[name] for name in _SHOWN} | bytes_by_owner)

    return serve(machine, source, settings_of(args, variant, source.config.num_experts), requests, watch=watch).row


def run(args: Arguments) -> None:
    machine = args.machine.machine
    source = args.model.source(machine.simulated)
    if args.times >= source.config.num_experts:
        raise UsageError(f"--times {args.times} would leave no expert of {source.config.num_experts} on the device")
    shown = ("budget", "requests", "prompt_tokens", "output_tokens", "start", "every", "times")
    settings = {name: getattr(args, name) for name in shown} | {"link_bandwidth": args.engine.link_bandwidth}
    made = {"seed": args.seed, "moves": settings}
    with Sweep.serving(args.out, "paper fig9", machine, source, made, settings, "rows.csv", args.seed) as sweep:
        for variant in args.variants:
            steps: list[dict] = []
            how = asdict(settings_of(args, variant, source.config.num_experts))
            row = sweep.measure(partial(run_variant, args, machine, source, variant, steps), how, variant=variant)
            if row is not None and row["status"] == "ok":
                others = [step for step in read_csv(args.out / "steps.csv") if step["variant"] != variant]
                write_csv(args.out / "steps.csv", [*others, *steps])
                report(variant, steps)
        sweep.note_tokens()
        sweep.finish()
    print(f"figure: {plot_adaptation(args.out)}")


def report(variant: str, steps: list[dict]) -> None:
    end, kv = steps[-1], [step["kv_bytes"] for step in steps]
    total = {
        name: sum(step[name] for step in steps) for name in ("decode_tokens", "preemptions", "stall_s", "transfer_s")
    }
    print(
        f"{variant:>9}: {total['decode_tokens'] / end['time_s']:.1f} tokens/s in {end['time_s']:.1f} s, largest "
        f"batch {max(step['batch'] for step in steps)}, KV {kv[0] / 1e6:.1f} → {max(kv) / 1e6:.1f} MB, "
        f"{total['preemptions']} preemptions, stalls {total['stall_s']:.2f} s of {total['transfer_s']:.2f} s",
        flush=True,
    )
