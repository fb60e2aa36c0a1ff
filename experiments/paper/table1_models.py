"""Sizes of models: parameters, bytes of experts and of the rest, KV and states of a sequence (Table 1).

    fluxmoe paper table1 --out results/simulated/4xL40/table1_models
    fluxmoe paper table1 --device cpu --out results/measured/<hardware>/table1_models

On sim, published models by their configs. On cpu and cuda, the presets as an engine really holds them, each compressed
too. Writes table.csv and table.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from fluxmoe.kernels.formats import DEFAULT_COMPRESSED, FORMATS
from fluxmoe.models.published import PUBLISHED
from fluxmoe.runtime.serving.config import EngineConfig
from tqdm import tqdm

from ..lib.args import group
from ..lib.machines import SIMULATED, FigureMachine, Machine
from ..lib.models import Source, preset_source, published_source
from ..lib.results import write_atomically, write_result

MEASURED = ("small", "next", "deep-next", "deep-mixtral")
HEADS = {
    "model": "model", "layers": "layers", "experts": "experts", "top_k": "top k", "parameters": "parameters (10⁹)",
    "expert_gb": "experts (GB)", "packed_gb": "packed, 12 bits (GB)", "all_gb": "all weights (GB)",
    "share": "experts' share (%)", "kv_kb": "KV a token (KB)", "state_mb": "states a sequence (MB)",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Arguments:
    where: FigureMachine = group()


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


def run(args: Arguments) -> None:
    where, out = args.where, args.where.out
    if where.simulated:
        rows = [computed(published_source(name)) for name in PUBLISHED]
        about = {"device": SIMULATED, "simulated": "published configs"}
    else:
        machine = where.here
        sources = [preset_source(name, where.checkpoints) for name in MEASURED]
        rows, about = [held(machine, source) for source in tqdm(sources, "models", disable=None)], machine.about
    lines = [" | ".join(HEADS.values()), " | ".join("---" for _ in HEADS)]
    lines += [" | ".join(str(row[key]) for key in HEADS) for row in rows]
    table = "".join(f"| {line} |\n" for line in lines)
    write_atomically(out / "table.md", table)
    write_result(out, "paper table1", {"table.csv": rows}, about)
    print(table)
