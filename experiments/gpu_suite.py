"""Everything that a new GPU should run: are the kernels right, and how fast are they.

    python -m fluxmoe.experiments.gpu_suite --minutes 25 --out results/<gpu>

Correctness first (kernels, then the engine against the CPU's), then benchmarks, the most telling first, then tuning and
the main benchmark again with the tiles found. Each step is a process of its own, ends when its share of the minutes is
used up, and leaves what it has measured by then; the suite goes on after a step that fails, says so in suite.json
and exits 1. Needs no network: this checkout, torch, triton and the packages of requirements.txt; a step whose
packages are missing is reported and left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from .common import Parser, UsageError, cli_main, provenance, write_json
from .gpu import require_gpu

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Step:
    """One process: `arguments` after the interpreter, {out} replaced. minutes: its share at most; needs: packages."""

    name: str
    arguments: tuple[str, ...]
    minutes: float
    needs: tuple[str, ...] = ()


def script(name: str, *arguments: str) -> tuple[str, ...]:
    return ("-m", f"fluxmoe.experiments.{name}", *arguments)


_KERNEL_TESTS = (
    "tests/kernels/test_routing.py", "tests/kernels/test_grouped_gemm.py", "tests/kernels/test_norm.py",
    "tests/kernels/test_rope_kv.py", "tests/kernels/test_paged_attention.py", "tests/kernels/test_delta_net.py",
)  # fmt: skip
_ENGINE = ("numba", "safetensors", "tokenizers", "einops", "tqdm")

_PEERS = ("--peers", "torch", "triton_kernels", "vllm")

# fmt: off
STEPS = (
    Step("kernel_tests", ("-m", "pytest", "-q", "-x", *_KERNEL_TESTS), 6, ("pytest",)),
    Step("check_engine", script("check_engine", "--device", "cuda", "--json", "{out}/check_engine.json"), 4, _ENGINE),
    Step("bench_untuned", script(
        "bench_grouped_gemm", "--shapes", "qwen3_30b", "mixtral", "--tokens", "1", "8", "32", "128", "1024", "8192",
        *_PEERS, "--out", "{out}/bench_grouped_gemm_untuned"), 4),
    Step("bench_attention", script(
        "bench_attention", "--shapes", "qwen3_30b", "--sequences", "1", "32", "128", "--contexts", "4096",
        "--prompts", "2048", "--out", "{out}/bench_attention"), 3),
    Step("memory_budget", script(
        "memory_budget", "--preset", "gpu", "--device", "cuda", "--out", "{out}/memory_budget"),
        6, (*_ENGINE, "pandas", "matplotlib")),
    Step("bench_packing", script(
        "bench_packing", "--preset", "gpu", "--out", "{out}/bench_packing"),
        5, (*_ENGINE, "pandas", "matplotlib")),
    Step("exp3_adaptation", script(
        "exp3_adaptation", "--preset", "gpu", "--device", "cuda", "--budget", "4608MiB", "--requests", "256",
        "--prompt-tokens", "512", "--output-tokens", "256", "--max-batch", "256", "--start", "100", "--every", "50",
        "--times", "7", "--variants", "static", "hold", "grow", "planned", "--out", "{out}/exp3_adaptation"),
        4, ("cuda", *_ENGINE, "pandas", "matplotlib")),
    Step("exp4_overhead", script(
        "exp4_overhead", "--device", "cuda", "--hidden", "2048", "--moe-intermediate", "768", "--experts", "64",
        "--top-k", "8", "--out", "{out}/exp4_overhead"), 3, ("cuda", "numba", "pandas", "matplotlib", "tqdm")),
    Step("profile_hardware", script(
        "profile_hardware", "--device", "cuda", "--out", "{out}/profile.json"), 2, _ENGINE),
    Step("memory_budget_next", script(
        "memory_budget", "--preset", "gpu-next", "--device", "cuda", "--out", "{out}/memory_budget_next"),
        6, (*_ENGINE, "pandas", "matplotlib")),
    Step("tune_grouped_gemm", script(
        "tune_grouped_gemm", "--minutes", "5", "--shapes", "qwen3_30b", "mixtral"), 6),
    Step("bench_grouped_gemm", script(
        "bench_grouped_gemm", *_PEERS, "--out", "{out}/bench_grouped_gemm"), 10),
    Step("bench_attention_all", script("bench_attention", "--out", "{out}/bench_attention_all"), 6),
)
# fmt: on


def run_step(step: Step, out: Path, seconds: float) -> dict:
    """Run one step for at most `seconds`; its output goes to {out}/logs. status: ok, failed, out of time, left out."""
    missing = [name for name in step.needs if importlib.util.find_spec(name) is None]
    if missing:
        return {"step": step.name, "status": "left out", "reason": f"not installed: {', '.join(missing)}"}
    log = out / "logs" / f"{step.name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, *(part.replace("{out}", str(out)) for part in step.arguments)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    begin = time.monotonic()
    with log.open("w") as file:
        # A process group: what a step started ends with it.
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
        )
        try:
            code = process.wait(timeout=seconds)
            status = "ok" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "out of time"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    record = {"step": step.name, "status": status, "seconds": round(time.monotonic() - begin, 1), "log": log.name}
    if status == "failed":
        tail = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        record["reason"] = " | ".join(tail[-3:])[-500:]
    return record


def run_suite(steps: tuple[Step, ...], out: Path, minutes: float, facts: dict) -> list[dict]:
    """All steps within `minutes`; suite.json is whole after each."""
    end = time.monotonic() + 60 * minutes
    records: list[dict] = []
    for step in steps:
        left = end - time.monotonic()
        if left < 10:
            record = {"step": step.name, "status": "left out", "reason": "no time left"}
        else:
            print(f"{step.name} …", flush=True)
            record = run_step(step, out, min(left, 60 * step.minutes))
        records.append(record)
        print(json.dumps(record, ensure_ascii=False), flush=True)
        write_json(out / "suite.json", {"steps": records, **facts})
    return records


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="fluxmoe.experiments.gpu_suite", description=__doc__.splitlines()[0])
    p.add_argument("--minutes", type=float, default=25.0)
    p.add_argument("--steps", nargs="+", choices=[step.name for step in STEPS], help="default: all")
    p.add_argument("--out", required=True, metavar="DIR")
    return p


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if args.minutes <= 0:
        raise UsageError("--minutes must be positive")
    require_gpu()
    steps = tuple(step for step in STEPS if not args.steps or step.name in args.steps)
    records = run_suite(steps, Path(args.out).resolve(), args.minutes, {"provenance": provenance("cuda", 0)})
    wrong = [r["step"] for r in records if r["status"] == "failed"]
    if wrong:
        print(f"failed: {', '.join(wrong)}; see {args.out}/logs", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    cli_main(main)
