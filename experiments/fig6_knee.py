"""Time of compute and of loads against α, the share of experts on the device: where loads stop hiding (Fig. 6).

    python -m fluxmoe.experiments.fig6_knee --profile 4xL40 --out results/simulated-4xL40/fig6_knee

Simulated: a decode step at each batch, with the host's experts dense, and compressed.
"""

from __future__ import annotations

from pathlib import Path

from fluxmoe.models.published import PUBLISHED, published_config
from fluxmoe.runtime.config import EngineConfig
from fluxmoe.runtime.hardware import HardwareProfile
from fluxmoe.runtime.planner import knee
from fluxmoe.runtime.request import Request, SamplingParams
from fluxmoe.runtime.simulator import SimEngine

from .common import Parser, cli_main, provenance, write_csv, write_json
from .paper_plots import plot_knee

ALPHAS = [i / 20 for i in range(10, 21)]


def step_times(model, profile: HardwareProfile, batch: int, alpha: float, host_format: str) -> tuple[float, float]:
    """Seconds of compute without waiting, and of loads, of one decode step of a full batch at a context of 1024."""
    config = EngineConfig(
        device="cpu", placement="balanced", alpha=alpha, expert_format="planar12", host_format=host_format,
        max_batch=batch, max_batched_tokens=2048, max_context=2048, budget_bytes=1 << 50,
    )  # fmt: skip
    # None may end before the last prompt is prefilled, and a step has room for one or two.
    params = SamplingParams(max_new_tokens=batch + 16, ignore_eos=True)
    engine = SimEngine(model, profile, config)
    steps = list(engine.steps([Request(i, (1,) * 1024, params) for i in range(batch)]))
    full = next(step for step in steps if step.prefill_tokens == 0 and step.batch == batch)
    return full.duration_s - full.stall_s, full.transfer_s


def main(argv: list[str] | None = None) -> None:
    p = Parser(prog="fluxmoe.experiments.fig6_knee", description=__doc__.splitlines()[0])
    p.add_argument("--model", choices=list(PUBLISHED), default="qwen3-next-80b-a3b")
    p.add_argument("--profile", default="4xL40", help="a shipped hardware profile or a file (default: %(default)s)")
    p.add_argument("--batches", type=int, nargs=2, default=[32, 256])
    p.add_argument("--out", required=True, metavar="DIR")
    args = p.parse_args(argv)
    model, profile, out = published_config(args.model), HardwareProfile.load(args.profile), Path(args.out)
    rows = []
    for batch in args.batches:
        for host_format in ("dense", "planar12"):
            for alpha in ALPHAS:
                compute, load = step_times(model, profile, batch, alpha, host_format)
                rows.append(
                    {
                        "model": args.model, "profile": profile.name, "batch": batch, "host_format": host_format,
                        "alpha": alpha, "compute_s": compute, "load_s": load,
                    }
                )  # fmt: skip
            per_layer = rows[-len(ALPHAS)]["load_s"] / (1 - ALPHAS[0]) * profile.host_bandwidth_each / model.num_layers
            at = knee(rows[-1]["compute_s"], per_layer, model.num_layers, profile.host_bandwidth_each)
            print(f"batch {batch:4}, host experts {host_format:<8}: loads hide down to α = {at:.2f}")
    write_csv(out / "points.csv", rows)
    write_json(out / "provenance.json", {**provenance("sim", 0), "simulated": True, "profile": profile.name})
    print(f"figure: {plot_knee(out)}")


if __name__ == "__main__":
    cli_main(main)
