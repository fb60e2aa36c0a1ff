"""The serving loop, written once: admit, schedule, execute, commit, adapt, measure.

A subclass executes steps: with real kernels on the wall clock (Engine), or as costs on a virtual one (SimEngine).

    with Engine(model_dir, config) as engine:
        handle = engine.add(Request(prompt_ids=(1, 2, 3)))
        while not handle.finished:
            engine.step()
        handle.output.token_ids

First come, first served. A handle gets its own answer or an error, whatever else happens around it: an exception in a
step leaves a loop that can go on, where all that the step touched is computed again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import insort
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..experts.placement import DEVICE_TIERS
from ..timeline import STEPS, Timeline
from .request import Request, RequestOutput, Sequence
from .scheduler import Scheduler, Step


@dataclass(frozen=True)
class StepMetrics:
    """One iteration. Times in seconds, `time_s` since the run began; blocks as they stood during the pass."""

    iteration: int
    time_s: float
    duration_s: float
    batch: int
    prefill_tokens: int
    decode_tokens: int
    kv_blocks_used: int
    kv_blocks: int
    waiting: int
    streamed_bytes: int
    stall_s: float
    transfer_s: float
    preemptions: int
    swapped_blocks: int
    finished: int
    device_experts: int


def summarise(steps: list[StepMetrics]) -> dict[str, float | int]:
    """Totals of a run: tokens per second over wall time, stalls, preemptions (keys of `generate --json`)."""
    decode_only = [s for s in steps if s.prefill_tokens == 0]
    decode_s = sum(s.duration_s for s in decode_only)
    summed = ("prefill_tokens", "preemptions", "swapped_blocks", "streamed_bytes", "stall_s", "transfer_s")
    return {
        "wall_s": steps[-1].time_s if steps else 0.0,
        "iterations": len(steps),
        "decode_tokens_per_s": sum(s.decode_tokens for s in decode_only) / decode_s if decode_s else 0.0,
        "generated_by_decode": sum(s.decode_tokens for s in steps),
        "peak_batch": max((s.batch for s in steps), default=0),
        "peak_kv_blocks": max((s.kv_blocks_used for s in steps), default=0),
    } | {name: sum(getattr(s, name) for s in steps) for name in summed}


class Executed(NamedTuple):
    """What a step came to. tokens: one for each chunk that is sampled from, in order; seconds that compute waited for
    loads, and that loads took; bytes that crossed."""

    tokens: list[int]
    stall_s: float
    transfer_s: float
    streamed_bytes: int


class ServingLoop(ABC):
    """Serves what is added, step by step. Not thread-safe."""

    scheduler: Scheduler
    timeline: Timeline

    def __init__(self) -> None:
        self._pending: list[Sequence] = []  # by arrival, whoever came first of equals
        self._origin_s = 0.0
        self._iteration = 0

    # What a subclass gives.

    @abstractmethod
    def _clock_s(self) -> float:
        """Seconds since some fixed time."""

    @abstractmethod
    def _wait(self, seconds: float) -> None:
        """Let time pass: nothing has arrived."""

    @abstractmethod
    def _execute(self, step: Step) -> Executed:
        """Run one pass."""

    @abstractmethod
    def _adapt(self, step: Step, executed: Executed, elapsed_s: float) -> None:
        """Whatever may change between passes; elapsed_s: of this pass so far."""

    @property
    @abstractmethod
    def tiers(self) -> np.ndarray:
        """int8 [layers, experts]: where every expert is."""

    def _dropped(self) -> None:  # noqa: B027
        """Sequences were aborted, or will be computed again: what was kept for them can go."""

    def _refusal(self, request: Request) -> str | None:
        """Why a request cannot be served, beside what the scheduler knows."""
        return None

    # Serving.

    def add(self, request: Request) -> Sequence:
        """Queue a request; its handle. One that cannot be served is finished at once, or when it arrives, with `error`.

        Arrivals count from the first request that finds the loop idle.
        """
        sequence = Sequence(request)
        if not self.has_work:
            self._origin_s = self._clock_s()
        insort(self._pending, sequence, key=lambda s: s.request.arrival_s)
        self._admit()
        return sequence

    @property
    def has_work(self) -> bool:
        return bool(self._pending) or self.scheduler.has_work

    @property
    def now_s(self) -> float:
        """Seconds since the loop was last idle."""
        return self._clock_s() - self._origin_s

    @property
    def _now_ns(self) -> int:
        return round(self._clock_s() * 1e9)

    def start_trace(self, request: Request) -> None:
        """Serve a request to warm up (kernels are compiled, slots and caches in use); the timeline begins after it."""
        self.generate([request])
        self._iteration = 0
        self.timeline.begin()

    def _admit(self) -> None:
        while self._pending and self._pending[0].request.arrival_s <= self.now_s:
            sequence = self._pending.pop(0)
            refusal = self._refusal(sequence.request) or self.scheduler.add(sequence)
            if refusal:
                sequence.end("refused", self.now_s, refusal)

    def step(self) -> StepMetrics | None:
        """One iteration, waiting for an arrival if there is nothing else to do; None once all is done."""
        done = self._step()
        return done and done[0]

    def _step(self) -> tuple[StepMetrics, list[tuple[Sequence, int]]] | None:
        """Metrics of an iteration, and its tokens."""
        self._admit()
        while not self.scheduler.has_work:
            if not self._pending:
                return None
            self._wait(max(0.0, self._pending[0].request.arrival_s - self.now_s))
            self._admit()
        begin_ns, begin_s, self.timeline.step = self._now_ns, self.now_s, self._iteration
        step = self.scheduler.schedule()
        blocks_used, blocks = self.scheduler.blocks_used, self.scheduler.num_blocks
        self.timeline.count("KV blocks", begin_ns, used=blocks_used, free=blocks - blocks_used)
        try:
            executed = self._execute(step)
        except BaseException:
            self.scheduler.give_up(step)
            self._dropped()
            raise
        now_s = self.now_s
        sampled = [chunk.sequence for chunk in step.chunks if chunk.sample]
        for sequence in sampled:
            if sequence.first_token_s is None:
                sequence.first_token_s = now_s
        finished = self.scheduler.commit(step, executed.tokens)
        for sequence in finished:
            sequence.finish_s = now_s
        self._adapt(step, executed, now_s - begin_s)
        self.timeline.add(
            STEPS, f"step {self._iteration}", "step", begin_ns, self._now_ns, batch=len(step.chunks),
            prefill_tokens=step.prefill_tokens, decode_tokens=step.decode_tokens,
        )  # fmt: skip
        self._iteration += 1
        metrics = StepMetrics(
            iteration=self._iteration - 1,
            time_s=now_s,
            duration_s=self.now_s - begin_s,
            batch=len(step.chunks),
            prefill_tokens=step.prefill_tokens,
            decode_tokens=step.decode_tokens,
            kv_blocks_used=blocks_used,
            kv_blocks=blocks,
            waiting=self.scheduler.num_waiting,
            streamed_bytes=executed.streamed_bytes,
            stall_s=executed.stall_s,
            transfer_s=executed.transfer_s,
            preemptions=step.num_preempted,
            swapped_blocks=len(step.swap_out) + len(step.swap_in),
            finished=len(finished),
            device_experts=sum(int(np.count_nonzero(self.tiers == int(tier))) for tier in DEVICE_TIERS),
        )
        return metrics, list(zip(sampled, executed.tokens, strict=True))

    def steps(self) -> Iterator[StepMetrics]:
        """Iterations until all that was added is finished."""
        while (metrics := self.step()) is not None:
            yield metrics

    def stream(self, requests: Iterable[Request]) -> Iterator[tuple[Sequence, int]]:
        """(handle, token) as tokens come, until all `requests` are finished; what is left when it is closed is aborted.

        A refused request has no tokens: its handle, in the order of `requests`, is not seen here.
        """
        yield from self._serve([self.add(request) for request in requests])

    def _serve(self, handles: list[Sequence]) -> Iterator[tuple[Sequence, int]]:
        mine = set(handles)
        try:
            while not all(handle.finished for handle in handles):
                done = self._step()
                assert done is not None, "a request is neither live nor finished"
                yield from (each for each in done[1] if each[0] in mine)
        finally:
            self.abort(*handles)

    def generate(self, requests: Iterable[Request]) -> list[RequestOutput]:
        """Serve all requests; outputs in the order given. Refused ones carry their reason and no tokens."""
        handles = [self.add(request) for request in requests]
        deque(self._serve(handles), maxlen=0)
        return [handle.output for handle in handles]

    def abort(self, *handles: Sequence) -> None:
        """End what is not finished; the tokens that have come stay in its output."""
        for handle in handles:
            if handle.finished:
                continue
            if handle in self._pending:
                self._pending.remove(handle)
                handle.end("aborted", self.now_s)
            else:
                self.scheduler.abort(handle)
                handle.finish_s = self.now_s
                self._dropped()

    def reset(self) -> None:
        """Abort everything, whatever state a failure has left."""
        for handle in (*self._pending, *self.scheduler.reset()):
            handle.end("aborted", self.now_s)
        self._pending = []
        self._dropped()
