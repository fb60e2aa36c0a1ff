"""Settings that would do nothing are refused: each of the engine's, where it has an effect and where it has none."""

from __future__ import annotations

import importlib
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest
from fluxmoe.experiments.commands.main import COMMANDS
from fluxmoe.experiments.lib.args import flag_of
from fluxmoe.experiments.lib.effects import EFFECTS, Setup, refuse_idle
from fluxmoe.experiments.lib.results import UsageError
from fluxmoe.models.published import published_config
from fluxmoe.runtime.serving.config import EngineConfig

SHOWN = {f.name: flag_of(f) for f in fields(EngineConfig) if f.metadata.get("help")}
OLMOE, NEXT = published_config("olmoe-1b-7b"), published_config("qwen3-next-80b-a3b")
PACKED, HOST, HALF = dict(placement="packed"), dict(placement="host"), dict(placement="balanced", alpha=0.5)
DISK, HUFFMAN, ADAPTIVE = dict(placement="disk"), dict(expert_format="huffman"), dict(adaptive=True)
STATIC = dict(cache_policy="static", cache_recording=Path("routing.npz"))
ON_DEMAND, WHOLE, PLANAR = dict(transfer="on_demand"), dict(transfer="whole"), dict(expert_format="planar12")


def on(device="cpu", model=OLMOE, **settings) -> Setup:
    return Setup(EngineConfig(**settings), device, model)


# Of each setting that is not always used: where it is, and where not.
USED = {
    "alpha": [on(**HALF), on(**HOST), on(placement="hybrid"), on(**PACKED, **ADAPTIVE)],
    "disk_share": [on(placement="three_tiers")],
    "dense_share": [on(**PACKED), on(**HALF, **PLANAR), on(**HOST, **PLANAR, alpha=0.1)],
    "expert_format": [on(**PACKED), on(**HOST)],
    "host_format": [on(**HALF), on(**PACKED, **ADAPTIVE), on(**DISK)],
    "slot_format": [on(**HOST, **PLANAR), on(**HALF, host_format="planar12"), on(**DISK, **WHOLE, **PLANAR)],
    "transfer": [on(**HALF), on(**PACKED, **ADAPTIVE)],
    "cache_bytes": [on(**DISK), on("sim", placement="three_tiers")],
    "cache_policy": [on(**DISK), on(placement="three_tiers")],
    "cache_recording": [on(**DISK, **STATIC)],
    "profile": [on(placement="balanced"), on(placement="three_tiers", alpha=0.5), on("sim"),
                on(**ADAPTIVE, transfer="auto"), on("cuda", **ADAPTIVE)],
    "slots": [on(**HOST), on(**PACKED, **HUFFMAN), on(**PACKED, **ADAPTIVE), on(**DISK), on(**DISK, **WHOLE),
              on(**PACKED, kernels="torch", expert_format="tiered")],
    "disk_dir": [on(**DISK), on("cuda", placement="three_tiers")],
    "kernels": [on(), on("cuda")],
    "batch_invariant": [on("cuda"), on(kernels="triton")],
    "threads": [on()],
    "poison": [on(), on("cuda", **HOST)],
    "link_bandwidth": [on(**HOST), on(**DISK), on("sim", **HALF), on("sim", preemption="swap")],
    "fit_batch": [on(model=NEXT), on("sim", NEXT)],
    "cuda_graphs": [on("cuda")],
    "delta_net": [on("cuda", NEXT)],
    "densify": [on(**PACKED, **ADAPTIVE)],
}  # fmt: skip
IDLE = {
    "alpha": [on(), on(**PACKED)],
    "disk_share": [on(**DISK), on(**HALF)],
    "dense_share": [on(), on(**HALF), on(**HOST, **PLANAR)],
    "expert_format": [on()],
    "host_format": [on(), on(**PACKED)],
    "slot_format": [on(), on(**HOST), on(**PACKED), on(**HALF, **PLANAR, **ON_DEMAND)],
    "transfer": [on(), on(**PACKED)],
    "cache_bytes": [on(**HOST), on(**DISK, **WHOLE)],
    "cache_policy": [on(), on("sim", **DISK), on(**DISK, **WHOLE)],
    "cache_recording": [on(**DISK), on("sim", **DISK, **STATIC), on(**HOST, **STATIC)],
    "profile": [on(), on(**HALF), on(placement="three_tiers", alpha=0.5, disk_share=0.2), on(**ADAPTIVE)],
    "slots": [on(), on(**PACKED), on(**HOST, **ON_DEMAND), on("cuda", **PACKED)],
    "disk_dir": [on(), on(**HALF), on("sim", **DISK)],
    "kernels": [on("sim")],
    "batch_invariant": [on(), on("sim"), on("cuda", kernels="torch")],
    "threads": [on("cuda"), on("sim"), on(kernels="torch"), on(kernels="triton")],
    "poison": [on("sim", **HOST)],
    "link_bandwidth": [on(), on("cuda", **HOST), on(**HALF, **ON_DEMAND), on("sim", **DISK)],
    "fit_batch": [on(), on("cuda")],
    "delta_net": [on("cuda"), on(model=NEXT), on("sim", NEXT), on("cuda", NEXT, kernels="torch"),
                  on("cuda", NEXT, batch_invariant=True)],
    "cuda_graphs": [on(), on("sim"), on("cuda", kernels="torch"), on("cuda", timeline=True)],
    "densify": [on(), on(**PACKED)],
}  # fmt: skip
SOMETIMES = {name for name, effect in EFFECTS.items() if effect is not None}


def test_the_table_has_every_setting_of_a_command_line():
    assert EFFECTS.keys() == SHOWN.keys()
    assert SOMETIMES == USED.keys() == IDLE.keys()


@pytest.mark.parametrize("name", USED)
def test_a_setting_is_taken_where_one_setup_has_use_for_it(name):
    for setup in USED[name]:
        refuse_idle({SHOWN[name]}, [setup])
        refuse_idle({f"no-{SHOWN[name]}"}, [*IDLE[name], setup])


@pytest.mark.parametrize("name", IDLE)
def test_a_setting_without_effect_is_refused_if_it_was_given(name):
    for setup in IDLE[name]:
        with pytest.raises(UsageError, match=f"^--{SHOWN[name]} has no effect here: it is for "):
            refuse_idle({SHOWN[name]}, [setup])
        refuse_idle(set(SHOWN.values()) - {SHOWN[each] for each in SOMETIMES}, [setup])


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_with_the_engines_settings_says_what_it_serves(name):
    arguments = importlib.import_module(f"fluxmoe.experiments.{COMMANDS[name][0]}").Arguments
    if EngineConfig in get_type_hints(arguments).values():
        assert hasattr(arguments, "setups"), "else its flags would not be checked"
