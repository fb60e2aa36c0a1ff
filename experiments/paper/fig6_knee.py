"""Time of compute and of loads against α, the share of experts on the device: where loads stop hiding (Fig. 6).

    fluxmoe paper fig6 --device sim --profile 4xL40 --config qwen3-next-80b-a3b --out DIR
    fluxmoe paper fig6 --device cpu --preset small --link-bandwidth 4GB --out DIR

A decode step of a full batch, with the host's experts dense, and compressed: the median of such steps.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from fluxmoe.kernels.formats import DEFAULT_COMPRESSED, DENSE
from fluxmoe.runtime.experts.planner import knee
from fluxmoe.runtime.serving.config import EngineConfig

from ..lib.args import group, option
from ..lib.effects import Setup, setups_of
from ..lib.machines import SWEPT, Machine, MachineChoice
from ..lib.models import ModelChoice, Source
from ..lib.results import UsageError
from ..lib.serve import serve
from ..lib.sweep import Sweep
from ..lib.workloads import Lengths, make_requests
from ..plots.paper import plot_knee

ALPHAS = [i / 20 for i in range(10, 21)]


@dataclass(frozen=True, kw_only=True)
class Arguments:
    model: ModelChoice = group()
    machine: MachineChoice = group()
    engine: EngineConfig = group(*SWEPT, "max_batch", "max_batched_tokens", "host_format")
    batches: tuple[int, ...] = option("of the panels", (32, 256), least=1)
    prompt_tokens: int = option("of each request", 1024, least=1)
    steps: int = option("decode steps of a full batch", 8, least=1)
    max_batched_tokens: int = option("tokens of one pass (prefill chunk)", 2048, least=1)
    out: Path = option("folder of the results", metavar="DIR")

    @property
    def setups(self) -> list[Setup]:
        settings = [
            replace(
                self.engine, placement="balanced", alpha=ALPHAS[0], expert_format=DEFAULT_COMPRESSED, host_format=host
            )
            for host in (DENSE, DEFAULT_COMPRESSED)
        ]
        return setups_of(self.model, self.machine, settings)


def step_times(machine: Machine, source: Source, settings: EngineConfig, prompt: int, output: int) -> dict[str, float]:
    """Seconds of compute without waiting, and of loads, of a decode step of a full batch."""
    batch = settings.max_batch
    requests = make_requests([Lengths(0.0, prompt, output)] * batch, source.config.vocab_size, 0)
    served = serve(machine, source, settings, requests)
    steps = [s for s in served.steps if s.prefill_tokens == 0 and s.batch == batch]
    if not steps:
        raise UsageError(f"no step had all {batch} requests; raise --max-batched-tokens")
    compute, load = zip(*((s.duration_s - s.stall_s, s.transfer_s) for s in steps), strict=True)
    return {"compute_s": float(np.median(compute)), "load_s": float(np.median(load))}


def run(args: Arguments) -> None:
    machine, points = args.machine.machine, []
    source = args.model.source(machine.simulated)
    panels = [(batch, host) for batch in args.batches for host in (DENSE, DEFAULT_COMPRESSED)]
    for batch, host in panels:
        # No request may end before the last prompt is prefilled, and a step has room for one at least.
        output = batch * -(-args.prompt_tokens // max(1, args.max_batched_tokens - batch)) + args.steps + 1
        for alpha in ALPHAS:
            settings = replace(
                args.engine, placement="balanced", alpha=alpha, expert_format=DEFAULT_COMPRESSED, host_format=host,
                max_batch=batch, max_batched_tokens=args.max_batched_tokens, max_context=args.prompt_tokens + output,
                budget_bytes=1 << 50 if machine.simulated else None,
            )  # fmt: skip
            work = partial(step_times, machine, source, settings, args.prompt_tokens, output)
            points.append(({"batch": batch, "host_format": host, "alpha": alpha}, asdict(settings), work))
    made = {"prompt": args.prompt_tokens, "steps": args.steps}
    facts = {"prompt_tokens": args.prompt_tokens, "link_bandwidth": args.engine.link_bandwidth}
    with Sweep.serving(args.out, "paper fig6", machine, source, made, facts) as sweep:
        rows = sweep.all(points)
        sweep.finish()
    layers = len(source.config.moe_layers)
    for batch, host in panels:
        line = [row for row in rows if (row["batch"], row["host_format"]) == (str(batch), host)]
        # Seconds of loading at α = 0, taken from the lowest α; a rate of 1 makes bytes of seconds.
        loads = float(line[0]["load_s"]) / (1 - ALPHAS[0]) / layers
        at = knee(float(line[-1]["compute_s"]), loads, layers, 1.0)
        print(f"batch {batch:4}, host experts {host:<8}: loads hide down to α = {at:.2f}")
    print(f"figure: {plot_knee(args.out)}")
