"""What Figures 2, 7 and 8 share: where they run, their runs as rows of points.csv, and their ratios beside the paper's.

`--device sim` is the paper's machine, 4 x L40, with the paper's models, as `systems.calibrate` fits it. `--device cpu`
or `cuda` serves a model of the same kind that is made for it, for real: batches and contexts are a 16th of the paper's,
and the budget leaves beside the weights the share of what the largest batch needs that the paper's machine left
(`equal_room`). `--link-bandwidth` holds a CPU's copies to the rate of a link.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from fluxmoe.runtime.hardware import HardwareProfile
from fluxmoe.runtime.memory.budget import parse_bytes
from fluxmoe.runtime.serving.config import EngineConfig

from ..lib.args import group, option
from ..lib.machines import FigureMachine
from ..lib.models import Source, preset_source, published_source
from ..lib.results import UsageError, load_json, provenance, write_json
from ..lib.serve import warm_up
from ..lib.sweep import Sweep
from . import stated
from .systems import OUTPUT_SHARE, Bench, Calibration, Run, calibrate, serve_run, settings_of

PROFILE = "4xL40"
MEASURED_SCALE = 16
Ratios = Mapping[str, tuple[float | None, float]]


@dataclass(frozen=True, kw_only=True)
class Arguments:
    where: FigureMachine = group()
    link_bandwidth: int | None = option(
        "CPU: host experts come at no more than this a second", None, parse=parse_bytes, metavar="BYTES"
    )
    calibration: Path = option(
        "made if it does not exist (half a minute)", Path("results/simulated/4xL40/calibration.json")
    )

    def __post_init__(self) -> None:
        if self.link_bandwidth and self.where.device != "cpu":
            raise UsageError("--link-bandwidth holds a CPU's copies to a rate: it has no effect without --device cpu")


@dataclass(frozen=True)
class Figure:
    """One figure: a model on so many of the paper's devices, and the preset that stands for it elsewhere. runs: (panel,
    run) pairs on a bench; ratios: name → (the paper's, ours), of their rows; plot: draws a folder."""

    experiment: str
    model: str
    devices: int
    preset: str
    runs: Callable[[Bench, float | None], list[tuple[str, Run]]]
    ratios: Callable[[list[dict], Bench], Ratios]
    plot: Callable[[Path], Path]

    def bench(self, args: Arguments) -> Bench:
        """The paper's model on the paper's devices, simulated; or the preset's on this machine."""
        if args.where.simulated:
            found = calibrated(args.calibration)
            return found.bench(HardwareProfile.load(PROFILE), published_source(self.model), self.devices)
        return Bench(args.where.here, preset_source(self.preset, args.where.checkpoints), None, None)

    def equal_room(self, bench: Bench, largest: Run) -> int | None:
        """The budget; on the paper's machine, None: 90 % of it.

        Elsewhere the resident weights, and of what `largest` needs for KV and states the share that the paper's machine
        leaves for its model (§6: 0.6 in Exp#1; less than none in Exp#2).
        """
        if bench.machine.simulated:
            return None
        profile, paper = HardwareProfile.load(PROFILE), published_source(self.model)
        weights = paper.config.expert_bytes_total + paper.config.non_expert_bytes
        room = (0.9 * profile.memory_bytes * self.devices - weights) / demand(paper, largest)
        here = scaled(bench, replace(largest, system="vllm"))
        return int(fixed_bytes(bench, here) + room * demand(bench.source, here))

    def run(self, args: Arguments) -> None:
        bench, out = self.bench(args), args.where.out
        rows = sweep(self.experiment, bench, self.runs(bench, args.link_bandwidth), out)
        print_ratios(self.ratios(rows, bench), bench.machine.simulated)
        print(f"figure: {self.plot(out)}")


def scaled(bench: Bench, run: Run, link_bandwidth: float | None = None) -> Run:
    """A run of the paper's as it is on `bench`."""
    if bench.machine.simulated:
        return run
    return replace(
        run, batch=run.batch // MEASURED_SCALE, context=run.context // MEASURED_SCALE,
        max_batched_tokens=run.max_batched_tokens // MEASURED_SCALE,
        # Of its memory's rate a CPU decodes Huffman's codes at a thirtieth, `tiered` at a ninth; an L40, calibrated, at
        # a third.
        buffer_format="tiered", link_bandwidth=link_bandwidth,
    )  # fmt: skip


def batches_and_contexts(bench: Bench, systems: Iterable[str], most: Run, link_bandwidth: float | None) -> list:
    """(panel, run): all systems over batches at context 4096, then over contexts at batch 256; `most`: the rest."""
    points = [("batch", batch, 4096) for batch in (32, 64, 128, 256)]
    points += [("context", 256, context) for context in (1024, 2048, 4096)]
    return [
        (panel, scaled(bench, replace(most, system=system, batch=batch, context=context), link_bandwidth))
        for panel, batch, context in points
        for system in systems
    ]


def demand(source: Source, run: Run) -> int:
    """Bytes of KV and recurrent states of a full batch at full context."""
    model = source.config
    return run.batch * (run.context * model.kv_bytes_per_token + model.state_bytes_per_sequence)


def fixed_bytes(bench: Bench, run: Run) -> int:
    """What a system takes beside KV and states."""
    settings = replace(next(settings_of(run)), budget_bytes=1 << 50 if bench.machine.simulated else None)
    with bench.machine.open(bench.source, settings, bench.theirs) as engine:
        return sum(nbytes for line, nbytes in engine.budget.lines().items() if line not in ("kv_cache", "states"))


def calibrated(path: Path) -> Calibration:
    """The calibration that `path` holds, or one made now and kept there."""
    if path.exists():
        try:
            return Calibration(**load_json(path)["calibration"])
        except (KeyError, TypeError):
            raise UsageError(f"{path} holds no calibration; remove it, and it is made") from None
    found = calibrate(HardwareProfile.load(PROFILE), published_source("qwen3-next-80b-a3b"))
    fitted = {name: stated.FIG7[name] for name in stated.CALIBRATED}
    about = {"profile": PROFILE, "calibrated_on": fitted, "output_share": OUTPUT_SHARE}
    write_json(path, {"calibration": asdict(found), **about, "provenance": provenance("sim", 0)})
    return found


def sweep(experiment: str, bench: Bench, runs: Iterable[tuple[str, Run]], out: Path) -> list[dict]:
    """Serve (panel, run) pairs; points.csv and provenance.json in `out`. Runs that cannot start say why."""
    machine, points = bench.machine, []
    for panel, run in runs:
        point = {"panel": panel, "system": run.system, "batch": run.batch, "context": run.context}
        points.append((point, asdict(run), partial(_row, run, bench)))
    costs = [asdict(each) if each else None for each in (bench.theirs, bench.ours)]
    made = {"costs": costs, "output_share": OUTPUT_SHARE}
    profile = machine.profile.to_json() if machine.profile else None
    facts = {"output_share": OUTPUT_SHARE, "machine": profile}
    with Sweep.serving(out, experiment, machine, bench.source, made, facts) as rows:
        if not all(rows.has(settings, **point) for point, settings, _ in points):
            warm_up(machine, bench.source, EngineConfig())
        found = rows.all(points)
        rows.finish()
    return found


def _row(run: Run, bench: Bench) -> dict:
    return asdict(run) | serve_run(run, bench)


def speed(rows: list[dict], panel: str, system: str, run: Run) -> float:
    """tokens/s of a run that is in `rows`; NaN if it could not start."""
    wanted = (panel, system, run.batch, run.context)
    (chosen,) = [r for r in rows if (r["panel"], r["system"], int(r["batch"]), int(r["context"])) == wanted]
    return float(chosen.get("tokens_per_s") or "nan")


def beside(paper: Mapping[str, float], ours: Mapping[str, float]) -> Ratios:
    """Name → (what the paper states, if it does, ours)."""
    return {name: (paper.get(name), value) for name, value in ours.items()}


def print_ratios(ratios: Ratios, simulated: bool) -> None:
    for name, (paper, ours) in ratios.items():
        said = "" if paper is None else f"   paper {paper:9.3f}   error {100 * (ours / paper - 1):+.0f} %"
        print(f"{name:<52} {'simulated' if simulated else 'measured'} {ours:9.3f}{said}")
