"""What benchmarks share: roofs measured in the same run, cold timing by CUDA graphs, and turns on the host's clock.

A point is timed by replaying a graph that runs the work once on each of several copies of the weights, which together
exceed L2: weights are cold, as in a model whose other layers run in between, and launch gaps are those of serving.
Work that cannot be captured (a peer that waits for the device) is timed eagerly, and its row says so.
"""

from __future__ import annotations

import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from fluxmoe.kernels.work import Work
from torch import Tensor

from ..lib.args import option
from ..lib.results import UsageError
from ..lib.sweep import Sweep, WrongError, say

GIB = 1 << 30
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class GpuBench:
    """Where a benchmark of a GPU runs, and its rows go."""

    rehearse: bool = option("no GPU: the smallest case, interpreted on the CPU; times mean nothing", False)
    out: Path = option("folder of the results", metavar="DIR")

    @property
    def device(self) -> torch.device:
        return require_gpu(self.rehearse)

    def rows(self, experiment: str, made: Mapping[str, Any] | None = None, **facts: Any) -> Sweep:
        kind = "rehearsed" if self.rehearse else "measured"
        common = {"kind": kind, **(made or {})}
        return Sweep(self.out, experiment, "rows.csv", common, device=self.device.type, kind=kind, **facts)


@dataclass(frozen=True)
class Roofs:
    """Rates that hardly a kernel passes: memory, read or copied (bytes read plus written), and a large bf16 matmul."""

    bytes_per_s: float
    flops_per_s: float

    def floor_s(self, nbytes: float, flops: float) -> float:
        return max(nbytes / self.bytes_per_s, flops / self.flops_per_s)


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: 20th, 50th and 80th percentile; method is graph, eager or rehearsal."""

    p20: float
    p50: float
    p80: float
    method: str

    @property
    def columns(self) -> dict[str, float | str]:
        """As a row has them."""
        return {"time_us": self.p50 * 1e6, "p20_us": self.p20 * 1e6, "p80_us": self.p80 * 1e6, "method": self.method}


def require_gpu(rehearse: bool = False) -> torch.device:
    """The CUDA device, or the CPU for a rehearsal; UsageError where there is none."""
    if rehearse:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError("no CUDA device can be used here; --rehearse runs the smallest case without one")
    return torch.device("cuda")


def check(got: Tensor, expected: Tensor) -> None:
    """WrongError unless `got` agrees within the roundings of bf16."""
    error = ((got.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-6)).item()
    if not error < 0.02:  # nor for NaN
        raise WrongError(f"it differs by {error:.1%} of the largest value")


def measure_roofs(device: torch.device | str = "cuda") -> Roofs:
    """1 GiB read and copied, and an 8192 x 8192 x 8192 product in bf16; in a rehearsal, next to nothing.

    Memory's rate is the best of three: an H200 copies 2.8 TB/s by a graph's memcpy node, and 4 by a kernel.
    """
    nbytes, n = (GIB, 8192) if torch.device(device).type == "cuda" else (1 << 16, 64)
    source = torch.randn(nbytes // 4, device=device)
    target = torch.empty_like(source)
    traffic: list[tuple[int, Callable[[], object]]] = [
        (2 * nbytes, lambda: target.copy_(source)),
        (2 * nbytes, lambda: torch.neg(source, out=target)),
        (nbytes, source.sum),
    ]
    memory = max(moved / time_calls([call]).p50 for moved, call in traffic)
    a, b, c = (torch.randn(n, n, dtype=torch.bfloat16, device=device) for _ in range(3))
    matmul = time_calls([lambda: torch.mm(a, b, out=c)]).p50
    return Roofs(memory, 2 * n**3 / matmul)


def cold_copies(nbytes: int) -> int:
    """Copies of `nbytes` of weights that together are at least three times L2, and at least two; one in a rehearsal."""
    if not torch.cuda.is_available():
        return 1
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, -(-3 * l2 // max(1, nbytes)))


def time_calls(work: Sequence[Callable[[], object]], seconds: float = 0.15, graph: bool = True) -> Timing:
    """Time of one call, all of `work` run in turns. The first round, which compiles, is not timed.

    graph: whether to try to capture it. Without a GPU, in a rehearsal, each call runs once on the host's clock.
    """
    if not torch.cuda.is_available():
        return _percentiles([host_seconds(call) for call in work], "rehearsal")

    def each() -> None:
        for call in work:
            call()

    each()
    torch.cuda.synchronize()
    replay = _captured(each) if graph else None
    once, method = (replay, "graph") if replay else (each, "eager")
    once()
    rounds = int(np.clip(seconds / max(_elapsed(once), 1e-7), 5, 200))
    return _percentiles([_elapsed(once) / len(work) for _ in range(rounds)], method)


class TimedPoint(ABC):
    """A point at which several providers are timed."""

    @property
    @abstractmethod
    def work(self) -> Work:
        """What our kernels declare of it."""

    @cached_property
    def base_s(self) -> float | None:
        """Seconds of ours in this run, which ratios refer to; None where it is wrong or fails, of which its own row
        says why."""
        try:
            return self.time("fluxmoe").p50
        except Exception:
            return None

    @abstractmethod
    def time(self, provider: str) -> Timing:
        """Checked, then timed; raises WrongError, AbsentError and whatever a kernel raises."""

    def columns(self, provider: str, timing: Timing, roofs: Roofs) -> dict[str, object]:
        """Of a provider's row."""
        return columns_of(self.work, timing, self.base_s, roofs)


def columns_of(work: Work, timing: Timing, base_s: float | None, roofs: Roofs) -> dict[str, object]:
    """Columns of a row: time, what our kernels declare, and how far it is from the floor that this sets; base_s: what
    ratios refer to."""
    floor = roofs.floor_s(*work)
    return {
        **timing.columns, "bytes": work.nbytes, "flops": work.flops, "floor_us": floor * 1e6,
        "share_of_floor": floor / timing.p50, "time_over_ours": timing.p50 / base_s if base_s else "",
    }  # fmt: skip


def time_providers(
    sweep: Sweep, roofs: Roofs, providers: Sequence[str], make: Callable[[], TimedPoint], **where: Any
) -> None:
    """A row for each provider at one point that has none yet."""
    missing = [name for name in providers if not sweep.has(**where, provider=name)]
    if not missing:
        return
    point = make()

    def columns(provider: str) -> dict[str, object]:
        timing = point.time(provider)
        if provider == "fluxmoe":
            point.base_s = timing.p50
        return point.columns(provider, timing, roofs)

    for provider in missing:
        say(sweep.measure(partial(columns, provider), **where, provider=provider))


def _captured(work: Callable[[], None]) -> Callable[[], None] | None:
    """What replays `work` as a graph; None if it cannot be captured."""
    stream, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            work()
    except RuntimeError:
        # A capture that fails leaves its own stream as the current one.
        torch.cuda.set_stream(stream)
        torch.cuda.synchronize()
        return None
    return graph.replay


def _percentiles(times: Sequence[float], method: str) -> Timing:
    p20, p50, p80 = (max(float(value), 1e-9) for value in np.percentile(times, [20, 50, 80]))
    return Timing(p20, p50, p80, method)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """One call, by the device's events where it has a clock of its own."""
    return _elapsed(work) if device.type == "cuda" else host_seconds(work)


def host_seconds(work: Callable[[], object]) -> float:
    """One call, by the host's clock."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def host_times(calls: Sequence[Callable[[], object]], seconds: float = 0.0, rounds: int = 1) -> np.ndarray:
    """Seconds of each call, `calls` one after another, at least so many rounds and so long; the very first, which
    compiles, is not counted."""
    calls[0]()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < rounds * len(calls) or time.perf_counter() - begin < seconds:
        times.append(host_seconds(calls[len(times) % len(calls)]))
    return np.array(times)


def times_in_turns(
    run: Callable[[T, int], float], names: Sequence[T], turns: int, seconds: float = float("inf"), seed: int = 0
) -> dict[T, np.ndarray]:
    """What `run(name, turn)` gives for each of `names` by turn: all take part in each, in an order of its own, so that
    a machine whose speed drifts favours none. Ends early, behind the third turn, after so many seconds."""
    rng, begin = random.Random(seed), time.perf_counter()
    times: dict[T, list[float]] = {name: [] for name in names}
    for turn in range(turns):
        if turn >= 3 and time.perf_counter() - begin > seconds:
            break
        for name in rng.sample(names, len(names)):
            times[name].append(run(name, turn))
    return {name: np.array(each) for name, each in times.items()}


def _elapsed(work: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
