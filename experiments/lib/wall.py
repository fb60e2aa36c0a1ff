"""A real limit of memory: a function runs in a fresh process under a memory cgroup, which the kernel enforces.

The group is a child of the one that this process is in, so a limit around us holds as before. Both versions of cgroups
are known. Swap counts too: a wall that the system can swap around is none.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from fluxmoe.runtime.memory.budget import format_bytes

from .results import UsageError

_PREFIX = "fluxmoe-"
# Imports of large libraries take hundreds of MiB within 50 ms, so a peak is looked for more often.
_LOOK_S = 0.01


class WallError(UsageError):
    """No wall can be made here; the message says why."""


class KilledError(ValueError):
    """The process behind the wall was killed, by the wall or by something else, or ended without an answer."""


class Answer(NamedTuple):
    """value: what the function returned; peak_bytes: the most that its process held, without page cache, as seen every
    10 ms."""

    value: Any
    peak_bytes: int


class _Files(NamedTuple):
    """What a version of cgroups calls its files, and the entries of memory.stat that are no page cache."""

    limit: str
    swap: str
    swap_is_total: bool
    held: tuple[str, ...]
    kills: str


_V1 = _Files(
    "memory.limit_in_bytes", "memory.memsw.limit_in_bytes", True, ("total_rss", "total_shmem"), "memory.oom_control"
)
_V2 = _Files("memory.max", "memory.swap.max", False, ("anon", "shmem"), "memory.events")


def call(limit: int, function: Callable[..., Any], *args: object) -> Answer:
    """`function(*args)` in a fresh process that cannot hold more than `limit` bytes.

    What it raises is raised here. function, arguments and result are pickled. KilledError if the process ends without
    an answer, WallError where no wall can be made. Nothing is left behind, unless this process is killed; then the next
    call removes it.
    """
    with fence(limit) as behind, tempfile.TemporaryFile() as job, tempfile.TemporaryFile() as answer:
        pickle.dump((sys.argv, function, args), job)
        job.seek(0)
        child = f"from {__name__} import _child; _child({answer.fileno()})"
        process = subprocess.Popen(
            behind.command([sys.executable, "-c", child]), stdin=job, pass_fds=(answer.fileno(),),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )  # fmt: skip
        try:
            while process.poll() is None:
                behind.look()
                time.sleep(_LOOK_S)
        finally:
            process.kill()
            process.wait()
        answer.seek(0)
        if process.returncode:
            raise KilledError(behind.why(process.returncode))
        good, value = pickle.load(answer)
        if not good:
            raise value
        return Answer(value, behind.peak_bytes)


class Fence:
    """A wall of `limit` bytes around the processes that are started by `command`, all of them together.

    peak_bytes: the most that they held, without page cache, whenever `look` was called.
    """

    def __init__(self, limit: int, group: Path, files: _Files) -> None:
        self.limit, self._group, self._files, self.peak_bytes = limit, group, files, 0

    def command(self, argv: Sequence[str]) -> list[str]:
        """What to start for `argv` to run behind the wall."""
        return ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self._group / "cgroup.procs"), *argv]

    def look(self) -> None:
        entries = _entries(self._group / "memory.stat")
        self.peak_bytes = max(self.peak_bytes, sum(entries.get(name, 0) for name in self._files.held))

    @property
    def killed(self) -> bool:
        """Whether the wall has killed a process behind it."""
        return _entries(self._group / self._files.kills).get("oom_kill", 0) > 0

    def why(self, status: int) -> str:
        """Why a process behind the wall ended with a status that is not 0."""
        if self.killed:
            return (
                f"the process was killed by its wall of {format_bytes(self.limit)}; it held "
                f"{format_bytes(self.peak_bytes)} when last seen: give it more, or the engine a smaller budget"
            )
        said = f"signal {-status}" if status < 0 else f"status {status}"
        return f"the process behind a wall of {format_bytes(self.limit)} ended with {said}, without an answer"


@contextmanager
def fence(limit: int) -> Iterator[Fence]:
    """A wall; what still runs behind it in the end is killed. WallError where none can be made."""
    with _group(limit) as (group, files):
        yield Fence(limit, group, files)


def check() -> None:
    """WallError where no wall can be made."""
    with _group(1 << 30):
        pass


def _child(answer: int) -> None:
    """What the fresh process does: the job of its standard input, its answer into an open file."""
    try:
        # The command line, which results name.
        sys.argv, function, args = pickle.load(sys.stdin.buffer)
        data = pickle.dumps((True, function(*args)))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BaseException as error:
        try:
            data = pickle.dumps((False, error))
            pickle.loads(data)
        except Exception:
            data = pickle.dumps((False, RuntimeError(traceback.format_exc())))
    with os.fdopen(answer, "wb") as file:
        file.write(data)


@contextmanager
def _group(limit: int) -> Iterator[tuple[Path, _Files]]:
    """A memory cgroup of `limit` bytes within our own; its name holds our process id."""
    parent, files = _own_group()
    _remove_stale(parent)
    group = parent / f"{_PREFIX}{os.getpid()}-{time.monotonic_ns()}"
    try:
        group.mkdir()
    except OSError as error:
        raise WallError(f"no memory cgroup can be made here: {parent}: {error.strerror}") from None
    try:
        try:
            (group / files.limit).write_text(str(limit))
            if (group / files.swap).exists():
                (group / files.swap).write_text(str(limit if files.swap_is_total else 0))
        except OSError as error:
            raise WallError(
                f"this process may not limit memory by a cgroup ({error.strerror}: {group / files.limit}): run it as "
                "root, or without a wall in a container whose memory is limited"
            ) from None
        yield group, files
    finally:
        _remove(group)


def _own_group(root: Path = Path("/")) -> tuple[Path, _Files]:
    """The folder of the memory cgroup that this process is in. WallError if there is none."""
    try:
        memberships = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        raise WallError("no memory cgroup can be made here: this system has no cgroups") from None
    for _, controllers, path in sorted(memberships, key=lambda entry: "memory" not in entry[1].split(",")):
        if controllers and "memory" not in controllers.split(","):
            continue
        files, mount = (_V1, "sys/fs/cgroup/memory") if controllers else (_V2, "sys/fs/cgroup")
        # A container sees its own group as the root of what is mounted, whatever its path is called outside.
        for group in (root / mount / path.lstrip("/"), root / mount):
            if str(os.getpid()) in _members(group):
                return group, files
    raise WallError("no memory cgroup can be made here: none is mounted that this process is in")


def _members(group: Path) -> list[str]:
    try:
        return (group / "cgroup.procs").read_text().split()
    except OSError:
        return []


def _remove_stale(parent: Path) -> None:
    """Remove groups whose maker was killed; one in which something still runs stays."""
    for group in parent.glob(f"{_PREFIX}*-*"):
        maker = group.name.removeprefix(_PREFIX).partition("-")[0]
        if maker.isdigit() and not Path(f"/proc/{maker}").exists():
            try:
                group.rmdir()
            except OSError:
                continue


def _remove(group: Path) -> None:
    """End what still runs in `group`, and remove it: the kernel lets go of it a little later."""
    for _ in range(200):
        try:
            for pid in _members(group):
                os.kill(int(pid), signal.SIGKILL)
            group.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.01)


def _entries(path: Path) -> dict[str, int]:
    """A file of `name number` lines; what cannot be read is empty."""
    try:
        return {name: int(value) for name, value in (line.split() for line in path.read_text().splitlines())}
    except (OSError, ValueError):
        return {}
