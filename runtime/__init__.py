"""Expert paging, and the engine that serves with it: `from fluxmoe.runtime import Engine, EngineConfig, Request`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .serving.config import EngineConfig
    from .serving.engine import Engine
    from .serving.request import Request, RequestOutput, SamplingParams

__all__ = ["Engine", "EngineConfig", "Request", "RequestOutput", "SamplingParams"]

_HOMES = {"Engine": "engine", "EngineConfig": "config"}


def __getattr__(name: str) -> object:
    # Loaded when asked for: whoever needs one part should not wait for the kernels of all.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".serving.{_HOMES.get(name, 'request')}", __name__), name)
