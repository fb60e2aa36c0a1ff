"""EngineConfig: how to serve a model."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from fluxmoe.kernels.formats import DEFAULT_COMPRESSED, DENSE, FORMATS, compressed_formats

from .hardware import HardwareProfile
from .layout import ExpertFormats
from .placement import COMPRESSING
from .streamer import Delay


class SettingError(ValueError):
    """An engine setting that cannot be meant."""


@dataclass(frozen=True)
class EngineConfig:
    """How to serve a model.

    budget_bytes        device bytes for everything; None: all that is free, on a CPU less what is kept beside it
    placement, alpha    see `placement.place`; dense_share: its `dense`
    expert_format       a name of kernels.formats: how balanced, host and disk hold experts, and packed and hybrid, for
                        which None means DEFAULT_COMPRESSED (for the others: dense)
    host_format         format in host memory and files, so of what crosses PCIe; None: expert_format
    slot_format         packed: the GEMM reads compressed experts in their slots, where it can | decoded
    transfer            whole: the host's share of each layer is copied ahead of time | on_demand: kernels read the
                        experts that were routed to in host memory | auto, with adaptive: whichever the planner expects
                        to cost less
    profile             the machine's rates, for balanced without alpha and transfer auto; None: measured in a fraction
                        of a second
    slots               streaming slots, S ≥ 2
    max_batch           sequences in a batch; fit_batch: fewer, where recurrent states of so many would leave KV short
    max_batched_tokens  tokens of one pass: the chunk size of prefill
    block_size          tokens of a KV block
    preemption          recompute | swap
    max_context         longest prompt + output served; None: the model's limit
    min_kv_tokens       the budget must hold at least this many tokens of KV
    kernels             auto (Triton on CUDA, numba on the CPU) | triton | torch (the slow reference)
    batch_invariant     Triton: a request's tokens do not depend on who shares its batch; on the CPU always so
    cuda_graphs         CUDA: decode steps are launched as graphs
    threads             CPU threads; None: all
    adaptive            experts move between device and host while serving, KV blocks take and give the memory
    planning            with adaptive: the planner decides; False: only `engine.residency.request` moves experts
    least_alpha         with adaptive: the least share of each layer on the device (sizes the slots)
    grow_kv             with adaptive: whether KV takes what experts leave
    densify             with adaptive: packed experts become dense where memory is idle
    theta, eager, spread, plan_every    of the planner and of `Residency`
    disk_dir            where the disk tier spills; None: the system's temporary directory
    poison              debug: fill recycled slots with NaN
    timeline            record loads and compute
    link_bandwidth      CPU: loads wait so that host experts come at no more bytes/s, as over a slower link
    load_delay          tests: seconds to wait before a load of (layer, tensor type)
    """

    budget_bytes: int | None = None
    placement: str = "resident"
    alpha: float | None = None
    dense_share: float = 0.0
    expert_format: str | None = None
    host_format: str | None = None
    slot_format: str = "packed"
    transfer: str = "whole"
    profile: HardwareProfile | None = None
    slots: int = 2
    max_batch: int = 64
    fit_batch: bool = True
    max_batched_tokens: int = 256
    block_size: int = 32
    preemption: str = "recompute"
    max_context: int | None = None
    min_kv_tokens: int = 1
    device: str = "auto"
    kernels: str = "auto"
    batch_invariant: bool = False
    cuda_graphs: bool = True
    threads: int | None = None
    adaptive: bool = False
    planning: bool = True
    least_alpha: float = 0.5
    grow_kv: bool = True
    densify: bool = False
    theta: float = 0.9
    eager: bool = False
    spread: bool = True
    plan_every: int = 8
    disk_dir: Path | None = None
    poison: bool = False
    timeline: bool = False
    progress: bool = False
    link_bandwidth: float | None = None
    load_delay: Delay | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_batched_tokens", "block_size", "max_context", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingError(f"{name} must be at least 1, got {value}")
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
        if self.transfer not in ("whole", "on_demand", "auto"):
            raise SettingError(f"transfer must be whole, on_demand or auto, got {self.transfer!r}")
        if self.transfer == "auto" and not (self.adaptive and self.planning):
            raise SettingError("transfer auto is the planner's choice: it needs adaptive")
        if self.preemption not in ("recompute", "swap"):
            raise SettingError(f"preemption must be recompute or swap, got {self.preemption!r}")

    @property
    def spill_dir(self) -> Path:
        """Where the disk tier's file goes."""
        return Path(self.disk_dir or tempfile.gettempdir())

    @property
    def device_format(self) -> str:
        """The format of experts that stay on the device, but for those that a placement keeps dense."""
        return self.expert_format or (DEFAULT_COMPRESSED if self.placement in COMPRESSING else DENSE)

    @property
    def formats(self) -> ExpertFormats:
        """Formats of all tiers."""
        packed = DEFAULT_COMPRESSED if self.device_format == DENSE else self.device_format  # no policy will use it
        transfer = "whole" if self.transfer == "auto" else self.transfer
        return ExpertFormats(packed, self.host_format or self.device_format, self.slot_format, transfer)
