"""What the host, or the container that it is, has and has free, and what this process really holds of it."""

from __future__ import annotations

import os
from pathlib import Path

from .budget import BudgetError


def free_bytes() -> int:
    """Memory that is free now: the least of the machine's and what the cgroups of this process leave."""
    return min([_meminfo("MemAvailable"), *(free for _, free in _cgroups())])


def total_bytes() -> int:
    """Memory, free or not: the machine's, or less where a cgroup allows less."""
    return min([_meminfo("MemTotal"), *(limit for limit, _ in _cgroups())])


def has_wall() -> bool:
    """Whether a cgroup holds this process to less than the machine has."""
    return any(limit < _meminfo("MemTotal") for limit, _ in _cgroups())


def touched_bytes() -> int | None:
    """What this process has touched, without files that it maps, which the system can drop: not a page of a tensor that
    nobody has written yet. None where this cannot be told."""
    return _status("RssAnon", "RssShmem")


def mapped_bytes() -> int | None:
    """What is in memory of the files that this process maps, libraries too. None where this cannot be told."""
    return _status("RssFile")


def _status(*names: str) -> int | None:
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return sum(int(fields[name].split()[0]) * 1024 for name in names)
    except (OSError, KeyError, ValueError):
        return None


def lies_in_memory(directory: Path, mounts: Path = Path("/proc/self/mountinfo")) -> bool:
    """Whether files there take host memory, as on a tmpfs."""
    try:
        number = directory.stat().st_dev
        entries = [line.split() for line in mounts.read_text().splitlines()]
    except OSError:
        return False
    name = f"{os.major(number)}:{os.minor(number)}"
    return any(entry[2] == name and entry[entry.index("-") + 1] in ("tmpfs", "ramfs") for entry in entries)


def _meminfo(entry: str) -> int:
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields[entry].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        raise BudgetError("cannot tell how much memory is free here; give a budget in bytes") from None


# limit, use, and the entry of memory.stat that counts droppable page cache, by cgroup version.
_CGROUP_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def _cgroups(root: Path = Path("/")) -> list[tuple[int, int]]:
    """(limit, free) bytes of each memory cgroup around this process that has a limit: a container knows no limit of its
    own elsewhere."""
    found: list[tuple[int, int]] = []
    try:
        memberships = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return found
    for membership in memberships:
        _, controllers, path = membership.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version, mount = (1, "sys/fs/cgroup/memory") if controllers else (2, "sys/fs/cgroup")
        limit_file, use_file, cache_entry = _CGROUP_FILES[version]
        inner = Path(path.lstrip("/"))
        for group in (root / mount / directory for directory in (inner, *inner.parents)):
            try:
                limit, use = ((group / name).read_text().strip() for name in (limit_file, use_file))
                statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                if limit != "max":
                    free = int(limit) - int(use) + int(statistics.get(cache_entry, 0))
                    found.append((int(limit), max(0, free)))
            except (OSError, ValueError):
                continue  # no limit here: the root has none, and a container does not see its parents
    return found
