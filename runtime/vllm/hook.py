"""Where vLLM's layers become ours whatever their method is: `vllm_kernels`.

It is switched on by --additional-config alone, since vLLM's quantization flag belongs to the checkpoint: so the layer
with experts is replaced, not its method. vLLM's PluggableLayer lets a stranger put a class in the place of its own, but
only one that exists already, which would cost every process of vLLM the import of all fused-MoE classes. So we look
at which class is made when it is made.
"""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_MODULE = "vllm.model_executor.custom_op"


def hook_layers() -> None:
    """Now, or as soon as vLLM imports the module of its layers; twice is once."""
    if _MODULE in sys.modules:
        _replace(sys.modules[_MODULE])
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


class _WhenImported(MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenReplace(spec.loader)
        return spec


class _ThenReplace(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _replace(module)


def _replace(module: ModuleType) -> None:
    # A vLLM without such layers has nothing to replace, and must be imported as ever.
    layer_class = getattr(module, "PluggableLayer", None)
    if layer_class is None or hasattr(layer_class, "fluxmoe_looks"):
        return
    make = layer_class.__new__

    def look(cls: type, *args: Any, **kwargs: Any) -> Any:
        return make(_class_for(cls), *args, **kwargs)

    layer_class.__new__, layer_class.fluxmoe_looks = staticmethod(look), True


def _class_for(cls: type) -> type:
    """`cls`, or ours in its place. SettingError for settings that are not valid, or would do nothing."""
    try:
        from vllm.config import get_current_vllm_config_or_none
    except ImportError:
        return cls  # a vLLM of other names must run as ever without our settings; with them `make vllm-matrix` tells
    config = get_current_vllm_config_or_none()
    given = getattr(config, "additional_config", None)
    if not isinstance(given, dict) or "fluxmoe" not in given or cls.__module__.startswith("fluxmoe."):
        return cls
    quant_config = config.quant_config
    if quant_config is not None and quant_config.get_name() == "fluxmoe":
        return cls
    from .unchanged import class_for

    return class_for(cls, config)
