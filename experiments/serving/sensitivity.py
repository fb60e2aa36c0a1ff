"""Beyond the paper: longer contexts, faster and slower links, other GPUs.

    python -m fluxmoe.experiments.serving.sensitivity --out results/simulated-h100/sensitivity
    python -m fluxmoe.experiments.serving.sensitivity --device cpu --out results/<hardware>/sensitivity

context   32 requests of up to 128 K tokens: what streamed experts leave for KV (sim: Qwen3-Next on 4 x L40)
link      what streaming costs at other ratios of link to memory bandwidth (sim: Qwen3-30B-A3B, an H100 with 40 GiB)
gpu       Qwen3-30B-A3B on 90 % of one device of each shipped profile (sim alone)

On a CPU or GPU at hand: the model of preset small, contexts to 4 K; the link panel holds a CPU's copies to a rate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

from fluxmoe.runtime.hardware import HardwareProfile
from fluxmoe.runtime.memory.budget import BudgetError
from fluxmoe.runtime.serving.config import EngineConfig
from fluxmoe.runtime.serving.metrics import summarise
from tqdm import tqdm

from ..lib.machines import SIMULATED, Machine, figure_parser, machine_of
from ..lib.presets import Source, preset_source, published_source
from ..lib.results import cli_main, provenance, resume, write_csv, write_json
from ..lib.workloads import Lengths, make_requests
from ..plots.paper import plot_sensitivity
from .memory_budget import split_placement

PLACEMENTS = ("resident", "packed", "balanced:0.9+planar12", "balanced:0.5+planar12", "host+planar12")
CONTEXTS = (4096, 16384, 32768, 65536, 131072)
LINKS = (0.25, 0.5, 1, 2, 4, 8, 16)
GPUS = ("4xL40", "A100-80GB", "H100-PCIe", "H100-SXM")
MEASURED_CONTEXTS = (256, 512, 1024, 2048, 4096)
MEASURED_LINKS = (0.25e9, 0.5e9, 1e9, 2e9, 4e9, 8e9)


@dataclass(frozen=True)
class Point:
    """One x of a panel. budget, link_bandwidth: None for all there is."""

    panel: str
    x: float | str
    machine: Machine
    source: Source
    batch: int
    context: int
    output: int
    budget: int | None = None
    link_bandwidth: float | None = None
    max_batched_tokens: int = 4096


def simulated_points() -> Iterator[Point]:
    four, h100 = HardwareProfile.load("4xL40"), HardwareProfile.load("H100-SXM")
    next_80b, qwen_30b = published_source("qwen3-next-80b-a3b"), published_source("qwen3-30b-a3b")
    for context in CONTEXTS:
        yield Point("context", context, Machine(SIMULATED, four), next_80b, 32, context, 512)
    for factor in LINKS:
        faster = replace(h100, host_bandwidth=factor * h100.host_bandwidth)
        ratio = faster.host_bandwidth / faster.memory_bandwidth
        yield Point("link", ratio, Machine(SIMULATED, faster), qwen_30b, 64, 4096, 512, 40 << 30)
    for name in GPUS:
        machine = Machine(SIMULATED, HardwareProfile.load(name), 1)
        yield Point("gpu", name.removeprefix("4x"), machine, qwen_30b, 64, 4096, 512)


def measured_points(machine: Machine, source: Source) -> Iterator[Point]:
    weights = source.config.expert_bytes_total + source.config.non_expert_bytes
    common = dict(output=32, max_batched_tokens=512)
    # As much as 32 requests of 1,024 tokens need.
    kv = 32 * 1024 * source.config.kv_bytes_per_token
    for context in MEASURED_CONTEXTS:
        yield Point("context", context, machine, source, 8, context, budget=weights + kv, **common)
    for rate in MEASURED_LINKS if machine.device == "cpu" else ():
        yield Point("link", rate, machine, source, 32, 256, budget=weights + kv, link_bandwidth=rate, **common)


def _identity(point: Point) -> str:
    """What a resumed sweep must agree on; its machine it says once."""
    values = {field.name: getattr(point, field.name) for field in fields(point)}
    values |= {"machine": None, "source": point.source.name}
    return f"Point({', '.join(f'{name}={value!r}' for name, value in values.items())})"


def serve(point: Point, placement: str) -> dict:
    """Totals of a run, or why it cannot start."""
    name, alpha, expert_format = split_placement(placement)
    config = EngineConfig(
        placement=name, alpha=alpha, expert_format=expert_format, budget_bytes=point.budget, max_batch=point.batch,
        max_batched_tokens=point.max_batched_tokens, max_context=point.context, min_kv_tokens=point.context,
        link_bandwidth=point.link_bandwidth,
    )  # fmt: skip
    lengths = [Lengths(0.0, point.context - point.output, point.output)] * point.batch
    try:
        with point.machine.open(point.source, config) as engine:
            for request in make_requests(lengths, point.source.config.vocab_size, 0):
                engine.add(request)
            totals = summarise(list(engine.steps()))
    except BudgetError as error:
        return {"status": "too_small", "reason": str(error)}
    kept = ("decode_tokens_per_s", "peak_batch", "preemptions", "stall_s", "wall_s")
    speed = point.batch * point.output / totals["wall_s"]
    return {"status": "ok", "reason": "", "tokens_per_s": speed, **{key: totals[key] for key in kept}}


def main(argv: list[str] | None = None) -> None:
    args = figure_parser("sensitivity", __doc__.splitlines()[0]).parse_args(argv)
    out = Path(args.out)
    if args.device == SIMULATED:
        points = list(simulated_points())
    else:
        points = list(measured_points(machine_of(args), preset_source("small", Path(args.checkpoints))))
    rows, identity = resume(out, {**points[0].machine.about, "points": [_identity(p) for p in points]})
    done = {(row["panel"], row["x"], row["placement"]) for row in rows}
    about = {**points[0].machine.about, "models": {p.panel: p.source.name for p in points}, "identity": identity}
    write_json(out / "provenance.json", {**provenance(args.device, 0), **about})
    turns = [(p, name) for p in points for name in PLACEMENTS if (p.panel, str(p.x), name) not in done]
    for point, placement in tqdm(turns, "points", unit="point"):
        row = {"panel": point.panel, "x": point.x, "placement": placement, "batch": point.batch}
        rows.append(row | {"context": point.context} | serve(point, placement))
        write_csv(out / "points.csv", rows)
    print(f"figure: {plot_sensitivity(out)}")


if __name__ == "__main__":
    cli_main(main)
