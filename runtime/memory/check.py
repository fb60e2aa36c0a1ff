"""Whether what is going to be held fits the memory that is free, and whether what is held is what the ledgers say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from ..devices import HOST, Device
from .budget import BudgetError, HostShortError, MemoryBudget, by_line, format_bytes

# What the ledgers may be wrong by, beside what the kind of a device allows.
TOLERANCE = 0.02


class FreeMemory(NamedTuple):
    """Bytes that are free before an engine is made, on its device and in the host; on a CPU they are the same.

    None, and checked by nobody, where the system does not say: outside Linux.
    """

    device: Device
    device_bytes: int | None
    host_bytes: int | None

    @classmethod
    def now(cls, device: Device) -> FreeMemory:
        return cls(device, _known(device.free_bytes), _known(HOST.free_bytes))

    @property
    def shared(self) -> bool:
        return self.device.is_host

    def check_budget(self, budget: int) -> None:
        """BudgetError for more than the device has."""
        has = _known(self.device.total_bytes)
        if has is not None and budget > has:
            raise BudgetError(
                f"a budget of {format_bytes(budget)} is more than the {format_bytes(has)} of memory that this "
                f"{'machine or its container' if self.shared else 'GPU'} has; lower the budget, or say all"
            )

    def beside(self, total: int, host_lines: Mapping[str, int]) -> int:
        """What is left of `total` bytes of a memory that both share. BudgetError if nothing is."""
        host = sum(host_lines.values())
        if host >= total:
            raise BudgetError(
                f"host memory takes {format_bytes(host)} ({by_line(host_lines)}), and of what is free only "
                f"{format_bytes(total)} can be given away"
            )
        return total - host

    def host_budget(self, device_bytes: int, host_lines: Mapping[str, int]) -> MemoryBudget:
        """The host's ledger. BudgetError unless it and what the device will hold at most fit what is free."""
        self.check(device_bytes, host_lines)
        total = sum(host_lines.values()) if self.host_bytes is None else self.host_bytes
        if self.shared and self.host_bytes is not None:
            total -= device_bytes
        budget = MemoryBudget(total)
        for line, nbytes in host_lines.items():
            budget.reserve(line, nbytes)
        return budget

    def check(self, device_bytes: int, host_lines: Mapping[str, int]) -> None:
        """BudgetError unless what the device and the host will hold at most is free."""
        host = sum(host_lines.values())
        hint = "; --preemption recompute needs no swap space" if "swapped_kv" in host_lines else ""
        if self.shared and self.host_bytes is not None and device_bytes + host > self.host_bytes:
            beside = f" and {format_bytes(host)} beside it ({by_line(host_lines)})" if host else ""
            raise BudgetError(
                f"the budget takes {format_bytes(device_bytes)}{beside}, and only {format_bytes(self.host_bytes)} of "
                f"memory are free; lower the budget{hint}"
            )
        if self.device_bytes is not None and device_bytes > self.device_bytes:
            raise BudgetError(
                f"the budget takes {format_bytes(device_bytes)}, and only {format_bytes(self.device_bytes)} of the "
                "GPU's memory are free; lower the budget"
            )
        if self.host_bytes is not None and host > self.host_bytes:
            raise HostShortError(
                f"host memory takes {format_bytes(host)} ({by_line(host_lines)}), and only "
                f"{format_bytes(self.host_bytes)} are free; keep more experts on the device{hint}"
            )


def _known(ask: Callable[[], int]) -> int | None:
    try:
        return ask()
    except BudgetError:
        return None


class MemoryCheck(NamedTuple):
    """What the ledgers say, and what is held since before the engine was made, of which mapped_bytes lie in files that
    are mapped: the system may drop them; ratio: held / ledger."""

    ledger_bytes: int
    held_bytes: int | None
    mapped_bytes: int
    ratio: float | None
    warning: str | None

    @classmethod
    def of(cls, device: Device, ledger: int, taken: int | None, mapped: int = 0) -> MemoryCheck:
        """taken: beside what is mapped. A warning when more is held than the tolerance allows."""
        if taken is None:
            return cls(ledger, None, mapped, None, None)
        held = taken + mapped
        allowed = ledger * (1 + TOLERANCE) + device.slack_bytes
        warning = None
        if held > allowed:
            warning = (
                f"{format_bytes(held)} of memory are held, {100 * (held / ledger - 1):.1f} % more than the "
                f"{format_bytes(ledger)} of the ledger"
            )
        return cls(ledger, held, mapped, held / ledger, warning)
