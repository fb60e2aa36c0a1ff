"""The ledger of device memory: every byte that a run uses is charged to one budget."""

from __future__ import annotations

import re
from collections.abc import Mapping
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
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?b?)\s*", text.lower())
    if not match or match[2] not in _UNITS:
        raise BudgetError(f"cannot read {text!r} as a number of bytes; write for example 512MiB, 1.5GB or all")
    return int(float(match[1]) * _UNITS[match[2]])


def format_bytes(nbytes: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= size:
            return f"{nbytes / size:.4g} {unit}"
    return f"{nbytes} B"


def available_bytes(device: torch.device) -> int:
    """What `all` means: a documented share of the memory that is free now (0.8 on the CPU, 0.92 on CUDA)."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * _CUDA_SHARE)
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(int(fields["MemAvailable"].split()[0]) * 1024 * _CPU_SHARE)
    except (OSError, KeyError, ValueError):
        raise BudgetError("cannot tell how much memory is free here; give a budget in bytes") from None


def require(total: int, lines: Mapping[str, int], hint: str = "") -> None:
    """BudgetError unless `total` holds the sum of `lines`; says the least that works and what takes it."""
    least = sum(lines.values())
    if total < least:
        parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in lines.items() if size)
        error = BudgetError(
            f"a budget of {format_bytes(total)} is too small: the least that works is {least} bytes "
            f"({format_bytes(least)}: {parts})" + (f"; {hint}" if hint else "")
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
