"""Where an experiment serves: for real on this machine's CPU or GPU, or simulated on a machine that is not there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fluxmoe.runtime.devices import resolve_device
from fluxmoe.runtime.hardware import HardwareProfile, list_profiles
from fluxmoe.runtime.serving.config import EngineConfig
from fluxmoe.runtime.serving.engine import Engine
from fluxmoe.runtime.sim.cost_model import CostParameters
from fluxmoe.runtime.sim.simulator import SimEngine

from .args import option
from .models import Source
from .results import UsageError

SIMULATED = "sim"
# Of an engine's settings those that a machine has, and those that a sweep varies itself.
ELSEWHERE = ("device", "profile")
SWEPT = (*ELSEWHERE, "budget_bytes", "placement", "alpha", "dense_share", "expert_format", "adaptive", "densify")


@dataclass(frozen=True)
class Machine:
    """device: cpu, cuda or sim; of sim, the profile that says what is simulated, and how many of its devices (None:
    all); else profile says the rates that placement is chosen by."""

    device: str
    profile: HardwareProfile | None = None
    devices: int | None = None

    @property
    def simulated(self) -> bool:
        return self.device == SIMULATED

    @property
    def about(self) -> dict[str, Any]:
        """What provenance.json says of it; figures tell measured from simulated by it."""
        return {"device": self.device, "simulated": self.profile.name if self.simulated and self.profile else None}

    @property
    def content(self) -> dict[str, Any]:
        """What of it makes a result, the profile by its content."""
        profile = self.profile.to_json() if self.profile else None
        return {"device": self.device, "profile": profile, "devices": self.devices}

    def open(self, source: Source, settings: EngineConfig, costs: CostParameters | None = None) -> Engine | SimEngine:
        """An engine that serves `source`, to be closed by `with`. costs: of the simulator."""
        if self.simulated:
            assert self.profile is not None, "what is simulated has a profile"
            return SimEngine(source.config, self.profile, replace(settings, device="cpu"), costs, self.devices)
        return self.engine(source, settings)

    def engine(self, source: Source, settings: EngineConfig) -> Engine:
        """One that serves for real."""
        return Engine(source.weights, replace(settings, device=self.device, profile=self.profile))


@dataclass(frozen=True, kw_only=True)
class MachineChoice:
    """What a command serves on."""

    device: str = option("sim: simulated", "auto", choices=("auto", "cpu", "cuda", SIMULATED))
    profile: str | None = option(
        "with --device sim, the machine; else the rates for balanced without a share: "
        f"{', '.join(list_profiles())}, as 4xH100-SXM several of one, or a file", None, metavar="NAME|FILE",
    )  # fmt: skip
    devices: int | None = option("with --device sim: how many of the profile's devices (default: all)", None, least=1)

    def __post_init__(self) -> None:
        if self.devices and self.device != SIMULATED:
            raise UsageError("--devices is for --device sim: it has no effect here")
        if self.device == SIMULATED and not self.profile:
            raise UsageError("--device sim needs --profile: the machine to simulate")

    @property
    def machine(self) -> Machine:
        profile = HardwareProfile.load(self.profile) if self.profile else None
        if self.devices and profile and self.devices > profile.num_devices:
            raise UsageError(f"--devices {self.devices}: profile {profile.name} has {profile.num_devices}")
        device = self.device if self.device == SIMULATED else resolve_device(self.device).type
        return Machine(device, profile, self.devices)


@dataclass(frozen=True, kw_only=True)
class FigureMachine:
    """What a figure of the paper is made on: simulated, or for real from a preset."""

    device: str = option("sim: the paper's machine, simulated", SIMULATED, choices=(SIMULATED, "cpu", "cuda"))
    checkpoints: Path = option("where presets keep their model", Path("checkpoints"))
    out: Path = option("folder of the results", metavar="DIR")

    @property
    def simulated(self) -> bool:
        return self.device == SIMULATED

    @property
    def here(self) -> Machine:
        """This machine."""
        return Machine(resolve_device(self.device).type)
