"""Where the time of a decode step goes on a CPU: experts, attention, other products, norms, and what is around them.

    fluxmoe bench step-cpu --preset small --out results/measured/<cpu>/bench_step

Requests of equal length decode together; a row is the median step of one batch and context, each kernel's time on the
wall clock by what it belongs to, attention with the products before and after it. `around` is the rest of the step:
Python between the kernels, scheduler, sampling.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from fluxmoe.runtime.serving.config import EngineConfig
from fluxmoe.runtime.serving.engine import Engine
from fluxmoe.runtime.serving.request import Request, SamplingParams

from ..lib.args import group, option
from ..lib.effects import Setup
from ..lib.machines import SWEPT, Machine
from ..lib.models import ModelChoice
from ..lib.serve import placed, placement_names
from ..lib.sweep import Sweep, say

# Methods of the operations by what their time is counted as.
PARTS = {
    "experts": ("moe_add",),
    "products": ("project_add", "logits", "router", "mlp_add", "delta_net"),
    "attention": ("attend",),
    "norms": ("rms_norm", "embed", "route"),
}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    model: ModelChoice = group("config")
    engine: EngineConfig = group(*SWEPT, "max_batch")
    placements: tuple[str, ...] = placement_names("where experts are", ("resident", "packed"))
    sequences: tuple[int, ...] = option("requests at once", (1, 8, 32), least=1)
    contexts: tuple[int, ...] = option("tokens before those that are timed", (32,), least=1)
    steps: int = option("that are timed", 32, least=3)
    out: Path = option("folder of the results", metavar="DIR")

    @property
    def setups(self) -> list[Setup]:
        return [Setup(replace(self.engine, **placed(name)), "cpu", self.model.architecture) for name in self.placements]


class Stopwatch:
    """Seconds of methods by part, the outermost alone where one calls another."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside = False

    def watch(self, target: object, parts: dict[str, tuple[str, ...]]) -> None:
        """Time those of the methods that `target` has, from now on."""
        for part, methods in parts.items():
            for name in methods:
                if hasattr(target, name):
                    setattr(target, name, self._timed(getattr(target, name), part))

    def _timed(self, method: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return method(*args, **kwargs)
            self._inside, begin = True, time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds[part] += time.perf_counter() - begin
                self._inside = False

        return timed


def profile(engine: Engine, watch: Stopwatch, sequences: int, context: int, steps: int) -> dict[str, float]:
    """Columns of one row: milliseconds of a step and of its parts, medians over steps that only decode."""
    rng = np.random.default_rng(0)
    params = SamplingParams(max_new_tokens=engine.deployment.limits.context - context, ignore_eos=True)
    for _ in range(sequences):
        engine.add(Request(tuple(rng.integers(0, engine.model.vocab_size, context).tolist()), params))
    times: dict[str, list[float]] = defaultdict(list)
    while engine.has_work and len(times["step"]) <= steps:
        watch.seconds.clear()
        begin = time.perf_counter()
        metrics = engine.step()
        whole = time.perf_counter() - begin
        if metrics is None or metrics.prefill_tokens or metrics.batch < sequences:
            continue
        parts = {part: watch.seconds[part] for part in PARTS}
        for part, seconds in (parts | {"step": whole, "around": whole - sum(parts.values())}).items():
            times[part].append(1e3 * seconds)
    engine.reset()
    found = {part: float(np.median(values[1:])) for part, values in times.items()}
    low, high = np.percentile(times["step"][1:], [25, 75])
    columns = {"step_ms": found["step"], "step_p25_ms": float(low), "step_p75_ms": float(high)}
    columns["tokens_per_s"] = 1e3 * sequences / found["step"]
    return columns | {f"{part}_ms": found[part] for part in (*PARTS, "around")}


def run(args: Arguments) -> None:
    source = args.model.source()
    most = max(args.contexts)
    # The first request may generate a token in every step in which others are still read.
    context = most + args.steps + 2 + max(args.sequences) * (1 + most // args.engine.max_batched_tokens)
    common = replace(args.engine, device="cpu", max_batch=max(args.sequences), max_context=context)
    made = {"model": source.content, "engine": asdict(common), "steps": args.steps}
    with Sweep(args.out, "bench step-cpu", "rows.csv", made, model=source.name, steps=args.steps) as sweep:
        for placement in args.placements:
            with Machine("cpu").engine(source, replace(common, **placed(placement))) as engine:
                watch = Stopwatch()
                watch.watch(engine.ops, PARTS)
                watch.watch(engine.pager.ops, PARTS)
                for tokens in args.contexts:
                    for sequences in args.sequences:
                        measure = partial(profile, engine, watch, sequences, tokens, args.steps)
                        say(sweep.measure(measure, placement=placement, sequences=sequences, context=tokens))
        sweep.finish()
