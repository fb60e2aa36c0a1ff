"""A model larger than memory: ours beside llama.cpp and vLLM, each in a process behind a real wall of memory; in turns.

    fluxmoe versus walls --preset olmoe-1b-7b --llama-python PATH --vllm-python PATH --out results/measured/<hardware>/…

A wall is a memory cgroup: all that a process has, interpreter, KV and page cache included. llama.cpp maps a GGUF file
with the same weights, so that the kernel keeps what it can of them; of ours the first of --placements runs that fits;
vLLM, whose CPU build offloads nothing, runs where its weights fit. Without a wall all placements in memory are run.
Every process starts anew, with its files dropped from the page cache; the time that this takes is a column too, and
what it holds: peak_bytes is the most without page cache, and what it maps of files; ours also by its ledgers. It is
asked nothing before a hypervisor has taken back what the process before it, and the files, left free. A round is one
process of each, so that a machine whose speed drifts favours nobody.

Prefill and decode are timed apart, greedy, all with the same random prompts. Without a wall every number of sequences
has a prefill of its own. Behind one a prefill of any size reads nearly all experts, so the most sequences are prefilled
and decoded, then fewer and fewer of them. A process decodes at most --output-tokens of each or --seconds, whichever
comes first. Two bounds stand beside each rate: what the disk, as measured each round, would allow for the bytes that
were read, and for those that uniform routing must read where experts fill the wall but for the other weights.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from fluxmoe.kernels.expert_blocks import blocks_of
from fluxmoe.kernels.formats import DEFAULT_COMPRESSED
from fluxmoe.kernels.packing.expert_file import pages
from fluxmoe.models.checkpoint import Checkpoint
from fluxmoe.models.decoder import expert_dims
from fluxmoe.models.packed import PackedExperts
from fluxmoe.runtime.disk_rate import BEYOND_CACHES, read_rate
from fluxmoe.runtime.experts.placement import IN_FILES
from fluxmoe.runtime.memory.budget import format_bytes, parse_bytes
from fluxmoe.runtime.serving.config import EngineConfig

from ..commands.pack_checkpoint import pack_checkpoint
from ..lib import wall
from ..lib.args import group, option
from ..lib.freed_memory import wait_until_taken_back
from ..lib.gguf import write_gguf
from ..lib.machines import Machine
from ..lib.models import ModelChoice, Source
from ..lib.page_cache import drop_cached
from ..lib.results import UsageError, values_by
from ..lib.serve import compile_kernels, placed, placement_name
from ..lib.sweep import Sweep
from ..plots.walls import plot_walls
from .bounds import Bounds
from .engines import RefusedError, WorkerPeer
from .phases import AHEAD
from .versus import version_of

NO_WALL = "none"
LLAMA, VLLM = "llama.cpp", "vllm"
HELD = ("base_bytes", "ledger_bytes", "mapped_experts", "rss_bytes", "peak_bytes", "wall_mapped_bytes")
_VLLM_BLOCK = 128  # tokens of a KV block of vLLM's CPU build


def wall_name(text: str) -> str:
    """`none`, or a number of bytes."""
    if text != NO_WALL and parse_bytes(text) is None:
        raise UsageError(f"--walls takes numbers of bytes, as 8GB, and `{NO_WALL}`, not {text!r}")
    return text


@dataclass(frozen=True, kw_only=True)
class Arguments:
    model: ModelChoice = group("config")
    packed: Path | None = option("the model, packed (default: beside it, made if needed)", None, metavar="DIR")
    gguf: Path | None = option("the same for llama.cpp (default: beside it, made if needed)", None, metavar="FILE")
    llama_python: str | None = option(
        "Python of an environment that has llama-cpp-python (default: without llama.cpp)", None, metavar="PATH"
    )
    vllm_python: str | None = option(
        "Python of an environment that has vLLM (default: without vLLM)", None, metavar="PATH"
    )
    walls: tuple[str, ...] = option(
        "memory of each process in all", (NO_WALL, "12GB", "8GB", "6GB", "4GB"), parse=wall_name, metavar="BYTES"
    )
    placements: tuple[str, ...] = option(
        "of ours", ("resident", "packed", f"disk+{DEFAULT_COMPRESSED}"), parse=placement_name, metavar="NAME[+FORMAT]"
    )
    sequences: tuple[int, ...] = option("decoded at once", (1, 8, 32), least=1)
    open_sequences: tuple[int, ...] = option("decoded at once without a wall, too", (64,), least=1)
    prompt_tokens: int = option("of each sequence", 32, least=4)
    output_tokens: int = option("of each sequence at most", 20, least=1)
    seconds: float = option("of decoding at most", 8.0)
    patience: float = option("seconds without an answer after which a process is ended", 300.0)
    rounds: int = option("processes of each", 3, least=1)
    eager: bool = option("vLLM without torch.compile", False)
    out: Path = option("folder of the results", metavar="DIR")

    def __post_init__(self) -> None:
        if self.eager and not self.vllm_python:
            raise UsageError("--eager is of vLLM: without --vllm-python it has no effect")
        if not (self.seconds > 0 and self.patience > 0):
            raise UsageError("--seconds and --patience must be positive")
        if self.gguf and not self.llama_python:
            raise UsageError("--gguf is for llama.cpp: without --llama-python it has no effect")


class Files(NamedTuple):
    """One model three times: as it is, packed for our kernels, and for llama.cpp."""

    source: Source
    packed: Path
    gguf: Path | None

    @property
    def weights_bytes(self) -> int:
        model = self.source.config
        return model.non_expert_bytes + model.expert_bytes_total

    @property
    def all(self) -> list[Path]:
        return [self.source.weights, self.packed, *([self.gguf] if self.gguf else [])]


def prepare(args: Arguments) -> Files:
    """The model, packed and as a GGUF file; what is missing is made."""
    source = args.model.source()
    beside = source.weights.resolve()
    packed = args.packed or beside.with_name(f"{beside.name}-{DEFAULT_COMPRESSED}")
    if not (packed.exists() and PackedExperts.in_directory(packed)):
        print(f"packing into {packed} …", flush=True)
        pack_checkpoint(source.weights, DEFAULT_COMPRESSED, packed)
    if Checkpoint(packed).content != Checkpoint(source.weights).content:
        raise UsageError(f"{packed} was not packed from {source.weights}")
    gguf = args.gguf or beside.with_name(f"{beside.name}.gguf") if args.llama_python else None
    if gguf is not None and not gguf.exists():
        print(f"writing {gguf} …", flush=True)
        write_gguf(source.weights, gguf)
    return Files(source, packed, gguf)


class Setup(NamedTuple):
    """What all processes behind one wall are asked. limit: bytes, None without one; jobs: each prefills as many
    sequences as its first number says."""

    wall: str
    limit: int | None
    jobs: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, name: str, args: Arguments) -> Setup:
        if name == NO_WALL:
            return cls(name, None, tuple((n,) for n in sorted({*args.sequences, *args.open_sequences})))
        return cls(name, parse_bytes(name), (tuple(sorted(set(args.sequences), reverse=True)),))

    @property
    def batches(self) -> list[int]:
        return [batch for job in self.jobs for batch in job]

    @property
    def most(self) -> int:
        return max(self.batches)

    def context(self, args: Arguments) -> int:
        return args.prompt_tokens + 1 + max(map(len, self.jobs)) * args.output_tokens

    def without(self, done: Callable[[int], bool]) -> Setup:
        jobs = (tuple(batch for batch in job if not done(batch)) for job in self.jobs)
        return self._replace(jobs=tuple(filter(None, jobs)))


Start = Callable[[wall.Fence | None], WorkerPeer]


def ours(args: Arguments, files: Files, setup: Setup, placement: str) -> Start:
    engine = {
        "max_batch": setup.most, "max_context": setup.context(args), "min_kv_tokens": setup.context(args),
        "max_batched_tokens": setup.most * args.prompt_tokens,
    }  # fmt: skip
    model = files.source.weights if placement == "resident" else files.packed
    settings = {"model": str(model), "placement": placement, "engine": engine}
    return lambda fence: WorkerPeer(
        f"fluxmoe {placement}", sys.executable, "walled_worker.py", settings, wall=fence, patience_s=args.patience
    )


def llama(args: Arguments, files: Files, setup: Setup) -> Start:
    settings = {
        "model": str(files.gguf), "threads": len(os.sched_getaffinity(0)), "sequences": setup.most,
        "context": setup.context(args), "prompt_tokens": args.prompt_tokens, "unified": setup.limit is not None,
    }  # fmt: skip
    python = args.llama_python or ""
    return lambda fence: WorkerPeer(LLAMA, python, "llama_worker.py", settings, wall=fence, patience_s=args.patience)


def vllm(args: Arguments, files: Files, setup: Setup) -> Start:
    model, context = files.source.config, setup.context(args) + AHEAD
    # Whole blocks for every sequence, and the one that vLLM keeps for itself: with fewer some wait till others end.
    blocks = setup.most * -(-context // _VLLM_BLOCK) + 1
    kv = blocks * _VLLM_BLOCK * model.kv_bytes_per_token
    llm = {
        "model": str(files.source.weights.resolve()), "max_model_len": context, "max_num_seqs": setup.most,
        "max_num_batched_tokens": max(setup.most * args.prompt_tokens, context), "enforce_eager": args.eager,
        "dtype": "bfloat16", "kv_cache_memory_bytes": kv,
    }  # fmt: skip

    def start(fence: wall.Fence | None) -> WorkerPeer:
        if fence is not None and files.weights_bytes > fence.limit:
            more = format_bytes(files.weights_bytes - fence.limit)
            raise RefusedError(f"its weights alone are {more} more than the wall, and its CPU build offloads nothing")
        python, settings = args.vllm_python or "", {"llm": llm, "phases": True}
        return WorkerPeer(VLLM, python, "vllm_worker.py", settings, wall=fence, patience_s=args.patience)

    return start


def turns(args: Arguments, files: Files, setup: Setup) -> list[tuple[str, Start]]:
    """Who runs behind a wall, in order. Ours are tried until one is not refused."""
    placements = [p for p in args.placements if setup.limit is not None or placed(p)["placement"] not in IN_FILES]
    found = [(f"fluxmoe {placement}", ours(args, files, setup, placement)) for placement in placements]
    if args.llama_python:
        found.append((LLAMA, llama(args, files, setup)))
    if args.vllm_python:
        found.append((VLLM, vllm(args, files, setup)))
    return found


def answers(
    args: Arguments, files: Files, setup: Setup, start: Start, vocab_size: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(sequences, what came of them) for all of a process: timings, or a status and its reason."""
    waiting, status = list(setup.batches), "refused"
    try:
        with ExitStack() as stack:
            drop_cached(files.all)
            fence = stack.enter_context(wall.fence(setup.limit, files.all)) if setup.limit is not None else None
            begin = time.perf_counter()
            peer = start(fence)
            stack.callback(peer.close)
            about, status = {"start_s": time.perf_counter() - begin, **peer.ready}, "stopped"
            wait_until_taken_back(begin, files.weights_bytes)
            for job in setup.jobs:
                prompts = np.random.default_rng(job[0]).integers(0, vocab_size, (job[0], args.prompt_tokens))
                peer.ask({"prompts": prompts.tolist(), "batches": job, "tokens": args.output_tokens,
                          "seconds": args.seconds})  # fmt: skip
                for batch in job:
                    answer = about | peer.answer()
                    assert answer["batch"] == batch, "a job is answered in order"
                    if fence is not None:
                        answer["wall_mapped_bytes"] = fence.mapped_bytes
                        answer["peak_bytes"] = fence.peak_bytes + answer["wall_mapped_bytes"]
                    yield waiting.pop(0), answer
    except RefusedError as error:
        yield from ((batch, {"status": status, "reason": str(error)}) for batch in waiting)


def row(answer: Mapping[str, Any], provider: str, setup: Setup, args: Arguments, bounds: Bounds) -> dict[str, Any]:
    """The columns of an answer."""
    if "status" in answer:
        return dict(answer)
    batch, tokens, expert_bytes = answer["batch"], answer["decode_tokens"], bounds.expert_bytes(provider)
    rate, read = tokens / answer["decode_s"], answer["read_bytes"] / tokens
    bound = bounds.of_bytes(read)
    found = {
        "status": "ok", "reason": "", "decode_tokens_per_s": rate, "decode_s": answer["decode_s"],
        "decode_tokens": tokens, "read_bytes_per_token": read, "bound_tokens_per_s": bound,
        "share_of_bound": bound and rate / bound,
        "uniform_bound_tokens_per_s": bounds.uniform(expert_bytes, setup.limit, batch),
        "disk_bytes_per_s": bounds.rate, "busy_disk_bytes_per_s": bounds.busy_rate, "start_s": answer["start_s"],
        "cache_bytes": answer.get("expert_cache"), "kv_bytes": answer.get("kv_cache"),
        **{name: answer.get(name) for name in HELD},
    }  # fmt: skip
    if "prefill_s" in answer:
        prompt = len(answer["first_tokens"]) * args.prompt_tokens
        found |= {"prefill_tokens_per_s": prompt / answer["prefill_s"], "prefill_s": answer["prefill_s"],
                  "prefill_read_bytes": answer["prefill_read_bytes"],
                  "first_tokens": " ".join(map(str, answer["first_tokens"]))}  # fmt: skip
    if answer.get("cache_hits") or answer.get("cache_misses"):
        missed = answer["cache_misses"]
        found |= {"hit_rate": answer["cache_hits"] / (answer["cache_hits"] + missed),
                  "missed_bytes_per_token": missed * expert_bytes / tokens}  # fmt: skip
    if answer.get("load_ns"):
        found["load_bytes_per_s"] = answer["loaded_bytes"] / (answer["load_ns"] / 1e9)
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in found.items()}


class Turns:
    """Processes, one after the other, into the rows of a sweep."""

    def __init__(self, args: Arguments, files: Files, sweep: Sweep, processes: int) -> None:
        self._args, self._files, self._sweep = args, files, sweep
        # What was refused once is not started again.
        self._refused: dict[tuple[str, str], str] = {}
        self._left, self._ran, self._begin = processes, 0, time.perf_counter()

    def round(self, number: int, setup: Setup, bounds: Bounds) -> None:
        """All behind one wall, once."""
        fits = False
        for provider, start in turns(self._args, self._files, setup):
            is_ours = provider.startswith("fluxmoe ")
            if not (fits and is_ours and setup.limit is not None):
                started = self._take(number, setup, provider, start, bounds)
                fits = fits or (is_ours and started)
            self._left -= 1

    def _take(self, number: int, setup: Setup, provider: str, start: Start, bounds: Bounds) -> bool:
        """Make the rows of a process that are missing; whether it started."""
        args, sweep = self._args, self._sweep
        points = {n: {"wall": setup.wall, "sequences": n, "provider": provider, "round": number} for n in setup.batches}
        made = {"jobs": setup.jobs}
        missing = setup.without(lambda batch: sweep.has(made, **points[batch]))
        known = self._refused.get((setup.wall, provider))
        if missing.jobs and not known:
            each = (time.perf_counter() - self._begin) / max(1, self._ran)
            left = f", about {self._left * each / 60:.0f} minutes left" if self._ran else ""
            print(f"round {number}, wall {setup.wall}: {provider} (at most {self._left} processes{left})", flush=True)
            self._ran += 1
        found: Iterable[tuple[int, dict[str, Any]]] = ()
        if known:
            found = [(batch, {"status": "refused", "reason": known}) for batch in missing.batches]
        elif missing.jobs:
            found = answers(args, self._files, missing, start, bounds.model.vocab_size)
        for batch, answer in found:
            sweep.measure(partial(row, answer, provider, setup, args, bounds), made, **points[batch])
        rows = [sweep.find(**point) for point in points.values()]
        if refused := [each["reason"] for each in rows if each and each["status"] == "refused"]:
            self._refused[setup.wall, provider] = refused[0]
        return not refused


def run(args: Arguments) -> None:
    setups = [Setup.of(name, args) for name in args.walls]
    if any(setup.limit is not None for setup in setups):
        wall.check()
    versions = {
        LLAMA: version_of(args.llama_python, {}, "llama_cpp") if args.llama_python else None,
        VLLM: version_of(args.vllm_python, {}, "vllm") if args.vllm_python else None,
    }
    files = prepare(args)
    if any(setup.limit is not None for setup in setups):
        for name in args.placements:  # outside of any wall: it takes memory that no ledger has
            compile_kernels(files.source.config, EngineConfig(**placed(name)))
    asked = {name: getattr(args, name) for name in ("prompt_tokens", "output_tokens", "seconds", "eager")}
    made = asked | {"versions": versions}
    model = files.source.config
    sizes = list(map(pages, blocks_of("cpu", expert_dims(model)).expert_bytes(DEFAULT_COMPRESSED)))
    facts = {
        **asked, "peers": versions, "page_cache": "the model's files are dropped from it before each start",
        "freed_memory": "left to a hypervisor that takes it back, before anything is asked",
        "arch": model.arch, "weights_bytes": files.weights_bytes,
    }  # fmt: skip
    with Sweep.serving(args.out, "versus walls", Machine("cpu"), files.source, made, facts, "rows.csv") as sweep:
        taken = Turns(args, files, sweep, args.rounds * sum(len(turns(args, files, setup)) for setup in setups))
        for number in range(args.rounds):
            wait_until_taken_back(time.perf_counter(), files.weights_bytes)
            paths = sorted(files.packed.glob("*.flux"))
            rates = (read_rate(paths, sizes=sizes, busy=busy, memory=BEYOND_CACHES) for busy in (False, True))
            bounds = Bounds(model, *rates)
            for setup in setups:
                taken.round(number, setup, bounds)
        report(sweep.rows, args.walls)
    print(f"figure: {plot_walls(args.out)}")


def report(rows: Sequence[Mapping[str, Any]], walls: Sequence[str]) -> None:
    """Medians, a line a wall and number of sequences; who was refused; whether first tokens are the same."""
    for said in dict.fromkeys(
        f"wall {each['wall']}: {each['provider']} {each['status']}: {each['reason']}"
        for each in rows if each["status"] != "ok"
    ):  # fmt: skip
        print(said)
    ok = [each for each in rows if each["status"] == "ok" and each["wall"] in walls]
    points = {(each["wall"], int(each["sequences"])) for each in ok}
    for name, batch in sorted(points, key=lambda point: (walls.index(point[0]), point[1])):
        of_point = [each for each in ok if (each["wall"], int(each["sequences"])) == (name, batch)]
        rates = values_by(of_point, "provider", "decode_tokens_per_s")
        medians = {provider: float(np.median(values)) for provider, values in rates.items()}
        mine, others = (
            [r for p, r in medians.items() if p.startswith("fluxmoe") == is_ours] for is_ours in (True, False)
        )
        ratio = f"; our best is {max(mine) / max(others):.2f}x theirs" if mine and others else ""
        shown = ", ".join(f"{provider} {rate:.2f}" for provider, rate in medians.items())
        print(f"wall {name}, {batch} sequences, tokens/s in decode: {shown}{ratio}")
    for provider, share in agreement(rows).items():
        print(f"first tokens: {provider} chooses as ours does in {share:.0%}")


def agreement(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Peer → share of prompts after which it chooses the token that ours chooses."""
    chosen: dict[str, dict[tuple[str, int], str]] = {}
    for each in rows:
        for index, token in enumerate((each.get("first_tokens") or "").split()):
            who = "fluxmoe" if each["provider"].startswith("fluxmoe") else each["provider"]
            chosen.setdefault(who, {})[str(each["sequences"]), index] = token
    mine = chosen.pop("fluxmoe", {})
    shared = {who: tokens.keys() & mine.keys() for who, tokens in chosen.items()}
    return {who: sum(chosen[who][p] == mine[p] for p in where) / len(where) for who, where in shared.items() if where}
