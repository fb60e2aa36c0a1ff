"""Talk with a checkpoint, token by token, under a memory budget.

    fluxmoe chat --model DIR --budget 4GiB --placement packed

A line is a turn; an empty line, or the end of input, ends it. Prompts are written as the checkpoint's chat template has
them, if it has one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

from fluxmoe.models.config import load_config
from fluxmoe.runtime.serving.config import EngineConfig
from fluxmoe.runtime.serving.engine import Engine
from fluxmoe.runtime.serving.request import Request

from ..lib.args import group, option
from ..lib.effects import Setup, served_on
from ..lib.models import check_context
from ..lib.results import UsageError
from ..lib.tokenizer import Tokenizer
from .generate import Sampling


@dataclass(frozen=True, kw_only=True)
class Arguments:
    model: str = option("Hugging Face checkpoint with a tokenizer", metavar="DIR")
    max_new_tokens: int = option("of an answer", 256, least=1)
    context: int | None = option(
        "tokens of the whole conversation (default: the model's limit, at most 4096)", None, least=2
    )
    system: str | None = option("what the model is told first", None, metavar="TEXT")
    sampling: Sampling = group()
    engine: EngineConfig = group("max_batch", "adaptive", "densify")

    @property
    def setups(self) -> list[Setup]:
        return [Setup(self.engine, served_on(self.engine.device), load_config(self.model))]


def answer(engine: Engine, tokenizer: Tokenizer, request: Request) -> Iterator[str]:
    """The answer, in pieces of whole characters as they come."""
    handle, said = engine.add(request), ""
    while not handle.finished:
        engine.step()
        text = tokenizer.decode(handle.token_ids[handle.prompt_len :]) or ""
        # A character of several tokens is shown when it is whole.
        if handle.finished or not text.endswith("\ufffd"):
            yield text[len(said) :]
            said = text
    if handle.error:
        raise UsageError(handle.error)


def run(args: Arguments) -> None:
    config, tokenizer = load_config(args.model), Tokenizer(args.model)
    tokenizer.encode("")  # one that is missing is an error before anything is loaded
    limit = args.context or min(4096, config.max_position_embeddings)
    check_context(limit, config)
    settings = replace(args.engine, max_batch=1, max_context=limit, min_kv_tokens=limit)
    turns = [{"role": "system", "content": args.system}] if args.system else []
    with Engine(args.model, settings) as engine:
        while line := _read_line():
            turns.append({"role": "user", "content": line})
            ids = tokenizer.chat(turns)
            room = limit - len(ids)
            if room < 1:
                raise UsageError(f"the conversation has {len(ids)} tokens, --context is {limit}: begin a new one")
            request = Request(tuple(ids), args.sampling.params(min(args.max_new_tokens, room)))
            pieces = []
            for piece in answer(engine, tokenizer, request):
                pieces.append(piece)
                print(piece, end="", flush=True)
            print()
            turns.append({"role": "assistant", "content": "".join(pieces)})


def _read_line() -> str:
    if sys.stdin.isatty():
        print("> ", end="", flush=True)
    return sys.stdin.readline().strip()
