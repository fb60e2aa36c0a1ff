"""PagingConfig: how experts are paged, and which kernels compute them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fluxmoe.kernels.formats import (
    DEFAULT_COMPRESSED,
    DENSE,
    FORMATS,
    compressed_formats,
    formats_help,
    fused_formats,
)

from ..hardware import HardwareProfile, list_profiles
from ..memory.budget import parse_bytes
from .cache_policies import POLICIES as CACHE_POLICIES
from .cache_policies import STATIC
from .layout import ExpertFormats
from .placement import COMPRESSING, IN_FILES, POLICIES

Delay = Callable[[int, int], float]


class SettingError(ValueError):
    """An invalid setting."""


def setting(default: Any, help: str | None, **more: Any) -> Any:
    """A field with its help, which command lines are made from; None: it is on no command line.

    more: choices; flag, its name there; metavar, and parse, which makes a value of text.
    """
    return field(default=default, metadata={"help": help, **more}, compare=more.pop("compare", True))


@dataclass(frozen=True, kw_only=True)
class PagingConfig:
    """How experts are paged. What a field means is its help."""

    placement: str = setting("resident", "where experts are; see placement.place", choices=tuple(POLICIES))
    alpha: float | None = setting(None, "share of experts kept on the device (default: the placement's own)")
    disk_share: float | None = setting(
        None, "share of experts in files, with three_tiers (default: by bandwidth, as alpha there)"
    )
    dense_share: float = setting(0.0, "share of experts kept dense beside packed ones")
    expert_format: str | None = setting(
        None, f"lossless format of experts (default: {DEFAULT_COMPRESSED} for packed and hybrid, {DENSE} for the "
        f"others). {formats_help()}", choices=FORMATS,
    )  # fmt: skip
    host_format: str | None = setting(
        None, "format in host memory and files, so of what crosses the link (default: the expert format)",
        choices=FORMATS,
    )  # fmt: skip
    slot_format: str = setting(
        "packed", "packed: the GEMM reads compressed experts in their slots, where it can; decoded: they are decoded "
        "into them", choices=("packed", "decoded"),
    )  # fmt: skip
    transfer: str | None = setting(
        None, "whole: what a layer lacks on the device is copied ahead; on_demand: kernels read routed experts in host "
        "memory, and from files only these come, into a cache; auto: with adaptive whichever the planner expects to "
        "cost less; from files on_demand, and in the disk's idle time what each layer is likely to lack (default: auto "
        "from files, where the kernels can, else whole)",
        choices=("whole", "on_demand", "auto"),
    )  # fmt: skip
    cache_bytes: int | None = setting(
        None, "of the cache of experts that come on demand from files, e.g. 2GiB (default: what KV does not need at "
        "the moment)",
        parse=parse_bytes, metavar="BYTES",
    )  # fmt: skip
    cache_policy: str = setting(
        "learned",
        "which experts leave the cache: those expected to be used last, or as the name says; static: those that "
        "cache_recording used least",
        choices=(*CACHE_POLICIES, STATIC),
    )
    cache_recording: Path | None = setting(
        None, "routing of this model, as generate --record-routing saves it, for cache_policy static", metavar="FILE"
    )
    profile: HardwareProfile | None = setting(
        None, "the machine's rates, for shares by bandwidth that are not given, and transfer auto (default: measured, "
        f"roughly): a file, or {', '.join(list_profiles())}", parse=HardwareProfile.load, metavar="NAME|FILE",
    )  # fmt: skip
    slots: int = setting(2, "streaming slots, at least 2")
    adaptive: bool = setting(
        False, "experts move between device and host memory while serving, and KV takes and gives the memory"
    )
    # With adaptive: how often experts are routed to is counted, and a planner decides; False: only `request` moves
    # experts. least_alpha: the least share of each layer on the device, which sizes the slots.
    planning: bool = setting(True, None)
    least_alpha: float = setting(0.5, None)
    disk_dir: Path | None = setting(None, "where the disk tier's files are kept (default: beside the checkpoint)")
    kernels: str = setting(
        "auto", "auto: triton on CUDA, numba on the CPU; torch: the slow reference", choices=("auto", "triton", "torch")
    )
    batch_invariant: bool = setting(
        False,
        "CUDA: a request's tokens do not depend on who shares its batch, at some speed (on the CPU always so, but for "
        "kernels torch)",
    )
    # Keep which experts every token chose, in memory that no ledger counts (`ExpertPager.recorder`).
    record_routing: bool = setting(False, None)
    threads: int | None = setting(None, "CPU threads (default: all)")
    poison: bool = setting(False, "debug: fill recycled slots with NaN")
    link_bandwidth: float | None = setting(
        None, "CPU: experts come from host memory, and as many from files, at no more bytes a second than this, as "
        "over a slower link, e.g. 4GB",
        parse=parse_bytes, metavar="BYTES",
    )  # fmt: skip
    # Tests: seconds to wait before a load of (layer, tensor type).
    load_delay: Delay | None = setting(None, None, compare=False)

    def __post_init__(self) -> None:
        if self.threads is not None and not 1 <= self.threads <= (most := os.cpu_count() or 1):
            raise SettingError(f"threads must be from 1 to the {most} that this machine has, got {self.threads}")
        if self.link_bandwidth is not None and not self.link_bandwidth > 0:
            raise SettingError(f"link_bandwidth must be positive bytes per second, got {self.link_bandwidth}")
        for each in fields(self):
            value, choices = getattr(self, each.name), each.metadata.get("choices")
            if choices and value not in choices and value != each.default:
                raise SettingError(f"{each.name} must be one of {', '.join(choices)}, got {value!r}")
        if self.placement == "resident" and self.device_format != DENSE:
            raise SettingError(
                f"placement resident holds experts dense; placement packed holds them in {self.expert_format}"
            )
        if self.placement in COMPRESSING and self.device_format == DENSE:
            choices = ", ".join(compressed_formats())
            raise SettingError(f"placement {self.placement} holds compressed experts: choose {choices}")
        if self.transfer == "auto" and not self.counts_routing and self.placement not in IN_FILES:
            raise SettingError(f"transfer auto needs adaptive, or placement {' or '.join(IN_FILES)}")
        if self.cache_bytes is not None and (self.placement not in IN_FILES or self.formats.transfer == "whole"):
            raise SettingError(
                f"cache_bytes is of experts that come on demand from files: it needs placement {' or '.join(IN_FILES)}"
            )
        if (self.cache_policy == STATIC) != (self.cache_recording is not None):
            raise SettingError(
                f"cache_policy {STATIC} and cache_recording go together: it keeps what a recording uses most"
            )
        if self.disk_share is not None and self.placement != "three_tiers":
            raise SettingError("disk_share is for placement three_tiers: elsewhere it has no effect")

    @property
    def device_format(self) -> str:
        """The format of experts that stay on the device, but for those that a placement keeps dense."""
        return self.expert_format or (DEFAULT_COMPRESSED if self.placement in COMPRESSING else DENSE)

    @property
    def formats(self) -> ExpertFormats:
        """Formats of all tiers."""
        packed = DEFAULT_COMPRESSED if self.device_format == DENSE else self.device_format  # no policy will use it
        host = self.host_format or self.device_format
        transfer, ahead = self.transfer, False
        if transfer in (None, "auto"):
            readable = {DENSE, *fused_formats("torch" if self.kernels == "torch" else "cpu")}
            ahead = self.placement in IN_FILES and self.kernels != "triton" and host in readable
            transfer = "on_demand" if ahead else "whole"
        return ExpertFormats(packed, host, self.slot_format, transfer, ahead)

    @property
    def named(self) -> str:
        """Placement and formats, for errors."""
        return f"placement {self.placement} ({' and '.join(dict.fromkeys((self.device_format, self.formats.host)))})"

    @property
    def formats_met(self) -> set[str]:
        """Formats in which kernels may meet experts, where they can read them."""
        formats = self.formats
        return {self.device_format} | ({formats.host} if formats.slot == "packed" else set())

    @property
    def counts_routing(self) -> bool:
        """Whether the pager counts how often each expert was routed to, for a planner."""
        return self.adaptive and self.planning
