"""What memory holds: weights, recurrent states and KV of a model against batch and context (Fig. 1, Table 1).

    python -m fluxmoe.experiments.fig1_memory --out results/simulated-4xL40/fig1_memory

Arithmetic on published configs: KV exists in the attention layers alone, states in the others.
"""

from __future__ import annotations

from pathlib import Path

from fluxmoe.models.published import PUBLISHED, published_config

from .common import Parser, cli_main, provenance, write_csv, write_json
from .paper_plots import plot_memory_split


def memory(name: str, batch: int, context: int) -> dict:
    """Bytes by use with every sequence at full context."""
    model = published_config(name)
    return {
        "model": name, "batch": batch, "context": context, "experts": model.expert_bytes_total,
        "other_weights": model.non_expert_bytes, "states": batch * model.state_bytes_per_sequence,
        "kv_cache": batch * context * model.kv_bytes_per_token,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    p = Parser(prog="fluxmoe.experiments.fig1_memory", description=__doc__.splitlines()[0])
    p.add_argument("--model", choices=list(PUBLISHED), default="qwen3-next-80b-a3b")
    p.add_argument("--out", required=True, metavar="DIR")
    args = p.parse_args(argv)
    out = Path(args.out)
    print("model                 experts  all weights  experts'   KV a token  states a sequence")
    for name in PUBLISHED:
        model = published_config(name)
        weights = model.expert_bytes_total + model.non_expert_bytes
        print(
            f"{name:<20} {model.expert_bytes_total / 1e9:6.1f} GB  {weights / 1e9:8.1f} GB  "
            f"{100 * model.expert_bytes_total / weights:6.1f} %  {model.kv_bytes_per_token / 1e3:7.1f} KB  "
            f"{model.state_bytes_per_sequence / 1e6:10.1f} MB"
        )
    rows = [{"panel": "batch", **memory(args.model, batch, 4096)} for batch in (32, 64, 128, 256, 512)]
    rows += [{"panel": "context", **memory(args.model, 256, context)} for context in (1024, 2048, 4096, 8192, 16384)]
    write_csv(out / "points.csv", rows)
    write_json(out / "provenance.json", {**provenance("sim", None), "computed": "from published configs"})
    print(f"figure: {plot_memory_split(out)}")


if __name__ == "__main__":
    cli_main(main)
