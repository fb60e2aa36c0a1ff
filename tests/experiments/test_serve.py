"""Serving once: what is compiled before a wall is all that is needed behind it."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import fluxmoe.kernels.cpu
import pytest
from fluxmoe.experiments.lib.checkpoints import make_checkpoint
from fluxmoe.experiments.lib.serve import compile_kernels, placed, run
from fluxmoe.experiments.lib.workloads import Lengths, make_requests
from fluxmoe.models.config import load_config
from fluxmoe.runtime.serving.config import EngineConfig
from fluxmoe.runtime.serving.engine import Engine
from numba.core.dispatcher import Dispatcher

pytestmark = pytest.mark.usefixtures("exact_bf16")


def compiled() -> set[tuple[str, Any]]:
    """Of all CPU kernels, the types that they have been compiled or loaded for by now."""
    names = [module.name for module in pkgutil.iter_modules(fluxmoe.kernels.cpu.__path__)]
    modules = [importlib.import_module(f"fluxmoe.kernels.cpu.{name}") for name in names]
    kernels = {id(kernel): kernel for module in modules for kernel in vars(module).values()}
    return {
        (kernel.py_func.__qualname__, types)
        for kernel in kernels.values()
        if isinstance(kernel, Dispatcher)
        for types in kernel.signatures
    }


@pytest.mark.parametrize(
    ("arch", "settings"),
    [
        ("olmoe", dict(placement="disk", expert_format="planar12")),
        ("qwen3_moe", dict(placement="packed", adaptive=True)),
        ("qwen3_next", dict(placement="balanced", alpha=0.5)),
    ],
)
def test_a_tiny_model_compiles_what_a_larger_one_needs(arch, settings, tmp_path):
    sizes: dict[str, Any] = dict(layers=4, experts=6, top_k=3, hidden=256, moe_intermediate=192, heads=4, vocab=600)
    model = make_checkpoint(arch, tmp_path / "model", **sizes)
    config = EngineConfig(device="cpu", max_context=64, max_batch=5, **settings)
    compile_kernels(load_config(model), config)
    before = compiled()
    assert before
    with Engine(model, config) as engine:
        run(engine, make_requests([Lengths(0.0, 20, 3)] * 5, sizes["vocab"], 0))
    assert compiled() == before


def test_a_placements_name_says_share_format_and_transfer():
    balanced = {"placement": "balanced", "alpha": 0.5, "expert_format": "planar12"}
    assert placed("balanced:0.5+planar12") == balanced  # a flag's transfer stays
    assert placed("balanced:0.5+planar12@on_demand") == balanced | {"transfer": "on_demand"}
    for wrong in ("host@never", "host+zip", "host:all", "nowhere"):
        with pytest.raises(ValueError, match=r"never|zip|all|nowhere"):
            placed(wrong)
