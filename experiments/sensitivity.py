"""Beyond the paper: contexts to 128 K, and links from a quarter to sixteen times as fast (simulated).

python -m fluxmoe.experiments.sensitivity --out results/simulated-h100/sensitivity

context   Qwen3-Next on 4 x L40, 32 requests: what compressed and streamed experts leave for KV, as contexts grow
link      Qwen3-30B-A3B on an H100 with 40 GiB: what streaming costs at other ratios of link to memory bandwidth
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from fluxmoe.models.config import ModelConfig
from fluxmoe.models.published import published_config
from fluxmoe.runtime.budget import BudgetError
from fluxmoe.runtime.config import EngineConfig
from fluxmoe.runtime.hardware import HardwareProfile
from fluxmoe.runtime.metrics import summarise
from fluxmoe.runtime.simulator import SimEngine
from tqdm import tqdm

from .common import Parser, cli_main, provenance, write_csv, write_json
from .memory_budget import split_placement
from .paper_plots import plot_sensitivity
from .workloads import Lengths, make_requests

PLACEMENTS = ("resident", "packed", "balanced:0.9+planar12", "balanced:0.5+planar12", "host+planar12")
CONTEXTS = (4096, 16384, 32768, 65536, 131072)
LINKS = (0.25, 0.5, 1, 2, 4, 8, 16)
_OUTPUT = 512


def points() -> Iterator[tuple[str, float, ModelConfig, HardwareProfile, int, int, int | None]]:
    """(panel, x, model, profile, batch, context, budget)."""
    four, h100 = HardwareProfile.load("4xL40"), HardwareProfile.load("H100-SXM")
    for context in CONTEXTS:
        yield "context", context, published_config("qwen3-next-80b-a3b"), four, 32, context, None
    for factor in LINKS:
        faster = replace(h100, host_bandwidth=factor * h100.host_bandwidth)
        ratio = faster.host_bandwidth / faster.memory_bandwidth
        yield "link", ratio, published_config("qwen3-30b-a3b"), faster, 64, 4096, 40 << 30


def simulate(
    model: ModelConfig, profile: HardwareProfile, placement: str, batch: int, context: int, budget: int | None
) -> dict:
    """Totals of a run, or why it cannot start."""
    name, alpha, expert_format = split_placement(placement)
    config = EngineConfig(
        device="cpu", placement=name, alpha=alpha, expert_format=expert_format, budget_bytes=budget, max_batch=batch,
        max_batched_tokens=4096, max_context=context, min_kv_tokens=context,
    )  # fmt: skip
    try:
        engine = SimEngine(model, profile, config)
    except BudgetError as error:
        return {"status": "too_small", "reason": str(error)}
    requests = make_requests([Lengths(0.0, context - _OUTPUT, _OUTPUT)] * batch, model.vocab_size, 0)
    totals = summarise(list(engine.steps(requests)))
    speed = batch * _OUTPUT / totals["wall_s"]
    return {"status": "ok", "reason": "", "tokens_per_s": speed, "decode_tokens_per_s": totals["decode_tokens_per_s"],
            "peak_batch": totals["peak_batch"], "preemptions": totals["preemptions"], "stall_s": totals["stall_s"],
            "wall_s": totals["wall_s"]}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    p = Parser(prog="fluxmoe.experiments.sensitivity", description=__doc__.splitlines()[0])
    p.add_argument("--out", required=True, metavar="DIR")
    out, rows = Path(p.parse_args(argv).out), []
    for panel, x, model, profile, batch, context, budget in tqdm(list(points()), "points", unit="point"):
        for placement in PLACEMENTS:
            row = {"panel": panel, "x": x, "placement": placement, "batch": batch, "context": context}
            rows.append(row | simulate(model, profile, placement, batch, context, budget))
    write_csv(out / "points.csv", rows)
    write_json(out / "provenance.json", {**provenance("sim", 0), "simulated": True, "output_tokens": _OUTPUT})
    print(f"figure: {plot_sensitivity(out)}")


if __name__ == "__main__":
    cli_main(main)
