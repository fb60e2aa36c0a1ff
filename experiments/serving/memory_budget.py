"""Throughput against memory budget, for several placements of the experts (the paper's headline question).

    fluxmoe memory-budget --preset demo --out results/measured/<hardware>/memory_budget
    fluxmoe memory-budget --device sim --profile H100-SXM --config mixtral-8x7b --out DIR

A row of points.csv is one run: a placement under a budget that must hold non-expert weights, resident experts, slots,
workspace and KV cache. Runs are interleaved over placements, so that a machine whose speed drifts does not favour one.
A stopped sweep resumes where it was. Points that cannot run are rows with the reason.

With `--wall cgroup` a budget is all the memory that a process has, interpreter and page cache included: each point runs
in a process of its own, which the kernel holds to it, on the budget `all`. Its row also says ledger_bytes, what all
ledgers say, of which mapped_experts are where their files are mapped; rss_bytes, the most that the process held after
an iteration, with those; base_bytes, what it held before its engine was made; wall_peak_bytes, the most that its cgroup
held without page cache, and wall_mapped_bytes, what is charged to it of files that are mapped. The model's files leave
the page cache before each point: what others have brought there would lie outside of the wall.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from fluxmoe.models.config import ModelConfig
from fluxmoe.runtime.devices import HOST
from fluxmoe.runtime.experts.placement import POLICIES
from fluxmoe.runtime.memory.budget import BudgetError, format_bytes
from fluxmoe.runtime.serving.config import EngineConfig
from fluxmoe.runtime.serving.engine import Engine
from fluxmoe.runtime.serving.loop import StepMetrics
from fluxmoe.runtime.sim.simulator import SimEngine
from tqdm import tqdm

from ..lib import wall
from ..lib.args import group, number_of_bytes, option
from ..lib.effects import Setup, setups_of
from ..lib.machines import SWEPT, Machine, MachineChoice
from ..lib.models import PRESETS, ModelChoice, Source
from ..lib.results import UsageError
from ..lib.serve import (
    compile_kernels,
    held,
    placed,
    placement_names,
    require_wall,
    row,
    serve,
    short_requests,
    wall_for,
    warm_up,
)  # fmt: skip
from ..lib.sweep import Sweep, in_turns
from ..lib.workloads import Lengths, Workload, make_requests
from ..plots.serving import plot_memory_budget

# offload and balanced at one α, so that they differ only in how the streamed half is spread over the layers.
PLACEMENTS = ("resident", "offload:0.5", "balanced:0.5", "host", "packed", "balanced:0.5+planar12", "host+planar12")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    model: ModelChoice = group()
    machine: MachineChoice = group()
    workload: Workload = group()
    engine: EngineConfig = group(*SWEPT, "max_batch")
    max_batch: int | None = option("sequences in a batch (default: the preset's, or 64)", None, least=1)
    budgets: tuple[int, ...] = option(
        "e.g. 256MiB 512MiB 1GiB (default: the preset's, or a row that suits the model)", (), parse=number_of_bytes,
        metavar="BYTES",
    )  # fmt: skip
    placements: tuple[str, ...] = placement_names(
        f"{', '.join(POLICIES)}; with a share of experts on the device where it takes one, and + a format for "
        "compressed experts", PLACEMENTS,
    )  # fmt: skip
    repeats: int = option("runs of each point", 1, least=1)
    wall: str = option(
        "cgroup: a budget is all that a point's own process has, interpreter included, and the kernel enforces it",
        "none", choices=("none", "cgroup"),
    )  # fmt: skip
    out: Path = option("folder of the results", metavar="DIR")

    @property
    def setups(self) -> list[Setup]:
        settings = [replace(self.engine, **placed(name)) for name in self.placements]
        return setups_of(self.model, self.machine, settings)


def default_budgets(config: ModelConfig, max_batch: int, context: int) -> list[int]:
    """A row from a few slots to everything resident with all the KV that a full batch needs."""
    kv = max_batch * (context * config.kv_bytes_per_token + config.state_bytes_per_sequence)
    weights = config.non_expert_bytes + config.expert_bytes_total
    least = config.non_expert_bytes + 2 * config.expert_bytes_total // len(config.moe_layers) + kv // max_batch
    values = [least * 1.3, weights * 0.5, weights * 0.8, weights + kv * 0.05]
    values += [weights + kv * share for share in (0.15, 0.3, 0.6, 1.0)]
    return sorted({int(-(-value // (1 << 20))) << 20 for value in values})


def summary(lengths: list[Lengths]) -> dict[str, Any]:
    prompts, outputs = [s.prompt for s in lengths], [s.output for s in lengths]
    return {
        "requests": len(lengths), "prompt_tokens": sum(prompts), "output_tokens": sum(outputs),
        "prompt_range": [min(prompts), max(prompts)], "output_range": [min(outputs), max(outputs)],
    }  # fmt: skip


def run(args: Arguments) -> None:
    machine, seed = args.machine.machine, args.workload.seed
    if args.wall != "none":
        if machine.device != "cpu":
            raise UsageError("--wall limits host memory: it is for --device cpu")
        wall.check()
    source = args.model.source(machine.simulated)
    preset = PRESETS[args.model.preset] if args.model.preset else None
    lengths = args.workload.lengths(preset, source.config)
    longest = max(shape.prompt + shape.output for shape in lengths)
    batch = args.max_batch or (preset.max_batch if preset else 64)
    budgets = args.budgets or tuple(map(number_of_bytes, preset.budgets if preset else ()))
    budgets = budgets or tuple(default_budgets(source.config, batch, longest))
    common = replace(args.engine, max_batch=batch, max_context=longest, min_kv_tokens=longest)
    points = []
    for repeat, (budget, name) in in_turns(((b, p) for b in budgets for p in args.placements), args.repeats):
        settings = replace(common, budget_bytes=None if args.wall == "cgroup" else budget, **placed(name))
        work: Callable[[], dict[str, Any]] = partial(row, machine, source, settings, lengths, seed)
        if args.wall == "cgroup":
            work = partial(walled_row, budget, machine, source, settings, lengths, seed)
        point = {"placement": name, "budget_bytes": budget, "repeat": repeat}
        points.append((point, asdict(settings), work))
    made = {"workload": lengths, "seed": seed} | ({"wall": args.wall} if args.wall != "none" else {})
    model = {key: str(value) if key == "dtype" else value for key, value in asdict(source.config).items()}
    facts = {"model": model, "workload": summary(lengths), "link_bandwidth": args.engine.link_bandwidth}
    with Sweep.serving(args.out, "memory-budget", machine, source, made, facts, seed=seed) as sweep:
        # Behind a wall each process warms up itself, with kernels that are compiled already.
        missing = [point["placement"] for point, settings, _ in points if not sweep.has(settings, **point)]
        if missing and args.wall == "none":
            warm_up(machine, source, common)
        elif missing:
            for name in tqdm(dict.fromkeys(missing), "compiling kernels", leave=False):
                compile_kernels(source.config, replace(common, **placed(name)))
        print_table(sweep.all(points))
        sweep.note_tokens()
        sweep.finish()
    print(f"figure: {plot_memory_budget(args.out)}")


def walled_row(
    limit: int, machine: Machine, source: Source, settings: EngineConfig, lengths: list[Lengths], seed: int
) -> dict[str, Any]:
    """The row of a point whose process has `limit` bytes in all. KilledError if the kernel ended it."""
    require_wall(limit)
    inside = limit, machine, source, settings, lengths, seed
    answer = wall.call(limit, _row_inside, *inside, files=[source.weights])
    return {**answer.value, "wall_peak_bytes": answer.peak_bytes + answer.value.get("wall_mapped_bytes", 0)}


def _row_inside(
    limit: int, machine: Machine, source: Source, settings: EngineConfig, lengths: list[Lengths], seed: int
) -> dict[str, Any]:
    """The row, as the process behind the wall makes it."""
    base, free, most = HOST.taken_bytes() or 0, HOST.free_bytes(), dict[str, int]()

    def watch(engine: Engine | SimEngine, _: StepMetrics) -> None:
        assert isinstance(engine, Engine), "a wall is for what is real"
        now = held(engine, base) | {"wall_mapped_bytes": wall.mapped_bytes()}
        most.update((name, max(nbytes, most.get(name, 0))) for name, nbytes in now.items())

    vocab_size = source.config.vocab_size
    requests, first = make_requests(lengths, vocab_size, seed), short_requests(vocab_size)
    try:
        served = serve(machine, source, settings, requests, watch=watch, first=first)
    except BudgetError as error:
        least = wall_for(limit, free, error.least) if error.least is not None else None
        return {"status": "too_small", "reason": str(error), "least_budget": least, "base_bytes": base}
    return served.row | most


def print_table(rows: list[dict]) -> None:
    """A line a run."""
    print(
        f"{'placement':>22} {'budget':>10} {'tokens/s':>9} {'batch':>6} {'KV blocks':>10} {'preempt.':>9} "
        f"{'stall s':>8} {'transfer s':>11}"
    )
    for made in sorted(rows, key=lambda r: (int(r["budget_bytes"]), r["placement"], int(r["repeat"]))):
        head = f"{made['placement']:>22} {format_bytes(int(made['budget_bytes'])):>10}"
        if made["status"] != "ok":
            least = made.get("least_budget")
            needs = f"needs {format_bytes(int(least))}" if least else made["reason"]
            print(f"{head} {'–':>9}  {needs}")
            continue
        print(
            f"{head} {float(made['tokens_per_s']):9.1f} {made['peak_batch']:>6} {made['kv_blocks']:>10} "
            f"{made['preemptions']:>9} {float(made['stall_s']):8.2f} {float(made['transfer_s']):11.2f}"
        )
