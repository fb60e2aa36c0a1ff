"""Settings: the fields of PagingConfig, by their names.

    --additional-config '{"fluxmoe": {"placement": "host", "slots": 3}}'      first
    FLUXMOE_PLACEMENT=host FLUXMOE_SLOTS=3                                    second, for containers

Experts are packed unless another placement is given, or `kv_tokens` chooses one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

import pydantic

from ..experts.config import PagingConfig, SettingError, setting

_PREFIX = "FLUXMOE_"
# Experts do not move inside vLLM, so nothing plans; profiles and delays are given from Python only.
_NOT_HERE = ("adaptive", "planning", "least_alpha", "profile", "load_delay", "record_routing")
# What `kv_tokens` chooses.
_CHOSEN = ("placement", "alpha", "disk_share", "dense_share", "cache_bytes")

# What counts where vLLM's own kernels read experts.
_STREAMED = ("vllm_kernels", "slots", "poison")


@dataclass(frozen=True, kw_only=True)
class PluginConfig(PagingConfig):
    """How experts are paged inside vLLM."""

    kv_tokens: int | None = setting(None, "chooses the least paging that leaves room for so many tokens of KV cache")
    vllm_kernels: bool = setting(
        False, "vLLM's own method for experts stays as it is, whatever the checkpoint's format, and the tensors that "
        "it made are streamed by whole layers from host memory; without --quantization fluxmoe"
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kv_tokens is not None and self.kv_tokens < 1:
            raise SettingError(f"kv_tokens must be at least 1, got {self.kv_tokens}")


NAMES = tuple(f.name for f in fields(PluginConfig) if f.name not in _NOT_HERE)


def read_settings(given: object, environ: Mapping[str, str]) -> PluginConfig:
    """given: what --additional-config has under `fluxmoe`; environ: of the process. SettingError for names that do not
    exist and values that are not valid, whoever gave them."""
    if not isinstance(given, Mapping):
        raise SettingError(f"fluxmoe in --additional-config must be a table of settings, got {given!r}")
    named = {name: value for name, value in environ.items() if name.startswith(_PREFIX)}
    sources = [(name.removeprefix(_PREFIX).lower(), name, value) for name, value in named.items()]
    sources += [(name, f"fluxmoe.{name} in --additional-config", value) for name, value in given.items()]
    types = get_type_hints(PluginConfig)
    values: dict[str, Any] = {}
    for name, source, value in sources:
        if name not in NAMES:
            raise SettingError(f"{source}: there is no such setting inside vLLM; choose among {', '.join(NAMES)}")
        try:
            values[name] = pydantic.TypeAdapter(types[name]).validate_python(value)
        except pydantic.ValidationError as error:
            raise SettingError(f"{source}: {error.errors()[0]['msg']}, got {value!r}") from None
    if values.get("vllm_kernels"):
        if beside := [name for name, value in values.items() if name not in _STREAMED and value is not None]:
            raise SettingError(f"vllm_kernels takes {' and '.join(_STREAMED[1:])} alone: leave out {', '.join(beside)}")
        return PluginConfig(**{"placement": "host"} | values)
    if values.get("kv_tokens") is None:
        return PluginConfig(**{"placement": "packed"} | values)
    if beside := [name for name in _CHOSEN if values.get(name) is not None]:
        raise SettingError(f"kv_tokens chooses the placement: leave out {', '.join(beside)}, or kv_tokens")
    return PluginConfig(**{"placement": "balanced"} | values)
