"""The whole engine: tokens/s of each placement, with and without CUDA graphs, and the ledger against the device.

    fluxmoe bench engine --preset gpu-short --out results/measured/<gpu>/engine

A row is one placement at one number of sequences, all of equal length, after a run that compiles kernels and captures
graphs: tokens/s in all and of decode steps alone, bytes streamed and waited for, and what the device lost from before
the engine was opened to after it served (torch.cuda.mem_get_info) beside what the ledger says. Tokens are compared by
bench tests; here their digest is written. Of long prompts and one token of output it says what whole prefills take.
"""

from __future__ import annotations

import gc
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from fluxmoe.runtime.devices import resolve_device
from fluxmoe.runtime.memory.budget import parse_bytes
from fluxmoe.runtime.serving.config import EngineConfig
from fluxmoe.runtime.serving.engine import Engine

from ..lib.args import group, option
from ..lib.machines import Machine
from ..lib.models import ModelChoice, Source
from ..lib.serve import Served, placed, placement_names
from ..lib.serve import run as serve
from ..lib.sweep import Sweep, say
from ..lib.workloads import Lengths, make_requests

PLACEMENTS = ("resident", "packed", "balanced:0.5", "balanced:0.5+planar12", "host+planar12", "host@on_demand")


@dataclass(frozen=True, kw_only=True)
class Load:
    """Requests of equal length on an engine of one size."""

    sequences: tuple[int, ...] = option("requests at once", (1, 32), least=1)
    prompt_tokens: int = option("of each request", 256, least=1)
    output_tokens: int = option("of each request", 64, least=1)
    max_batched_tokens: int = option("tokens of one pass (prefill chunk)", 2048, least=1)
    budget: int | None = option("device bytes for everything (default: 8GiB)", 8 << 30, parse=parse_bytes)

    def settings(self, placement: str, graphs: bool) -> EngineConfig:
        longest = self.prompt_tokens + self.output_tokens
        return EngineConfig(
            budget_bytes=self.budget, max_batch=max(self.sequences), max_context=longest,
            max_batched_tokens=self.max_batched_tokens, min_kv_tokens=longest, cuda_graphs=graphs,
            **placed(placement),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Arguments:
    model: ModelChoice = group("config")
    load: Load = group()
    placements: tuple[str, ...] = placement_names("which", PLACEMENTS)
    device: str = option("what serves", "auto", choices=("auto", "cpu", "cuda"))
    out: Path = option("folder of the results", metavar="DIR")


class OpenEngine:
    """An engine that stays open for all numbers of sequences of one placement."""

    def __init__(self, load: Load, source: Source, device: torch.device) -> None:
        self.load, self.source, self.device = load, source, device
        self._open: tuple[tuple[str, bool], Engine] | None = None
        self._free_before = 0

    def engine(self, placement: str, graphs: bool) -> Engine:
        """The engine of this placement; another that is open is closed first."""
        if self._open and self._open[0] == (placement, graphs):
            return self._open[1]
        self.close()
        self._free_before = _free_bytes(self.device)
        engine = Machine(self.device.type).engine(self.source, self.load.settings(placement, graphs))
        self._open = (placement, graphs), engine
        for sequences in self.load.sequences:  # compiles, and captures a graph of each batch size and phase
            self._serve(engine, sequences, 6)
        return engine

    def _serve(self, engine: Engine, sequences: int, output_tokens: int) -> Served:
        lengths = [Lengths(0.0, self.load.prompt_tokens, output_tokens)] * sequences
        return serve(engine, make_requests(lengths, self.source.config.vocab_size, 0))

    def columns(self, placement: str, graphs: bool, sequences: int) -> dict[str, object]:
        engine = self.engine(placement, graphs)
        row, ledger = self._serve(engine, sequences, self.load.output_tokens).row, sum(engine.budget.lines().values())
        taken = self._free_before - _free_bytes(self.device)
        replays = engine.graphs.replays if engine.graphs is not None else 0
        memory = {"ledger_bytes": ledger, "device_bytes": taken, "device_over_ledger": taken / ledger}
        captured = {"graph_replays": replays, "graph_bytes": row.pop("graphs", 0)}  # `graphs`: whether
        return {**row, **captured, **memory}

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


def run(args: Arguments) -> None:
    device, source = resolve_device(args.device), args.model.source()
    if device.type == "cuda":
        torch.mm(*(torch.zeros(16, 16, device=device) for _ in range(2)))  # the context and cuBLAS, once
    made = {"model": source.content, "output_tokens": args.load.output_tokens}
    served = OpenEngine(args.load, source, device)
    facts: dict[str, Any] = {"kind": "measured", "model": source.name, "budget": args.load.budget}
    with Sweep(args.out, "bench engine", "rows.csv", made, device=device.type, **facts) as sweep:
        for placement, graphs in product(args.placements, (True, False)):
            if graphs and device.type != "cuda":
                continue
            for sequences in args.load.sequences:
                how = asdict(args.load.settings(placement, graphs))
                work = partial(served.columns, placement, graphs, sequences)
                say(sweep.measure(work, how, placement=placement, graphs=graphs, sequences=sequences))
        served.close()
        sweep.finish()
