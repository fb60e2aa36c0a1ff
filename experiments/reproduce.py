"""Run everything that this machine can, one experiment after the other, into results/<hardware>.

    python -m fluxmoe.experiments.reproduce [--out results/<hardware>] [--only NAME …]

An experiment that has ended is not run again; one that was stopped goes on where it can. On a machine with a GPU the
suite for GPUs comes first. A failure is reported at the end and stops none of the others.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from .common import Parser, UsageError, cli_main, device_name

_SIM = "results/simulated-4xL40"


@dataclass(frozen=True)
class Experiment:
    """A script and its arguments; {out} is the folder of this hardware. `result`: what is there when it has ended."""

    name: str
    arguments: tuple[str, ...]
    result: str
    needs_gpu: bool = False


def script(module: str, *arguments: str, out: str = "", result: str) -> Experiment:
    """`module`, whose --out is {out}/<module> or `out`, and the file in there that it leaves last."""
    folder = out or f"{{out}}/{module}"
    name = Path(folder).name
    return Experiment(name, (module, *arguments, "--out", folder), f"{folder}/{result}")


_ADAPT = (
    "--preset", "small", "--max-batch", "64", "--budget", "420MiB", "--requests", "64", "--output-tokens", "160",
    "--start", "150", "--every", "60", "--times", "6",
)  # fmt: skip
EXPERIMENTS = (
    Experiment("gpu_suite", ("gpu_suite", "--minutes", "60", "--out", "{out}"), "{out}/suite.json", needs_gpu=True),
    Experiment("profile_hardware", ("profile_hardware", "--out", "{out}/profile.json"), "{out}/profile.json"),
    script("memory_budget", "--preset", "small", "--device", "cpu", result="throughput_vs_budget.png"),
    script(
        "memory_budget", "--preset", "next", "--device", "cpu", out="{out}/memory_budget_next",
        result="throughput_vs_budget.png",
    ),
    script(
        "packed_overhead", "--preset", "small", "--device", "cpu", "--placements", "resident", "packed",
        result="rows.csv",
    ),
    script("bench_packing", "--preset", "small", result="gemm.csv"),
    script("fig5_exponents", "--model", "checkpoints/small", result="exponents.png"),
    script("exp3_adaptation", *_ADAPT, "--device", "cpu", result="adaptation.png"),
    script("exp4_overhead", "--device", "cpu", result="overhead.png"),
    script("ablation", "--preset", "small", "--budget", "384MiB", "--device", "cpu", result="rows.csv"),
    script("bench_cpu_moe", result="rows.csv"),
    script("fig1_memory", out=f"{_SIM}/fig1_memory", result="memory.png"),
    script("fig2_kv_capacity", out=f"{_SIM}/fig2_kv_capacity", result="kv_capacity.png"),
    script("fig6_knee", out=f"{_SIM}/fig6_knee", result="knee.png"),
    script("exp1_performance_bound", out=f"{_SIM}/exp1_performance_bound", result="throughput.png"),
    script("sensitivity", out="results/simulated-h100/sensitivity", result="sensitivity.png"),
    script("exp2_capacity_bound", out=f"{_SIM}/exp2_capacity_bound", result="throughput.png"),
)  # fmt: skip


def hardware_folder() -> str:
    """results/<hardware> for this machine."""
    gpu = torch.cuda.is_available()
    name = device_name("cuda" if gpu else "cpu")
    return "results/" + re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def run_all(experiments: tuple[Experiment, ...], out: str, gpu: bool) -> list[str]:
    """Names of experiments that failed."""
    failed = []
    for index, experiment in enumerate(experiments, start=1):
        head = f"[{index}/{len(experiments)}] {experiment.name}"
        if experiment.needs_gpu and not gpu:
            print(f"{head}: needs a GPU", flush=True)
        elif Path(experiment.result.format(out=out)).exists():
            print(f"{head}: there already", flush=True)
        else:
            print(f"{head} …", flush=True)
            module, *arguments = (part.format(out=out) for part in experiment.arguments)
            done = subprocess.run([sys.executable, "-m", f"fluxmoe.experiments.{module}", *arguments])
            if done.returncode:
                failed.append(experiment.name)
    return failed


def main(argv: list[str] | None = None) -> None:
    p = Parser(prog="fluxmoe.experiments.reproduce", description=__doc__.splitlines()[0])
    p.add_argument("--out", metavar="DIR", help="(default: results/<this machine's processor>)")
    p.add_argument("--only", nargs="+", choices=[e.name for e in EXPERIMENTS])
    args = p.parse_args(argv)
    chosen = tuple(e for e in EXPERIMENTS if not args.only or e.name in args.only)
    failed = run_all(chosen, args.out or hardware_folder(), torch.cuda.is_available())
    if failed:
        raise UsageError(f"failed: {', '.join(failed)}; what they printed is above")


if __name__ == "__main__":
    cli_main(main)
