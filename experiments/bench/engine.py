"""The whole engine: tokens/s of each placement, with and without CUDA graphs, and the ledger against the device.

    python -m fluxmoe.experiments.bench.engine --preset gpu-short --out results/<gpu>/bench_engine

A row is one placement at one number of sequences, all of equal length, after a run that compiles kernels and captures
graphs: tokens/s in all and of decode steps alone, bytes streamed and waited for, and what the device lost from before
the engine was opened to after it served (torch.cuda.mem_get_info) beside what the ledger says. Tokens are compared by
check_engine; here their digest is written.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
from functools import partial

import torch
from fluxmoe.runtime.devices import resolve_device
from fluxmoe.runtime.memory.budget import parse_bytes
from fluxmoe.runtime.serving.config import EngineConfig
from fluxmoe.runtime.serving.engine import Engine
from fluxmoe.runtime.serving.metrics import summarise

from ..lib.presets import Source, add_model_source, model_source
from ..lib.results import Parser, UsageError, cli_main
from ..lib.workloads import Lengths, make_requests
from ..serving.memory_budget import split_placement
from .timing import ResultRows

PLACEMENTS = ("resident", "packed", "balanced:0.5", "balanced:0.5+planar12", "host+planar12", "host@on_demand")
_KEPT = ("decode_tokens_per_s", "iterations", "peak_batch", "preemptions", "streamed_bytes", "stall_s", "transfer_s")


class Served:
    """An engine that stays open for all numbers of sequences of one placement."""

    def __init__(self, args: argparse.Namespace, source: Source, device: torch.device) -> None:
        self.args, self.source, self.device = args, source, device
        self._open: tuple[tuple[str, bool], Engine] | None = None
        self._free_before = 0

    def engine(self, placement: str, graphs: bool) -> Engine:
        """The engine of this placement; another that is open is closed first."""
        if self._open and self._open[0] == (placement, graphs):
            return self._open[1]
        self.close()
        self._free_before = _free_bytes(self.device)
        args, where = self.args, placement.partition("@")
        name, alpha, expert_format = split_placement(where[0])
        longest = args.prompt_tokens + args.output_tokens
        config = EngineConfig(
            placement=name, alpha=alpha, expert_format=expert_format, transfer=where[2] or "whole",
            budget_bytes=parse_bytes(args.budget), max_batch=max(args.sequences), max_context=longest,
            max_batched_tokens=args.max_batched_tokens, min_kv_tokens=longest, device=self.device.type,
            cuda_graphs=graphs,
        )  # fmt: skip
        engine = Engine(self.source.weights, config)
        self._open = (placement, graphs), engine
        for sequences in args.sequences:  # compiles, and captures a graph of each batch size and phase
            self._serve(engine, sequences, 6)
        return engine

    def _serve(self, engine: Engine, sequences: int, output_tokens: int) -> tuple[list, list]:
        lengths = [Lengths(0.0, self.args.prompt_tokens, output_tokens)] * sequences
        requests = make_requests(lengths, self.source.config.vocab_size, 0)
        handles = [engine.add(request) for request in requests]
        steps = list(engine.steps())
        return steps, [handle.output.token_ids for handle in handles]

    def columns(self, placement: str, graphs: bool, sequences: int) -> dict[str, object]:
        engine = self.engine(placement, graphs)
        steps, tokens = self._serve(engine, sequences, self.args.output_tokens)
        totals, ledger = summarise(steps), sum(engine.budget.lines().values())
        taken = self._free_before - _free_bytes(self.device)
        generated = sum(len(each) for each in tokens)
        digest = hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:16]
        return {
            "tokens_per_s": generated / totals["wall_s"], **{name: totals[name] for name in _KEPT},
            "graph_replays": engine.graphs.replays if engine.graphs is not None else 0,
            "ledger_bytes": ledger, "device_bytes": taken, "device_over_ledger": taken / ledger,
            **engine.budget.lines(), "tokens_sha256": digest,
        }  # fmt: skip

    def close(self) -> None:
        if self._open:
            self._open[1].close()
            self._open = None
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()


def _free_bytes(device: torch.device) -> int:
    """Of the device as the driver sees it; 0 on a CPU, where no one device holds what an engine takes."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info()[0]


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="fluxmoe.experiments.bench.engine", description=__doc__.splitlines()[0])
    add_model_source(p)
    p.add_argument(
        "--placements", nargs="+", default=list(PLACEMENTS), metavar="NAME[:ALPHA][+FORMAT][@on_demand]",
        help="(default: %(default)s)",
    )  # fmt: skip
    p.add_argument("--sequences", nargs="+", type=int, default=[1, 32])
    p.add_argument("--prompt-tokens", type=int, default=256)
    p.add_argument("--output-tokens", type=int, default=64)
    p.add_argument("--max-batched-tokens", type=int, default=2048)
    p.add_argument("--budget", default="8GiB")
    p.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    p.add_argument("--out", required=True, metavar="DIR")
    return p


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if min(*args.sequences, args.prompt_tokens, args.output_tokens, args.max_batched_tokens) < 1:
        raise UsageError("--sequences, --prompt-tokens, --output-tokens and --max-batched-tokens must be at least 1")
    for placement in args.placements:
        where, _, transfer = placement.partition("@")
        split_placement(where)
        if transfer not in ("", "on_demand"):
            raise UsageError(f"placement {placement!r}: after @ only on_demand can stand")
    device, source = resolve_device(args.device), model_source(args)
    if device.type == "cuda":
        torch.mm(*(torch.zeros(16, 16, device=device) for _ in range(2)))  # the context and cuBLAS, once
    results = ResultRows(args.out, device.type, kind="measured", model=source.name, budget=args.budget)
    served = Served(args, source, device)
    for placement in args.placements:
        for graphs in (True, False) if device.type == "cuda" else (False,):
            for sequences in args.sequences:
                work = partial(served.columns, placement, graphs, sequences)
                results.measure(work, placement=placement, graphs=graphs, sequences=sequences)
    served.close()
    results.finish()


if __name__ == "__main__":
    cli_main(main)
