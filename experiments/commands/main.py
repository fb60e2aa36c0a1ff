"""`fluxmoe`: expert paging for mixture-of-experts inference.

Finds the command that is asked for and imports it alone: `fluxmoe --help` needs neither torch nor a GPU.
"""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Sequence
from typing import Any

# Name → module of experiments, and what it does.
COMMANDS: dict[str, tuple[str, str]] = {
    "doctor": ("commands.doctor", "what this machine has, what will work, what is missing"),
    "demo": ("commands.demo", "a small model under a row of budgets, with its figure (under 4 minutes)"),
    "generate": ("commands.generate", "text from a checkpoint under a memory budget"),
    "chat": ("commands.chat", "talk with a checkpoint, token by token"),
    "plan": ("commands.plan", "before renting a GPU: does a model fit, how fast, what would help"),
    "verify": ("commands.verify", "do plan's numbers come true on this machine"),
    "make-checkpoint": ("commands.make_checkpoint", "a checkpoint of a real architecture with random weights"),
    "pack-checkpoint": ("commands.pack_checkpoint", "compress the experts of a checkpoint, losslessly"),
    "profile": ("commands.profile", "measure what this machine can move and compute"),
    "memory-budget": ("serving.memory_budget", "throughput against memory budget, for several placements"),
    "versus": ("serving.versus", "vLLM and transformers beside ours, in turns"),
    "versus vllm-plugin": ("serving.vllm_plugin", "vLLM as it is, with us inside, and our engine, in turns"),
    "versus walls": ("serving.walls", "a model larger than memory: llama.cpp and vLLM beside ours, behind real walls"),
    "ablation": ("serving.ablation", "what each idea is worth: one at a time taken away"),
    "sensitivity": ("serving.sensitivity", "longer contexts, other links, other GPUs"),
    "paper table1": ("paper.table1_models", "sizes of models"),
    "paper fig1": ("paper.fig1_memory", "what memory holds against batch and context"),
    "paper fig2": ("paper.fig2_kv_capacity", "throughput against the memory that KV has"),
    "paper fig5": ("paper.fig5_exponents", "how the bits of expert weights are distributed"),
    "paper fig6": ("paper.fig6_knee", "compute and loads against the share of experts on the device"),
    "paper fig7": ("paper.fig7_performance_bound", "the paper's systems, all experts on the device"),
    "paper fig8": ("paper.fig8_capacity_bound", "the paper's systems, an eighth of the experts in host memory"),
    "paper fig9": ("paper.fig9_adaptation", "experts leave while serving, KV grows"),
    "paper fig10": ("paper.fig10_overhead", "what paging costs with everything resident"),
    "paper validate": ("paper.validate_simulator", "the simulator against the paper and against what we measured"),
    "bench moe": ("bench.moe", "the MoE layer on a GPU against its roofs and peers"),
    "bench cpu-moe": ("bench.cpu_moe", "the CPU's grouped GEMM against its floor and torch"),
    "bench attention": ("bench.attention", "paged attention against its roofs and torch"),
    "bench attention-cpu": ("bench.attention_cpu", "KV in slabs beside one contiguous cache, on a CPU"),
    "bench step-cpu": ("bench.step_cpu", "where a decode step's time goes on a CPU"),
    "bench delta-net": ("bench.delta_net", "Gated DeltaNet against its roofs and FLA"),
    "bench packing": ("bench.packing", "lossless formats: bits a weight and rates"),
    "bench cache": ("bench.cache", "which experts a cache should keep: policies ranked on recorded or drawn routing"),
    "bench engine": ("bench.engine", "the whole engine: each placement, with and without graphs"),
    "bench tune": ("bench.tune", "find the tiles of the grouped GEMM for this GPU"),
    "bench predict": ("bench.predict", "what kernels should take on an H100, from their machine code"),
    "bench compile": ("bench.compile_kernels", "compile what the GPU suite launches, on all cores"),
    "bench tests": ("bench.gpu_tests", "the tests that make sense on a GPU, a row each"),
    "bench tools": ("bench.gpu_tools", "Nsight Compute, compute-sanitizer and torch's profiler, as rows"),
    "gpu-suite": ("commands.gpu_suite", "everything that a new GPU should run, in slices"),
    "figures": ("commands.figures", "redraw every figure from the committed results"),
    "reproduce": ("commands.reproduce", "make the results again and say which came true"),
    "completion": ("commands.completion", "a script by which bash or zsh completes all of these"),
    "compare": ("commands.compare", "two folders of results side by side"),
}


def find(argv: Sequence[str]) -> tuple[str, list[str]]:
    """(name of the command, its arguments). UsageError says which there are."""
    from ..lib.results import UsageError

    for words in (2, 1):
        if (name := " ".join(argv[:words])) in COMMANDS:
            return name, list(argv[words:])
    import difflib

    said = " ".join(argv[: 2 if argv[0] in ("paper", "bench") else 1])
    close = difflib.get_close_matches(said, COMMANDS, 1)
    raise UsageError(
        f"no command {said!r}" + (f"; did you mean {close[0]}?" if close else "") + " (see fluxmoe --help)"
    )


def arguments(argv: Sequence[str]) -> tuple[Any, Any]:
    """(module, arguments) of a command line, checked but not run."""
    from ..lib.args import given, parse

    name, rest = find(argv)
    module = importlib.import_module(f"fluxmoe.experiments.{COMMANDS[name][0]}")
    found = parse(module.Arguments, rest, f"fluxmoe {name}", module.__doc__)
    if hasattr(found, "setups"):
        from ..lib.effects import refuse_idle

        refuse_idle(given(rest), found.setups)
    return module, found


def call(argv: Sequence[str]) -> object:
    """Run a command line; errors are exceptions."""
    module, found = arguments(argv)
    return module.run(found)


def listing(prefix: str = "") -> str:
    """All commands that begin with `prefix`, a line each."""
    shown = {name: about for name, (_, about) in COMMANDS.items() if name.startswith(prefix)}
    lines = "\n".join(f"  {name:<20} {about}" for name, about in shown.items())
    return f"usage: fluxmoe COMMAND [--help] …\n\n{lines}\n"


def main(argv: Sequence[str] | None = None) -> None:
    """The command; an error that a user can cause becomes one `error:` line and exit status 2.

    User errors are `ValueError` subclasses that our packages define (UsageError, BudgetError, …), `OSError`, and a
    package of others that is missing. A bare ValueError, like any other exception, is a bug of ours and keeps its
    traceback.
    """
    if argv is None:
        # Whoever is asked to end cleans up as after Ctrl-C.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    argv = list(sys.argv[1:] if argv is None else argv)
    asked = [word for word in argv if word not in ("-h", "--help")]
    if asked in ([], ["paper"], ["bench"]):
        print(listing(*asked), end="")
        return
    try:
        call(argv)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except ModuleNotFoundError as error:
        if (missing := (error.name or "fluxmoe").partition(".")[0]) == "fluxmoe":
            raise
        print(
            f"error: this needs {missing}, which is not installed here: pip install {missing}, or what all commands "
            "need, pip install 'fluxmoe[experiments]'; see fluxmoe doctor", file=sys.stderr,
        )  # fmt: skip
        sys.exit(2)
    except (ValueError, OSError) as error:
        if not isinstance(error, OSError) and not type(error).__module__.startswith("fluxmoe."):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
