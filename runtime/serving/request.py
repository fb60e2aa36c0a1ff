"""Requests, how to sample for them, and the state that a scheduler keeps for each.

`Request` and `SamplingParams` are what a user gives, `RequestOutput` what they get back; all three are frozen.
`Sequence` is the mutable state between the two: a user's handle, which only the scheduler and its loop change. Times
are seconds on the clock of whoever runs the scheduler: an engine's wall clock or the simulator's virtual one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from operator import index
from typing import Literal

FinishReason = Literal["stop", "length", "refused", "aborted"]


class RequestError(ValueError):
    """A request or its sampling parameters ask for something that cannot be."""


def _integer(name: str, value: object) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise RequestError(f"{name} must be an integer, got {value!r}")
    return index(value)


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen; the defaults are greedy decoding.

    `temperature` 0 is greedy and ignores top_k, top_p and seed. `top_k` 0 keeps all tokens, `top_p` 1 keeps all.
    A token of `stop_token_ids` ends the request even under `ignore_eos`, which only disarms the model's own end
    tokens. The token that stops a request stays in its output, as in Hugging Face's `generate`.
    Raises RequestError.
    """

    max_new_tokens: int = 16
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if _integer("max_new_tokens", self.max_new_tokens) < 1:
            raise RequestError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise RequestError(f"temperature must be 0 (greedy) or a positive number, got {self.temperature}")
        if _integer("top_k", self.top_k) < 0:
            raise RequestError(f"top_k must be 0 (all tokens) or a positive count, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top_p must be above 0 and at most 1 (all tokens), got {self.top_p}")
        if not 0 <= _integer("seed", self.seed) < 2**64:
            raise RequestError(f"seed must be between 0 and 2**64 - 1, got {self.seed}")
        if not isinstance(self.stop_token_ids, tuple):
            raise RequestError(f"stop_token_ids must be a tuple of token ids, got {type(self.stop_token_ids).__name__}")
        for token in self.stop_token_ids:
            _integer("a stop token id", token)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@dataclass(frozen=True)
class Request:
    """A prompt (token ids) and how to continue it. arrival_s: when it comes, in seconds after the first request, for
    whoever replays a trace; request_id: a name for the caller's own use, which nothing here depends on.

    An empty prompt is no error here: the scheduler refuses it, so that one bad request does not stop the others.
    Raises RequestError on ids that are no token ids at all.
    """

    prompt_ids: tuple[int, ...]
    params: SamplingParams = SamplingParams()
    arrival_s: float = 0.0
    request_id: str | int | None = None

    def __post_init__(self) -> None:
        name = "" if self.request_id is None else f"request {self.request_id}: "
        if not isinstance(self.prompt_ids, tuple):
            raise RequestError(f"{name}prompt_ids must be a tuple of token ids, got {type(self.prompt_ids).__name__}")
        # Of plain numbers, as nearly all are, in one pass each: a prompt may have 100,000.
        if set(map(type, self.prompt_ids)) == {int} and min(self.prompt_ids) >= 0:
            return
        for token in self.prompt_ids:
            if _integer(f"{name}a prompt token id", token) < 0:
                raise RequestError(f"{name}prompt token ids must be ≥ 0, got {token}")


@dataclass(frozen=True)
class RequestOutput:
    """What became of a request: `token_ids` are the new tokens only; `error` is set when it was refused."""

    request_id: str | int | None
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    error: str | None
    first_token_s: float | None
    finish_s: float | None


class SequenceState(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    SWAPPED = "swapped"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """A request under way: the handle that its user gets, with `finished`, `output` and the tokens so far.

    token_ids        prompt, then generated tokens
    num_computed     tokens whose K and V are in the cache: a prefix of token_ids
    block_ids        device blocks in token order: position p lies in block_ids[p // block_size]
    host_block_ids   the same for a swapped sequence, covering num_computed tokens
    state_slot       where layers with a recurrent state keep this sequence's while it runs; else -1
    order            rank of arrival (order of `Scheduler.add`)
    error            why it was refused
    """

    request: Request
    order: int = -1
    stop_ids: frozenset[int] = frozenset()
    prompt_len: int = field(init=False)
    token_ids: list[int] = field(init=False)
    num_computed: int = 0
    block_ids: list[int] = field(default_factory=list)
    host_block_ids: list[int] = field(default_factory=list)
    state_slot: int = -1
    state: SequenceState = SequenceState.WAITING
    finish_reason: FinishReason | None = None
    first_token_s: float | None = None
    finish_s: float | None = None
    error: str | None = None

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_ids)
        self.prompt_len = len(self.token_ids)

    @property
    def name(self) -> str:
        """For messages."""
        return f"request {self.order if self.request.request_id is None else self.request.request_id}"

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.prompt_len

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def end(self, reason: FinishReason, at_s: float | None = None, error: str | None = None) -> None:
        """Nothing more will be computed."""
        self.state, self.finish_reason, self.finish_s, self.error = SequenceState.FINISHED, reason, at_s, error

    @property
    def output(self) -> RequestOutput:
        """What became of it, once it is finished."""
        assert self.finish_reason is not None, f"{self.name} is still {self.state.value}"
        return RequestOutput(
            self.request.request_id,
            self.request.prompt_ids,
            tuple(self.token_ids[self.prompt_len :]),
            self.finish_reason,
            self.error,
            self.first_token_s,
            self.finish_s,
        )
