"""Ledgers: every byte of device memory that a run uses is charged to a budget, what it keeps in the host to another.

What a machine or its container has, what is free of it, and what this process really holds, are asked here too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

import torch

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{p}b": 1000**i for i, p in enumerate("kmgt", 1)} | {f"{p}ib": 1024**i for i, p in enumerate("kmgt", 1)}
# Leave room for the rest of the process and for the page cache that loads stream through.
_CPU_SHARE = 0.8
_CUDA_SHARE = 0.92


class BudgetError(ValueError):
    """The memory budget cannot be read, or cannot hold what it must; then `least` is the budget that works."""

    least: int | None = None


def parse_bytes(text: str) -> int | None:
    """'512MiB', '1.5 GB', '123456' → bytes; 'all' → None, all that is free. GB = 1e9, GiB = 2^30."""
    if text.strip().lower() == "all":
        return None
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([kmgt]?i?b?)\s*", text.lower(), re.ASCII)
    if not match or match[2] not in _UNITS:
        raise BudgetError(f"cannot read {text!r} as a number of bytes; write for example 512MiB, 1.5GB or all")
    return int(Fraction(match[1]) * _UNITS[match[2]])


def format_bytes(nbytes: int) -> str:
    for unit, size in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= size:
            return f"{nbytes / size:.4g} {unit}"
    return f"{nbytes} B"


def available_bytes(device: torch.device) -> int:
    """What `all` means: a documented share of the memory that is free now (0.8 on the CPU, 0.92 on CUDA)."""
    return int(free_bytes(device) * (_CUDA_SHARE if device.type == "cuda" else _CPU_SHARE))


def free_bytes(device: torch.device) -> int:
    """Memory that is free now; on the CPU the least of the machine's and what the cgroups of this process leave."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([_meminfo("MemAvailable"), *_cgroup_free()])


def total_bytes(device: torch.device) -> int:
    """Memory that a device has, free or not; on the CPU the machine's, or less where a cgroup allows less."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return min([_meminfo("MemTotal"), *(limit for limit, _ in _cgroups())])


def taken_bytes(device: torch.device) -> int | None:
    """Memory that is taken now, for differences; None where this cannot be told.

    On CUDA all that is taken on the device, whoever holds it. On the CPU what this process has touched, without files
    that it maps, which the system can drop: not a page of a tensor that nobody has written yet.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))
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


def _cgroup_free(root: Path = Path("/")) -> list[int]:
    """Bytes that each memory cgroup around this process leaves: a container knows no limit of its own elsewhere."""
    return [free for _, free in _cgroups(root)]


def _cgroups(root: Path = Path("/")) -> list[tuple[int, int]]:
    """(limit, free) bytes of each memory cgroup around this process that has a limit."""
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


def by_line(lines: Mapping[str, int]) -> str:
    """'name 3 GiB, other 2 MiB' of what is not nothing."""
    return ", ".join(f"{name} {format_bytes(size)}" for name, size in lines.items() if size)


def require(total: int, lines: Mapping[str, int], hint: str = "") -> None:
    """BudgetError unless `total` holds the sum of `lines`; says the least that works and what takes it."""
    least = sum(lines.values())
    if total < least:
        error = BudgetError(
            f"a budget of {format_bytes(total)} is too small: the least that works is {least} bytes "
            f"({format_bytes(least)}: {by_line(lines)})" + (f"; {hint}" if hint else "")
        )
        error.least = least
        raise error


class MemoryBudget:
    """`total` bytes, reserved line by line. Reserving more than is free raises BudgetError and changes nothing."""

    def __init__(self, total: int) -> None:
        if total < 0:
            raise BudgetError(f"a budget cannot be negative, got {total}")
        self.total = total
        self._lines: dict[str, int] = {}

    @property
    def used(self) -> int:
        return sum(self._lines.values())

    @property
    def free(self) -> int:
        return self.total - self.used

    def lines(self) -> dict[str, int]:
        """Bytes by line."""
        return dict(self._lines)

    def reserve(self, line: str, nbytes: int) -> None:
        assert nbytes >= 0, f"cannot reserve {nbytes} bytes"
        if nbytes > self.free:
            raise BudgetError(
                f"{line} needs {format_bytes(nbytes)}, of {format_bytes(self.total)} only "
                f"{format_bytes(self.free)} are free"
            )
        self._lines[line] = self._lines.get(line, 0) + nbytes

    def release(self, line: str, nbytes: int) -> None:
        held = self._lines.get(line, 0)
        assert 0 <= nbytes <= held, f"{line} holds {held} bytes, cannot release {nbytes}"
        self._lines[line] = held - nbytes
