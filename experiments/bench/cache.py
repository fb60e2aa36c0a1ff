"""Which experts a cache should keep: policies ranked on routing that was recorded, or on synthetic routing.

    fluxmoe bench cache --preset small --out results/measured/<cpu>/bench_cache
    fluxmoe bench cache --shapes olmoe-1b-7b qwen3-30b-a3b --out results/simulated/synthetic_routing/bench_cache
    fluxmoe bench cache --recording FILE --expert-bytes BYTES --out DIR       # of generate --record-routing

Replays decode, a token of each of `batch` sequences a pass, through one cache of places for a share of all experts.
Rows count the second half of the passes: hit rate, and bytes that come for each token. --preset serves a small model
first, sampling, at each skew of its routers (see make-checkpoint), and keeps the recordings; --shapes draws hidden
states at a model's sizes instead (`lib.skew.synthetic_routing`): no reuse but popularity and `correlation`.

Beside the cache's policies: belady knows the future, a bound. static keeps what was most popular in the first half, for
ever: as good as residency gets; others pass through slots that are not counted. fixed keeps the same share of every
layer by id, as placements do. crossover.csv has, for each share, the largest batch at which some policy hits more than
either by a point at least.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from fluxmoe.models.checkpoint import Checkpoint
from fluxmoe.models.published import PUBLISHED, published_config
from fluxmoe.runtime.experts.cache_policies import POLICIES, belady, replay, resident
from fluxmoe.runtime.experts.recording import Recording, Visit, visits_of
from fluxmoe.runtime.serving.config import EngineConfig
from fluxmoe.runtime.serving.engine import Engine
from fluxmoe.runtime.serving.request import Request, SamplingParams

from ..lib.args import option
from ..lib.models import PRESETS, preset_config, preset_model
from ..lib.results import UsageError, digest, provenance, write_atomically, write_csv
from ..lib.skew import MOST_SKEW, synthetic_routing
from ..lib.sweep import Sweep, say
from ..plots.bench import plot_cache

BOUND, RESIDENT = "belady", ("static", "fixed")
# A policy is ahead of residency by so much.
_AHEAD = 0.01
_PROMPT = 16


@dataclass(frozen=True, kw_only=True)
class Arguments:
    recording: Path | None = option("routing that generate --record-routing saved", None, metavar="FILE")
    expert_bytes: int | None = option("of an expert, with --recording", None, least=1)
    preset: str | None = option("a small model, which is served and recorded", None, choices=tuple(sorted(PRESETS)))
    shapes: tuple[str, ...] = option("synthetic routing at the sizes of these models", (), choices=tuple(PUBLISHED))
    skews: tuple[float, ...] = option("of routers that are made", (0.0, 1.4), metavar="SKEW")
    correlation: float = option("synthetic: of a sequence's hidden states, token to token", 0.0)
    batches: tuple[int, ...] = option("sequences a pass", (1, 8, 32, 128), least=1)
    shares: tuple[float, ...] = option("of all experts that the cache holds", (0.125, 0.25, 0.5, 0.75))
    passes: int = option("at most, half of them warm-up", 200, least=2)
    checkpoints: Path = option("where presets keep their model", Path("checkpoints"))
    seed: int = option("of prompts, sampling and synthetic routing", 0)
    out: Path = option("folder of the results", metavar="DIR")

    def __post_init__(self) -> None:
        if sum(map(bool, (self.recording, self.preset, self.shapes))) != 1:
            raise UsageError("give one of --recording, --preset and --shapes: whose routing to replay")
        if bool(self.recording) != bool(self.expert_bytes):
            raise UsageError(
                "--recording and --expert-bytes go together: a recording does not say how large experts are"
            )
        if self.correlation and not self.shapes:
            raise UsageError("--correlation is of synthetic routing: it has no effect without --shapes")
        if not 0 <= self.correlation < 1:
            raise UsageError(f"--correlation must be from 0 to below 1, got {self.correlation}")
        for name, values, most in (("skews", self.skews, MOST_SKEW), ("shares", self.shares, 1)):
            if wrong := [value for value in values if not 0 <= value <= most]:
                raise UsageError(f"--{name} must be from 0 to {most:g}, got {wrong[0]}")


class Source(NamedTuple):
    """Routing to replay. skew: None where nobody knows. tokens: batch → experts int16 [passes, batch, L, k]; made: what
    it depends on."""

    name: str
    skew: float | None
    expert_bytes: int
    shape: tuple[int, int]
    tokens: Callable[[int], np.ndarray]
    made: str


def recorded(name: str, skew: float | None, expert_bytes: int, recording: Recording) -> Source:
    # Its arrays: `about` has the time.
    made = digest(hashlib.sha256(recording.experts.tobytes()).hexdigest(), recording.step.tolist())
    return Source(name, skew, expert_bytes, recording.shape, recording.batches, made)


def synthetic(name: str, skew: float, args: Arguments) -> Source:
    model = published_config(name)
    shape = len(model.moe_layers), model.num_experts
    drawing = (*shape, model.top_k, max(args.batches), args.passes, skew, args.correlation, args.seed)
    drawn = cache(partial(synthetic_routing, *drawing))
    expert_bytes = model.expert_params * model.dtype.itemsize
    return Source(name, skew, expert_bytes, shape, lambda batch: drawn()[:, :batch], digest(drawing))


def record(path: Path, name: str, skew: float, args: Arguments) -> Recording:
    """The recording in `path`, made if it is not there: as many sequences as the largest batch, a random prompt each,
    sampled at temperature 1, since greedy decoding of random weights soon repeats itself."""
    checkpoint, lanes = preset_model(name, args.checkpoints, router_skew=skew), max(args.batches)
    content = Checkpoint(checkpoint).content
    asked = {"model": name, "content": content, "lanes": lanes, "passes": args.passes, "seed": args.seed}
    if path.exists() and asked.items() <= (found := Recording.load(path)).about.items():
        return found
    output, rng = args.passes + 1, np.random.default_rng(args.seed)
    params = [SamplingParams(output, temperature=1.0, seed=args.seed + i, ignore_eos=True) for i in range(lanes)]
    prompts = rng.integers(0, preset_config(name).vocab_size, (lanes, _PROMPT)).tolist()
    settings = EngineConfig(device="cpu", record_routing=True, max_batch=lanes, max_context=_PROMPT + output)
    with Engine(checkpoint, settings) as engine:
        engine.generate(Request(tuple(prompt), each) for prompt, each in zip(prompts, params, strict=True))
        assert engine.pager.recorder is not None, "it was asked for"
        made = engine.pager.recorder.recording(**(asked | provenance("cpu", args.seed)))
    write_atomically(path, made.to_bytes())
    return made


def sources(args: Arguments) -> Iterator[Source]:
    if args.recording is not None:
        assert args.expert_bytes is not None, "they go together"
        yield recorded(args.recording.stem, None, args.expert_bytes, Recording.load(args.recording))
    for name in args.shapes:
        yield from (synthetic(name, skew, args) for skew in args.skews)
    for skew in args.skews if args.preset else ():
        assert args.preset is not None, "asked above"
        path, model = args.out / f"routing_skew{skew:g}.npz", preset_config(args.preset)
        expert_bytes = model.expert_params * model.dtype.itemsize
        yield recorded(args.preset, skew, expert_bytes, record(path, args.preset, skew, args))


def kept(shape: tuple[int, int], places: int, popularity: np.ndarray) -> np.ndarray:
    """bool [L, E]: the `places` experts that `popularity` [L, E] ranks first."""
    chosen = np.zeros(shape, bool)
    chosen.flat[np.argsort(-popularity.ravel(), kind="stable")[:places]] = True
    return chosen


def used(shape: tuple[int, int], visits: Sequence[Visit]) -> np.ndarray:
    """int64 [L, E]: how many passes use each expert."""
    counts = np.zeros(shape, np.int64)
    for layer, experts in visits:
        counts[layer, experts] += 1
    return counts


def columns(source: Source, batch: int, share: float, policy: str, passes: int) -> dict[str, Any]:
    """A row: one policy on one source, batch and share."""
    tokens = source.tokens(batch)[:passes]
    layers, experts = source.shape
    visits = [visit for each in tokens for visit in visits_of(each)]
    warm, places = len(tokens) // 2 * layers, round(share * layers * experts)
    if policy == BOUND:
        found = belady(visits, source.shape, places, warm)
    elif policy in RESIDENT:
        by_id = np.broadcast_to(-np.arange(experts), source.shape)
        rank = by_id if policy == "fixed" else used(source.shape, visits[:warm])
        found = resident(visits, kept(source.shape, places, rank), warm)
    else:
        found = replay(visits, source.shape, places, POLICIES[policy], warm)
    counted = len(tokens) - len(tokens) // 2
    return {
        "hit_rate": found.hit_rate, "bytes_per_token": found.misses * source.expert_bytes / (counted * batch),
        "used_per_layer": (found.hits + found.misses) / (counted * layers), "places": places, "passes": len(tokens),
    }  # fmt: skip


def crossovers(rows: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """By source, skew and share: the largest batch at which the best policy is ahead of each kind of residency (0:
    none); and at each batch, which policy that is and by how much it is ahead."""
    rates: dict[tuple, dict[str, float]] = {}
    for row in rows:
        key = row["source"], row["skew"], float(row["share"]), int(row["batch"])
        rates.setdefault(key, {})[row["policy"]] = float(row["hit_rate"])
    found: dict[tuple, dict[str, Any]] = {}
    for (source, skew, share, batch), each in sorted(rates.items()):
        start = {"source": source, "skew": skew, "share": share} | {f"ahead_of_{name}_to": 0 for name in RESIDENT}
        line = found.setdefault((source, skew, share), start)
        line[f"best_{batch}"] = best = max(POLICIES, key=each.__getitem__)
        for name in RESIDENT:
            line[f"over_{name}_{batch}"] = ahead = each[best] - each[name]
            if ahead >= _AHEAD:
                line[f"ahead_of_{name}_to"] = batch
    return list(found.values())


def run(args: Arguments) -> None:
    drawn = "synthetic routing" if args.shapes else None
    if args.recording is not None:
        Recording.load(args.recording).batches(max(args.batches))  # what it lacks is said before anything is made
    facts: dict[str, Any] = {
        "simulated": drawn,
        "correlation": args.correlation,
        "batches": args.batches,
        "shares": args.shares,
    }
    with Sweep(args.out, "bench cache", "rows.csv", {"passes": args.passes}, args.seed, **facts) as sweep:
        policies, points = (*POLICIES, *RESIDENT, BOUND), []
        for source in sources(args):
            kind = "synthetic" if args.shapes else "recorded"
            for batch, share, policy in product(args.batches, args.shares, policies):
                point = {"kind": kind, "source": source.name, "skew": source.skew, "batch": batch, "share": share,
                         "policy": policy}  # fmt: skip
                work = partial(columns, source, batch, share, policy, args.passes)
                points.append((point, {"routing": source.made, "expert_bytes": source.expert_bytes}, work))
        rows = [row for row in sweep.all(points) if row["status"] == "ok"]
        found = crossovers(rows)
        write_csv(args.out / "crossover.csv", found)
        for line in found:
            say(line)
        print(plot_cache(args.out))
        sweep.finish()
