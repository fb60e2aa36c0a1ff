"""A small checkpoint is made and served under a row of budgets, with its figure: under 4 minutes on two cores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..lib.args import option
from .main import call


@dataclass(frozen=True, kw_only=True)
class Arguments:
    out: Path = option("folder of the results", Path("scratch/demo"))


def run(args: Arguments) -> None:
    placements = ["resident", "balanced:0.5", "host", "packed", "host+planar12"]
    call(["memory-budget", "--preset", "demo", "--placements", *placements, "--out", str(args.out)])
