"""FluxMoE inside vLLM beside vLLM as it is and beside our own engine: one checkpoint, one total memory, in turns.

    fluxmoe versus vllm-plugin --preset small --vllm-python PATH --out results/measured/<hardware>/vllm_plugin

vLLM runs in an environment of its own in which this project is installed too (`make vllm-test` makes one, .venv-vllm).
A budget is what one process may take in all: weights, KV cache, code, libraries; vLLM counts it so itself
(`--gpu-memory-utilization`), and ours gets what its code leaves. So KV cache is what experts leave, and rows say how
many tokens it holds and the most memory that the process really held. All get the same prompts, greedy, with fixed
output lengths; a round is one run of each. Times to the first token are of requests that all come at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fluxmoe.runtime.devices import HOST, resolve_device
from fluxmoe.runtime.memory.budget import format_bytes, parse_bytes

from ..lib.args import group, option
from ..lib.machines import Machine
from ..lib.models import ModelChoice
from ..lib.results import UsageError, code_digest
from ..lib.serve import placement_names
from ..lib.sweep import Sweep
from ..plots.serving import plot_vllm_plugin
from . import engines
from .engines import RefusedError
from .versus import Work, ask_vllm, fill, version_of

# vLLM's load makes text of random tokens, which need not become as many tokens again.
_RETOKENIZED = 32


@dataclass(frozen=True, kw_only=True)
class Arguments:
    model: ModelChoice = group("config")
    vllm_python: str = option("Python of an environment that has vLLM and this project", metavar="PATH")
    device: str = option("what serves", "auto", choices=("auto", "cpu", "cuda"))
    budgets: tuple[str, ...] = option("of each process in all", ("1536MiB", "2GiB"), metavar="BYTES")
    placements: tuple[str, ...] = placement_names("of the plug-in's", ("packed", "balanced:0.5", "host", "disk"))
    engine: tuple[str, ...] = placement_names("of our own engine, which has no server (default: packed)", ())
    sequences: tuple[int, ...] = option("requests at once", (1, 8, 32), least=1)
    served: int | None = option("over HTTP: requests of each run of `vllm bench serve`", None, least=1)
    prompt_tokens: int = option("of each request", 128, least=1)
    output_tokens: int = option("of each request", 64, least=1)
    rounds: int = option("after one that is not counted", 3, least=1)
    eager: bool = option("vLLM without torch.compile", False)
    out: Path = option("folder of the results", metavar="DIR")

    def __post_init__(self) -> None:
        for text in self.budgets:
            if parse_bytes(text) is None:
                raise UsageError("--budgets: each process takes so much in all; `all` is no number")
        if self.served and self.engine:
            raise UsageError("--served: our own engine has no server, --engine has no effect")
        if self.served and self.served < max(self.sequences):
            raise UsageError("--served: fewer requests than --sequences has clients")

    @property
    def own(self) -> tuple[str, ...]:
        """Placements of our own engine."""
        return self.engine or (() if self.served else ("packed",))

    @property
    def providers(self) -> int:
        """Engines that run at the same time."""
        return 1 + len(self.placements) + len(self.own)


def starters(args: Arguments, device: str, model: str, total: int) -> dict[str, Callable]:
    """Provider → what starts it with `total` bytes."""
    context = args.prompt_tokens + args.output_tokens + (_RETOKENIZED if args.served else 0)
    settings = {"model": model, "max_model_len": context, "max_batch": max(args.sequences), "eager": args.eager,
                "device": device}  # fmt: skip
    within = partial(engines.vllm_within, args.vllm_python, total, settings, {}, served=args.served)
    return {
        "vllm": within,
        **{f"vllm + fluxmoe {placement}": partial(within, placement) for placement in args.placements},
        **{
            f"fluxmoe {placement}": partial(engines.fluxmoe_within, placement, total, settings)
            for placement in args.own
        },
    }


def check(args: Arguments, device: str) -> None:
    """UsageError unless vLLM's environment runs the code that rows will name, and all engines fit this machine."""
    code = "from fluxmoe.experiments.lib.results import code_digest; print(code_digest())"
    if (there := ask_vllm(args.vllm_python, {}, code)) != code_digest():
        what = "no fluxmoe" if there is None else "another fluxmoe than this"
        raise UsageError(f"the environment of {args.vllm_python} has {what}; install this one there: pip install -e .")
    most, free = max(parse_bytes(text) or 0 for text in args.budgets), HOST.free_bytes()
    if device == "cpu" and args.providers * most > free:
        raise UsageError(
            f"{args.providers} engines of {format_bytes(most)} run at the same time, and {format_bytes(free)} are "
            "free; give fewer --placements or smaller --budgets"
        )


def compile_first(starting: Mapping[str, Callable]) -> None:
    """Start and stop each once: who compiles kernels keeps 0.1 GB that later starts, which find them on disk, have for
    KV."""
    for start in starting.values():
        with suppress(RefusedError):
            start().close()


def run(args: Arguments) -> None:
    machine = Machine(resolve_device(args.device).type)
    version = version_of(args.vllm_python, {}, "vllm")
    check(args, machine.device)
    source = args.model.source()
    checkpoint = Path(source.checkpoint or "").resolve()
    asked = {k: getattr(args, k) for k in ("placements", "sequences", "served", "rounds", "prompt_tokens",
                                           "output_tokens", "eager")}  # fmt: skip
    made = asked | {"engine": args.own, "vllm": version}
    work = Work(args.sequences, args.rounds, args.prompt_tokens, args.output_tokens, source.config.vocab_size)
    with Sweep.serving(args.out, "versus vllm-plugin", machine, source, made, made, "rows.csv") as sweep:
        missing = [text for text in args.budgets if not sweep.made_together(budget=text)]
        starting = {text: starters(args, machine.device, str(checkpoint), parse_bytes(text) or 0) for text in missing}
        if missing:
            compile_first(starting[max(missing, key=lambda text: parse_bytes(text) or 0)])
        fill(sweep, starting, work)
    print(f"figure: {plot_vllm_plugin(args.out)}")
