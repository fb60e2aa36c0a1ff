"""Beyond the paper: longer contexts, faster and slower links, other GPUs.

    fluxmoe sensitivity --out results/simulated/h100/sensitivity
    fluxmoe sensitivity --device cpu --out results/measured/<hardware>/sensitivity

context   32 requests of up to 128 K tokens: what streamed experts leave for KV (sim: Qwen3-Next on 4 x L40)
link      what streaming costs at other ratios of link to memory bandwidth (sim: Qwen3-30B-A3B, an H100 with 40 GiB)
gpu       Qwen3-30B-A3B on 90 % of one device of each shipped profile (sim alone)

On a CPU or GPU at hand: the model of preset small, contexts to 4 K; the link panel holds a CPU's copies to a rate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import NamedTuple

from fluxmoe.runtime.hardware import HardwareProfile
from fluxmoe.runtime.serving.config import EngineConfig

from ..lib.args import group
from ..lib.machines import SIMULATED, FigureMachine, Machine
from ..lib.models import Source, preset_source, published_source
from ..lib.serve import placed, row
from ..lib.sweep import Sweep
from ..lib.workloads import Lengths
from ..plots.paper import plot_sensitivity

PLACEMENTS = ("resident", "packed", "balanced:0.9+planar12", "balanced:0.5+planar12", "host+planar12")
CONTEXTS = (4096, 16384, 32768, 65536, 131072)
LINKS = (0.25, 0.5, 1, 2, 4, 8, 16)
GPUS = ("4xL40", "A100-80GB", "H100-PCIe", "H100-SXM")
MEASURED_CONTEXTS = (256, 512, 1024, 2048, 4096)
MEASURED_LINKS = (0.25e9, 0.5e9, 1e9, 2e9, 4e9, 8e9)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    where: FigureMachine = group()


class Point(NamedTuple):
    """One x of a panel: where what is served, for requests of one length, and how, but for the placement."""

    panel: str
    x: float | str
    machine: Machine
    source: Source
    output: int
    settings: EngineConfig


def settings(
    batch: int, context: int, tokens: int, budget: int | None = None, link: float | None = None
) -> EngineConfig:
    return EngineConfig(
        budget_bytes=budget, max_batch=batch, max_batched_tokens=tokens, max_context=context, min_kv_tokens=context,
        link_bandwidth=link,
    )  # fmt: skip


def simulated_points() -> Iterator[Point]:
    four, h100 = HardwareProfile.load("4xL40"), HardwareProfile.load("H100-SXM")
    next_80b, qwen_30b = published_source("qwen3-next-80b-a3b"), published_source("qwen3-30b-a3b")
    for context in CONTEXTS:
        yield Point("context", context, Machine(SIMULATED, four), next_80b, 512, settings(32, context, 4096))
    for factor in LINKS:
        faster = replace(h100, host_bandwidth=factor * h100.host_bandwidth)
        ratio = faster.host_bandwidth / faster.memory_bandwidth
        yield Point("link", ratio, Machine(SIMULATED, faster), qwen_30b, 512, settings(64, 4096, 4096, 40 << 30))
    for name in GPUS:
        machine = Machine(SIMULATED, HardwareProfile.load(name), 1)
        yield Point("gpu", name.removeprefix("4x"), machine, qwen_30b, 512, settings(64, 4096, 4096))


def measured_points(machine: Machine, source: Source) -> Iterator[Point]:
    # Beside the weights as much as 32 requests of 1,024 tokens need.
    budget = source.config.expert_bytes_total + source.config.non_expert_bytes
    budget += 32 * 1024 * source.config.kv_bytes_per_token
    for context in MEASURED_CONTEXTS:
        yield Point("context", context, machine, source, 32, settings(8, context, 512, budget))
    for rate in MEASURED_LINKS if machine.device == "cpu" else ():
        yield Point("link", rate, machine, source, 32, settings(32, 256, 512, budget, rate))


def run(args: Arguments) -> None:
    if args.where.simulated:
        points = list(simulated_points())
    else:
        points = list(measured_points(args.where.here, preset_source("small", args.where.checkpoints)))
    runs, machine = [], points[0].machine
    for p in points:
        batch, context = p.settings.max_batch, p.settings.max_context or 0
        lengths = [Lengths(0.0, context - p.output, p.output)] * batch
        for name in PLACEMENTS:
            how = replace(p.settings, **placed(name))
            made = asdict(how) | {"machine": p.machine.content, "model": p.source.content, "output": p.output}
            where = {"panel": p.panel, "x": p.x, "placement": name, "batch": batch, "context": context}
            runs.append((where, made, partial(row, p.machine, p.source, how, lengths)))
    facts = {**machine.about, "models": {p.panel: p.source.name for p in points}}
    with Sweep(args.where.out, "sensitivity", **facts) as sweep:
        sweep.all(runs)
        sweep.finish()
    print(f"figure: {plot_sensitivity(args.where.out)}")
