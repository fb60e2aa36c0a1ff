"""What depends on the kind of a device, CPU or CUDA: the one place that asks which, and that everything else asks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from fluxmoe.kernels.host_memory import host_zeros
from fluxmoe.kernels.ops import ExpertDims, ExpertOps, LayerDims, Limits, Ops
from torch import Tensor

from .memory import machine
from .timeline import CudaClock, HostClock, Timeline

# Imported where they are used: triton exists on few platforms, and the parts of the pager ask this module.
if TYPE_CHECKING:
    from torch.cuda.streams import Event

    from .experts.config import PagingConfig
    from .experts.mover import Courier
    from .experts.store import ExpertStore
    from .experts.streamer import Streamer
    from .experts.streamer_cpu import ThreadStreamer
    from .experts.streamer_cuda import CudaStreamer
    from .memory.region import BlockPool
    from .memory.slabs import SlabPool


class DeviceError(ValueError):
    """A device was asked for that this machine lacks, or kernels that do not exist."""


@dataclass(frozen=True)
class Device(ABC):
    """One device, `torch`, of a kind.

    is_host         its memory is the host's
    asynchronous    work is enqueued: copies come from page-locked memory, and the host times no load
    graphs          passes can be captured and launched as graphs
    reads_disk      the disk tier's file can be read into slots
    usable          share of the free memory that `all` takes: room for the rest of the process, and for the page cache
                    that loads stream through
    slack_bytes     what a process may hold beside its ledgers: compiled kernels, threads' stacks, what malloc keeps.
                    On a CPU 17 to 32 MiB were measured, 186 MiB where numba compiles anew.
    """

    torch: torch.device

    kind: ClassVar[str]
    is_host: ClassVar[bool]
    asynchronous: ClassVar[bool]
    graphs: ClassVar[bool]
    reads_disk: ClassVar[bool]
    usable: ClassVar[float]
    slack_bytes: ClassVar[int]
    _kernels: ClassVar[str]

    # Memory.

    @abstractmethod
    def free_bytes(self) -> int:
        """Memory that is free now. BudgetError where the system does not say."""

    @abstractmethod
    def total_bytes(self) -> int:
        """Memory that the device has, free or not. BudgetError where the system does not say."""

    @abstractmethod
    def taken_bytes(self) -> int | None:
        """Memory that is taken now, for differences; None where this cannot be told."""

    @property
    def most_room(self) -> int | None:
        """The most that `all` leaves free, whatever the share says; None for no bound."""
        return None

    def available_bytes(self) -> int:
        """What `all` means: of the memory that is free now a share, and at most what leaves room for the slack."""
        free = self.free_bytes()
        available = min(int(free * self.usable), free - self.slack_bytes)
        return max(0, available if self.most_room is None else max(available, free - self.most_room))

    def free_for(self, budget: int) -> int:
        """The least memory that must be free for `all` to be `budget` bytes."""
        free = max(math.ceil(budget / self.usable), budget + self.slack_bytes)
        return free if self.most_room is None else min(free, budget + self.most_room)

    @abstractmethod
    def empty(self, nbytes: int) -> Tensor:
        """uint8 [nbytes] on the device; on the host it starts at a page boundary, as direct reads need."""

    @abstractmethod
    def zeros(self, nbytes: int) -> Tensor:
        """uint8 [nbytes] of zeros, otherwise like `empty`; in the host pages take memory once they are written."""

    @abstractmethod
    def make_pool(self, max_bytes: int) -> BlockPool:
        """A pool of physical blocks. RegionError where the platform lacks what it needs."""

    def make_slabs(self, num_slabs: int, slab_bytes: int, poison: bool = False) -> SlabPool:
        """A pool of slabs, all of them zeros. SlabError where there is no memory for it."""
        from .memory.slabs import SlabError, SlabPool

        try:
            memory = self.zeros(num_slabs * slab_bytes)
        except (RuntimeError, MemoryError):
            raise SlabError(
                f"cannot allocate {num_slabs} slabs of {slab_bytes} bytes of {self.kind} memory for experts and KV; "
                "lower the budget"
            ) from None
        return SlabPool(memory.view(num_slabs, slab_bytes), poison)

    # Order of work.

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for all work that was enqueued."""

    @abstractmethod
    def now(self) -> Event | None:
        """A point in the order of the current stream; None where nothing is enqueued."""

    @abstractmethod
    def clock(self) -> HostClock:
        """What a timeline marks times by."""

    @abstractmethod
    def own_stream(self) -> AbstractContextManager[Callable[[], None]]:
        """A context in which work of the calling thread has an order of its own; yields what waits for it."""

    # Parts.

    @property
    @abstractmethod
    def streamer(self) -> type[Streamer]:
        """The kind of streamer."""

    @abstractmethod
    def make_streamer(self, store: ExpertStore, config: PagingConfig, timeline: Timeline) -> Streamer: ...

    @abstractmethod
    def make_courier(self) -> Courier: ...

    @abstractmethod
    def read_bandwidth(self, probe_bytes: int) -> float | None:
        """Bytes/s of kernels that read host memory in place, measured; None where that is the device's own memory."""

    def make_ops(self, dims: LayerDims, limits: Limits, config: PagingConfig, delta_net: str = "fluxmoe") -> Ops:
        """Kernels of all but experts; delta_net: whose rule Triton's take for Gated DeltaNet. DeviceError for a name
        that does not exist and a rule that others do not take, KernelError for sizes, and a rule that is not there."""
        kernels = self._choose(config.kernels)
        if delta_net != "fluxmoe" and kernels != "triton":
            raise DeviceError(f"--delta-net {delta_net} is for Triton's kernels on a CUDA device: leave it out")
        match kernels:
            case "torch":
                from fluxmoe.kernels.reference.ops import TorchOps

                return TorchOps(dims, limits, self.torch)
            case "numba":
                from fluxmoe.kernels.cpu.ops import CpuOps

                return CpuOps(dims, limits, config.threads)
        from fluxmoe.kernels.triton.ops import TritonOps

        return TritonOps(
            dims, limits, self.torch, batch_invariant=config.batch_invariant, delta_net_rule=delta_net
        )  # fmt: skip

    def make_expert_ops(self, dims: ExpertDims, max_tokens: int, config: PagingConfig) -> ExpertOps:
        """Kernels of experts. DeviceError for a name that does not exist, KernelError for sizes."""
        match self._choose(config.kernels):
            case "torch":
                from fluxmoe.kernels.reference.experts import TorchExperts

                return TorchExperts(dims, max_tokens, self.torch)
            case "numba":
                from fluxmoe.kernels.cpu.experts import CpuExperts

                return CpuExperts(dims, max_tokens, config.threads)
        from fluxmoe.kernels.triton.experts import TritonExperts

        return TritonExperts(
            dims, max_tokens, self.torch, batch_invariant=config.batch_invariant, formats=config.formats_met
        )

    def _choose(self, kernels: str) -> str:
        if kernels not in ("auto", "torch", "triton"):
            raise DeviceError(f"unknown kernels {kernels!r}; choose auto, torch or triton")
        return self._kernels if kernels == "auto" else kernels


class CpuDevice(Device):
    kind, _kernels = "cpu", "numba"
    is_host, asynchronous, graphs, reads_disk = True, False, False, True
    usable, slack_bytes = 0.8, 256 << 20

    def free_bytes(self) -> int:
        return machine.free_bytes()

    def total_bytes(self) -> int:
        return machine.total_bytes()

    @property
    def most_room(self) -> int | None:
        # A container's memory is its own: nobody else's needs are in it, and page cache makes way.
        return 2 * self.slack_bytes if machine.has_wall() else None

    def taken_bytes(self) -> int | None:
        return machine.touched_bytes()

    def empty(self, nbytes: int) -> Tensor:
        return host_zeros(nbytes)

    def zeros(self, nbytes: int) -> Tensor:
        return host_zeros(nbytes)

    def make_pool(self, max_bytes: int) -> BlockPool:
        from .memory.region import MemfdPool

        return MemfdPool(max_bytes)

    def synchronize(self) -> None:
        pass

    def now(self) -> None:
        return None

    def clock(self) -> HostClock:
        return HostClock()

    @contextmanager
    def own_stream(self) -> Iterator[Callable[[], None]]:
        yield self.synchronize

    @property
    def streamer(self) -> type[ThreadStreamer]:
        from .experts.streamer_cpu import ThreadStreamer

        return ThreadStreamer

    def make_streamer(self, store: ExpertStore, config: PagingConfig, timeline: Timeline) -> Streamer:
        return self.streamer(store, config.slots, config.poison, timeline, config.load_delay, config.link_bandwidth)

    def make_courier(self) -> Courier:
        from .experts.mover import ThreadCourier

        return ThreadCourier()

    def read_bandwidth(self, probe_bytes: int) -> None:
        return None


class CudaDevice(Device):
    kind, _kernels = "cuda", "triton"
    is_host, asynchronous, graphs, reads_disk = False, True, True, False
    usable, slack_bytes = 0.92, 0

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.torch)[0]

    def total_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.torch)[1]

    def taken_bytes(self) -> int:
        free, total = torch.cuda.mem_get_info(self.torch)
        return total - free

    def empty(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.torch)

    def zeros(self, nbytes: int) -> Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8, device=self.torch)

    def make_pool(self, max_bytes: int) -> BlockPool:
        from .memory.region_cuda import VmmPool

        return VmmPool(max_bytes, self.torch)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch)

    def now(self) -> Event:
        event = torch.cuda.Event()
        event.record()
        return event

    def clock(self) -> CudaClock:
        return CudaClock()

    @contextmanager
    def own_stream(self) -> Iterator[Callable[[], None]]:
        stream = torch.cuda.Stream(self.torch)
        with torch.cuda.stream(stream):
            yield stream.synchronize

    @property
    def streamer(self) -> type[CudaStreamer]:
        from .experts.streamer_cuda import CudaStreamer

        return CudaStreamer

    def make_streamer(self, store: ExpertStore, config: PagingConfig, timeline: Timeline) -> Streamer:
        return self.streamer(store, config.slots, config.poison, timeline)

    def make_courier(self) -> Courier:
        from .experts.mover import StreamCourier

        return StreamCourier()

    def read_bandwidth(self, probe_bytes: int) -> float:
        from fluxmoe.kernels.triton.host_read import read_bandwidth

        return read_bandwidth(probe_bytes)


def device_of(device: torch.device | str) -> Device:
    """What is known of a device, whether this machine has it or not. DeviceError for a kind that is neither."""
    device = torch.device(device)
    for kind in (CpuDevice, CudaDevice):
        if device.type == kind.kind:
            return kind(device)
    raise DeviceError(f"unknown device {str(device)!r}; choose cpu or cuda")


HOST = device_of("cpu")


def resolve_device(name: str) -> torch.device:
    """auto | cpu | cuda → a device that exists here."""
    if name not in ("auto", "cpu", "cuda"):
        raise DeviceError(f"unknown device {name!r}; choose auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError("no CUDA device can be used here; run with --device cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
