"""What GPU benchmarks share: roofs measured in the same run, cold timing by CUDA graphs, rows that outlive a kill.

A point is timed by replaying a graph that runs the work once on each of several copies of the weights, which together
exceed L2: weights are cold, as in a model whose other layers run in between, and launch gaps are those of serving.
Work that cannot be captured (a peer that waits for the device) is timed eagerly, and its row says so.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

from ..lib.results import UsageError, provenance, read_csv, write_csv, write_json

GIB = 1 << 30
# Exit status of a script whose device was lost: what is left can be measured by another process.
EXIT_AGAIN = 75
# A point at which a script ended so often is not tried again.
_TRIES = 2
_PACKAGES = ("kernels", "models", "runtime", "experiments")


class WrongError(Exception):
    """A result that is not what it should be; the message says by how much."""


class AbsentError(Exception):
    """What a point needs (a peer, a tool) is not there, or has another interface than the one known here."""


@dataclass(frozen=True)
class Roofs:
    """Rates that no kernel can pass: copying device memory (bytes read plus written) and a large bf16 matmul."""

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
        return {
            "time_us": self.p50 * 1e6,
            "p20_us": self.p20 * 1e6,
            "p80_us": self.p80 * 1e6,
            "method": self.method,
        }


def require_gpu(rehearse: bool = False) -> torch.device:
    """The CUDA device, or the CPU for a rehearsal; UsageError where there is none."""
    if rehearse:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError("no CUDA device can be used here; --rehearse runs the smallest case without one")
    return torch.device("cuda")


def measure_roofs(device: torch.device | str = "cuda") -> Roofs:
    """1 GiB copied, and an 8192 x 8192 x 8192 product in bf16; in a rehearsal, next to nothing."""
    nbytes, n = (GIB, 8192) if torch.device(device).type == "cuda" else (1 << 16, 64)
    source = torch.empty(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = time_calls([lambda: target.copy_(source)]).p50
    a, b, c = (torch.randn(n, n, dtype=torch.bfloat16, device=device) for _ in range(3))
    matmul = time_calls([lambda: torch.mm(a, b, out=c)]).p50
    return Roofs(2 * nbytes / copy, 2 * n**3 / matmul)


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
        return _percentiles([_host_seconds(call) for call in work], "rehearsal")
    for call in work:
        call()
    torch.cuda.synchronize()

    def once() -> None:
        for call in work:
            call()

    replay = _captured(once) if graph else None
    once, method = (replay, "graph") if replay else (once, "eager")
    once()
    rounds = int(np.clip(seconds / max(_elapsed(once), 1e-7), 5, 200))
    return _percentiles([_elapsed(once) / len(work) for _ in range(rounds)], method)


def base_seconds(work: Callable[[], Timing]) -> float | None:
    """Seconds of what ratios refer to; None where it is wrong or fails, of which its own row says why."""
    try:
        return work().p50
    except Exception:
        return None


def ratio(timing: Timing, base_s: float | None) -> float | str:
    """Time over that of the base; empty without one."""
    return timing.p50 / base_s if base_s else ""


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


def _host_seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _elapsed(work: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


@cache
def code_digest() -> str:
    """Names the code that made a row, also where there is no git: a digest of all our sources."""
    digest, root = hashlib.sha256(), Path(__file__).resolve().parents[2]
    for path in sorted(path for package in _PACKAGES for path in (root / package).rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


class ResultRows:
    """Rows of one experiment in rows.csv, whole after each; provenance.json beside it.

    Rows that are there are not measured again, but for those that were wrong or failed with other code, or lacked
    something. A point at
    which the process ends twice (a hang, a crash) becomes a row that says so. Each row says what code and which run
    (UTC) made it, and its status: ok | wrong | failed | absent, with the reason.
    """

    def __init__(self, out: Path | str, device: str = "cuda", **facts: object) -> None:
        self.out, self.run = Path(out), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._attempt = self.out / "attempt.json"
        rows = read_csv(self.out / "rows.csv")
        self.rows: list[Mapping] = [
            row for row in rows if row["status"] == "ok" or (row["status"] != "absent" and row["code"] == code_digest())
        ]
        about = {"code": code_digest(), **provenance(device, 0), **facts}
        write_json(self.out / "provenance.json", {**about, "runs": self._runs(about["hardware"])})
        tried: dict = load_json(self._attempt) if self._attempt.exists() else {"tries": 0}
        self._tried = tried
        if tried["tries"] >= _TRIES and not self.has(**tried["point"]):
            self._add({**tried["point"], "status": "failed", "reason": "the process hung, crashed or was ended here"})

    def _runs(self, hardware: str) -> list[dict]:
        path = self.out / "provenance.json"
        runs = load_json(path).get("runs", []) if path.exists() else []
        return [*runs, {"utc": self.run, "hardware": hardware}]

    def find(self, **point: object) -> Mapping | None:
        """The row of a point, if there is one."""
        wanted = _plain(point).items()
        return next((row for row in self.rows if all(str(row.get(k, "")) == value for k, value in wanted)), None)

    def has(self, **point: object) -> bool:
        return self.find(**point) is not None

    def measure(self, work: Callable[[], Mapping[str, object]], **point: object) -> dict | None:
        """The row of `point` with the columns that `work` returns; None if it is there already.

        What `work` raises is a row too. Exits with EXIT_AGAIN if the device is lost with it.
        """
        if self.has(**point):
            return None
        tries = self._tried["tries"] + 1 if self._tried.get("point") == _plain(point) else 1
        write_json(self._attempt, {"point": _plain(point), "tries": tries})
        try:
            row = {**point, "status": "ok", "reason": "", **work()}
        except WrongError as error:
            row = {**point, "status": "wrong", "reason": _one_line(error)}
        except AbsentError as error:
            row = {**point, "status": "absent", "reason": _one_line(error)}
        except Exception as error:  # the row says which, and the next point goes on
            row = {**point, "status": "failed", "reason": f"{type(error).__name__}: {_one_line(error)}"}
        self._add(row)
        self._attempt.unlink()
        if row["status"] == "failed" and _device_is_lost():
            print("the device is lost; what is left needs another process", file=sys.stderr)
            sys.exit(EXIT_AGAIN)
        return row

    def _add(self, row: Mapping[str, object]) -> None:
        self.rows.append({**row, "run": self.run, "code": code_digest()})
        write_csv(self.out / "rows.csv", self.rows)
        shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items() if v not in ("", None)}
        print(", ".join(f"{name} {value}" for name, value in shown.items()), flush=True)

    def finish(self) -> None:
        """Exits with status 1 if any row is wrong or failed."""
        bad = [row for row in self.rows if row["status"] in ("wrong", "failed")]
        for row in bad:
            print(f"{row['status']}: {row['reason']}", file=sys.stderr)
        if bad:
            sys.exit(1)


def _plain(point: Mapping[str, object]) -> dict[str, str]:
    return {name: str(value) for name, value in point.items()}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


def _device_is_lost() -> bool:
    """Whether an error stays with this process's context, as that of an illegal access does."""
    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def load_json(path: Path | str) -> dict:
    """A JSON file's content; UsageError if it cannot be read."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
