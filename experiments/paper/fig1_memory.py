"""What memory holds: weights, recurrent states and KV of a model against batch and context (Fig. 1).

    fluxmoe paper fig1 --out results/simulated/4xL40/fig1_memory
    fluxmoe paper fig1 --device cpu --out results/measured/<hardware>/fig1_memory

On sim, arithmetic on a published config: KV exists in the attention layers alone, states in the others. On cpu and
cuda, what an engine with everything resident really holds for a full batch, at a 16th of the batches and contexts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fluxmoe.models.published import PUBLISHED
from fluxmoe.runtime.serving.config import EngineConfig
from tqdm import tqdm

from ..lib.args import group, option
from ..lib.machines import SIMULATED, FigureMachine, Machine
from ..lib.models import Source, preset_source, published_source
from ..lib.results import write_result
from ..plots.paper import plot_memory_split
from .sweep import MEASURED_SCALE

BATCHES, CONTEXTS = (32, 64, 128, 256, 512), (1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    where: FigureMachine = group()
    model: str = option("of sim", "qwen3-next-80b-a3b", choices=tuple(PUBLISHED))


def points(scale: int) -> Iterator[tuple[str, int, int]]:
    """(panel, batch, context)."""
    yield from (("batch", batch // scale, 4096 // scale) for batch in BATCHES)
    yield from (("context", 256 // scale, context // scale) for context in CONTEXTS)


def computed(source: Source, batch: int, context: int) -> dict[str, int]:
    """Bytes by use with every sequence at full context."""
    model = source.config
    return {
        "experts": model.expert_bytes_total, "other_weights": model.non_expert_bytes,
        "states": batch * model.state_bytes_per_sequence, "kv_cache": batch * context * model.kv_bytes_per_token,
    }  # fmt: skip


def held(machine: Machine, source: Source, batch: int, context: int) -> dict[str, int]:
    """Bytes by use that an engine holds, not what its ledger says."""
    with machine.engine(source, EngineConfig(max_batch=batch, max_context=context)) as engine:
        lines = engine.held_bytes()
    return {
        "experts": lines["resident_experts"], "other_weights": lines["non_expert_weights"],
        "states": lines.get("states", 0), "kv_cache": lines["kv_cache"],
    }  # fmt: skip


def run(args: Arguments) -> None:
    out = args.where.out
    if args.where.simulated:
        source, about = published_source(args.model), {"device": SIMULATED, "simulated": "published config"}
        rows = [(panel, b, c, computed(source, b, c)) for panel, b, c in points(1)]
    else:
        machine, source = args.where.here, preset_source("deep-next", args.where.checkpoints)
        about = machine.about
        bar = tqdm(list(points(MEASURED_SCALE)), "engines", unit="engine", disable=None)
        rows = [(panel, b, c, held(machine, source, b, c)) for panel, b, c in bar]
    table = [{"panel": panel, "model": source.name, "batch": b, "context": c, **use} for panel, b, c, use in rows]
    write_result(out, "paper fig1", {"points.csv": table}, {**about, "model": source.name})
    print(f"figure: {plot_memory_split(out)}")
