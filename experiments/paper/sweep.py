"""What the scripts of the paper's figures share: where they run, and runs into points.csv.

`--device sim` is the paper's machine, 4 x L40, with the paper's models, as `paper_systems.calibrate` fits it. `--device
cpu` or `cuda` serves a model of the same kind that is made for it, for real: batches and contexts are a 16th of the
paper's, and the budget leaves beside the weights the share of what the largest batch needs that the paper's machine
left (`equal_room`). `--link-bandwidth` holds a CPU's copies to the rate of a link.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

from fluxmoe.runtime.hardware import HardwareProfile
from fluxmoe.runtime.memory.budget import BudgetError, parse_bytes
from tqdm import tqdm

from ..lib.machines import SIMULATED, figure_parser, machine_of
from ..lib.presets import Source, preset_source, published_source
from ..lib.results import provenance, read_csv, resume, write_csv, write_json
from .systems import CALIBRATED_ON, OUTPUT_SHARE, Bench, Calibration, Run, calibrate, serve, settings_of

PROFILE = "4xL40"
MEASURED_SCALE = 16
COLUMNS = (
    "panel", "system", "batch", "context", "alpha", "budget", "buffer_format", "max_batched_tokens", "link_bandwidth",
    "status", "reason", "tokens_per_s", "decode_tokens_per_s", "preemption", "max_sequences", "peak_batch",
    "preemptions", "swapped_blocks", "kv_tokens", "stall_s", "transfer_s", "wall_s", "workspace",
)  # fmt: skip


def parser(module: str, description: str) -> argparse.ArgumentParser:
    p = figure_parser(module, description)
    p.add_argument("--link-bandwidth", metavar="BYTES", help="CPU: host experts come at no more than this a second")
    p.add_argument(
        "--calibration", metavar="FILE", default="results/simulated-4xL40/calibration.json",
        help="made if it does not exist (half a minute; default: %(default)s)",
    )  # fmt: skip
    return p


def bench_of(args: argparse.Namespace, published: str, devices: int, preset: str) -> Bench:
    """The paper's model on as many L40, simulated; or the preset's on this machine."""
    if args.device == SIMULATED:
        return calibrated(Path(args.calibration)).bench(
            HardwareProfile.load(PROFILE), published_source(published), devices
        )
    return Bench(machine_of(args), preset_source(preset, Path(args.checkpoints)), None, None)


def scaled(bench: Bench, run: Run, link_bandwidth: str | None = None) -> Run:
    """A run of the paper's as it is on `bench`."""
    if bench.machine.simulated:
        return run
    return replace(
        run, batch=run.batch // MEASURED_SCALE, context=run.context // MEASURED_SCALE,
        max_batched_tokens=run.max_batched_tokens // MEASURED_SCALE,
        # Of its memory's rate a CPU decodes Huffman's codes at a thirtieth, `tiered` at a ninth; an L40, calibrated, at
        # a third.
        buffer_format="tiered",
        link_bandwidth=parse_bytes(link_bandwidth) if link_bandwidth else None,
    )  # fmt: skip


def demand(source: Source, run: Run) -> int:
    """Bytes of KV and recurrent states of a full batch at full context."""
    model = source.config
    return run.batch * (run.context * model.kv_bytes_per_token + model.state_bytes_per_sequence)


def fixed_bytes(bench: Bench, run: Run) -> int:
    """What a system takes beside KV and states."""
    settings = replace(next(settings_of(run)), budget_bytes=None if bench.machine.device != SIMULATED else 1 << 50)
    with bench.machine.open(bench.source, settings, bench.theirs) as engine:
        return sum(nbytes for line, nbytes in engine.budget.lines().items() if line not in ("kv_cache", "states"))


def equal_room(bench: Bench, published: str, devices: int, largest: Run) -> int | None:
    """The budget; on the paper's machine, None: 90 % of it.

    Elsewhere the resident weights, and of what `largest` needs for KV and states the share that the paper's machine
    leaves for `published` (§6: 0.6 in Exp#1; less than none in Exp#2).
    """
    if bench.machine.simulated:
        return None
    profile, paper = HardwareProfile.load(PROFILE), published_source(published)
    weights = paper.config.expert_bytes_total + paper.config.non_expert_bytes
    room = (0.9 * profile.memory_bytes * devices - weights) / demand(paper, largest)
    here = scaled(bench, replace(largest, system="vllm"))
    return int(fixed_bytes(bench, here) + room * demand(bench.source, here))


def calibrated(path: Path) -> Calibration:
    """The calibration that `path` holds, or one made now and kept there."""
    if path.exists():
        return Calibration(**json.loads(path.read_text())["calibration"])
    found = calibrate(HardwareProfile.load(PROFILE), published_source("qwen3-next-80b-a3b"))
    about = {"profile": PROFILE, "calibrated_on": CALIBRATED_ON, "output_share": OUTPUT_SHARE}
    write_json(path, {"calibration": asdict(found), **about, "provenance": provenance("sim", 0)})
    return found


def sweep(bench: Bench, runs: Iterable[tuple[str, Run]], out: Path) -> list[dict]:
    """Serve (panel, run) pairs; points.csv and provenance.json in `out`. Runs that cannot start say why.

    What an earlier, stopped sweep of the same runs left is not made again.
    """
    runs, machine = list(runs), bench.machine
    about = {
        **machine.about, "model": bench.source.name, "output_share": OUTPUT_SHARE,
        "machine": machine.profile.to_json() if machine.profile else None, "costs": _plain(bench.theirs),
    }  # fmt: skip
    rows, identity = resume(out, {**about, "runs": [(panel, asdict(run)) for panel, run in runs]})
    done = {(row["panel"], row["system"], int(row["batch"]), int(row["context"])) for row in rows}
    write_json(out / "provenance.json", {**provenance(machine.device, 0), "identity": identity, **about})
    missing = [(panel, run) for panel, run in runs if (panel, run.system, run.batch, run.context) not in done]
    if missing and not machine.simulated:
        # Kernels are compiled, and the checkpoint's pages touched, before the first timed point.
        _serve_row("", replace(missing[0][1], batch=1, budget=None), bench)
    for panel, run in tqdm(missing, "runs", unit="run"):
        rows.append(_serve_row(panel, run, bench))
        write_csv(out / "points.csv", rows, COLUMNS)
    return read_csv(out / "points.csv")


def _serve_row(panel: str, run: Run, bench: Bench) -> dict:
    row: dict = {"panel": panel, **asdict(run), "status": "ok", "reason": ""}
    try:
        return row | serve(run, bench)
    except BudgetError as error:
        return row | {"status": "too_small", "reason": str(error)}


def _plain(costs) -> dict | None:
    return None if costs is None else {key: str(value) for key, value in asdict(costs).items()}


def speed(rows: list[dict], panel: str, system: str, run: Run) -> float:
    """tokens/s of a run that is in `rows`; NaN if it could not start."""
    wanted = (panel, system, run.batch, run.context)
    (chosen,) = [r for r in rows if (r["panel"], r["system"], int(r["batch"]), int(r["context"])) == wanted]
    return float(chosen.get("tokens_per_s") or "nan")


def print_ratios(ratios: Mapping[str, tuple[float | None, float]], device: str) -> None:
    """name → (what the paper says, what we have), a line each."""
    kind = "simulated" if device == SIMULATED else "measured"
    for name, (paper, ours) in ratios.items():
        said = "" if paper is None else f"   paper {paper:9.3f}   error {100 * (ours / paper - 1):+.0f} %"
        print(f"{name:<52} {kind} {ours:9.3f}{said}")
