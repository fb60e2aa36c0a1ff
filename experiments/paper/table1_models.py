"""Sizes of models: parameters, bytes of experts and of the rest, KV and states of a sequence (Table 1).

    python -m fluxmoe.experiments.paper.table1_models --out results/simulated-4xL40/table1_models
    python -m fluxmoe.experiments.paper.table1_models --device cpu --out results/<hardware>/table1_models

On sim, published models by their configs. On cpu and cuda, the presets as an engine really holds them, each compressed
too. Writes table.csv and table.md.
"""

from __future__ import annotations

from pathlib import Path

from fluxmoe.kernels.formats import DEFAULT_COMPRESSED, FORMATS
from fluxmoe.models.published import PUBLISHED
from fluxmoe.runtime.serving.config import EngineConfig
from tqdm import tqdm

from ..lib.machines import SIMULATED, Machine, figure_parser, machine_of
from ..lib.presets import Source, preset_source, published_source
from ..lib.results import cli_main, provenance, write_atomically, write_csv, write_json

MEASURED = ("small", "next", "deep-next", "deep-mixtral")
HEADS = {
    "model": "model", "layers": "layers", "experts": "experts", "top_k": "top k", "parameters": "parameters (10⁹)",
    "expert_gb": "experts (GB)", "packed_gb": "packed, 12 bits (GB)", "all_gb": "all weights (GB)",
    "share": "experts' share (%)", "kv_kb": "KV a token (KB)", "state_mb": "states a sequence (MB)",
}  # fmt: skip


def row_of(source: Source, experts: int, packed: float, others: int) -> dict[str, object]:
    """experts, packed, others: bytes of dense and of compressed experts, and of what is neither."""
    model = source.config
    return {
        "model": source.name, "layers": model.num_layers, "experts": model.num_experts, "top_k": model.top_k,
        "parameters": round((experts + others) / model.dtype.itemsize / 1e9, 3), "expert_gb": round(experts / 1e9, 3),
        "packed_gb": round(packed / 1e9, 3), "all_gb": round((experts + others) / 1e9, 3),
        "share": round(100 * experts / (experts + others), 1), "kv_kb": round(model.kv_bytes_per_token / 1e3, 1),
        "state_mb": round(model.state_bytes_per_sequence / 1e6, 2),
    }  # fmt: skip


def computed(source: Source) -> dict[str, object]:
    experts = source.config.expert_bytes_total
    return row_of(source, experts, experts * FORMATS[DEFAULT_COMPRESSED].bits / 16, source.config.non_expert_bytes)


def held(machine: Machine, source: Source) -> dict[str, object]:
    """As an engine holds them: experts dense, then compressed."""
    lines = {}
    for placement in ("resident", "packed"):
        with machine.engine(source, EngineConfig(placement=placement, max_batch=1, max_context=64)) as engine:
            lines[placement] = engine.held_bytes()
    dense, packed = lines["resident"], lines["packed"]
    return row_of(source, dense["resident_experts"], packed["packed_experts"], dense["non_expert_weights"])


def main(argv: list[str] | None = None) -> None:
    args = figure_parser("table1_models", __doc__.splitlines()[0]).parse_args(argv)
    if args.device == SIMULATED:
        rows, about = [computed(published_source(name)) for name in PUBLISHED], {"simulated": "published configs"}
    else:
        machine = machine_of(args)
        sources = [preset_source(name, Path(args.checkpoints)) for name in MEASURED]
        rows, about = [held(machine, source) for source in tqdm(sources, "models")], machine.about
    lines = [" | ".join(HEADS.values()), " | ".join("---" for _ in HEADS)]
    lines += [" | ".join(str(row[key]) for key in HEADS) for row in rows]
    table = "".join(f"| {line} |\n" for line in lines)
    out = Path(args.out)
    write_csv(out / "table.csv", rows)
    write_atomically(out / "table.md", table)
    write_json(out / "provenance.json", {**provenance(args.device, None), "device": args.device, **about})
    print(table)


if __name__ == "__main__":
    cli_main(main)
