"""Mixtral-8x7B on 2 x L40, which cannot hold it: an eighth of the experts in host memory (Fig. 8).

    python -m fluxmoe.experiments.exp2_capacity_bound --out results/simulated-4xL40/exp2_capacity_bound

Simulated, on the paper's machine as `validate_simulator` calibrates it.
"""

from __future__ import annotations

from pathlib import Path

from fluxmoe.models.published import published_config

from .common import cli_main
from .paper_plots import plot_exp2
from .paper_sweep import parser, print_ratios, speed, sweep
from .paper_systems import Run

SYSTEMS = ("vllm", "vllm-o", "fluxmoe-h", "fluxmoe", "ours-eager", "ours")


def runs() -> list[tuple[str, Run]]:
    model = published_config("mixtral-8x7b")
    points = [("batch", batch, 4096) for batch in (32, 64, 128, 256)]
    points += [("context", 256, context) for context in (1024, 2048, 3072, 4096)]
    return [
        (panel, Run(system, model, 2, batch, context, alpha=0.875))
        for panel, batch, context in points
        for system in SYSTEMS
    ]


def ratios(rows: list[dict]) -> dict[str, tuple[float | None, float]]:
    """Figure → (the paper's, ours)."""

    def at(system: str, context: int) -> float:
        return speed(rows, "context", system, 256, context)

    return {
        "vllm-o at batch 256, context 4096, tokens/s": (3.7, at("vllm-o", 4096)),
        "fluxmoe / fluxmoe-h, context 1024": (1.285, at("fluxmoe", 1024) / at("fluxmoe-h", 1024)),
        "fluxmoe / fluxmoe-h, context 4096": (1.229, at("fluxmoe", 4096) / at("fluxmoe-h", 4096)),
        "ours, launched one by one / fluxmoe, context 4096": (
            None,
            at("ours-eager", 4096) / at("fluxmoe", 4096),
        ),
        "ours / fluxmoe, context 4096": (None, at("ours", 4096) / at("fluxmoe", 4096)),
    }


def main(argv: list[str] | None = None) -> None:
    args = parser("exp2_capacity_bound", __doc__.splitlines()[0]).parse_args(argv)
    rows = sweep(runs(), Path(args.out), Path(args.calibration))
    print_ratios(ratios(rows))
    print(f"figure: {plot_exp2(Path(args.out))}")


if __name__ == "__main__":
    cli_main(main)
