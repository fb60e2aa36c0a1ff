"""`kv_tokens: N`: the least paging that leaves so many tokens of KV cache.

From the pager's own footprint: experts dense on the device, then compressed, then a falling share of them there and the
others in host memory, then in files. A pure function of sizes, which knows no vLLM; see `room` for where these come
from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

from fluxmoe.kernels.formats import DEFAULT_COMPRESSED, DENSE

from ..experts.config import PagingConfig
from ..experts.footprint import Footprint
from ..memory.budget import BudgetError, format_bytes
from .settings import PluginConfig

# Shares of experts on the device that are tried, in so many steps from all to none.
_STEPS = 64


class Room(NamedTuple):
    """What a host has for experts and KV cache together.

    device_bytes: on the device, once all but these have theirs. host_bytes: free in the host, None where the system
    does not say. shared: both are the same memory. token_bytes: of one token's KV in all layers. reads_files: whether
    experts may be in files.
    """

    device_bytes: int
    host_bytes: int | None
    shared: bool
    token_bytes: int
    reads_files: bool

    def tokens_beside(self, footprint: Footprint) -> int:
        """Tokens of KV beside experts that take so much; negative where these alone do not fit."""
        taken, host = sum(footprint.lines().values()), footprint.host_lines().get("host_experts", 0)
        if self.shared:
            taken += host
        elif self.host_bytes is not None and host > self.host_bytes:
            return -1
        return (self.device_bytes - taken) // self.token_bytes


def choices(config: PluginConfig, reads_files: bool) -> Iterator[PagingConfig]:
    """Placements from the least paging to the most, with formats, slots and the rest as `config` has them."""
    compressed = config.expert_format or DEFAULT_COMPRESSED

    def choose(placement: str, alpha: float | None, expert_format: str | None) -> PagingConfig:
        return replace(config, kv_tokens=None, placement=placement, alpha=alpha, expert_format=expert_format)

    yield choose("resident", None, None)
    if compressed != DENSE:
        yield choose("packed", None, compressed)
    for placement in ("balanced", "disk") if reads_files else ("balanced",):
        for step in reversed(range(_STEPS)):
            yield choose(placement, step / _STEPS, compressed)


def least_paging(
    config: PluginConfig, room: Room, footprint_of: Callable[[PagingConfig], Footprint]
) -> tuple[PagingConfig, int]:
    """The first of `choices` beside which `config.kv_tokens` tokens have room, and how many have. BudgetError where
    there is none, which names the most that would have."""
    assert config.kv_tokens is not None, "asked for where a number is given"
    most, leanest = -1, None
    for choice in choices(config, room.reads_files):
        tokens = room.tokens_beside(footprint_of(choice))
        if tokens >= config.kv_tokens:
            return choice, tokens
        if tokens > most:
            most, leanest = tokens, choice
    if leanest is None or most <= 0:
        raise BudgetError(
            f"kv_tokens {config.kv_tokens}: beside {format_bytes(max(0, room.device_bytes))} of experts and KV cache "
            "no placement leaves room for any; give vLLM more memory (--gpu-memory-utilization)"
        )
    raise BudgetError(
        f"kv_tokens {config.kv_tokens}: no placement leaves room for so many; at most {most} would have, with "
        f"{described(leanest)}; ask for no more, or give vLLM more memory (--gpu-memory-utilization)"
    )


def described(config: PagingConfig) -> str:
    """`placement balanced, alpha 0.5, planar12`."""
    alpha = "" if config.alpha is None else f", alpha {config.alpha:g}"
    return f"placement {config.placement}{alpha}, {config.device_format}"
