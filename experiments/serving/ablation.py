"""What each of our ideas is worth: one at a time taken away, under one memory budget.

    fluxmoe ablation --preset small --budget 384MiB --out results/measured/<hardware>/ablation
    fluxmoe ablation --device sim --profile H100-SXM --config qwen3-30b-a3b --budget 40GiB --out DIR

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

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from fluxmoe.kernels.formats import DEFAULT_COMPRESSED, DENSE
from fluxmoe.runtime.memory.budget import parse_bytes
from fluxmoe.runtime.serving.config import EngineConfig

from ..lib.args import group, option
from ..lib.effects import Setup, setups_of
from ..lib.machines import SWEPT, MachineChoice
from ..lib.models import ModelChoice, check_context
from ..lib.results import values_by
from ..lib.serve import row
from ..lib.sweep import Sweep, in_turns
from ..lib.workloads import drawn_lengths

_HALF = {"placement": "balanced", "alpha": 0.5, "expert_format": DEFAULT_COMPRESSED}
_ADAPTIVE = {"placement": "packed", "adaptive": True, "least_alpha": 0.8}
VARIANTS: dict[str, dict] = {
    "full": _HALF,
    "decoded slots": _HALF | {"slot_format": "decoded"},
    "dense transfer": _HALF | {"host_format": DENSE},
    "no compression": {"placement": "balanced", "alpha": 0.5},
    "whole layers": _HALF | {"placement": "hybrid"},
    "on demand": _HALF | {"transfer": "on_demand"},
    "adaptive": _ADAPTIVE,
    "adaptive, KV held": _ADAPTIVE | {"grow_kv": False},
}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    model: ModelChoice = group()
    machine: MachineChoice = group()
    engine: EngineConfig = group(*SWEPT)
    budget: int | None = option("device bytes for everything", parse=parse_bytes, metavar="BYTES")
    variants: tuple[str, ...] = option("which", tuple(VARIANTS), choices=tuple(VARIANTS))
    requests: int = option("number of requests", 64, least=1)
    context: int = option("longest prompt + output", 512, least=2)
    output_tokens: int = option("of every request", 128, least=1)
    repeats: int = option("runs of each variant", 3, least=1)
    seed: int = option("of lengths and prompts", 0)
    out: Path = option("folder of the results", metavar="DIR")

    @property
    def setups(self) -> list[Setup]:
        settings = [replace(self.engine, **VARIANTS[name]) for name in self.variants]
        return setups_of(self.model, self.machine, settings)


def run(args: Arguments) -> None:
    machine = args.machine.machine
    check_context(args.context, args.model.architecture)
    source = args.model.source(machine.simulated)
    lengths = drawn_lengths(args.requests, args.context, args.output_tokens, args.seed)
    common = replace(args.engine, budget_bytes=args.budget, max_context=args.context, min_kv_tokens=args.context)
    points = []
    for turn, name in in_turns(args.variants, 1 if machine.simulated else args.repeats):
        settings = replace(common, **VARIANTS[name])
        work = partial(row, machine, source, settings, lengths, args.seed)
        points.append(({"variant": name, "turn": turn}, asdict(settings), work))
    made = {"workload": lengths, "seed": args.seed}
    facts = {"budget": args.budget, "requests": args.requests}
    with Sweep.serving(args.out, "ablation", machine, source, made, facts, "rows.csv", args.seed) as sweep:
        rows = sweep.all(points)
        speeds = values_by(rows, "variant")
        full = np.median(speeds.get("full", [np.nan]))
        for name in args.variants:
            if each := speeds.get(name):
                spread = f"({min(each):.1f} … {max(each):.1f})"
                print(f"{name:<18} {np.median(each):9.1f} tokens/s {spread:<22} {np.median(each) / full:5.2f} of full")
            else:
                print(f"{name:<18} does not start with this budget")
        sweep.note_tokens()
        sweep.finish()
