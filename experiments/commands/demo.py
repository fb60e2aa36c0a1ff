"""`make demo`: make a small checkpoint, serve it under a row of budgets, draw the figure. Under 4 minutes."""

from __future__ import annotations

from ..lib.results import cli_main
from ..serving.memory_budget import main as memory_budget


def main() -> None:
    placements = ["resident", "balanced:0.5", "host", "packed", "host+planar12"]
    memory_budget(["--preset", "demo", "--placements", *placements, "--out", "scratch/demo"])


if __name__ == "__main__":
    cli_main(main)
