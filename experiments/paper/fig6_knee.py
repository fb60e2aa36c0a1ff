"""Time of compute and of loads against α, the share of experts on the device: where loads stop hiding (Fig. 6).

    python -m fluxmoe.experiments.paper.fig6_knee --device sim --profile 4xL40 --config qwen3-next-80b-a3b --out DIR
    python -m fluxmoe.experiments.paper.fig6_knee --device cpu --preset small --link-bandwidth 4GB --out DIR

A decode step of a full batch, with the host's experts dense, and compressed: the median of such steps.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from fluxmoe.kernels.formats import DEFAULT_COMPRESSED, DENSE
from fluxmoe.runtime.experts.planner import knee
from tqdm import tqdm

from ..commands.generate import add_engine_arguments, engine_config
from ..lib.machines import Machine, machine_of
from ..lib.presets import Source, add_model_source, model_source
from ..lib.results import Parser, UsageError, cli_main, provenance, write_csv, write_json
from ..lib.workloads import Lengths, make_requests
from ..plots.paper import plot_knee

ALPHAS = [i / 20 for i in range(10, 21)]


def step_times(
    args: argparse.Namespace, machine: Machine, source: Source, batch: int, alpha: float, host_format: str
) -> tuple[float, float]:
    """Seconds of compute without waiting, and of loads, of a decode step of a full batch."""
    # No request may end before the last prompt is prefilled, and a step has room for one at least.
    output = batch * -(-args.prompt_tokens // max(1, args.max_batched_tokens - batch)) + args.steps + 1
    settings = engine_config(
        args, args.prompt_tokens + output, placement="balanced", alpha=alpha, expert_format=DEFAULT_COMPRESSED,
        host_format=host_format, max_batch=batch, budget_bytes=1 << 50 if machine.simulated else None,
    )  # fmt: skip
    requests = make_requests([Lengths(0.0, args.prompt_tokens, output)] * batch, source.config.vocab_size, 0)
    with machine.open(source, settings) as engine:
        for request in requests:
            engine.add(request)
        steps = [s for s in engine.steps() if s.prefill_tokens == 0 and s.batch == batch]
    if not steps:
        raise UsageError(f"no step had all {batch} requests; raise --max-batched-tokens")
    compute, load = zip(*((s.duration_s - s.stall_s, s.transfer_s) for s in steps), strict=True)
    return float(np.median(compute)), float(np.median(load))


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="fluxmoe.experiments.paper.fig6_knee", description=__doc__.splitlines()[0])
    add_model_source(p, simulate=True)
    p.add_argument("--batches", type=int, nargs=2, default=[32, 256])
    p.add_argument("--prompt-tokens", type=int, default=1024)
    p.add_argument("--steps", type=int, default=8, help="decode steps of a full batch")
    p.add_argument("--out", required=True, metavar="DIR")
    add_engine_arguments(p, swept=True, simulate=True)
    p.set_defaults(max_batched_tokens=2048)
    return p


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if min(*args.batches, args.prompt_tokens, args.steps) < 1:
        raise UsageError("batches, prompts and steps must be at least 1")
    machine, source, out = machine_of(args), model_source(args), Path(args.out)
    rows: list[dict] = []
    points = [(b, f, a) for b in args.batches for f in (DENSE, DEFAULT_COMPRESSED) for a in ALPHAS]
    for batch, host_format, alpha in tqdm(points, "points", unit="point"):
        compute, load = step_times(args, machine, source, batch, alpha, host_format)
        rows.append({"batch": batch, "host_format": host_format, "alpha": alpha, "compute_s": compute, "load_s": load})
    layers = len(source.config.moe_layers)
    for batch, host_format in dict.fromkeys((b, f) for b, f, _ in points):
        line = [row for row in rows if (row["batch"], row["host_format"]) == (batch, host_format)]
        # Seconds of loading at α = 0, taken from the lowest α; a rate of 1 makes bytes of seconds.
        at = knee(line[-1]["compute_s"], line[0]["load_s"] / (1 - ALPHAS[0]) / layers, layers, 1.0)
        print(f"batch {batch:4}, host experts {host_format:<8}: loads hide down to α = {at:.2f}")
    write_csv(out / "points.csv", rows)
    about = {"model": source.name, "prompt_tokens": args.prompt_tokens, "link_bandwidth": args.link_bandwidth}
    write_json(out / "provenance.json", {**provenance(machine.device, 0), **machine.about, **about})
    print(f"figure: {plot_knee(out)}")


if __name__ == "__main__":
    cli_main(main)
