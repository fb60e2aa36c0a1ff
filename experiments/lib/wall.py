"""A real limit of memory: a function runs in a fresh process under a memory cgroup, which the kernel enforces.

The group is a child of the one that this process is in, so a limit around us holds as before. Both versions of cgroups
are known; who may not make one asks systemd. Swap counts too: a wall that the system can swap around is none.

Of files that a process maps, the kernel charges a page to whoever brought it to the page cache. So the files that will
be mapped behind a wall are dropped from it first, and it says what of them is charged inside (`mapped_bytes`).
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
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from fluxmoe.kernels.cpu import ENVIRONMENT
from fluxmoe.runtime.memory.budget import format_bytes

from .page_cache import cached_bytes, drop_cached, files_of
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
    """What a version of cgroups calls its files, and the entries of memory.stat that are no page cache, and those that
    are pages of files that are mapped."""

    limit: str
    swap: str
    swap_is_total: bool
    held: tuple[str, ...]
    mapped: str
    kills: str


_V1 = _Files(
    "memory.limit_in_bytes", "memory.memsw.limit_in_bytes", True, ("total_rss", "total_shmem"), "total_mapped_file",
    "memory.oom_control",
)  # fmt: skip
_V2 = _Files("memory.max", "memory.swap.max", False, ("anon", "shmem"), "file_mapped", "memory.events")
# Of a file, what may stay in the page cache when it is dropped: somebody may be reading it.
_STAYS = 0.02


def call(limit: int, function: Callable[..., Any], *args: object, files: Sequence[Path] = ()) -> Answer:
    """`function(*args)` in a fresh process that cannot hold more than `limit` bytes. files: as `fence` says.

    What it raises is raised here. function, arguments and result are pickled. KilledError if the process ends without
    an answer, or the kernel ended any process behind the wall; WallError where no wall can be made. Nothing is left
    behind, unless this process is killed; then the next call removes it.
    """
    with fence(limit, files) as behind, tempfile.TemporaryFile() as job, tempfile.TemporaryFile() as answer:
        pickle.dump((sys.argv, function, args), job)
        job.seek(0)
        child = f"from {__name__} import _child; _child({answer.fileno()})"
        process = subprocess.Popen(
            behind.command([sys.executable, "-c", child]), stdin=job, pass_fds=(answer.fileno(),),
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )  # fmt: skip
        try:
            while process.poll() is None:
                behind.look()
                time.sleep(_LOOK_S)
        finally:
            process.kill()
            process.wait()
        answer.seek(0)
        found = answer.read()
        if process.returncode or behind.killed or not found:
            raise KilledError(behind.why(process.returncode))
        good, value = pickle.loads(found)
        if not good:
            raise value
        return Answer(value, behind.peak_bytes)


class Fence:
    """A wall of `limit` bytes around the processes that are started by `command`, all of them together.

    enter: what their command lines begin with; group: where their cgroup is, None while nobody knows. peak_bytes: the
    most that they held, without page cache, whenever `look` was called.
    """

    def __init__(self, limit: int, enter: Sequence[str], group: Callable[[], Path | None], files: _Files) -> None:
        self.limit, self._enter, self._find, self._files = limit, enter, group, files
        self._group: Path | None = None
        self.peak_bytes = self._kills = 0

    def command(self, argv: Sequence[str]) -> list[str]:
        """What to start for `argv` to run behind the wall."""
        return [*self._enter, *argv]

    def look(self) -> None:
        self._group = self._group or self._find()
        if self._group is not None:
            entries = _entries(self._group / "memory.stat")
            self.peak_bytes = max(self.peak_bytes, sum(entries.get(name, 0) for name in self._files.held))
            # systemd's groups end with their processes, and their counts with them.
            self._kills = max(self._kills, _entries(self._group / self._files.kills).get("oom_kill", 0))

    @property
    def mapped_bytes(self) -> int:
        """Of the files that they map, what is charged to them now; the kernel may be 64 pages a CPU behind."""
        self.look()
        return 0 if self._group is None else _mapped(self._group, self._files)

    @property
    def killed(self) -> bool:
        """Whether the wall has killed a process behind it."""
        self.look()
        return self._kills > 0

    def why(self, status: int) -> str:
        """Why a process behind the wall gave no answer, or one that cannot be trusted."""
        held = f"it held {format_bytes(self.peak_bytes)} when last seen"
        if self.killed:
            return (
                f"the process, or one that it made, was killed by its wall of {format_bytes(self.limit)}; {held}: give "
                "it more, or the engine a smaller budget"
            )
        said = f"signal {-status}" if status < 0 else f"status {status}"
        perhaps = f" (perhaps by the wall: {held})" if status == -signal.SIGKILL else ""
        return f"the process behind a wall of {format_bytes(self.limit)} ended with {said}{perhaps}, without an answer"


def mapped_bytes() -> int:
    """The same, asked behind the wall. WallError where no cgroup is found."""
    return _mapped(*_own_group())


def _mapped(group: Path, files: _Files) -> int:
    return _entries(group / "memory.stat").get(files.mapped, 0)


@contextmanager
def fence(limit: int, files: Sequence[Path] = ()) -> Iterator[Fence]:
    """A wall, by a cgroup of our own making or by systemd's; what still runs behind one of ours in the end is killed.
    files: or folders of them, that may be mapped behind it; they leave the page cache first. WallError where neither
    can be made, or a file stays."""
    drop_cached(files)
    for path in files_of(files):
        if (stays := cached_bytes(path)) > (1 << 20) + _STAYS * path.stat().st_size:
            raise WallError(
                f"{format_bytes(stays)} of {path} stay in the page cache, where no wall of ours counts them: end what "
                "else maps it, or move it from memory to a disk"
            )
    with ExitStack() as resources:
        try:
            group, names = resources.enter_context(_group(limit))
        except WallError as error:
            behind = _scope(limit, str(error))
        else:
            enter = ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group / "cgroup.procs")]
            behind = Fence(limit, enter, lambda: group, names)
        yield behind


def _scope(limit: int, why: str) -> Fence:
    """A scope of systemd's, the user's own for whoever is not root. WallError, which says `why` no cgroup could be made
    either."""
    command = ["systemd-run", *([] if os.geteuid() == 0 else ["--user"]), "--scope", "--quiet", "--collect"]
    limits = ["-p", f"MemoryMax={limit}", "-p", "MemorySwapMax=0", "--"]
    try:
        tried = subprocess.run([*command, *limits, "true"], capture_output=True, text=True, timeout=20)
        reason = "" if tried.returncode == 0 else (tried.stderr.strip() or f"status {tried.returncode}")
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "strerror", None) or str(error)
    if reason:
        raise WallError(
            f"{why}; nor can systemd-run ({' '.join(reason.split())}): run it as root, or without a wall in a "
            "container whose memory is limited"
        )
    unit = f"{_PREFIX}{os.getpid()}-{time.monotonic_ns()}"
    return Fence(limit, [*command, f"--unit={unit}", *limits], lambda: _scope_group(f"{unit}.scope"), _V2)


def _scope_group(name: str, root: Path = Path("/")) -> Path | None:
    """The cgroup (v2) of a scope, once it is there."""
    groups = root / "sys/fs/cgroup"
    places = f"system.slice/{name}", f"user.slice/user-*.slice/user@*.service/{name}", (
        f"user.slice/user-*.slice/user@*.service/*.slice/{name}"
    )  # fmt: skip
    return next((group for place in places for group in groups.glob(place)), None)


def check() -> None:
    """WallError where no wall can be made."""
    with fence(1 << 30):
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
            raise WallError(f"no memory cgroup can be limited here: {group / files.limit}: {error.strerror}") from None
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
