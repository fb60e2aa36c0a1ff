"""Ledgers: every byte of device memory that a run uses is charged to a budget, what it keeps in the host to another."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{p}b": 1000**i for i, p in enumerate("kmgt", 1)} | {f"{p}ib": 1024**i for i, p in enumerate("kmgt", 1)}


class BudgetError(ValueError):
    """The memory budget cannot be read, or cannot hold what it must; then `least` is the budget that works."""

    least: int | None = None


class HostShortError(BudgetError):
    """A GPU's host lacks memory, whatever the budget."""


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


@contextmanager
def explained(
    of: str, beside: int = 0, together: bool = True, least: Callable[[], int | None] = lambda: None,
    instead: Callable[[], str] = lambda: "",
) -> Iterator[None]:  # fmt: skip
    """BudgetErrors from here say what needs the budget, the least that works, that with the host memory that lies
    `beside` it, and what would do `instead`. together: the budget holds that too. least: asked where an error does not
    know."""
    try:
        yield
    except BudgetError as error:
        found, more = error.least, ""
        if found is None and not isinstance(error, HostShortError) and (found := least()) is not None:
            more = f"; the least that works is {found} bytes ({format_bytes(found)})"
        if found is not None and beside:
            more += f"; with {format_bytes(beside)} of host memory beside it {found + beside} bytes in all"
        if other := instead():
            more += f"; {other}"
        named = BudgetError(f"{of}: {error}{more}")
        named.least = found + beside if found is not None and together else found
        raise named from None


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

    def settle(self, held: Mapping[str, int]) -> None:
        """Lines are what is held now. BudgetError, and nothing is changed, if all lines together are too much."""
        lines = {**self._lines, **held}
        require(self.total, lines)
        self._lines = lines
