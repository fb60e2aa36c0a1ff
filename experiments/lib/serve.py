"""The one way to run: an engine, real or simulated, serves requests and gives a row."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from fluxmoe.kernels.formats import FORMATS
from fluxmoe.models.config import ModelConfig
from fluxmoe.runtime.devices import HOST
from fluxmoe.runtime.experts.placement import IN_FILES, Tier, place
from fluxmoe.runtime.memory.budget import BudgetError, format_bytes
from fluxmoe.runtime.serving.config import EngineConfig
from fluxmoe.runtime.serving.engine import Engine
from fluxmoe.runtime.serving.loop import StepMetrics, summarise
from fluxmoe.runtime.serving.request import Request
from fluxmoe.runtime.sim.cost_model import CostParameters
from fluxmoe.runtime.sim.simulator import SimEngine

from . import wall
from .args import option
from .checkpoints import make_checkpoint
from .machines import Machine
from .models import Source
from .results import UsageError
from .workloads import Lengths, make_requests

Watch = Callable[[Engine | SimEngine, StepMetrics], None]


class Served(NamedTuple):
    """row: what a result file says of the run; steps: its iterations; tokens: of each request."""

    row: dict[str, Any]
    steps: list[StepMetrics]
    tokens: list[tuple[int, ...]]


def run(engine: Engine | SimEngine, requests: Sequence[Request], watch: Watch | None = None) -> Served:
    """Serve `requests` on an engine that stays open. watch: called after each iteration."""
    handles, steps = [engine.add(request) for request in requests], []
    for step in engine.steps():
        if watch is not None:
            watch(engine, step)
        steps.append(step)
    outputs, totals = [handle.output for handle in handles], summarise(steps)
    tokens = [tuple(output.token_ids) for output in outputs]
    generated, wall_s = sum(map(len, tokens)), totals["wall_s"]
    prompts = sum(len(request.prompt_ids) for request in requests)
    layout = engine.deployment.layout
    row = {
        "status": "ok", "reason": "", "tokens_per_s": generated / wall_s if wall_s else 0.0,
        "total_tokens_per_s": (generated + prompts) / wall_s if wall_s else 0.0, **totals, "requests": len(requests),
        "refused": sum(output.finish_reason == "refused" for output in outputs), "generated_tokens": generated,
        "kv_blocks": engine.scheduler.most_blocks, "max_sequences": engine.deployment.max_sequences,
        "hidden_share": 1 - totals["stall_s"] / totals["transfer_s"] if totals["transfer_s"] else None,
        **engine.budget.lines(), "host_bytes": layout.tier_bytes(Tier.HOST), "disk_bytes": layout.tier_bytes(Tier.DISK),
        "tokens_sha256": hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:16],
    }  # fmt: skip
    return Served(row, steps, tokens)


def serve(
    machine: Machine, source: Source, settings: EngineConfig, requests: Sequence[Request],
    costs: CostParameters | None = None, watch: Watch | None = None, first: Sequence[Request] = (),
) -> Served:  # fmt: skip
    """Serve `requests` once on an engine of their own, after those in `first`, which warm it up. BudgetError where it
    cannot start."""
    with machine.open(source, settings, costs) as engine:
        if first:
            run(engine, first)
        served = run(engine, requests, watch)
        placed = {"alpha": engine.placement.alpha, "kv_tokens": engine.scheduler.most_blocks * settings.block_size}
    return served._replace(row=placed | served.row)


def require_wall(limit: int) -> None:
    """BudgetError unless a wall of `limit` bytes leaves something beside the interpreter and its slack."""
    if limit >= 1 << 30:
        return
    least = _interpreter_bytes() + HOST.slack_bytes
    if limit < least:
        error = BudgetError(
            f"a wall of {format_bytes(limit)} is too small for the interpreter, its libraries and their slack, which "
            f"take {format_bytes(least)}: give more than that"
        )
        error.least = least
        raise error


def wall_for(limit: int, free: int, budget: int) -> int:
    """The least wall behind which `all` is `budget` bytes, for a process that saw `free` behind one of `limit`."""
    return limit - free + HOST.free_for(budget)


@cache
def _interpreter_bytes() -> int:
    """What a fresh process takes that has all it needs to serve, but no engine."""
    taken = wall.call(HOST.total_bytes(), _taken).value
    assert taken is not None, "a wall is made on Linux, which says what a process takes"
    return taken


def _taken() -> int | None:
    """Asked here, where the imports of this module are made before."""
    return HOST.taken_bytes()


def held(engine: Engine, base: int) -> dict[str, int]:
    """Bytes of a process that held `base` before its engine was made: by the ledgers, of them those of experts that are
    mapped, and in truth, these included."""
    check = engine.memory_check()
    return {
        "base_bytes": base, "ledger_bytes": check.ledger_bytes, "mapped_experts": engine.pager.store.mapped_bytes,
        "rss_bytes": base + (check.held_bytes or 0),
    }  # fmt: skip


def short_requests(vocab_size: int) -> list[Request]:
    """What an engine serves to warm up."""
    return make_requests([Lengths(0.0, 8, 2)] * 2, vocab_size, 0)


def warm_up(machine: Machine, source: Source, settings: EngineConfig) -> None:
    """Kernels are compiled, and the checkpoint's pages touched, before what is timed; nothing for what is simulated."""
    if not machine.simulated:
        small = replace(settings, placement="host", budget_bytes=None, max_context=None, min_kv_tokens=1, max_batch=2)
        serve(machine, source, small, short_requests(source.config.vocab_size))


def compile_kernels(model: ModelConfig, settings: EngineConfig) -> None:
    """All kernels that `settings` use on a CPU for a model of this architecture and dtype are compiled, and kept on
    disk: by serving a tiny one. Compiling takes more memory than a wall may leave to whoever comes first on a machine.

    Experts of files lie in host memory here: the same kernels read them.
    """
    in_files = settings.placement in IN_FILES
    small = replace(
        settings, device="cpu", budget_bytes=None, max_batch=2, max_batched_tokens=16, max_context=64, min_kv_tokens=1,
        placement="host" if in_files else settings.placement, cache_bytes=None, disk_share=None, link_bandwidth=None,
        transfer=settings.formats.transfer if in_files else settings.transfer, record_routing=False, timeline=False,
        cache_policy=EngineConfig.cache_policy, cache_recording=None, progress=False,
    )  # fmt: skip
    # Wide enough for every format to save something; four layers are one turn of Qwen3-Next's kinds.
    sizes: dict[str, Any] = dict(layers=4, experts=4, hidden=256, moe_intermediate=256, vocab=320, max_positions=64)
    with tempfile.TemporaryDirectory(prefix="fluxmoe-") as folder:
        dtype = str(model.dtype).removeprefix("torch.")
        tiny = make_checkpoint(model.arch, Path(folder) / "tiny", dtype=dtype, **sizes)
        with Engine(tiny, small) as engine:
            run(engine, short_requests(sizes["vocab"]))


def row(
    machine: Machine, source: Source, settings: EngineConfig, lengths: Sequence[Lengths], seed: int = 0,
    costs: CostParameters | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What `serve` gives for a workload; one that cannot start is a row with the reason and the least that works.

    On CUDA its prompts are served before, for two tokens each: kernels load and graphs are captured as they are met.
    """
    try:
        requests = make_requests(list(lengths), source.config.vocab_size, seed)
        brief = [replace(each, params=replace(each.params, max_new_tokens=2)) for each in requests]
        return serve(machine, source, settings, requests, costs, first=brief if machine.device == "cuda" else ()).row
    except BudgetError as error:
        return {"status": "too_small", "reason": str(error), "least_budget": error.least}


def placed(text: str) -> dict[str, Any]:
    """'balanced:0.5+planar12@on_demand' → the settings placement, alpha, expert_format and, where given, transfer;
    checked on a model of one layer."""
    stored, _, transfer = text.partition("@")
    where, _, expert_format = stored.partition("+")
    name, _, share = where.partition(":")
    try:
        alpha = float(share) if share else None
    except ValueError:
        raise UsageError(f"placement {text!r}: {share!r} is no share; write for example balanced:0.5") from None
    if expert_format and expert_format not in FORMATS:
        raise UsageError(f"placement {text!r}: unknown expert format; these are: {', '.join(FORMATS)}")
    place(name, 1, 1, alpha=alpha, bandwidths=dict.fromkeys(Tier, 1.0))
    settings: dict[str, Any] = {"placement": name, "alpha": alpha, "expert_format": expert_format or None}
    settings |= {"transfer": transfer} if transfer else {}
    EngineConfig(**settings)
    return settings


def placement_name(text: str) -> str:
    """`text`, which `placed` takes."""
    placed(text)
    return text


def placement_names(help: str, default: tuple[str, ...]) -> Any:
    """A field of a command's arguments: names that `placed` takes."""
    return option(help, default, parse=placement_name, metavar="NAME[:ALPHA][+FORMAT][@TRANSFER]")
