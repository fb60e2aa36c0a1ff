"""Where a setting of the engine has an effect: what a user asks for in vain is refused, before any work.

A command with such settings says in `setups` what it will serve; one in which a setting has an effect is enough, since
a sweep has its settings in common for all of its placements. Only what was given counts, not defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import fields
from typing import NamedTuple

from fluxmoe.kernels.formats import DENSE, fused_formats
from fluxmoe.models.config import ModelConfig
from fluxmoe.runtime.devices import resolve_device
from fluxmoe.runtime.experts.cache_policies import STATIC
from fluxmoe.runtime.experts.placement import BY_BANDWIDTH, IN_FILES, WHOLLY_ON_DEVICE
from fluxmoe.runtime.serving.config import EngineConfig

from .args import flag_of
from .machines import SIMULATED, MachineChoice
from .models import ModelChoice
from .results import UsageError


class Setup(NamedTuple):
    """A model that is served with some settings; device: cpu, cuda or sim."""

    settings: EngineConfig
    device: str
    model: ModelConfig


class Effect(NamedTuple):
    """needs: what a setting is for, in words; found: whether a setup has it."""

    needs: str
    found: Callable[[Setup], bool]


def _has_far_experts(s: Setup) -> bool:
    return s.settings.adaptive or s.settings.placement not in WHOLLY_ON_DEVICE


def _comes_whole(s: Setup) -> bool:
    return _has_far_experts(s) and (s.settings.adaptive or s.settings.formats.transfer == "whole")


def _has_cache(s: Setup) -> bool:
    return s.settings.placement in IN_FILES and s.settings.formats.transfer == "on_demand"


def _uses_slots(s: Setup) -> bool:
    c = s.settings
    backend = "torch" if c.kernels == "torch" else "cpu" if (s.device, c.kernels) == ("cpu", "auto") else "triton"
    decoded_first = c.device_format not in {DENSE, *fused_formats(backend)}
    return _comes_whole(s) or _has_cache(s) or decoded_first


def _keeps_packed(s: Setup) -> bool:
    c = s.settings
    return c.device_format != DENSE and (c.placement not in ("host", "disk") or bool(c.alpha))


def _asks_rates(s: Setup) -> bool:
    c = s.settings
    shares = (c.alpha, c.disk_share) if c.placement in IN_FILES else (c.alpha,)
    planned = c.counts_routing and (c.transfer == "auto" or s.device == "cuda")
    return s.device == SIMULATED or (c.placement in BY_BANDWIDTH and None in shares) or planned


def _has_slow_link(s: Setup) -> bool:
    if s.device == SIMULATED:
        return s.settings.preemption == "swap" or (_has_far_experts(s) and s.settings.placement != "disk")
    return s.device == "cpu" and (_comes_whole(s) or _has_cache(s))


_FAR = Effect("experts that are not all on the device: give another --placement", _has_far_experts)
_CACHE = f"experts that come on demand from files: --placement {' or '.join(IN_FILES)}, not --transfer whole"
_REAL = Effect("what serves for real, not for what is simulated", lambda s: s.device != SIMULATED)

# None: wherever something is served.
EFFECTS: Mapping[str, Effect | None] = {
    "placement": None,
    "alpha": _FAR,
    "disk_share": Effect("--placement three_tiers", lambda s: s.settings.placement == "three_tiers"),
    "dense_share": Effect("experts that are kept packed on the device: give an --expert-format", _keeps_packed),
    "expert_format": Effect(
        "experts that may be compressed: --placement resident holds them dense",
        lambda s: s.settings.placement != "resident",
    ),
    "host_format": _FAR,
    "slot_format": Effect(
        "compressed experts that are copied into slots: give a --placement with some elsewhere, and an --expert-format",
        lambda s: _comes_whole(s) and s.settings.formats.host != DENSE,
    ),
    "transfer": _FAR,
    "cache_bytes": Effect(_CACHE, _has_cache),
    "cache_policy": Effect(_CACHE + ", served for real", lambda s: _has_cache(s) and s.device != SIMULATED),
    "cache_recording": Effect(
        f"--cache-policy {STATIC} of a cache that serves for real",
        lambda s: _has_cache(s) and s.settings.cache_policy == STATIC and s.device != SIMULATED,
    ),
    "profile": Effect("shares by bandwidth that are not given, --transfer auto, and --device sim", _asks_rates),
    "slots": Effect("experts that are copied or decoded before they are read: give another --placement", _uses_slots),
    "adaptive": None,
    "disk_dir": Effect(
        f"--placement {' or '.join(IN_FILES)}, served for real",
        lambda s: s.settings.placement in IN_FILES and s.device != SIMULATED,
    ),
    "kernels": _REAL,
    "batch_invariant": Effect(
        "Triton's kernels on CUDA; those of the CPU always are",
        lambda s: s.settings.kernels != "torch" and (s.device == "cuda" or s.settings.kernels == "triton"),
    ),
    "threads": Effect("the CPU's own kernels", lambda s: (s.device, s.settings.kernels) == ("cpu", "auto")),
    "poison": _REAL,
    "link_bandwidth": Effect(
        "experts that a CPU copies from elsewhere than the device: --device cpu, or sim, and such a --placement",
        _has_slow_link,
    ),
    "budget_bytes": None,
    "max_batch": None,
    "fit_batch": Effect("models with recurrent states", lambda s: s.model.delta is not None),
    "max_batched_tokens": None,
    "block_size": None,
    "preemption": None,
    "device": None,
    "cuda_graphs": Effect(
        "CUDA and Triton's kernels, without a trace or a record of routing",
        lambda s: (
            s.device == "cuda"
            and s.settings.kernels != "torch"
            and not (s.settings.timeline or s.settings.record_routing)
        ),
    ),
    "delta_net": Effect(
        "models with Gated DeltaNet in Triton's kernels on CUDA, without --batch-invariant",
        lambda s: (
            s.model.delta is not None
            and s.device == "cuda"
            and s.settings.kernels != "torch"
            and not s.settings.batch_invariant
        ),
    ),
    "densify": Effect("--adaptive", lambda s: s.settings.adaptive),
}


def setups_of(model: ModelChoice, machine: MachineChoice, each: Iterable[EngineConfig]) -> list[Setup]:
    """Setups of a sweep. Nothing is made."""
    device, config = served_on(machine.device), model.architecture
    return [Setup(settings, device, config) for settings in each]


def served_on(device: str) -> str:
    """What --device means; a device that is asked for by name need not be here to know what has an effect on it."""
    return resolve_device(device).type if device == "auto" else device


def refuse_idle(given: Collection[str], setups: Iterable[Setup]) -> None:
    """UsageError for a flag of those `given` that has no effect in any of `setups`."""
    served = list(setups)
    for f in fields(EngineConfig):
        effect, flags = EFFECTS.get(f.name), {flag_of(f), f"no-{flag_of(f)}"}
        if effect is None or any(map(effect.found, served)):
            continue
        for flag in flags & set(given):
            raise UsageError(f"--{flag} has no effect here: it is for {effect.needs}")
