"""What would do where a budget does not: another placement and format, and the budget that it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from fluxmoe.kernels.formats import DEFAULT_COMPRESSED

from ..experts.footprint import Footprint
from ..memory.budget import format_bytes
from .config import EngineConfig
from .deployment import least_budget

# From the fastest to the one that needs the least memory. Files are read on a CPU alone.
_PLACEMENTS = ("packed", "host", "disk")
_HINT = "lower --max-batch, or serve a smaller model"


class Needs(NamedTuple):
    """A placement, its format, the least budget in bytes, and host memory beside it."""

    placement: str
    expert_format: str
    budget: int
    host: int

    def __str__(self) -> str:
        beside = f", and {format_bytes(self.host)} of host memory beside it" if self.host else ""
        return (
            f"--placement {self.placement} --expert-format {self.expert_format} works with {self.budget} bytes "
            f"({format_bytes(self.budget)}){beside}"
        )


def advice(
    config: EngineConfig,
    place: Callable[[EngineConfig], Footprint],
    deploy: Callable[[EngineConfig, Footprint, int], object],
    host_bytes: Callable[[Footprint], int],
    fits: Callable[[int, int], bool],
    files: bool,
) -> str:
    """What to do instead of `config`: the first other placement that `fits` (budget, host bytes), or the one that needs
    the least. files: whether experts may come from files. place, deploy: as the engine does with settings."""
    found = []
    for placement in _PLACEMENTS if files else _PLACEMENTS[:-1]:
        other = _with(config, placement)
        if (other.placement, other.device_format) == (config.placement, config.device_format):
            continue
        try:
            footprint = place(other)
            least = least_budget(partial(deploy, other, footprint))
        except ValueError:  # this model or these kernels cannot
            continue
        if least is not None:
            found.append(Needs(placement, DEFAULT_COMPRESSED, least, host_bytes(footprint)))
    does = next((each for each in found if fits(each.budget, each.host)), None)
    if does is not None:
        return str(does)
    if not found:
        return _HINT
    return f"{_HINT}; of other placements {min(found, key=lambda each: each.budget + each.host)}"


def _with(config: EngineConfig, placement: str) -> EngineConfig:
    """The same settings but for where experts are."""
    return replace(
        config, placement=placement, expert_format=DEFAULT_COMPRESSED, host_format=None, slot_format="packed",
        alpha=None, disk_share=None, dense_share=0.0, transfer=None, adaptive=False, densify=False, cache_bytes=None,
        cache_policy=EngineConfig.cache_policy, cache_recording=None,
    )  # fmt: skip
