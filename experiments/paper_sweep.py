"""What the scripts of the paper's figures share: simulated runs into points.csv, and the calibration of its machine."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

from fluxmoe.models.published import published_config
from fluxmoe.runtime.budget import BudgetError
from fluxmoe.runtime.hardware import HardwareProfile
from tqdm import tqdm

from .common import Parser, provenance, write_csv, write_json
from .paper_systems import CALIBRATED_ON, OUTPUT_SHARE, Calibration, Run, calibrate, simulate

PROFILE = "4xL40"
COLUMNS = (
    "panel", "system", "batch", "context", "alpha", "status", "reason", "tokens_per_s", "decode_tokens_per_s",
    "peak_batch", "preemptions", "swapped_blocks", "kv_tokens", "stall_s", "transfer_s", "wall_s",
)  # fmt: skip


def parser(module: str, description: str) -> argparse.ArgumentParser:
    p = Parser(prog=f"fluxmoe.experiments.{module}", description=description)
    p.add_argument("--out", required=True, metavar="DIR")
    p.add_argument(
        "--calibration", metavar="FILE", default="results/simulated-4xL40/calibration.json",
        help="made if it does not exist (half a minute; default: %(default)s)",
    )  # fmt: skip
    return p


def calibrated(path: Path) -> tuple[HardwareProfile, Calibration]:
    """The paper's machine with the calibration that `path` holds, or with one made now and kept there."""
    base = HardwareProfile.load(PROFILE)
    if path.exists():
        found = Calibration(**json.loads(path.read_text())["calibration"])
    else:
        found = calibrate(base, published_config("qwen3-next-80b-a3b"))
        about = {"profile": PROFILE, "calibrated_on": CALIBRATED_ON, "output_share": OUTPUT_SHARE}
        write_json(path, {"calibration": asdict(found), **about, "provenance": provenance("sim", 0)})
    return found.profile(base), found


def sweep(runs: Iterable[tuple[str, Run]], out: Path, calibration: Path) -> list[dict]:
    """Simulate (panel, run) pairs; points.csv and provenance.json in `out`. Runs that cannot start say why."""
    profile, found = calibrated(calibration)
    rows = []
    for panel, run in tqdm(list(runs), "runs", unit="run"):
        row: dict = {"panel": panel, "system": run.system, "batch": run.batch, "context": run.context}
        row |= {"alpha": run.alpha, "status": "ok", "reason": ""}
        try:
            row |= simulate(run, profile, found.parameters)
        except BudgetError as error:
            row |= {"status": "too_small", "reason": str(error)}
        rows.append(row)
    write_csv(out / "points.csv", rows, COLUMNS)
    about = {"simulated": True, "profile": PROFILE, "calibration": asdict(found), "output_share": OUTPUT_SHARE}
    write_json(out / "provenance.json", {**provenance("sim", 0), **about})
    return rows


def speed(rows: list[dict], panel: str, system: str, batch: int, context: int) -> float:
    """tokens/s of a run that is in `rows`; NaN if it could not start."""
    chosen = [r for r in rows if (r["panel"], r["system"], r["batch"], r["context"]) == (panel, system, batch, context)]
    return float(chosen[0].get("tokens_per_s", "nan"))


def print_ratios(ratios: Mapping[str, tuple[float | None, float]]) -> None:
    """name → (what the paper says, what we simulate), a line each."""
    for name, (paper, ours) in ratios.items():
        said = "" if paper is None else f"   paper {paper:9.3f}   error {100 * (ours / paper - 1):+.0f} %"
        print(f"{name:<52} simulated {ours:9.3f}{said}")
