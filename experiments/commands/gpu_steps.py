"""The steps of the GPU suite, the most telling first, and their rehearsal on a machine without one.

    python -m fluxmoe.experiments.commands.gpu_steps GROUP OUT

rehearses a group of steps in one process: each parses the arguments that it will have on a GPU, and runs its smallest
case on the CPU. A line of JSON for each says how it went.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from ..lib.results import Parser, cli_main


@dataclass(frozen=True)
class Step:
    """One process: `python -m fluxmoe.experiments.<module>` with `arguments`.

    In arguments {out} is the step's own folder, {root} the suite's. minutes: its share of the first pass; stall_s: how
    long it may say nothing; needs: packages. rehearsal: its arguments without a GPU; group: which rehearsal it is in:
    compiled, or one of two that are interpreted. every_call: its work is lost with the machine.
    """

    name: str
    module: str
    arguments: tuple[str, ...]
    minutes: float
    rehearsal: tuple[str, ...]
    group: str = "interpreted"
    needs: tuple[str, ...] = ()
    stall_s: float = 150.0
    every_call: bool = False

    def command(self, root: Path) -> list[str]:
        return ["-m", f"fluxmoe.experiments.{self.module}", *self.filled(self.arguments, root)]

    def filled(self, arguments: tuple[str, ...], root: Path) -> list[str]:
        return [part.replace("{out}", f"{root / self.name}").replace("{root}", f"{root}") for part in arguments]


_ENGINE = ("numba", "safetensors", "tokenizers", "einops", "tqdm")
_PLOTS = ("pandas", "matplotlib")
_OUT = ("--out", "{out}")
_SHORT = ("--preset", "gpu-short", "--checkpoints", "{root}/checkpoints")
_TINY = ("--preset", "tiny", "--checkpoints", "{root}/checkpoints")
_WIDE = ("--shapes", "qwen3_30b", "mixtral")
_REHEARSE = ("--rehearse", *_OUT)
_LAYER = ("--shapes", "tiny", "--tokens", "1", *_REHEARSE)
_FEW = ("1", "8", "32", "128", "1024", "8192")
_ALL = ("1", "2", "4", "8", "16", "32", "64", "128", "256", "512", "1024", "2048", "4096", "8192")

# fmt: off
STEPS = (
    Step("compile", "compile_kernels", ("--tuned", "{root}/tuned.json", *_OUT), 1.5, _REHEARSE, "compiled", _ENGINE,
         every_call=True),
    Step("tests", "gpu_tests", ("--workers", "14", *_OUT), 3,
         ("tests/kernels/triton/test_host_read.py", "--workers", "1", *_REHEARSE), needs=("pytest",)),
    Step("bit_equality", "bit_equality", _OUT, 0.5, ("--repeats", "1", *_REHEARSE)),
    Step("check_engine", "check_engine", ("--device", "cuda", *_OUT), 2.5,
         ("--models", "qwen3_moe", "--new-tokens", "1", *_REHEARSE), "interpreted too", _ENGINE,
         stall_s=60),
    Step("moe", "bench_grouped_gemm",
         (*_WIDE, "--tokens", *_FEW, "--providers", "fluxmoe", "torch", "triton_kernels", "vllm", *_OUT), 2,
         ("--providers", "fluxmoe", "torch", "triton_kernels", "vllm", *_LAYER)),
    Step("packed", "bench_grouped_gemm",
         (*_WIDE, "--tokens", *_ALL, "--providers", "fluxmoe", "fluxmoe planar12", *_OUT), 1.5,
         ("--providers", "fluxmoe planar12", *_LAYER)),
    Step("engine", "bench_engine", (*_SHORT, "--device", "cuda", *_OUT), 2.5,
         (*_TINY, "--device", "cpu", "--placements", "packed", "host@on_demand", "--sequences", "1", "--prompt-tokens",
          "4", "--output-tokens", "2", "--budget", "64MiB", *_OUT), "interpreted too", _ENGINE),
    # Liger tunes itself at its first call.
    Step("liger", "bench_grouped_gemm",
         (*_WIDE, "--tokens", "1024", "8", "8192", "--providers", "fluxmoe", "liger", *_OUT), 1,
         ("--providers", "liger", *_LAYER)),
    Step("tune", "tune_grouped_gemm", (*_WIDE, "--table", "{root}/tuned.json", *_OUT), 2,
         ("--shapes", "tiny", "--table", "{root}/tuned.json", *_REHEARSE)),
    Step("moe_tuned", "bench_grouped_gemm",
         (*_WIDE, "--tokens", *_FEW, "--tuned", "{root}/tuned.json", "--providers", "fluxmoe", "torch", *_OUT), 1,
         ("--tuned", "{root}/tuned.json", "--providers", "fluxmoe", *_LAYER)),
    Step("attention", "bench.attention",
         (*_WIDE, "--sequences", "1", "32", "128", "--contexts", "4096", "--prompts", "2048", *_OUT), 1,
         ("--shapes", "tiny", "--sequences", "1", "--contexts", "33", "--prompts", "16", *_REHEARSE)),
    Step("delta_net", "bench_delta_net", _OUT, 0.5, ("--sequences", "1", "--prompts", "2", *_REHEARSE)),
    Step("memory_budget", "memory_budget",
         (*_SHORT, "--device", "cuda", "--placements", "resident", "packed", "balanced:0.5+planar12", "host+planar12",
          *_OUT), 1.25,
         (*_TINY, "--device", "cpu", "--placements", "packed", "host", *_OUT), "interpreted too", (*_ENGINE, *_PLOTS)),
    Step("exp3_adaptation", "exp3_adaptation",
         (*_SHORT, "--device", "cuda", "--budget", "2560MiB", "--requests", "256", "--prompt-tokens", "512",
          "--output-tokens", "128", "--max-batch", "256", "--start", "100", "--every", "25", "--times", "7",
          "--variants", "static", "grow", "planned", *_OUT), 1,
         (*_TINY, "--device", "cpu", "--budget", "16MiB", "--requests", "2", "--prompt-tokens", "4", "--output-tokens",
          "4", "--start", "1", "--every", "1", "--times", "1", "--variants", "grow", *_OUT), "interpreted too",
         ("cuda", *_ENGINE, *_PLOTS)),
    Step("exp4_overhead", "paper.fig10_overhead",
         ("--device", "cuda", "--hidden", "2048", "--moe-intermediate", "768", "--experts", "64", "--top-k", "8",
          "--repeats", "100", *_OUT), 0.5,
         ("--device", "cpu", "--layers", "1", "--experts", "2", "--top-k", "1", "--hidden", "64", "--moe-intermediate",
          "64", "--batches", "1", "--repeats", "2", *_OUT), "interpreted too", ("cuda", "numba", "tqdm", *_PLOTS)),
    Step("profile", "profile_hardware", ("--device", "cuda", "--out", "{out}/profile.json"), 0.5,
         ("--device", "cpu", "--rehearse", "--out", "{out}/profile.json"), "interpreted too", _ENGINE),
    Step("trace", "gpu_tools", ("trace", *_SHORT, *_OUT), 0.5,
         ("trace", *_TINY, "--budget", "64MiB", "--placements", "host", *_REHEARSE), "interpreted too", _ENGINE),
    Step("ncu", "gpu_tools", ("ncu", *_OUT), 1, ("kernels", "--small", "--only", "dense", "attention", "--rehearse")),
    Step("sanitizer", "gpu_tools", ("sanitizer", *_OUT), 1,
         ("kernels", "--small", "--only", "dense", "--rehearse")),
)
# fmt: on
GROUPS = tuple(dict.fromkeys(step.group for step in STEPS))


def rehearse(step: Step, root: Path) -> dict[str, object]:
    """Parse the arguments of the real run, then run the smallest case, in this process."""
    begin = time.monotonic()
    record: dict[str, object] = {"step": step.name, "status": "ok"}
    try:
        module = importlib.import_module(f"fluxmoe.experiments.{step.module}")
        module.parser().parse_args(step.filled(step.arguments, root))
        module.main(step.filled(step.rehearsal, root))
    except BaseException as error:  # SystemExit too, as of a script with wrong rows
        traceback.print_exc()
        record |= {"status": "failed", "reason": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    return record | {"seconds": round(time.monotonic() - begin, 1)}


def main(argv: list[str] | None = None) -> None:
    p = Parser(prog="fluxmoe.experiments.commands.gpu_steps", description=__doc__.splitlines()[0])
    p.add_argument("group", choices=GROUPS)
    p.add_argument("root", type=Path, metavar="OUT")
    args: argparse.Namespace = p.parse_args(argv)
    records = []
    for step in (step for step in STEPS if step.group == args.group):
        records.append(rehearse(step, args.root))
        print("REHEARSED " + json.dumps(records[-1], ensure_ascii=False), flush=True)
    if any(record["status"] != "ok" for record in records):
        sys.exit(1)


if __name__ == "__main__":
    cli_main(main)
