"""Run everything that this machine can, one experiment after the other, into results/<hardware>.

    python -m fluxmoe.experiments.commands.reproduce [--out results/<hardware>] [--only NAME …]

An experiment that has ended is not run again; one that was stopped goes on where it can. On a machine with a GPU the
suite for GPUs comes first; the comparison with vLLM needs --vllm-python. A failure is reported at the end and stops
none of the others.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from ..lib.results import Parser, UsageError, cli_main, device_name

_SIM = "results/simulated-4xL40"
_H100 = "results/simulated-h100"


@dataclass(frozen=True)
class Experiment:
    """A script and its arguments; {out} is the folder of this hardware, {vllm} vLLM's Python. `result`: what is there
    when it has ended."""

    name: str
    arguments: tuple[str, ...]
    result: str
    needs_gpu: bool = False

    @property
    def needs_vllm(self) -> bool:
        return "{vllm}" in self.arguments


def script(module: str, *arguments: str, out: str = "", result: str) -> Experiment:
    """`module`, whose --out is {out}/<module> or `out`, and the file in there that it leaves last."""
    folder = out or f"{{out}}/{module}"
    name = folder.removeprefix("{out}/").removeprefix("results/")
    return Experiment(name, (module, *arguments, "--out", folder), f"{folder}/{result}")


_ADAPT = (
    "--preset", "small", "--max-batch", "64", "--budget", "420MiB", "--requests", "64", "--output-tokens", "160",
    "--start", "150", "--every", "60", "--times", "6",
)  # fmt: skip
# The CPU's copies held to the paper's ratio of link to memory: 25 over 778 GB/s.
_HELD = ("--link-bandwidth", "1GB")
_VERSUS = (
    "--budgets", "256MiB", "384MiB", "432MiB", "480MiB", "560MiB", "960MiB", "1280MiB", "--placements", "resident",
    "packed", "host+planar12", "--sequences", "64", "--prompt-tokens", "192", "--rounds", "1",
)  # fmt: skip
_SIZES = (
    "--requests", "128", "--context", "4096", "--output-tokens", "512", "--max-batch", "128", "--max-batched-tokens",
    "2048", "--budgets", "8GiB", "16GiB", "24GiB", "32GiB", "40GiB", "48GiB", "56GiB", "64GiB", "72GiB", "--placements",
    "resident", "offload:0.5", "balanced:0.5", "balanced:0.5+planar12", "balanced:0.9+planar12", "host+planar12",
    "packed",
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
    script(
        "packed_overhead", "--preset", "small", "--device", "cpu", "--placements", "resident", "packed",
        "packed+tiered", "packed+huffman", "--batches", "32", "--repeats", "1", "--output-tokens", "6",
        out="{out}/packed_overhead_decoded", result="rows.csv",
    ),
    script("bench_packing", "--preset", "small", result="gemm.csv"),
    script("fig5_exponents", "--model", "checkpoints/small", result="exponents.png"),
    script("exp3_adaptation", *_ADAPT, "--device", "cpu", result="adaptation.png"),
    script(
        "exp3_adaptation", *_ADAPT, "--device", "cpu", "--link-bandwidth", "4GB", out="{out}/exp3_adaptation_4GBps",
        result="adaptation.png",
    ),
    script("paper.fig10_overhead", "--device", "cpu", out="{out}/exp4_overhead", result="overhead.png"),
    script("ablation", "--preset", "small", "--budget", "384MiB", "--device", "cpu", result="rows.csv"),
    script("bench_cpu_moe", result="rows.csv"),
    script("table1_models", "--device", "cpu", result="table.md"),
    script("fig1_memory", "--device", "cpu", result="memory.png"),
    script("fig2_kv_capacity", "--device", "cpu", result="kv_capacity.png"),
    script(
        "fig6_knee", "--device", "cpu", "--preset", "small", "--batches", "4", "32", "--prompt-tokens", "32",
        "--link-bandwidth", "4GB", result="knee.png",
    ),
    script("exp1_performance_bound", "--device", "cpu", *_HELD, result="throughput.png"),
    script("exp2_capacity_bound", "--device", "cpu", *_HELD, result="throughput.png"),
    script("sensitivity", "--device", "cpu", result="sensitivity.png"),
    script(
        "versus_vllm", "--vllm-python", "{vllm}", "--dtypes", "bfloat16", "float32", "--device", "cpu",
        result="versus.png",
    ),
    script(
        "versus_vllm", "--vllm-python", "{vllm}", "--dtypes", "bfloat16", "float32", "--device", "cpu", *_VERSUS,
        out="{out}/versus_budget", result="versus.png",
    ),
    script(
        "versus_vllm", "--transformers", "--dtypes", "bfloat16", "float32", "--device", "cpu", "--placements",
        "resident", "packed", "--sequences", "1", "8", out="{out}/versus_transformers", result="versus.png",
    ),
    script("table1_models", out=f"{_SIM}/table1_models", result="table.md"),
    script("fig1_memory", out=f"{_SIM}/fig1_memory", result="memory.png"),
    script("fig2_kv_capacity", out=f"{_SIM}/fig2_kv_capacity", result="kv_capacity.png"),
    script(
        "fig6_knee", "--device", "sim", "--profile", "4xL40", "--config", "qwen3-next-80b-a3b",
        out=f"{_SIM}/fig6_knee", result="knee.png",
    ),
    script("exp1_performance_bound", out=f"{_SIM}/exp1_performance_bound", result="throughput.png"),
    script("exp2_capacity_bound", out=f"{_SIM}/exp2_capacity_bound", result="throughput.png"),
    script(
        "exp3_adaptation", "--device", "sim", "--profile", "4xL40", "--config", "qwen3-next-80b-a3b", "--budget", "all",
        "--max-batch", "256", "--requests", "512", "--prompt-tokens", "3072", "--output-tokens", "1024", "--start",
        "600", "--every", "100", "--max-batched-tokens", "2048", out=f"{_SIM}/exp3_adaptation", result="adaptation.png",
    ),
    script("validate_simulator", "--measured", "{out}", out=f"{_SIM}/validation", result="table.csv"),
    *(
        script(
            "memory_budget", "--device", "sim", "--profile", profile, "--config", model, *_SIZES,
            out=f"{_H100}/memory_budget_{name}", result="throughput_vs_budget.png",
        )
        for name, profile, model in (
            ("mixtral-8x7b", "H100-SXM", "mixtral-8x7b"),
            ("qwen3-30b-a3b", "H100-SXM", "qwen3-30b-a3b"),
            ("qwen3-next-80b-a3b", "H100-SXM", "qwen3-next-80b-a3b"),
            ("qwen3-next-80b-a3b_4gpus", "H100-SXM×4", "qwen3-next-80b-a3b"),
        )
    ),
    script(
        "ablation", "--device", "sim", "--profile", "H100-SXM", "--config", "qwen3-30b-a3b", "--budget", "48GiB",
        "--requests", "128", "--context", "4096", "--output-tokens", "512", "--max-batch", "128",
        "--max-batched-tokens", "2048", out=f"{_H100}/ablation_qwen3-30b-a3b", result="rows.csv",
    ),
    script("sensitivity", out=f"{_H100}/sensitivity", result="sensitivity.png"),
)  # fmt: skip


def hardware_folder() -> str:
    """results/<hardware> for this machine."""
    gpu = torch.cuda.is_available()
    name = device_name("cuda" if gpu else "cpu")
    return "results/" + re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def run_all(experiments: tuple[Experiment, ...], out: str, gpu: bool, vllm: str | None = None) -> list[str]:
    """Names of experiments that failed."""
    failed = []
    for index, experiment in enumerate(experiments, start=1):
        head = f"[{index}/{len(experiments)}] {experiment.name}"
        if experiment.needs_gpu and not gpu:
            print(f"{head}: needs a GPU", flush=True)
        elif experiment.needs_vllm and not vllm:
            print(f"{head}: needs --vllm-python", flush=True)
        elif Path(experiment.result.format(out=out)).exists():
            print(f"{head}: there already", flush=True)
        else:
            print(f"{head} …", flush=True)
            module, *arguments = (part.format(out=out, vllm=vllm) for part in experiment.arguments)
            done = subprocess.run([sys.executable, "-m", f"fluxmoe.experiments.{module}", *arguments])
            if done.returncode:
                failed.append(experiment.name)
    return failed


def main(argv: list[str] | None = None) -> None:
    p = Parser(prog="fluxmoe.experiments.commands.reproduce", description=__doc__.splitlines()[0])
    p.add_argument("--out", metavar="DIR", help="(default: results/<this machine's processor>)")
    p.add_argument("--only", nargs="+", choices=[e.name for e in EXPERIMENTS])
    p.add_argument("--vllm-python", metavar="PATH", help="Python of an environment with vLLM")
    args = p.parse_args(argv)
    chosen = tuple(e for e in EXPERIMENTS if not args.only or e.name in args.only)
    failed = run_all(chosen, args.out or hardware_folder(), torch.cuda.is_available(), args.vllm_python)
    if failed:
        raise UsageError(f"failed: {', '.join(failed)}; what they printed is above")


if __name__ == "__main__":
    cli_main(main)
