"""HardwareProfile: what a machine can move and compute, as placements, planner and simulator need it.

A profile is a JSON file, measured (`fluxmoe profile`) or put together from datasheets; `sources` says of every number
which. Rates are bytes/s and FLOP/s of one device, GB = 1e9.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .devices import HOST, device_of
from .disk_rate import read_rate
from .experts.placement import Tier
from .experts.planner import Links
from .memory.budget import BudgetError

_SHIPPED = Path(__file__).resolve().parent / "profiles"
_PROBE_BYTES = 128 << 20
_REPEATS = 3
# 16 MiB in flight.
_DISK_S, _DISK_BLOCKS = 0.3, (2 << 20,)
# Fields that are checked: those without a default must be positive.
_NUMBERS = ("int", "float")


class ProfileError(ValueError):
    """A hardware profile that is missing or not valid."""


@dataclass(frozen=True)
class HardwareProfile:
    """One machine: `num_devices` equal devices behind one host.

    name, device            what it is; cpu or cuda
    measured                by profile_hardware on the machine itself; else `sources` says from where each number is
    memory_bytes            of one device; host_memory_bytes: of the host
    memory_bandwidth        reads of device memory
    matmul_flops            dense products in the weights' dtype
    host_bandwidth          copies from (pinned) host memory to one device; host_latency_s: of one copy
    host_link_shared        bytes/s that all devices together get from the host, 0: as many as their links add up to
    copy_overlap            of a copy from the host, what hides under compute: 1 with a copy engine; less on a CPU,
                            whose copies run on its cores and through its only memory
    kernel_host_bandwidth   kernels that read pinned memory in place
    decode_bandwidth        format → bytes/s of bf16 put out, decoding compressed experts to a buffer
    decode_latency_s        of decoding one tensor, however small
    disk_bandwidth          reads of files, as many in flight as the disk tier has
    launch_s                one kernel inside a graph, launch to launch; iteration_s: scheduler, sampling, batch
    link_bandwidth          all-reduce between devices, bytes/s of payload; link_latency_s: of one all-reduce
    """

    name: str
    device: str
    num_devices: int
    memory_bytes: float
    host_memory_bytes: float
    memory_bandwidth: float
    matmul_flops: float
    host_bandwidth: float
    kernel_host_bandwidth: float
    disk_bandwidth: float
    decode_bandwidth: Mapping[str, float] = field(default_factory=dict)
    decode_latency_s: float = 0.0
    host_latency_s: float = 0.0
    host_link_shared: float = 0.0
    copy_overlap: float = 1.0
    launch_s: float = 0.0
    iteration_s: float = 0.0
    link_bandwidth: float = 0.0
    link_latency_s: float = 0.0
    measured: bool = False
    sources: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise ProfileError(f"profile {self.name}: device must be cpu or cuda, got {self.device!r}")
        numbers = [(f.name, getattr(self, f.name), not _has_default(f)) for f in fields(self) if f.type in _NUMBERS]
        numbers += [(name, rate, False) for name, rate in self.decode_bandwidth.items()]
        for name, value, positive in numbers:
            if not _number(value) or value < 0 or (positive and not value):
                must = "be positive" if positive else "not be negative"
                raise ProfileError(f"profile {self.name}: {name} must {must}, got {value!r}")
        if self.copy_overlap > 1:
            raise ProfileError(f"profile {self.name}: copy_overlap must be from 0 to 1, got {self.copy_overlap!r}")

    @property
    def host_bandwidth_each(self) -> float:
        """Bytes/s from the host to one device while all of them copy."""
        shared = self.host_link_shared / self.num_devices if self.host_link_shared else self.host_bandwidth
        return min(self.host_bandwidth, shared)

    @property
    def links(self) -> Links:
        """What the planner weighs whole against on-demand transfer with."""
        share = self.host_bandwidth_each / self.host_bandwidth
        return Links(self.host_bandwidth_each, share * self.kernel_host_bandwidth)

    def bandwidths(self, packed: str | None = None) -> dict[Tier, float]:
        """For `placement.place`: bytes/s of bf16 at which each tier delivers a layer.

        packed: the format of the PACKED tier, if it is decoded to a buffer; None: the GEMM reads it in place, at the
        bandwidth of memory.
        """
        device = self.memory_bandwidth
        return {
            Tier.RESIDENT: device,
            Tier.PACKED: self.decode_bandwidth.get(packed, device) if packed else device,
            Tier.HOST: self.host_bandwidth_each,
            Tier.DISK: self.disk_bandwidth,
        }

    def of_devices(self, count: int) -> HardwareProfile:
        """As many such devices in one host, whose links add up. ProfileError where they have no link between them."""
        if count < 1:
            raise ProfileError(f"a machine has at least one device, got {count}")
        if count > 1 and not self.link_bandwidth:
            raise ProfileError(f"profile {self.name} has no link_bandwidth; {count} devices cannot share a model")
        shared = self.host_link_shared * count / self.num_devices
        return replace(self, name=f"{self.name}×{count}", num_devices=count, host_link_shared=shared)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any], where: str = "profile") -> HardwareProfile:
        """ProfileError for fields that are missing, unknown or not valid."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(values.keys() - known):
            raise ProfileError(f"{where}: unknown field {unknown[0]!r}")
        try:
            return cls(**values)
        except TypeError:
            needed = {f.name for f in fields(cls)} - {f.name for f in fields(cls) if _has_default(f)}
            raise ProfileError(f"{where}: field {min(needed - values.keys())!r} is missing") from None

    @classmethod
    def load(cls, name: str | Path) -> HardwareProfile:
        """A shipped profile by name, in any case (see `list_profiles`; `h100` is the first that begins so, SXM before
        PCIe), or a file; NAME×N, NxNAME or NAMExN: N of its devices."""
        path = Path(name)
        if not path.exists():
            if shipped := _shipped(str(name)):
                path = _SHIPPED / f"{shipped}.json"
            elif many := re.fullmatch(r"(?P<name>.+)[×xX](?P<count>\d+)|(?P<n>\d+)[×xX](?P<of>.+)", str(name)):
                return cls.load(many["name"] or many["of"]).of_devices(int(many["count"] or many["n"]))
        try:
            values = json.loads(path.read_text())
        except OSError:
            raise ProfileError(
                f"no hardware profile {str(name)!r}: give a file, or one of {', '.join(list_profiles())}"
            ) from None
        except ValueError as error:
            raise ProfileError(f"{path} is no JSON: {error}") from None
        if not isinstance(values, dict):
            raise ProfileError(f"{path} holds no profile")
        return cls.from_json(values, str(path))


def _number(value: object) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf


def _has_default(f: Field) -> bool:
    return f.default is not MISSING or f.default_factory is not MISSING


def _shipped(name: str) -> str | None:
    """The shipped profile that is meant."""

    def plain(text: str) -> str:
        return re.sub(r"[^a-z0-9]", "", text.lower())

    # SXM before PCIe.
    names = sorted(list_profiles(), reverse=True)
    exact = [each for each in names if plain(each) == plain(name)]
    close = [each for each in names if plain(name) and plain(each).startswith(plain(name))]
    return next(iter([*exact, *close]), None)


def list_profiles() -> list[str]:
    """Names of the profiles that come with the project."""
    return sorted(path.stem for path in _SHIPPED.glob("*.json"))


def measure_bandwidths(device: torch.device, files: Sequence[Path] = ()) -> dict[Tier, float]:
    """Bytes per second at which a layer's experts reach the compute units from each tier (best of 3), in a fraction of
    a second.

    RESIDENT: reads of device memory. HOST: copies from host memory to the device (pinned on CUDA). DISK, if there are
    `files`: reads of them, past the page cache if they can be. The balanced placements give each tier a share
    proportional to its bandwidth (arXiv 2604.02715 §4.2).
    """
    probe = _probe_bytes(device)
    source = torch.ones(probe // 8, dtype=torch.int64, device=device)
    host = torch.ones(probe // 8, dtype=torch.int64, device="cpu", pin_memory=device_of(device).asynchronous)
    target = torch.empty_like(source)
    # A GPU takes as long to start and to be waited for as to read once (an H200: 20 and 31 us).
    reads = 16 if device_of(device).asynchronous else 1
    rates = {
        Tier.RESIDENT: reads * probe / best_seconds(lambda: [source.sum() for _ in range(reads)], device),
        Tier.HOST: probe / best_seconds(lambda: target.copy_(host, non_blocking=True), device),
    }
    if files:
        del source, host, target
        reading = partial(read_rate, files, _DISK_S, sizes=_DISK_BLOCKS)
        if disk := reading() or reading(direct=False):
            rates[Tier.DISK] = disk
    return rates


def _probe_bytes(device: torch.device) -> int:
    """Of each of three buffers: behind a wall little may be free, and what is taken in vain kills as well."""
    try:
        free = min(device_of(device).free_bytes(), HOST.free_bytes())
    except BudgetError:  # the system does not say
        return _PROBE_BYTES
    return max(1 << 20, min(_PROBE_BYTES, free // 16))


def measure_links(device: torch.device) -> Links:
    """Copies from host memory, and reads of it in place, in a fraction of a second."""
    copy = measure_bandwidths(device)
    return Links(copy[Tier.HOST], device_of(device).read_bandwidth(_PROBE_BYTES) or copy[Tier.RESIDENT])


def best_seconds(work, device: torch.device, repeats: int = _REPEATS) -> float:
    """Least time of `repeats` calls after one that is not counted, until the device is done."""
    best = float("inf")
    for i in range(repeats + 1):
        begin = time.perf_counter()
        work()
        device_of(device).synchronize()
        if i:
            best = min(best, time.perf_counter() - begin)
    return best
