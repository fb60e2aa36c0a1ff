"""Generate text from a checkpoint under a memory budget.

fluxmoe generate --model DIR --prompt "Once upon a time" --max-new-tokens 32 --budget 512MiB --placement balanced
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fluxmoe.models.checkpoint import Checkpoint
from fluxmoe.models.config import load_config
from fluxmoe.runtime.devices import HOST, resolve_device
from fluxmoe.runtime.memory.budget import BudgetError, format_bytes
from fluxmoe.runtime.serving.config import EngineConfig
from fluxmoe.runtime.serving.engine import Engine
from fluxmoe.runtime.serving.loop import summarise
from fluxmoe.runtime.serving.request import Request, SamplingParams

from ..lib import wall
from ..lib.args import group, number_of_bytes, option
from ..lib.effects import Setup, served_on
from ..lib.results import UsageError, load_json, output_file, provenance, write_atomically, write_csv, write_json
from ..lib.serve import compile_kernels, require_wall, wall_for
from ..lib.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen."""

    temperature: float = option("0 is greedy", 0.0)
    top_k: int = option("0 keeps all", 0)
    top_p: float = option("least share of probability that is kept", 1.0)
    seed: int = option("request i samples with seed + i", 0)
    ignore_eos: bool = option("go on behind the end-of-text token", False)

    def __post_init__(self) -> None:
        if self.temperature == 0 and (self.top_k, self.top_p) != (0, 1.0):
            raise UsageError("--top-k and --top-p have no effect on greedy decoding: give a --temperature")

    def params(self, max_new_tokens: int, index: int = 0) -> SamplingParams:
        return SamplingParams(
            max_new_tokens=max_new_tokens, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p,
            seed=self.seed + index, ignore_eos=self.ignore_eos,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Arguments:
    model: str = option("Hugging Face checkpoint", metavar="DIR")
    prompt: tuple[str, ...] = option("texts", (), metavar="TEXT")
    prompts: Path | None = option("JSON: a list of strings or of lists of token ids", None, metavar="FILE")
    max_new_tokens: int = option("of each prompt", least=1)
    sampling: Sampling = group()
    engine: EngineConfig = group()
    trace: Path | None = option(
        "save a Chrome trace of loads, waits and compute (ui.perfetto.dev), after a warm-up; CUDA: without graphs",
        None,
        parse=output_file,
        metavar="FILE",
    )
    steps: Path | None = option(
        "save a CSV with the metrics of every iteration", None, parse=output_file, metavar="FILE"
    )
    record_routing: Path | None = option(
        "save which experts each token chose (.npz, for bench cache; CUDA: without graphs)",
        None, parse=output_file, metavar="FILE",
    )  # fmt: skip
    wall: int | None = option(
        "all memory that this may take, interpreter included, which the kernel enforces by a cgroup, e.g. 8GB; the "
        "model's files leave the page cache first", None, parse=number_of_bytes, least=1, metavar="BYTES",
    )  # fmt: skip
    json: Path | None = option(
        "save outputs, metrics, memory, placement, provenance", None, parse=output_file, metavar="FILE"
    )

    def __post_init__(self) -> None:
        if bool(self.prompt) == bool(self.prompts):
            raise UsageError("give --prompt or --prompts: what to go on from")

    @property
    def settings(self) -> EngineConfig:
        return replace(self.engine, timeline=bool(self.trace), record_routing=bool(self.record_routing))

    @property
    def setups(self) -> list[Setup]:
        return [Setup(self.settings, served_on(self.engine.device), load_config(self.model))]


def read_prompts(args: Arguments, tokenizer: Tokenizer, vocab_size: int, limit: int) -> list[list[int]]:
    """Token ids of every prompt, each checked against vocabulary and context length."""
    prompts: list = list(args.prompt)
    if args.prompts:
        prompts = load_json(args.prompts)
        if not isinstance(prompts, list) or not prompts:
            raise UsageError(f"{args.prompts} must be a non-empty list of strings or of lists of token ids")
    encoded = []
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            ids = tokenizer.encode(prompt)
        elif isinstance(prompt, list) and all(isinstance(t, int) and not isinstance(t, bool) for t in prompt):
            ids = prompt
        else:
            raise UsageError(f"prompt {i} is neither a string nor a list of token ids")
        if not ids:
            raise UsageError(f"prompt {i} is empty; a prompt needs at least one token")
        if outside := [t for t in ids if not 0 <= t < vocab_size]:
            raise UsageError(f"prompt {i}: token id {outside[0]} is outside the vocabulary of {vocab_size}")
        if len(ids) + args.max_new_tokens > limit:
            raise UsageError(
                f"prompt {i} has {len(ids)} tokens; with {args.max_new_tokens} new ones it passes the model's "
                f"context of {limit}: shorten it or lower --max-new-tokens"
            )
        encoded.append(ids)
    return encoded


def serve(args: Arguments) -> dict:
    """Serve the prompts; returns what --json writes."""
    config, tokenizer = load_config(args.model), Tokenizer(args.model)
    prompts = read_prompts(args, tokenizer, config.vocab_size, config.max_position_embeddings)
    lengths = [len(ids) + args.max_new_tokens for ids in prompts]
    settings = replace(
        args.settings, max_context=max(lengths), min_kv_tokens=min(lengths), progress=sys.stderr.isatty()
    )
    with Engine(args.model, settings) as engine:
        if engine.packs_into is not None:
            print(f"packed experts into {engine.packs_into}, once: the next start reads them there", file=sys.stderr)
        if args.trace:
            warm_up = args.sampling.params(min(2, args.max_new_tokens))
            engine.start_trace(Request(tuple(prompts[0]), warm_up))
        handles = [
            engine.add(Request(tuple(ids), args.sampling.params(args.max_new_tokens, i)))
            for i, ids in enumerate(prompts)
        ]
        steps = list(engine.steps())
        if args.trace:
            engine.timeline.save(args.trace)
        made = provenance(engine.device.type, args.sampling.seed)
        if args.record_routing and engine.pager.recorder is not None and steps:
            model = {"model": Path(args.model).name, "content": Checkpoint(args.model).content}
            recording = engine.pager.recorder.recording(**model, **made)
            write_atomically(args.record_routing, recording.to_bytes())
        if args.steps:
            write_csv(args.steps, [asdict(step) for step in steps])
        memory = {**engine.budget.lines(), "budget": engine.budget.total}
        host_memory, memory_check = engine.host_budget.lines(), engine.memory_check()._asdict()
        walled = {} if args.wall is None else {"wall": {"bytes": args.wall, "mapped_bytes": wall.mapped_bytes()}}
        formats = {"device_format": settings.device_format, "host_format": settings.formats.host}
        placement = {"name": engine.placement.name, **formats, **engine.pager.placement.counts()}
    ordered, totals = [handle.output for handle in handles], summarise(steps)
    generated = sum(len(output.token_ids) for output in ordered)
    speed = generated / totals["wall_s"] if totals["wall_s"] else 0.0
    return {
        "outputs": [
            {
                "prompt_ids": list(output.prompt_ids), "token_ids": list(output.token_ids),
                "text": tokenizer.decode(output.token_ids), "finish_reason": output.finish_reason,
                **({"error": output.error} if output.error else {}),
            }
            for output in ordered
        ],
        "metrics": {"tokens_per_s": speed, "generated_tokens": generated, **totals},
        "memory": memory, "host_memory": host_memory, "memory_check": memory_check, "placement": placement,
        "settings": {k: v for k, v in asdict(settings).items() if isinstance(v, str | int | float | bool)},
        "provenance": made, **walled,
    }  # fmt: skip


def serve_walled(args: Arguments, limit: int) -> dict:
    """The same in a process behind a wall of `limit` bytes, with the most that it held."""
    wall.check()
    require_wall(limit)
    config = load_config(args.model)
    if resolve_device(args.engine.device).type == "cpu":
        if sys.stderr.isatty():
            print("compiling kernels, unless they are: outside of the wall", file=sys.stderr)
        compile_kernels(config, args.settings)
    result, peak = wall.call(limit, _serve_inside, args, limit, files=[Path(args.model)])
    result["wall"]["peak_bytes"] = peak + result["wall"]["mapped_bytes"]
    return result


def _serve_inside(args: Arguments, limit: int) -> dict:
    """What the process behind the wall does."""
    try:
        return serve(args)
    except BudgetError as error:
        if error.least is None or args.engine.budget_bytes is not None:
            raise
        # What is free by now, with the tokenizer loaded.
        least = wall_for(limit, HOST.free_bytes(), error.least)
        raise BudgetError(f"{error}; as it is, this takes --wall {least} ({format_bytes(least)})") from None


def run(args: Arguments) -> None:
    result = serve(args) if args.wall is None else serve_walled(args, args.wall)
    refused = [output for output in result["outputs"] if output["finish_reason"] == "refused"]
    for output in refused:
        print(f"refused: {output['error']}", file=sys.stderr)
    if len(refused) == len(result["outputs"]):
        raise UsageError(f"no prompt could be served: {refused[0]['error']}")
    if warning := result["memory_check"]["warning"]:
        print(f"warning: {warning}", file=sys.stderr)
    if args.json:
        write_json(args.json, result)
    for output in result["outputs"]:
        shown = output["text"] if output["text"] is not None else output["token_ids"]
        print(f"[{output['finish_reason']}] {shown}")
    m = result["metrics"]
    print(
        f"{m['generated_tokens']} tokens in {m['wall_s']:.2f} s: {m['tokens_per_s']:.1f} tokens/s "
        f"(decode alone {m['decode_tokens_per_s']:.1f}), streamed {m['streamed_bytes'] / 1e9:.2f} GB, "
        f"waited {m['stall_s']:.2f} s for loads that took {m['transfer_s']:.2f} s"
    )
    if args.wall is not None:
        held = result["wall"]
        print(
            f"at most {format_bytes(held['peak_bytes'])} held of {format_bytes(args.wall)}, "
            f"of which {format_bytes(held['mapped_bytes'])} are files that are mapped"
        )
