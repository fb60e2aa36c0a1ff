"""Whether what is going to be held fits the memory that is free, and whether what is held is what the ledgers say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from .budget import BudgetError, by_line, format_bytes, free_bytes, total_bytes

# What the ledgers may be wrong by. On the CPU, beside a share: compiled kernels, threads' stacks and what malloc keeps,
# which are nobody's and do not grow with the model: 17 to 32 MiB were measured, 186 MiB where numba compiles anew.
TOLERANCE = 0.02
PROCESS_BYTES = 256 << 20


class FreeMemory(NamedTuple):
    """Bytes that are free before an engine is made, on its device and in the host; on a CPU they are the same."""

    device: torch.device
    device_bytes: int
    host_bytes: int

    @classmethod
    def now(cls, device: torch.device) -> FreeMemory:
        free = free_bytes(device)
        return cls(device, free, free if device.type == "cpu" else free_bytes(torch.device("cpu")))

    @property
    def shared(self) -> bool:
        return self.device.type == "cpu"

    def check_budget(self, budget: int) -> None:
        """BudgetError for more than the device has."""
        if budget > (has := total_bytes(self.device)):
            raise BudgetError(
                f"a budget of {format_bytes(budget)} is more than the {format_bytes(has)} of memory that this "
                f"{'machine or its container' if self.shared else 'GPU'} has; lower the budget, or say all"
            )

    def check(self, device_bytes: int, host_lines: Mapping[str, int]) -> None:
        """BudgetError unless what the device and the host will hold at most is free."""
        host = sum(host_lines.values())
        hint = "; --preemption recompute needs no swap space" if "swapped_kv" in host_lines else ""
        hint += "; put the spill file on a disk (TMPDIR), not in memory" if "spill" in host_lines else ""
        if self.shared and device_bytes + host > self.host_bytes:
            beside = f" and {format_bytes(host)} beside it ({by_line(host_lines)})" if host else ""
            raise BudgetError(
                f"the budget takes {format_bytes(device_bytes)}{beside}, and only {format_bytes(self.host_bytes)} of "
                f"memory are free; lower the budget{hint}"
            )
        if device_bytes > self.device_bytes:
            raise BudgetError(
                f"the budget takes {format_bytes(device_bytes)}, and only {format_bytes(self.device_bytes)} of the "
                "GPU's memory are free; lower the budget"
            )
        if host > self.host_bytes:
            raise BudgetError(
                f"host memory takes {format_bytes(host)} ({by_line(host_lines)}), and only "
                f"{format_bytes(self.host_bytes)} are free; keep more experts on the device{hint}"
            )


class MemoryCheck(NamedTuple):
    """What the ledgers say, and what is held since before the engine was made; ratio: held / ledger."""

    ledger_bytes: int
    held_bytes: int | None
    ratio: float | None
    warning: str | None

    @classmethod
    def of(cls, device: torch.device, ledger: int, held: int | None) -> MemoryCheck:
        """A warning when more is held than the tolerance allows."""
        if held is None:
            return cls(ledger, None, None, None)
        allowed = ledger * (1 + TOLERANCE) + (PROCESS_BYTES if device.type == "cpu" else 0)
        warning = None
        if held > allowed:
            warning = (
                f"{format_bytes(held)} of memory are held, {100 * (held / ledger - 1):.1f} % more than the "
                f"{format_bytes(ledger)} of the ledger"
            )
        return cls(ledger, held, held / ledger, warning)
