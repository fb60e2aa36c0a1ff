"""A wall of memory: what is behind it is answered, refused or killed, and nothing is left of it."""

from __future__ import annotations

import mmap
import os
import signal
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
from fluxmoe.experiments.lib import wall
from fluxmoe.experiments.lib.page_cache import cached_bytes
from fluxmoe.runtime.memory import machine
from fluxmoe.runtime.memory.budget import BudgetError, require

LIMIT = 64 << 20


@pytest.fixture
def own_group():
    """The folder of our own memory cgroup, which holds no group of this process afterwards."""
    try:
        wall.check()
    except wall.WallError as error:
        pytest.skip(str(error))
    parent = wall._own_group()[0]
    yield parent
    assert not list(parent.glob(f"{wall._PREFIX}{os.getpid()}-*"))


def test_what_is_behind_it_sees_the_limit_and_is_measured(own_group):
    assert wall.call(LIMIT, machine.total_bytes).value == LIMIT
    held = 40 << 20
    assert wall.call(LIMIT, len, bytes(held)).value == held
    assert held <= wall.call(LIMIT, _hold, held).peak_bytes <= LIMIT


def _hold(nbytes: int) -> None:
    kept = b"x" * nbytes
    time.sleep(0.1)
    del kept


def test_what_passes_it_is_killed_and_says_so(own_group):
    with pytest.raises(wall.KilledError, match="killed by its wall of 64 MiB"):
        wall.call(LIMIT, _hold, 2 * LIMIT)


def test_page_cache_is_not_counted_and_kills_nobody(own_group, tmp_path):
    (tmp_path / "file").write_bytes(b"x" * (2 * LIMIT))
    assert wall.call(LIMIT, _read, tmp_path / "file").value == 2 * LIMIT


def _read(path: Path) -> int:
    with path.open("rb") as file:
        return sum(len(part) for part in iter(lambda: file.read(1 << 20), b""))


def test_files_that_are_mapped_are_charged_to_it(own_group, tmp_path):
    """Even if others have brought them to the page cache before; of those that stay there it says that they do."""
    if machine.lies_in_memory(tmp_path):
        pytest.skip("on a tmpfs files are always in memory, and refused")
    size, path = LIMIT // 2, tmp_path / "file"
    # Of pages, that every CPU may hold back from a cgroup's counters.
    batches = 64 * mmap.PAGESIZE * os.sysconf("SC_NPROCESSORS_ONLN")
    path.write_bytes(b"x" * size)
    path.with_name("small").touch()
    assert cached_bytes(path) == size
    assert wall.call(LIMIT, _map, path).value < size // 2  # outside of the wall
    assert wall.call(LIMIT, _map, path, files=[tmp_path]).value >= size - batches
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as kept:
        assert kept[:: mmap.PAGESIZE].count(b"x") == size // mmap.PAGESIZE
        with pytest.raises(wall.WallError, match=f"32 MiB of {path} stay in the page cache"), wall.fence(LIMIT, [path]):
            pass


def _map(path: Path) -> int:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
        mapping[:: mmap.PAGESIZE]
        return wall.mapped_bytes()


def test_errors_come_out_as_they_are(own_group):
    with pytest.raises(BudgetError, match="least that works is 7 bytes") as raised:
        wall.call(LIMIT, require, 5, {"weights": 7})
    assert raised.value.least == 7
    with pytest.raises(TypeError, match="cannot pickle"):
        wall.call(LIMIT, memoryview, b"")
    with pytest.raises(wall.KilledError, match="ended with status 3"):
        wall.call(LIMIT, os._exit, 3)


def test_interrupting_ends_the_process_and_removes_the_group(own_group, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(wall.Fence, "look", interrupted)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        wall.call(LIMIT, time.sleep, 60)
    assert time.monotonic() - start < 30


def test_groups_of_makers_that_were_killed_are_removed(own_group):
    gone = next(pid for pid in range(4_000_000, 4_100_000) if not Path(f"/proc/{pid}").exists())
    stale = own_group / f"{wall._PREFIX}{gone}-1"
    stale.mkdir()
    wall.check()
    assert not stale.exists()


@pytest.fixture
def nobody(monkeypatch):
    """Whoever may make no cgroup."""

    def refuse():
        raise wall.WallError("no memory cgroup can be made here: not by you")

    monkeypatch.setattr(wall, "_own_group", refuse)


def systemd_run(folder: Path, then: str, monkeypatch) -> Path:
    """A systemd-run that notes its options, one a line, in the file that is returned, and goes on with `then`."""
    script, log = folder / "systemd-run", folder / "options"
    lines = ["#!/bin/sh", 'while [ "$1" != -- ]; do echo "$1"; shift; done > "$0.log"', "shift", then]
    script.write_text("\n".join(lines).replace("$0.log", str(log)))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return log


def test_who_may_make_no_cgroup_asks_systemd(nobody, tmp_path, monkeypatch):
    log = systemd_run(tmp_path, 'exec "$@"', monkeypatch)
    assert wall.call(LIMIT, len, b"four").value == 4
    options = log.read_text().split()
    assert {"--scope", f"MemoryMax={LIMIT}", "MemorySwapMax=0"} <= set(options)
    assert ("--user" in options) == (os.geteuid() != 0)
    assert any(option.startswith("--unit=fluxmoe-") for option in options)
    # The scope is gone with its process, and with it what would tell who killed.
    with pytest.raises(wall.KilledError, match=r"ended with signal 9 \(perhaps by the wall"):
        wall.call(LIMIT, _kill_myself, signal.SIGKILL)
    with pytest.raises(wall.KilledError, match=r"ended with signal 15, without"):
        wall.call(LIMIT, _kill_myself, signal.SIGTERM)


def _kill_myself(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("how", ["refuses", "is not there"])
def test_where_neither_may_be_one_sentence_says_why(nobody, tmp_path, monkeypatch, how):
    if how == "refuses":
        systemd_run(tmp_path, "echo Failed to connect to bus >&2; exit 1", monkeypatch)
    else:
        monkeypatch.setenv("PATH", str(tmp_path))
    why = {"refuses": "Failed to connect to bus", "is not there": "No such file or directory"}[how]
    with pytest.raises(wall.WallError, match=rf"made here: not by you; nor can systemd-run \({why}\): run it as root"):
        wall.check()


@pytest.mark.parametrize(
    "place",
    ["system.slice", "user.slice/user-7.slice/user@7.service/app.slice", "user.slice/user-7.slice/user@7.service"],
)  # fmt: skip
def test_a_scope_is_found_once_it_is_there(tmp_path, place):
    assert wall._scope_group("x.scope", tmp_path) is None
    (tmp_path / "sys/fs/cgroup" / place / "x.scope").mkdir(parents=True)
    assert wall._scope_group("x.scope", tmp_path) == tmp_path / "sys/fs/cgroup" / place / "x.scope"


@pytest.mark.parametrize("kills", [0, 1])
@pytest.mark.parametrize("status", [None, 0, 5], ids=["answers", "no answer", "fails"])
def test_kills_count_whatever_the_process_says(tmp_path, monkeypatch, kills, status):
    """Its helper may have been killed, and the process gone on without."""
    (tmp_path / "memory.events").write_text(f"oom 3\noom_kill {kills}\n")
    (tmp_path / "memory.stat").write_text("anon 5\nfile 100\nfile_mapped 30\nshmem 2\n")
    fake = wall.Fence(LIMIT, [], lambda: tmp_path, wall._V2)
    monkeypatch.setattr(wall, "fence", lambda limit, files: nullcontext(fake))
    assert fake.mapped_bytes == 30
    if kills == 0 and status is None:
        assert wall.call(LIMIT, len, b"four") == (4, 7)
        return
    said = "killed by its wall of 64 MiB; it held 7 B" if kills else f"ended with status {status}"
    with pytest.raises(wall.KilledError, match=said):
        wall.call(LIMIT, len, b"four") if status is None else wall.call(LIMIT, os._exit, status)


@pytest.mark.parametrize(
    ("membership", "mount", "found"),
    [("4:memory:/box", "sys/fs/cgroup/memory", wall._V1), ("0::/box", "sys/fs/cgroup", wall._V2)],
)
@pytest.mark.parametrize("inside", ["box", "."], ids=["host", "container"])
def test_the_own_group_is_found_in_both_versions(tmp_path, membership, mount, found, inside):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"1:cpu:/\n{membership}\n")
    group = tmp_path / mount / inside
    group.mkdir(parents=True)
    (group / "cgroup.procs").write_text(f"1\n{os.getpid()}\n")
    assert wall._own_group(tmp_path) == (group, found)
    (group / "cgroup.procs").write_text("1\n")
    with pytest.raises(wall.WallError, match="none is mounted"):
        wall._own_group(tmp_path)


def test_without_cgroups_one_sentence_says_so(tmp_path):
    with pytest.raises(wall.WallError, match="this system has no cgroups"):
        wall._own_group(tmp_path)
