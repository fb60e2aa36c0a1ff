"""Qwen3-Next on 4 x L40, all experts compressed on the GPUs: throughput against batch and context (Fig. 7).

    python -m fluxmoe.experiments.exp1_performance_bound --out results/simulated-4xL40/exp1_performance_bound

Simulated, on the paper's machine as `validate_simulator` calibrates it. `ours` is what this project adds: experts of 12
bits decoded inside the GEMM.
"""

from __future__ import annotations

from pathlib import Path

from fluxmoe.models.published import published_config

from .common import cli_main
from .paper_plots import plot_exp1
from .paper_sweep import parser, print_ratios, speed, sweep
from .paper_systems import Run

SYSTEMS = ("vllm", "vllm-o", "fluxmoe", "ours-eager", "ours")


def runs() -> list[tuple[str, Run]]:
    model = published_config("qwen3-next-80b-a3b")
    points = [("batch", batch, 4096) for batch in (32, 64, 128, 192, 256)]
    points += [("context", 256, context) for context in (1024, 2048, 3072, 4096)]
    return [(panel, Run(system, model, 4, batch, context)) for panel, batch, context in points for system in SYSTEMS]


def ratios(rows: list[dict]) -> dict[str, tuple[float | None, float]]:
    """Figure → (the paper's, ours)."""

    def at(system: str, batch: int, context: int = 4096, panel: str = "batch") -> float:
        return speed(rows, panel, system, batch, context)

    def loss(system: str) -> float:
        return at(system, 256, 4096, "context") / at(system, 256, 1024, "context") - 1

    return {
        "vllm-o at batch 32, tokens/s": (54.6, at("vllm-o", 32)),
        "vllm / vllm-o at batch 32": (6.0, at("vllm", 32) / at("vllm-o", 32)),
        "fluxmoe / vllm at batch 32": (0.639, at("fluxmoe", 32) / at("vllm", 32)),
        "vllm, batch 128 to 256": (-0.322, at("vllm", 256) / at("vllm", 128) - 1),
        "fluxmoe / vllm at batch 256": (3.0, at("fluxmoe", 256) / at("vllm", 256)),
        "fluxmoe / vllm-o at batch 256": (3.7, at("fluxmoe", 256) / at("vllm-o", 256)),
        "vllm / vllm-o at batch 256": (1.22, at("vllm", 256) / at("vllm-o", 256)),
        "vllm, context 1024 to 4096": (-0.453, loss("vllm")),
        "fluxmoe, context 1024 to 4096": (-0.205, loss("fluxmoe")),
        "ours, launched one by one / vllm at batch 32": (None, at("ours-eager", 32) / at("vllm", 32)),
        "ours, launched one by one / vllm at batch 256": (None, at("ours-eager", 256) / at("vllm", 256)),
        "ours, launched one by one / fluxmoe at batch 256": (None, at("ours-eager", 256) / at("fluxmoe", 256)),
        "ours / vllm at batch 256": (None, at("ours", 256) / at("vllm", 256)),
    }


def main(argv: list[str] | None = None) -> None:
    args = parser("exp1_performance_bound", __doc__.splitlines()[0]).parse_args(argv)
    rows = sweep(runs(), Path(args.out), Path(args.calibration))
    print_ratios(ratios(rows))
    print(f"figure: {plot_exp1(Path(args.out))}")


if __name__ == "__main__":
    cli_main(main)
