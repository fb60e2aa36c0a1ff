"""Do plan's numbers come true on this machine: the same settings, simulated with its profile, and served for real.

    fluxmoe verify --preset demo --profile results/measured/<hardware>/profile.json
    fluxmoe verify --model DIR --requests 16 --context 512

Placements under one budget, each simulated and run; the table has both, their ratio, and whether the simulator puts
them in the right order. Without --profile the machine is measured first (under a minute).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

from fluxmoe.runtime.devices import resolve_device
from fluxmoe.runtime.hardware import HardwareProfile
from fluxmoe.runtime.memory.budget import parse_bytes
from fluxmoe.runtime.serving.config import EngineConfig
from fluxmoe.runtime.sim.cost_model import CostParameters

from ..lib.args import group, option
from ..lib.machines import SIMULATED, Machine
from ..lib.models import PRESETS, ModelChoice
from ..lib.results import output_file, provenance, write_json
from ..lib.serve import placed, placement_names, row, warm_up
from ..lib.workloads import Workload
from ..paper.validate_simulator import CPU_COSTS
from .profile import measure

PLACEMENTS = ("resident", "packed", "balanced:0.5+planar12", "host+planar12")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    model: ModelChoice = group("config")
    workload: Workload = group()
    device: str = option("what serves", "auto", choices=("auto", "cpu", "cuda"))
    profile: HardwareProfile | None = option(
        "what this machine can do (default: measured now)", None, parse=HardwareProfile.load, metavar="FILE"
    )
    budget: int | None = option("device bytes for everything", None, parse=parse_bytes, metavar="BYTES")
    max_batch: int | None = option("sequences in a batch (default: the preset's, or 64)", None, least=1)
    placements: tuple[str, ...] = placement_names("which", PLACEMENTS)
    json: Path | None = option("save the table", None, parse=output_file, metavar="FILE")


def run(args: Arguments) -> None:
    device, source = resolve_device(args.device), args.model.source()
    preset = PRESETS[args.model.preset] if args.model.preset else None
    lengths = args.workload.lengths(preset, source.config)
    longest = max(shape.prompt + shape.output for shape in lengths)
    profile = args.profile or measure(device, Path.cwd())
    here, there = Machine(device.type), Machine(SIMULATED, profile)
    common = EngineConfig(
        budget_bytes=args.budget, max_batch=args.max_batch or (preset.max_batch if preset else 64),
        max_context=longest, min_kv_tokens=longest,
    )  # fmt: skip
    warm_up(here, source, common)
    table = []
    for name in args.placements:
        settings = replace(common, **placed(name))
        real = row(here, source, settings, lengths, args.workload.seed)
        if real["status"] != "ok":
            print(f"{name:<24} does not start: {real['reason']}")
            continue
        costs = CPU_COSTS if device.type == "cpu" else CostParameters()
        # What a run without a budget took is what is planned with.
        budget = args.budget or sum(real.get(line, 0) for line in _LEDGER)
        costs = replace(costs, workspace_bytes=real["workspace"])
        planned = row(there, source, replace(settings, budget_bytes=budget), lengths, args.workload.seed, costs)
        if planned["status"] != "ok":
            print(f"{name:<24} runs here, but was planned not to start: {planned['reason']}")
            continue
        each = {"placement": name, "planned": planned["tokens_per_s"], "measured": real["tokens_per_s"]}
        table.append(each | {"measured_over_planned": real["tokens_per_s"] / planned["tokens_per_s"]})
        print(
            f"{name:<24} planned {each['planned']:9.1f} tokens/s, measured {each['measured']:9.1f}: "
            f"{table[-1]['measured_over_planned']:.2f}x"
        )
    pairs = list(combinations(table, 2))
    right = sum((a["planned"] > b["planned"]) == (a["measured"] > b["measured"]) for a, b in pairs)
    print(f"{right} of {len(pairs)} pairs are in the order that was planned")
    if args.json:
        write_json(args.json, {"rows": table, "pairs": len(pairs), "right": right, "profile": profile.name,
                               "provenance": provenance(device.type, args.workload.seed)})  # fmt: skip


# Lines of the ledger.
_LEDGER = (
    "non_expert_weights", "resident_experts", "packed_experts", "slots", "workspace", "states", "kv_cache",
)  # fmt: skip
