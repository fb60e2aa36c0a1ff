"""What GPU benchmarks share: roofs measured in the same run, cold timing by CUDA graphs, result rows on disk.

A point is timed by replaying a graph that runs the work once on each of several copies of the weights, which together
exceed L2: weights are cold, as in a model whose other layers run in between, and launch gaps are those of serving.
Work that cannot be captured (a peer that waits for the device) is timed eagerly, and its row says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from .common import UsageError, provenance, write_csv, write_json

GIB = 1 << 30


@dataclass(frozen=True)
class Roofs:
    """Rates that no kernel can pass: copying device memory (bytes read plus written) and a large bf16 matmul."""

    bytes_per_s: float
    flops_per_s: float

    def floor_s(self, nbytes: float, flops: float) -> float:
        return max(nbytes / self.bytes_per_s, flops / self.flops_per_s)


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: 20th, 50th and 80th percentile; method is graph or eager."""

    p20: float
    p50: float
    p80: float
    method: str


def require_gpu() -> torch.device:
    """The CUDA device; UsageError where there is none."""
    if not torch.cuda.is_available():
        raise UsageError("no CUDA device can be used here; --predict writes what the machine code lets expect")
    return torch.device("cuda")


def measure_roofs() -> Roofs:
    """1 GiB copied, and an 8192 x 8192 x 8192 product in bf16."""
    source = torch.empty(GIB, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = time_calls([lambda: target.copy_(source)]).p50
    a, b, c = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    matmul = time_calls([lambda: torch.mm(a, b, out=c)]).p50
    return Roofs(2 * GIB / copy, 2 * 8192**3 / matmul)


def cold_copies(nbytes: int) -> int:
    """Copies of `nbytes` of weights that together are at least three times L2, and at least two."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, -(-3 * l2 // max(1, nbytes)))


def time_calls(work: Sequence[Callable[[], object]], seconds: float = 0.15) -> Timing:
    """Time of one call, all of `work` run in turns. The first round, which compiles, is not timed."""
    for call in work:
        call()
    torch.cuda.synchronize()
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in work:
                call()
        once, method = graph.replay, "graph"
    except RuntimeError:
        torch.cuda.synchronize()

        def once() -> None:
            for call in work:
                call()

        method = "eager"
    once()
    first = _elapsed(once)
    rounds = int(np.clip(seconds / max(first, 1e-7), 5, 200))
    times = np.array([_elapsed(once) for _ in range(rounds)]) / len(work)
    p20, p50, p80 = np.percentile(times, [20, 50, 80])
    return Timing(float(p20), float(p50), float(p80), method)


def _elapsed(work: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


class ResultRows:
    """Rows of one experiment: every `add` leaves a whole rows.csv, provenance.json beside it."""

    def __init__(self, out: Path | str, roofs: Roofs, device: str = "cuda", **facts: object) -> None:
        self.out, self.rows = Path(out), []
        write_json(self.out / "provenance.json", {**provenance(device, 0), "roofs": asdict(roofs), **facts})

    def add(self, row: dict) -> None:
        self.rows.append(row)
        write_csv(self.out / "rows.csv", self.rows)


def load_json(path: Path | str) -> dict:
    """A JSON file's content; UsageError if it cannot be read."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
