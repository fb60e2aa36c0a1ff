"""Before renting anything: does a model fit, where do its experts go, what throughput to expect, what would help most.

    fluxmoe plan --config qwen3-next-80b-a3b --gpu H100-SXM --batch 128 --context 4096
    fluxmoe plan --model DIR --gpu 4xL40 --devices 2 --budget 40GiB --json plan.json --trace plan.trace.json

Everything is simulated (see `runtime.sim`): placements with the runtime's own ledger and scheduler, times by a cost
model over the GPU's profile. `fluxmoe paper validate` says how far that is from measurements.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from fluxmoe.kernels.formats import DEFAULT_COMPRESSED
from fluxmoe.models.published import PUBLISHED
from fluxmoe.runtime.hardware import HardwareProfile, list_profiles
from fluxmoe.runtime.memory.budget import format_bytes, parse_bytes
from fluxmoe.runtime.serving.config import EngineConfig

from ..lib.args import option
from ..lib.machines import SIMULATED, Machine
from ..lib.models import Source, check_context, checkpoint_source, published_source
from ..lib.results import UsageError, output_file, provenance, write_json
from ..lib.serve import placed, row
from ..lib.serve import run as serve
from ..lib.workloads import Lengths, make_requests

# What a user can ask the engine for.
CANDIDATES = (
    "resident", "packed",
    *(f"balanced:{alpha}+{DEFAULT_COMPRESSED}" for alpha in (0.95, 0.9, 0.8, 0.7, 0.5, 0.25)),
    f"host+{DEFAULT_COMPRESSED}",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Arguments:
    model: str | None = option("Hugging Face checkpoint (its config.json is enough)", None, metavar="DIR")
    config: str | None = option(f"a published model by name: {', '.join(PUBLISHED)}", None, metavar="NAME")
    gpu: HardwareProfile = option(
        f"{', '.join(list_profiles())}, as 4xH100-SXM several of one, or a file", parse=HardwareProfile.load,
        metavar="NAME|FILE",
    )  # fmt: skip
    devices: int | None = option("how many of the profile's devices share the model (default: all)", None, least=1)
    budget: int | None = option(
        "of each device (default: 90 % of its memory)", None, parse=parse_bytes, metavar="BYTES"
    )
    batch: int = option("requests at a time", 64, least=1)
    context: int = option("prompt + output", 4096, least=2)
    output_tokens: int | None = option("of each request (default: a quarter of the context)", None, least=1)
    json: Path | None = option("save the answer", None, parse=output_file, metavar="FILE")
    trace: Path | None = option(
        "save a simulated Chrome trace (ui.perfetto.dev) of the best placement: its prompts, then 16 passes", None,
        parse=output_file, metavar="FILE",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if bool(self.model) == bool(self.config):
            raise UsageError("give one of --model and --config: what to plan for")
        if self.output_tokens and self.output_tokens >= self.context:
            raise UsageError(f"--output-tokens must be less than --context {self.context}, got {self.output_tokens}")
        if self.budget and self.budget > self.gpu.memory_bytes:
            raise UsageError(
                f"--budget {format_bytes(self.budget)} is more than the {format_bytes(int(self.gpu.memory_bytes))} "
                f"that a device of {self.gpu.name} has"
            )

    @property
    def source(self) -> Source:
        return published_source(self.config) if self.config else checkpoint_source(self.model or "")

    @property
    def question(self) -> Question:
        source, devices = self.source, self.devices or self.gpu.num_devices
        check_context(self.context, source.config)
        output = self.output_tokens or max(1, self.context // 4)
        return Question(source, self.gpu, devices, self.budget, self.batch, self.context, output)


@dataclass(frozen=True)
class Question:
    """Requests of equal length, all at once, on some devices of a profile."""

    source: Source
    profile: HardwareProfile
    devices: int
    budget: int | None
    batch: int
    context: int
    output: int

    @property
    def machine(self) -> Machine:
        return Machine(SIMULATED, self.profile, self.devices)

    def settings(self, placement: str) -> EngineConfig:
        return EngineConfig(
            budget_bytes=self.budget, max_batch=self.batch, max_batched_tokens=2048, max_context=self.context,
            min_kv_tokens=self.context, **placed(placement),
        )  # fmt: skip


def evaluate(q: Question) -> list[dict]:
    """One row a candidate that starts, the fastest first; those that do not fit last, with what they need."""
    rows = []
    lengths = [Lengths(0.0, q.context - q.output, q.output)] * q.batch
    for name in CANDIDATES:
        found = row(q.machine, q.source, q.settings(name), lengths)
        if found["status"] != "ok":
            rows.append({"placement": name, "fits": False, "needs_bytes": found["least_budget"], "tokens_per_s": 0.0})
            continue
        more = {"bottleneck": bottleneck(found, q), "kv_sequences": found["peak_batch"],
                "stall_share": found["stall_s"] / found["wall_s"]}  # fmt: skip
        rows.append({"placement": name, "fits": True, **more, **found})
    return sorted(rows, key=lambda each: -each["tokens_per_s"])


def bottleneck(totals: dict, q: Question) -> str:
    """What a run waits for most."""
    if totals["stall_s"] > 0.3 * totals["wall_s"]:
        return "link to the host"
    if totals["peak_batch"] < 0.9 * q.batch or totals["preemptions"] > q.batch / 4:
        return "KV cache"
    model, tokens = q.source.config, totals["generated_by_decode"] / max(1, totals["iterations"])
    flops = 6 * tokens * model.top_k * model.hidden_size * model.moe_intermediate_size / q.devices
    touched = model.num_experts * (1 - (1 - model.top_k / model.num_experts) ** tokens)
    read = touched * model.expert_params * 2 / q.devices
    if flops / q.profile.matmul_flops > read / q.profile.memory_bandwidth:
        return "arithmetic"
    serial = model.num_layers * 14 * q.profile.launch_s + q.profile.iteration_s
    return "launches and host" if serial > 0.5 * totals["wall_s"] / totals["iterations"] else "memory bandwidth"


def changes(q: Question) -> dict[str, Question]:
    """Single changes that a user could make."""
    p, total = q.profile, q.budget or int(0.9 * q.profile.memory_bytes)
    link = replace(p, host_bandwidth=2 * p.host_bandwidth, host_link_shared=2 * p.host_link_shared)
    return {
        "a quarter more memory": replace(q, budget=int(1.25 * total)),
        "a link twice as fast": replace(q, profile=link),
        "memory twice as fast": replace(q, profile=replace(p, memory_bandwidth=2 * p.memory_bandwidth)),
        "twice the requests": replace(q, batch=2 * q.batch),
        "half the requests": replace(q, batch=max(1, q.batch // 2)),
    }


def save_trace(q: Question, placement: str, path: Path) -> None:
    """Loads, waits and compute of the prompts and of 16 passes behind them, as they are simulated."""
    lengths = [Lengths(0.0, q.context - q.output, min(q.output, 16))] * q.batch
    with q.machine.open(q.source, replace(q.settings(placement), timeline=True)) as engine:
        serve(engine, make_requests(lengths, q.source.config.vocab_size, 0))
        engine.timeline.save(path)


def run(args: Arguments) -> None:
    asked = args.question
    model, profile = asked.source.config, asked.profile
    rows = evaluate(asked)
    total = model.expert_bytes_total + model.non_expert_bytes
    where = profile.name if asked.devices == profile.num_devices else f"{asked.devices} of {profile.name}"
    print(
        f"{asked.source.name}: {format_bytes(total)} of weights, "
        f"{100 * model.expert_bytes_total / total:.0f} % experts; {where}; "
        f"{asked.batch} requests of {asked.context} tokens. Simulated."
    )
    for each in rows:
        if each["fits"]:
            print(
                f"{each['placement']:<24} {each['tokens_per_s']:9.1f} tokens/s  {each['kv_sequences']:4} at a time  "
                f"KV {format_bytes(each['kv_cache']):>10}  waits {100 * each['stall_share']:3.0f} %  "
                f"bound by {each['bottleneck']}"
            )
        else:
            print(f"{each['placement']:<24} does not fit: needs {format_bytes(each['needs_bytes'])} a device")
    best, gains = rows[0], {}
    if best["fits"]:
        for name, change in changes(asked).items():
            gains[name] = evaluate(change)[0]["tokens_per_s"] / best["tokens_per_s"]
        for name, gain in sorted(gains.items(), key=lambda item: -item[1]):
            print(f"  {name:<24} {gain:5.2f} x")
        print(f"best: --placement {best['placement']}; what helps most: {max(gains, key=gains.__getitem__)}")
        if args.trace:
            save_trace(asked, best["placement"], args.trace)
    else:
        least = format_bytes(min(each["needs_bytes"] for each in rows))
        print(f"nothing fits; the least is {least} a device" + (", so there is no trace" if args.trace else ""))
    if args.json:
        about = {"profile": profile.name, "devices": asked.devices, "batch": asked.batch, "context": asked.context}
        write_json(args.json, {"rows": rows, "gains": gains, **about, "provenance": provenance("sim", 0)})
