"""Many runs into one table: each is a row when it is made, resumed where it was stopped, and never taken for another.

A row's identity (column `made`) is a digest of everything that made it: its settings, workload, model and profile by
content, and our code. A row of the same point that was made otherwise is moved to old_<table>, and made anew.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import filelock
from fluxmoe.runtime.memory.budget import BudgetError, format_bytes
from tqdm import tqdm

from .machines import Machine
from .models import Source
from .results import (
    UsageError,
    anywhere,
    check_out,
    code_digest,
    digest,
    load_json,
    provenance,
    read_csv,
    write_csv,
    write_json,
)

# Exit status of a command whose device was lost: what is left can be measured by another process.
EXIT_AGAIN = 75
# A point at which a process ended so often is not tried again.
_TRIES = 2
_BAD = ("wrong", "failed")
T = TypeVar("T")


class WrongError(Exception):
    """A result that is not what it should be; the message says by how much."""


class AbsentError(Exception):
    """What a point needs (a peer, a tool) is not there, or has another interface than the one known here."""


class Sweep:
    """The rows of one experiment in `out`, and provenance.json beside them.

    experiment: its command, by which its figure is drawn. common: what makes every row. A point at which the process
    ends twice (a hang, a crash) becomes a row that says so. Each row says its status, ok | too_small | wrong | failed |
    absent, the reason, and which run (UTC) made it.
    """

    def __init__(
        self, out: Path | str, experiment: str, table: str = "points.csv", common: Mapping[str, Any] | None = None,
        seed: int | None = 0, device: str = "cpu", **facts: Any,
    ) -> None:  # fmt: skip
        self.out, self.table, self.utc = Path(out), table, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        check_out(self.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self._lock = filelock.FileLock(self.out / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise UsageError(f"another process is writing to {out}: wait for it, or give another --out") from None
        self._common = {"experiment": experiment, "code": code_digest(), **(common or {})}
        self.rows: list[Mapping[str, Any]] = list(read_csv(self.out / table))
        self._old = read_csv(self.out / f"old_{table}")
        self._provenance = self.out / "provenance.json"
        self._run = {"experiment": experiment, **provenance(device, seed), **facts}
        self.about = load_json(self._provenance) if self._provenance.exists() and self.rows else {}
        self._attempt = self.out / "attempt.json"
        self._tried: dict = load_json(self._attempt) if self._attempt.exists() else {"tries": 0}
        self._said = False
        if not self.about:
            self._say_run()

    def _say_run(self) -> None:
        """Say in provenance.json that rows are of this run: not before one is made, where there are others."""
        if not self._said:
            this = {name: self._run[name] for name in ("utc", "command", "commit", "code", "hardware")}
            self.about = {**self._run, "runs": [*self.about.get("runs", []), this]}
            write_json(self._provenance, self.about)
            self._said = True

    @classmethod
    def serving(
        cls, out: Path, experiment: str, machine: Machine, source: Source, made: Mapping[str, Any],
        facts: Mapping[str, Any], table: str = "points.csv", seed: int | None = 0,
    ) -> Sweep:  # fmt: skip
        """Of runs of one model on one machine. made: what else makes every row; facts: what provenance.json says."""
        common = {"machine": machine.content, "model": source.content, **made}
        return cls(out, experiment, table, common, seed, **{**machine.about, "model": anywhere(source.name), **facts})

    def __enter__(self) -> Sweep:
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.release()

    def note(self, **facts: object) -> None:
        """Add to provenance.json."""
        self.about |= facts
        write_json(self._provenance, self.about)

    def note_tokens(self) -> None:
        """Say, here and in provenance.json, whether all rows that could be made have the same tokens."""
        found = {row["tokens_sha256"] for row in self.rows if row["status"] == "ok"}
        if found:
            self.note(tokens="identical" if len(found) == 1 else "DIFFER")
            print(f"tokens: {'identical in all runs' if len(found) == 1 else f'DIFFER: {len(found)} variants'}")

    def find(self, **point: object) -> Mapping[str, Any] | None:
        """The row of a point, however it was made."""
        return next(iter(self._matching(point)), None)

    def _matching(self, point: Mapping[str, object]) -> list[Mapping[str, Any]]:
        """Rows that have `point` in common."""
        wanted = _plain(point).items()
        return [row for row in self.rows if all(str(row.get(k, "")) == value for k, value in wanted)]

    def has(self, made: Mapping[str, Any] | None = None, **point: object) -> bool:
        """Whether the row of a point is there, and made as it would be now; what was absent may be there now."""
        row = self.find(**point)
        return row is not None and row.get("made") == self.identity(made, point) and row["status"] != "absent"

    def identity(self, made: Mapping[str, Any] | None, point: Mapping[str, object]) -> str:
        return digest(self._common, made or {}, _plain(point))

    def measure(
        self, work: Callable[[], Mapping[str, object]], made: Mapping[str, Any] | None = None, **point: object
    ) -> dict | None:
        """The row of `point` with the columns that `work` returns; None if it is there already.

        made: what makes it, beside what makes every row. What `work` raises is a row too. Exits with EXIT_AGAIN if the
        device is lost with it.
        """
        if self.has(made, **point):
            return None
        tries = self._tried["tries"] + 1 if self._tried.get("point") == _plain(point) else 1
        if tries > _TRIES:
            self._attempt.unlink()
            return self._add(point, made, {"status": "failed", "reason": "the process hung, crashed or was ended here"})
        write_json(self._attempt, {"point": _plain(point), "tries": tries})
        try:
            found: dict[str, Any] = {"status": "ok", "reason": "", **work()}
        except BudgetError as error:
            found = {"status": "too_small", "reason": _one_line(error), "least_budget": error.least}
        except WrongError as error:
            found = {"status": "wrong", "reason": _one_line(error)}
        except AbsentError as error:
            found = {"status": "absent", "reason": _one_line(error)}
        except KeyboardInterrupt:
            self._attempt.unlink()
            raise
        except Exception as error:  # the row says which, and the next point goes on
            found = {"status": "failed", "reason": f"{type(error).__name__}: {_one_line(error)}"}
        row = self._add(point, made, found)
        self._attempt.unlink()
        if row["status"] == "failed" and _device_is_lost():
            print("the device is lost; what is left needs another process", file=sys.stderr)
            sys.exit(EXIT_AGAIN)
        return row

    def _add(self, point: Mapping[str, object], made: Mapping[str, Any] | None, found: Mapping[str, Any]) -> dict:
        if (before := self.find(**point)) is not None:
            self.rows.remove(before)
            self._keep_old([before])
        self._say_run()
        # The point's own columns are found by, whatever work calls its own.
        row = {**point, **found, **point, "run": self.utc, "made": self.identity(made, point)}
        self.rows.append(row)
        write_csv(self.out / self.table, self.rows)
        return row

    def made_together(self, **point: object) -> bool:
        """Whether the rows that have `point` in common are there, and made as they would be now."""
        rows = self._matching(point)
        return bool(rows) and all(row.get("made") == self.identity(None, point) for row in rows)

    def replace(self, point: Mapping[str, object], rows: Iterable[Mapping[str, Any]]) -> None:
        """Rows that were made together, in the place of those that have `point` in common."""
        old = self._matching(point)
        self._say_run()
        self._keep_old(old)
        made = {"run": self.utc, "made": self.identity(None, point)}
        self.rows = [row for row in self.rows if row not in old] + [{**row, **made} for row in rows]
        write_csv(self.out / self.table, self.rows)

    def _keep_old(self, rows: Sequence[Mapping[str, Any]]) -> None:
        if rows:
            self._old += [{key: str(value) for key, value in row.items()} for row in rows]
            write_csv(self.out / f"old_{self.table}", self._old)

    def all(self, points: Sequence[tuple[Mapping[str, Any], Mapping[str, Any], Callable[[], Mapping]]]) -> list[dict]:
        """Make the rows of (point, what makes it, work) that are missing, with progress; the rows of all points."""
        missing = [each for each in points if not self.has(each[1], **each[0])]
        old = sum(self.find(**point) is not None for point, _, _ in missing)
        if old:
            print(f"{old} rows of {self.out} were made otherwise (settings, model or code): made anew; the old ones "
                  f"are kept in old_{self.table}")  # fmt: skip
        bar = tqdm(missing, "runs", unit="run", disable=None)
        for point, made, work in bar:
            bar.set_postfix_str(" ".join(map(str, point.values())))
            self.measure(work, made, **point)
            gc.collect()
        asked = [_plain(point) for point, _, _ in points]
        return [row for row in read_csv(self.out / self.table) if any(p.items() <= row.items() for p in asked)]

    def finish(self) -> None:
        """Exits with status 1 if any row is wrong or failed, or no row could start."""
        bad = [row for row in self.rows if row["status"] in _BAD]
        for row in bad:
            print(f"{row['status']}: {row['reason']}", file=sys.stderr)
        if bad:
            sys.exit(1)
        if self.rows and all(row["status"] == "too_small" for row in self.rows):
            # Where the host's part alone is too much, an error knows no least.
            known = [int(row["least_budget"]) for row in self.rows if row.get("least_budget") not in (None, "")]
            least = f"{format_bytes(min(known))} ({min(known)} bytes)" if known else "not known: see the rows' reasons"
            print(f"no budget is large enough; the least that works is {least}")
            sys.exit(1)


def say(row: Mapping[str, object] | None) -> None:
    """Print a row that was just made."""
    shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in (row or {}).items() if v not in ("", None)}
    shown = {k: v for k, v in shown.items() if k not in ("run", "made")}
    if shown:
        print(", ".join(f"{name} {value}" for name, value in shown.items()), flush=True)


def in_turns(points: Iterable[T], repeats: int) -> list[tuple[int, T]]:
    """(turn, point): all points, then all again, so that a machine whose speed drifts favours none."""
    each = list(points)
    return [(turn, point) for turn in range(repeats) for point in each]


def _plain(point: Mapping[str, object]) -> dict[str, str]:
    return {name: "" if value is None else str(value) for name, value in point.items()}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


def _device_is_lost() -> bool:
    """Whether an error stays with this process's context, as that of an illegal access does."""
    import torch

    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
