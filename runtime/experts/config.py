"""PagingConfig: how experts are paged, and which kernels compute them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fluxmoe.kernels.formats import DEFAULT_COMPRESSED, DENSE, FORMATS, compressed_formats, fused_formats

from ..hardware import HardwareProfile
from .cache_policies import POLICIES
from .layout import ExpertFormats
from .placement import COMPRESSING

Delay = Callable[[int, int], float]


class SettingError(ValueError):
    """An invalid setting."""


@dataclass(frozen=True, kw_only=True)
class PagingConfig:
    """How experts are paged.

    placement, alpha    see `placement.place`; dense_share: its `dense`
    expert_format       a name of kernels.formats: how balanced, host and disk hold experts, and packed and hybrid, for
                        which None means DEFAULT_COMPRESSED (for the others: dense)
    host_format         format in host memory and files, so of what crosses PCIe; None: expert_format
    slot_format         packed: the GEMM reads compressed experts in their slots, where it can | decoded
    transfer            whole: the share of each layer that is not on the device is copied ahead of time | on_demand:
                        kernels read the experts that were routed to in host memory; from files only these come, into a
                        cache | auto, with adaptive: whichever the planner expects to cost less | None: on_demand from
                        files, where the kernels can, else whole
    cache_bytes         of the cache of experts that come on demand from files; None: what a host has left
    cache_policy        which experts leave it: a name of cache_policies.POLICIES
    profile             the machine's rates, for balanced without alpha and transfer auto; None: measured in a fraction
                        of a second
    slots               streaming slots, S ≥ 2
    adaptive            experts move between device and host memory while serving
    planning            with adaptive: how often experts are routed to is counted, and a planner decides; False: only
                        `request` moves experts
    least_alpha         with adaptive: the least share of each layer on the device (sizes the slots)
    disk_dir            where the disk tier's files are kept; None: beside a checkpoint, or in the system's temporary
                        directory where a host has no folder for them
    kernels             auto (Triton on CUDA, numba on the CPU) | triton | torch (the slow reference)
    batch_invariant     Triton: a token's result does not depend on who shares its batch; on the CPU always so
    threads             CPU threads; None: all
    poison              debug: fill recycled slots with NaN
    link_bandwidth      CPU: loads wait so that host experts come at no more bytes/s, as over a slower link
    load_delay          tests: seconds to wait before a load of (layer, tensor type)
    """

    placement: str = "resident"
    alpha: float | None = None
    dense_share: float = 0.0
    expert_format: str | None = None
    host_format: str | None = None
    slot_format: str = "packed"
    transfer: str | None = None
    profile: HardwareProfile | None = None
    slots: int = 2
    adaptive: bool = False
    planning: bool = True
    least_alpha: float = 0.5
    cache_bytes: int | None = None
    cache_policy: str = "next_use"
    disk_dir: Path | None = None
    kernels: str = "auto"
    batch_invariant: bool = False
    threads: int | None = None
    poison: bool = False
    link_bandwidth: float | None = None
    load_delay: Delay | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise SettingError(f"threads must be at least 1, got {self.threads}")
        if self.link_bandwidth is not None and not self.link_bandwidth > 0:
            raise SettingError(f"link_bandwidth must be positive bytes per second, got {self.link_bandwidth}")
        for name in ("expert_format", "host_format"):
            value = getattr(self, name)
            if value not in (None, *FORMATS):
                raise SettingError(f"{name} must be one of {', '.join(FORMATS)}, got {value!r}")
        if self.placement == "resident" and self.device_format != DENSE:
            raise SettingError(
                f"placement resident holds experts dense; placement packed holds them in {self.expert_format}"
            )
        if self.placement in COMPRESSING and self.device_format == DENSE:
            choices = ", ".join(compressed_formats())
            raise SettingError(f"placement {self.placement} holds compressed experts: choose {choices}")
        if self.slot_format not in ("packed", "decoded"):
            raise SettingError(f"slot_format must be packed or decoded, got {self.slot_format!r}")
        if self.transfer not in (None, "whole", "on_demand", "auto"):
            raise SettingError(f"transfer must be whole, on_demand or auto, got {self.transfer!r}")
        if self.transfer == "auto" and not self.counts_routing:
            raise SettingError("transfer auto is the planner's choice: it needs adaptive")
        if self.cache_policy not in POLICIES:
            raise SettingError(f"cache_policy must be one of {', '.join(POLICIES)}, got {self.cache_policy!r}")
        if self.cache_bytes is not None and (self.placement != "disk" or self.formats.transfer == "whole"):
            raise SettingError("cache_bytes is of experts that come on demand: it needs placement disk")

    @property
    def device_format(self) -> str:
        """The format of experts that stay on the device, but for those that a placement keeps dense."""
        return self.expert_format or (DEFAULT_COMPRESSED if self.placement in COMPRESSING else DENSE)

    @property
    def formats(self) -> ExpertFormats:
        """Formats of all tiers."""
        packed = DEFAULT_COMPRESSED if self.device_format == DENSE else self.device_format  # no policy will use it
        host = self.host_format or self.device_format
        transfer = "whole" if self.transfer == "auto" else self.transfer
        if transfer is None:
            readable = {DENSE, *fused_formats("torch" if self.kernels == "torch" else "cpu")}
            on_demand = self.placement == "disk" and self.kernels != "triton" and host in readable
            transfer = "on_demand" if on_demand else "whole"
        return ExpertFormats(packed, host, self.slot_format, transfer)

    @property
    def formats_met(self) -> set[str]:
        """Formats in which kernels may meet experts, where they can read them."""
        formats = self.formats
        return {self.device_format} | ({formats.host} if formats.slot == "packed" else set())

    @property
    def counts_routing(self) -> bool:
        """Whether the pager counts how often each expert was routed to, for a planner."""
        return self.adaptive and self.planning
