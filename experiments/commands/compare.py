"""Two folders of results side by side: for each column the ratio second over first, and its spread over the points.

fluxmoe compare results/measured/a/memory_budget results/measured/b/memory_budget
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..lib.args import option
from ..lib.comparison import SPEEDS, compare
from ..lib.results import UsageError


@dataclass(frozen=True, kw_only=True)
class Arguments:
    first: Path = option("folder of results", metavar="DIR", positional=True)
    second: Path = option("another", metavar="DIR", positional=True)
    all: bool = option("every column, not speeds alone", False)


def run(args: Arguments) -> None:
    for folder in (args.first, args.second):
        if not list(folder.glob("*.csv")):
            raise UsageError(f"{folder} holds no table of results (*.csv)")
    found = compare(args.first, args.second)
    if not found.differences:
        raise UsageError(f"{args.first} and {args.second} have no point in common")
    shown = [d for d in found.differences if args.all or d.column in SPEEDS] or found.differences
    for difference in shown:
        print(f"{difference.table:<16} {difference}")
    print(f"differs: {found.told}" if found.told else "the same in all numbers")
