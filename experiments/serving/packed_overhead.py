"""What compressed experts cost or gain at equal batch, all of them on the device (the paper: 63.9 % at batch 32).

    fluxmoe packed-overhead --preset small --out results/measured/<hardware>/packed_overhead

Engines that differ only in how they hold experts serve the same requests in turns: dense; planar12, which the GEMM
decodes in its tile loop; and, as the paper does it, formats that are decoded into a buffer before each layer runs.
A row is one engine at one batch: tokens/s of iterations that only decode, and its ratio to `resident` turn by turn.
Tokens must be the same in all of them.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from fluxmoe.runtime.serving.config import EngineConfig
from fluxmoe.runtime.serving.engine import Engine
from fluxmoe.runtime.serving.loop import summarise

from ..lib.args import group, option
from ..lib.effects import Setup, setups_of
from ..lib.machines import SWEPT, MachineChoice
from ..lib.models import ModelChoice
from ..lib.serve import Served, placed, placement_names
from ..lib.serve import run as serve
from ..lib.sweep import Sweep, WrongError, say
from ..lib.workloads import Lengths, make_requests

_EXPERT_LINES = ("resident_experts", "packed_experts", "slots")
PLACEMENTS = ("resident", "packed", "packed+tiered", "packed+huffman")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    model: ModelChoice = group("config")
    machine: MachineChoice = group("devices")
    engine: EngineConfig = group(*SWEPT, "max_batch")
    placements: tuple[str, ...] = placement_names("what is compared with resident", PLACEMENTS)
    batches: tuple[int, ...] = option("requests at once", (1, 8, 32, 64), least=1)
    prompt_tokens: int = option("of each request", 32, least=1)
    output_tokens: int = option("of each request", 48, least=2)
    repeats: int = option("turns", 5, least=1)
    seed: int = option("of prompts", 0)
    out: Path = option("folder of the results", metavar="DIR")

    @property
    def setups(self) -> list[Setup]:
        settings = [replace(self.engine, **placed(name)) for name in self.placements]
        return setups_of(self.model, self.machine, settings)


def decode_rate(served: Served, batch: int) -> float:
    """tokens/s of iterations that only decode at full batch."""
    full = [s for s in served.steps if s.prefill_tokens == 0 and s.batch == batch]
    return summarise(full)["decode_tokens_per_s"]


def run(args: Arguments) -> None:
    machine, source = args.machine.machine, args.model.source()
    names = ("resident", *(name for name in args.placements if name != "resident"))
    context = args.prompt_tokens + args.output_tokens
    common = replace(args.engine, max_batch=max(args.batches), max_context=context)
    each = {name: replace(common, **placed(name)) for name in names}
    facts = {"prompt_tokens": args.prompt_tokens, "output_tokens": args.output_tokens, "repeats": args.repeats}
    made = {"engines": {name: asdict(settings) for name, settings in each.items()}, "seed": args.seed, **facts}
    with ExitStack() as stack:
        sweep = stack.enter_context(
            Sweep.serving(args.out, "packed-overhead", machine, source, made, facts, "rows.csv", args.seed)
        )
        engines: dict[str, Engine] = {}
        for batch in args.batches:
            if all(sweep.has(batch=batch, placement=name) for name in names):
                continue
            for name, settings in each.items():
                if name not in engines:
                    engines[name] = stack.enter_context(machine.engine(source, settings))
            columns = compare(engines, args, batch, source.config.vocab_size)
            for name in names:
                say(sweep.measure(partial(columns, name), batch=batch, placement=name))
        sweep.finish()


def compare(engines: dict[str, Engine], args: Arguments, batch: int, vocab_size: int):
    """All engines in turns at one batch; the function that gives the columns of one."""
    lengths = [Lengths(0.0, args.prompt_tokens, args.output_tokens)] * batch
    requests = make_requests(lengths, vocab_size, args.seed)
    rates: dict[str, list[float]] = {name: [] for name in engines}
    tokens: dict[str, list] = {}
    for turn in range(args.repeats + 1):
        for name, engine in engines.items():
            served = serve(engine, requests)
            tokens[name] = served.tokens
            if turn:  # the first run of a batch warms up
                rates[name].append(decode_rate(served, batch))

    def columns(name: str) -> dict[str, object]:
        if tokens[name] != tokens["resident"]:
            raise WrongError(f"{name} gives other tokens than resident")
        low, middle, high = np.percentile(np.array(rates[name]) / np.array(rates["resident"]), [0, 50, 100])
        return {
            "decode_tokens_per_s": float(np.median(rates[name])), "over_resident": float(middle), "least": float(low),
            "most": float(high), "expert_bytes": sum(engines[name].budget.lines()[line] for line in _EXPERT_LINES),
        }  # fmt: skip

    return columns
