"""Where an experiment serves: for real on this machine's CPU or GPU, or simulated on a machine that is not there."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import Any

from fluxmoe.runtime.devices import resolve_device
from fluxmoe.runtime.hardware import HardwareProfile
from fluxmoe.runtime.serving.config import EngineConfig
from fluxmoe.runtime.serving.engine import Engine
from fluxmoe.runtime.sim.cost_model import CostParameters
from fluxmoe.runtime.sim.simulator import SimEngine

from .presets import Source
from .results import Parser, UsageError

SIMULATED = "sim"


@dataclass(frozen=True)
class Machine:
    """device: cpu, cuda or sim; of sim, the profile that says what is simulated, and how many of its devices (None:
    all)."""

    device: str
    profile: HardwareProfile | None = None
    devices: int | None = None

    @property
    def simulated(self) -> bool:
        return self.profile is not None

    @property
    def about(self) -> dict[str, Any]:
        """What provenance.json says of it; figures tell measured from simulated by it."""
        return {"device": self.device, "simulated": self.profile.name if self.profile else None}

    def open(self, source: Source, settings: EngineConfig, costs: CostParameters | None = None) -> Engine | SimEngine:
        """An engine that serves `source`, to be closed by `with`. costs: of the simulator."""
        if self.profile is not None:
            return SimEngine(source.config, self.profile, settings, costs, self.devices)
        return self.engine(source, settings)

    def engine(self, source: Source, settings: EngineConfig) -> Engine:
        """One that serves for real."""
        return Engine(source.weights, replace(settings, device=self.device))


def figure_parser(module: str, description: str) -> Parser:
    """The arguments of a script that simulates a figure of the paper, or makes it for real from a preset."""
    p = Parser(prog=f"fluxmoe.experiments.{module}", description=description)
    p.add_argument("--device", choices=[SIMULATED, "cpu", "cuda"], default=SIMULATED, help="(default: %(default)s)")
    p.add_argument("--checkpoints", default="checkpoints", metavar="DIR", help="where presets keep their model")
    p.add_argument("--out", required=True, metavar="DIR")
    return p


def machine_of(args: argparse.Namespace) -> Machine:
    """The machine of --device, --profile and, where a script has it, --devices."""
    if args.device != SIMULATED:
        return Machine(resolve_device(args.device).type)
    if not args.profile:
        raise UsageError("--device sim needs --profile: the machine to simulate")
    return Machine(SIMULATED, HardwareProfile.load(args.profile), getattr(args, "devices", None))
