"""Generate text from a checkpoint under a memory budget.

    python -m fluxmoe.experiments.commands.generate --model DIR --prompt "Once upon a time" --max-new-tokens 32 \\
        --budget 512MiB --placement balanced
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path

from fluxmoe.kernels.formats import DEFAULT_COMPRESSED, DENSE, FORMATS, formats_help
from fluxmoe.models.config import load_config
from fluxmoe.runtime.devices import resolve_device
from fluxmoe.runtime.experts.placement import POLICIES
from fluxmoe.runtime.hardware import HardwareProfile, list_profiles
from fluxmoe.runtime.memory.budget import parse_bytes
from fluxmoe.runtime.serving.config import EngineConfig
from fluxmoe.runtime.serving.engine import Engine
from fluxmoe.runtime.serving.metrics import StepMetrics, summarise
from fluxmoe.runtime.serving.request import Request, SamplingParams

from ..lib.results import Parser, UsageError, cli_main, provenance, write_atomically, write_json

# Twice the largest published.
_MOST_TOKENIZER_BYTES = 64 << 20


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="fluxmoe.experiments.commands.generate", description=__doc__.splitlines()[0])
    p.add_argument("--model", required=True, metavar="DIR", help="Hugging Face checkpoint")
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", nargs="+", metavar="TEXT")
    source.add_argument("--prompts", metavar="FILE", help="JSON: a list of strings or of lists of token ids")
    p.add_argument("--max-new-tokens", type=int, required=True)
    add_engine_arguments(p)
    p.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    p.add_argument("--top-k", type=int, default=0, help="0 keeps all")
    p.add_argument("--top-p", type=float, default=1.0)
    p.add_argument("--seed", type=int, default=0, help="request i samples with seed + i")
    p.add_argument("--ignore-eos", action="store_true")
    p.add_argument(
        "--adaptive", action="store_true",
        help="experts move between device and host memory while serving, and KV takes and gives the memory",
    )  # fmt: skip
    p.add_argument("--densify", action="store_true", help="with --adaptive: idle memory makes packed experts dense")
    p.add_argument("--trace", metavar="FILE", help="save a Chrome trace of loads and compute")
    p.add_argument("--steps", metavar="FILE", help="save a CSV with the metrics of every iteration")
    p.add_argument("--json", metavar="FILE", help="save outputs, metrics, memory, placement, provenance")
    return p


def add_engine_arguments(p: argparse.ArgumentParser, swept: bool = False, simulate: bool = False) -> None:
    """Arguments that every script which runs the engine shares; `swept`: it varies budget and placement itself;
    `simulate`: it also runs on the simulator."""
    if not swept:
        p.add_argument("--budget", default="all", help="device bytes for everything, e.g. 512MiB; or all")
        p.add_argument("--placement", default="resident", choices=sorted(POLICIES))
        p.add_argument("--alpha", type=float, help="share of experts kept on the device")
        p.add_argument("--dense-share", type=float, default=0.0, help="share of experts kept dense even so")
        p.add_argument(
            "--expert-format", choices=list(FORMATS),
            help=f"lossless format of experts (default: {DEFAULT_COMPRESSED} for packed and hybrid, {DENSE} for the "
            f"others). {formats_help()}",
        )  # fmt: skip
    p.add_argument(
        "--host-format", choices=list(FORMATS), help="format in host memory and files (default: --expert-format)"
    )
    p.add_argument(
        "--slot-format", choices=["packed", "decoded"], default="packed",
        help="packed: the GEMM reads compressed experts in their slots; decoded: they are decoded into them",
    )  # fmt: skip
    p.add_argument(
        "--transfer", choices=["whole", "on_demand", "auto"],
        help="whole: the host's share of a layer is copied ahead; on_demand: kernels read routed experts in the host; "
        "auto, with --adaptive: whichever the planner expects to cost less",
    )  # fmt: skip
    p.add_argument(
        "--profile", metavar="NAME|FILE",
        help="rates for balanced without a share (default: measured, roughly); with --device sim, the machine: "
        f"{', '.join(list_profiles())}, as H100-SXM×4 several of one, or a file",
    )  # fmt: skip
    p.add_argument(
        "--link-bandwidth", metavar="BYTES",
        help="CPU: host experts come at no more than this a second, as over a slower link, e.g. 4GB",
    )  # fmt: skip
    p.add_argument("--slots", type=int, default=2, help="streaming slots, at least 2")
    p.add_argument("--max-batch", type=int, default=64, help="sequences in a batch")
    p.add_argument("--max-batched-tokens", type=int, default=256, help="tokens of one pass (prefill chunk)")
    p.add_argument("--block-size", type=int, default=32, help="tokens in a KV block")
    p.add_argument("--preemption", default="recompute", choices=["recompute", "swap"])
    devices = ["auto", "cpu", "cuda", *(["sim"] if simulate else [])]
    p.add_argument("--device", default="auto", choices=devices, help="sim: simulated" if simulate else None)
    p.add_argument("--threads", type=int, help="CPU threads (default: all)")
    p.add_argument(
        "--kernels", default="auto", choices=["auto", "triton", "torch"],
        help="auto: triton on CUDA, numba on the CPU; torch: the slow reference",
    )  # fmt: skip
    p.add_argument(
        "--batch-invariant", action="store_true",
        help="CUDA: a request's tokens do not depend on who shares its batch, at some speed (on the CPU always so)",
    )  # fmt: skip
    p.add_argument("--no-cuda-graphs", action="store_true", help="launch decode steps kernel by kernel")
    p.add_argument("--poison", action="store_true", help="debug: fill recycled slots with NaN")


def engine_config(args: argparse.Namespace, max_context: int, **overrides) -> EngineConfig:
    return EngineConfig(
        **{
            "host_format": args.host_format,
            "slot_format": args.slot_format,
            "transfer": args.transfer,
            "link_bandwidth": parse_bytes(args.link_bandwidth) if args.link_bandwidth else None,
            "profile": HardwareProfile.load(args.profile) if args.profile else None,
            "slots": args.slots,
            "max_batch": args.max_batch,
            "max_batched_tokens": args.max_batched_tokens,
            "block_size": args.block_size,
            "preemption": args.preemption,
            "max_context": max_context,
            # The simulator is told what to simulate by the profile.
            "device": "auto" if args.device == "sim" else args.device,
            "threads": args.threads,
            "kernels": args.kernels,
            "batch_invariant": args.batch_invariant,
            "cuda_graphs": not args.no_cuda_graphs,
            "poison": args.poison,
            **overrides,
        }
    )


def steps_csv(steps: list[StepMetrics]) -> str:
    """One row an iteration, columns of StepMetrics."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(StepMetrics)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(step) for step in steps)
    return text.getvalue()


@contextmanager
def _tokenizer_errors(what: str) -> Iterator[None]:
    """UsageError for what the tokenizers library raises: bare Exceptions, and panics, which are BaseExceptions."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise UsageError(f"{what}: {error}") from None


class Tokenizer:
    """The checkpoint's tokenizer.json; without one, only token ids can be prompts and no text comes out."""

    def __init__(self, model_dir: str) -> None:
        path = Path(model_dir) / "tokenizer.json"
        self._tokenizer = None
        if path.exists():
            import tokenizers

            with _tokenizer_errors(f"{path} cannot be read as a tokenizer"):
                if path.stat().st_size > _MOST_TOKENIZER_BYTES:
                    raise UsageError(f"over {_MOST_TOKENIZER_BYTES} bytes")
                self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
                # A prompt is taken as it is, whatever the file says, as transformers does.
                self._tokenizer.no_padding()
                self._tokenizer.no_truncation()

    def encode(self, text: str) -> list[int]:
        if self._tokenizer is None:
            raise UsageError("the checkpoint has no tokenizer.json; give prompts as token ids with --prompts")
        with _tokenizer_errors("the checkpoint's tokenizer.json cannot encode a prompt"):
            return self._tokenizer.encode(text).ids

    def decode(self, token_ids: tuple[int, ...]) -> str | None:
        if self._tokenizer is None:
            return None
        with _tokenizer_errors("the checkpoint's tokenizer.json cannot decode tokens"):
            return self._tokenizer.decode(list(token_ids))


def read_prompts(args: argparse.Namespace, tokenizer: Tokenizer, vocab_size: int, limit: int) -> list[list[int]]:
    """Token ids of every prompt, each checked against vocabulary and context length."""
    prompts = args.prompt
    if args.prompts:
        try:
            prompts = json.loads(Path(args.prompts).read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"{args.prompts} is not JSON: {error}") from None
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
        outside = [t for t in ids if not 0 <= t < vocab_size]
        if outside:
            raise UsageError(f"prompt {i}: token id {outside[0]} is outside the vocabulary of {vocab_size}")
        if len(ids) + args.max_new_tokens > limit:
            raise UsageError(
                f"prompt {i} has {len(ids)} tokens; with {args.max_new_tokens} new ones it passes the model's "
                f"context of {limit}: shorten it or lower --max-new-tokens"
            )
        encoded.append(ids)
    return encoded


def run(args: argparse.Namespace) -> dict:
    """Serve the prompts; returns what --json writes."""
    config = load_config(args.model)
    device = resolve_device(args.device)
    if args.max_new_tokens < 1:
        raise UsageError("--max-new-tokens must be at least 1")
    tokenizer = Tokenizer(args.model)
    prompts = read_prompts(args, tokenizer, config.vocab_size, config.max_position_embeddings)
    requests = [
        Request(
            prompt_ids=tuple(ids),
            params=SamplingParams(
                max_new_tokens=args.max_new_tokens,
                temperature=args.temperature,
                top_k=args.top_k,
                top_p=args.top_p,
                seed=args.seed + i,
                ignore_eos=args.ignore_eos,
            ),
        )
        for i, ids in enumerate(prompts)
    ]
    longest = max(len(ids) for ids in prompts) + args.max_new_tokens
    shortest = min(len(ids) for ids in prompts) + args.max_new_tokens
    settings = engine_config(
        args,
        longest,
        budget_bytes=parse_bytes(args.budget),
        placement=args.placement,
        alpha=args.alpha,
        dense_share=args.dense_share,
        expert_format=args.expert_format,
        adaptive=args.adaptive,
        densify=args.densify,
        min_kv_tokens=shortest,
        progress=sys.stderr.isatty(),
        timeline=bool(args.trace),
    )
    with Engine(args.model, settings) as engine:
        handles = [engine.add(request) for request in requests]
        steps = list(engine.steps())
        if args.trace:
            engine.timeline.save(args.trace)
        if args.steps:
            write_atomically(args.steps, steps_csv(steps))
        memory = {**engine.budget.lines(), "budget": engine.budget.total}
        host_memory, memory_check = engine.host_budget.lines(), engine.memory_check()._asdict()
        formats = {"device_format": settings.device_format, "host_format": settings.formats.host}
        placement = {"name": engine.placement.name, **formats, **engine.pager.placement.counts()}
    ordered = [handle.output for handle in handles]
    totals = summarise(steps)
    generated = sum(len(output.token_ids) for output in ordered)
    return {
        "outputs": [
            {
                "prompt_ids": list(output.prompt_ids),
                "token_ids": list(output.token_ids),
                "text": tokenizer.decode(output.token_ids),
                "finish_reason": output.finish_reason,
                **({"error": output.error} if output.error else {}),
            }
            for output in ordered
        ],
        "metrics": {
            "tokens_per_s": generated / totals["wall_s"] if totals["wall_s"] else 0.0,
            "generated_tokens": generated,
            **totals,
        },
        "memory": memory,
        "host_memory": host_memory,
        "memory_check": memory_check,
        "placement": placement,
        "settings": {k: v for k, v in asdict(settings).items() if isinstance(v, str | int | float | bool)},
        "provenance": provenance(device.type, args.seed),
    }


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    result = run(args)
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


if __name__ == "__main__":
    cli_main(main)
