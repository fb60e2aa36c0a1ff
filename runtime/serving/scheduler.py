"""Continuous batching with chunked prefill over a paged KV cache: which tokens each forward pass computes.

Every step mixes decodes (one token a sequence) with chunks of prompts up to a token budget (Sarathi-Serve,
arXiv 2403.02310; the token-level view of a sequence, "computed out of known", is vLLM v1's). A sequence is
admitted when blocks for all of its known tokens are free, or lent by a cache of experts, and gets them at once, so that
a prefill under way never waits for memory; only decodes can run out, and then the latest arrival is preempted.

This is plain Python without a clock, so the engine and the simulator drive the same object:

    while scheduler.has_work:
        step = scheduler.schedule()
        executor: cache.swap_out(step.swap_out); cache.swap_in(step.swap_in); forward(step.chunks)
        finished = scheduler.commit(step, tokens)        # or give_up(step), if that failed

The order inside a step is what makes it safe: a device block that `swap_out` reads may already belong to a chunk
of the same step, so the copy out must be ordered before the forward pass (same stream, or an event). Host blocks
cannot clash: a step that preempts resumes and admits nobody, so `swap_out` and `swap_in` are never both filled.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Literal, NamedTuple, get_args

from .kv_cache import BlockAllocator
from .request import Sequence, SequenceState

Preemption = Literal["recompute", "swap"]

_by_order = attrgetter("order")


class Chunk(NamedTuple):
    """Compute tokens [start, start + length) of a sequence; `sample` a token from its last row if that is the
    last known token.
    """

    sequence: Sequence
    start: int
    length: int
    sample: bool


@dataclass(slots=True)
class Step:
    """One forward pass. Block pairs are (source, destination).

    chunks          never empty
    swap_out        (device block, host block), to be copied before everything else
    swap_in         (host block, device block), to be copied before the forward pass
    state_out       (state slot, order of the sequence), likewise of recurrent states
    state_in        (order of the sequence, state slot)
    num_preempted   sequences that lost their device blocks in this step, by either way
    prefill_tokens  tokens of prompts, and of what a preempted sequence computes again
    decode_tokens   tokens that were sampled in the step before
    """

    chunks: list[Chunk] = field(default_factory=list)
    swap_out: list[tuple[int, int]] = field(default_factory=list)
    swap_in: list[tuple[int, int]] = field(default_factory=list)
    state_out: list[tuple[int, int]] = field(default_factory=list)
    state_in: list[tuple[int, int]] = field(default_factory=list)
    num_preempted: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        return self.prefill_tokens + self.decode_tokens


def _add_chunk(step: Step, sequence: Sequence, length: int) -> int:
    start, known = sequence.num_computed, len(sequence.token_ids)
    if start >= sequence.prompt_len and start + 1 == known:
        step.decode_tokens += 1
    else:
        step.prefill_tokens += length
    step.chunks.append(Chunk(sequence, start, length, start + length == known))
    return length


class Scheduler:
    """First come, first served, over `num_blocks` device blocks of `block_size` tokens.

    At most `max_batch` sequences hold device blocks and at most `max_batched_tokens` tokens are computed a step.
    A preempted sequence either gives its blocks up and computes all its known tokens again ("recompute"), or
    has the filled ones copied into the `host_blocks` ("swap"; it falls back to "recompute" where they do not
    fit). Either way it keeps its tokens and its rank of arrival, and goes on before any request that has not
    started.

    Every accepted request ends: the earliest running sequence always gets tokens and is never preempted, since
    the blocks of all others are enough (`add` refuses what would not fit alone).
    Raises ValueError on limits under which nothing could run.
    """

    def __init__(
        self,
        blocks: BlockAllocator,
        block_size: int,
        max_batch: int,
        max_batched_tokens: int,
        preemption: Preemption,
        max_model_len: int,
        host_blocks: int = 0,
        eos_token_ids: tuple[int, ...] = (),
    ) -> None:
        for name, value, least in (
            ("num_blocks", blocks.num_blocks, 1),
            ("block_size", block_size, 1),
            ("max_batch", max_batch, 1),
            ("max_batched_tokens", max_batched_tokens, 1),
            ("max_model_len", max_model_len, 1),
            ("host_blocks", host_blocks, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if preemption not in get_args(Preemption):
            raise ValueError(f"preemption must be one of {', '.join(get_args(Preemption))}, got {preemption!r}")
        self.block_size, self.max_batch, self.max_batched_tokens = block_size, max_batch, max_batched_tokens
        self.preemption, self.max_model_len = preemption, max_model_len
        self._eos = frozenset(eos_token_ids)
        self._device = blocks
        self._host = BlockAllocator(host_blocks)
        self._states = BlockAllocator(max_batch)
        self._num_added = 0
        self._drop_all()

    def _drop_all(self) -> None:
        # All three are in order of arrival; what waits again after a preemption is ahead of what never ran.
        self._running: list[Sequence] = []
        self._swapped: deque[Sequence] = deque()
        self._waiting: deque[Sequence] = deque()
        self._live: set[Sequence] = set()
        self._uncommitted: Step | None = None

    def reset(self) -> list[Sequence]:
        """Drop everything, whatever state a failure has left; returns the sequences that were live."""
        live = sorted(self._live, key=_by_order)
        for sequence in live:
            sequence.block_ids, sequence.host_block_ids, sequence.state_slot = [], [], -1
            sequence.end("aborted")
        for allocator in (self._device, self._host, self._states):
            allocator.free_all()
        self._drop_all()
        return live

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_swapped(self) -> int:
        return len(self._swapped)

    @property
    def swapped_orders(self) -> set[int]:
        """Ranks of arrival of the sequences whose blocks and states are in host memory."""
        return {sequence.order for sequence in self._swapped}

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_blocks(self) -> int:
        return self._device.num_blocks

    @property
    def most_blocks(self) -> int:
        """Device blocks that there are, or can come to be."""
        return self._device.most_blocks

    @property
    def blocks_used(self) -> int:
        return self._device.num_used

    @property
    def host_blocks_used(self) -> int:
        return self._host.num_used

    def can_spare(self, num_blocks: int) -> bool:
        """Whether the cache without so many device blocks would hold the longest of the accepted requests."""
        live = (*self._running, *self._swapped, *self._waiting)
        longest = max((self._blocks(s.prompt_len + s.request.params.max_new_tokens - 1) for s in live), default=1)
        return self._device.num_blocks - num_blocks >= longest

    @property
    def blocks_wanted(self) -> int:
        """Blocks that the known tokens of all who wait would take, as many sequences as still fit the batch."""
        room = max(0, self.max_batch - len(self._running))
        queue = [*self._swapped, *self._waiting][:room]
        return sum(self._blocks(len(s.token_ids)) for s in queue)

    def add(self, sequence: Sequence) -> str | None:
        """Queue a new sequence; or, without a trace, refuse it: the sentence that says why and what would do."""
        assert sequence.order < 0, f"{sequence.name} was added before"
        request = sequence.request
        prompt, new = len(request.prompt_ids), request.params.max_new_tokens
        if prompt == 0:
            return "the prompt is empty; give at least one token"
        if prompt + new > self.max_model_len:
            return (
                f"prompt ({prompt}) + max_new_tokens ({new}) is {prompt + new} tokens, more than the limit of "
                f"{self.max_model_len}; shorten the prompt or ask for fewer tokens"
            )
        # K and V of the last sampled token are never needed.
        needed = self._blocks(prompt + new - 1)
        if needed > self.most_blocks:
            return (
                f"prompt ({prompt}) + max_new_tokens ({new}) needs {needed} KV blocks of {self.block_size} tokens, "
                f"the cache has {self.most_blocks}; ask for fewer tokens or give the KV cache more memory"
            )
        stop_ids = frozenset(request.params.stop_token_ids)
        if not request.params.ignore_eos:
            stop_ids |= self._eos
        sequence.order, sequence.stop_ids = self._num_added, stop_ids
        self._num_added += 1
        self._live.add(sequence)
        self._waiting.append(sequence)
        return None

    def abort(self, sequence: Sequence) -> None:
        """End a live sequence now, between steps; its blocks are free at once."""
        assert self._uncommitted is None, "commit the last step, or give it up, before aborting"
        queues = {SequenceState.RUNNING: self._running, SequenceState.SWAPPED: self._swapped}
        queues.get(sequence.state, self._waiting).remove(sequence)
        self._release(sequence)
        self._live.remove(sequence)
        sequence.end("aborted")

    def schedule(self) -> Step:
        """Choose the next step and assign its blocks; only while `has_work`, and after the last step's commit."""
        assert self._uncommitted is None, "commit the last step before scheduling another"
        assert self._live, "nothing to schedule"
        step = Step()
        budget = self._schedule_running(step, self.max_batched_tokens)
        if not step.num_preempted:
            self._schedule_new(step, budget)
        assert step.chunks, "a step without work while requests are unfinished"
        self._uncommitted = step
        return step

    def give_up(self, step: Step) -> None:
        """`step` failed, and nobody knows what it has written: all that it touched is computed again."""
        assert step is self._uncommitted, "give_up takes the step that schedule returned last, once"
        self._uncommitted = None
        copied_out = {order for _, order in step.state_out}
        for sequence in [s for s in self._swapped if s.order in copied_out]:
            self._swapped.remove(sequence)
            self._compute_again(sequence)
        while self._running:
            self._compute_again(self._running.pop())

    def commit(self, step: Step, tokens: list[int]) -> list[Sequence]:
        """Record that `step` was computed; `tokens`: one for every chunk with `sample`, in order.

        Returns the sequences that this ended, with `finish_reason` set and their blocks free again.
        """
        assert step is self._uncommitted, "commit takes the step that schedule returned last, once"
        sampling = sum(chunk.sample for chunk in step.chunks)
        assert sampling == len(tokens), f"{sampling} sequences are sampled, got {len(tokens)} tokens"
        self._uncommitted = None
        finished, next_token = [], iter(tokens)
        for sequence, _, length, sample in step.chunks:
            sequence.num_computed += length
            if not sample:
                continue
            token = next(next_token)
            sequence.token_ids.append(token)
            if token in sequence.stop_ids:
                sequence.end("stop")
            elif sequence.num_generated == sequence.request.params.max_new_tokens:
                sequence.end("length")
            else:
                continue
            finished.append(sequence)
        for sequence in finished:
            self._release(sequence)
            self._live.remove(sequence)
        if finished:
            self._running = [s for s in self._running if s.state is SequenceState.RUNNING]
        return finished

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def _schedule_running(self, step: Step, budget: int) -> int:
        """Chunks for running sequences, preempting the latest where blocks run out; returns the budget left."""
        i, running, block_size = 0, self._running, self.block_size
        while budget and i < len(running):
            sequence = running[i]
            i += 1
            known, start, blocks = len(sequence.token_ids), sequence.num_computed, sequence.block_ids
            length = min(known - start, budget)
            if start + length > len(blocks) * block_size:
                missing = self._blocks(start + length) - len(blocks)
                while not (has := self._device.has(missing)) and running[-1] is not sequence:
                    self._preempt(step)
                if not has:
                    self._preempt(step)
                    break
                blocks += self._device.allocate(missing)
            budget -= _add_chunk(step, sequence, length)
        return budget

    def _schedule_new(self, step: Step, budget: int) -> None:
        """Resume swapped sequences, then admit waiting ones; nobody is passed over by a later arrival's blocks."""
        while budget and len(self._running) < self.max_batch and (self._swapped or self._waiting):
            queue = self._swapped or self._waiting
            sequence = queue[0]
            known = len(sequence.token_ids)
            needed = self._blocks(known)
            if not self._device.has(needed):
                return
            queue.popleft()
            sequence.block_ids = self._device.allocate(needed)
            (sequence.state_slot,) = self._states.allocate(1)
            if sequence.host_block_ids:
                step.state_in.append((sequence.order, sequence.state_slot))
                step.swap_in += zip(sequence.host_block_ids, sequence.block_ids, strict=False)
                self._host.free(sequence.host_block_ids)
                sequence.host_block_ids = []
            sequence.state = SequenceState.RUNNING
            insort(self._running, sequence, key=_by_order)
            budget -= _add_chunk(step, sequence, min(known - sequence.num_computed, budget))

    def _preempt(self, step: Step) -> None:
        """Take the device blocks of the latest running sequence; it has no chunk in this step yet, since chunks
        are given in order of arrival.
        """
        sequence = self._running.pop()
        step.num_preempted += 1
        # Blocks reserved for tokens not yet computed hold nothing worth a copy. There is at least one filled, for
        # joining a batch comes with a first chunk.
        filled = self._blocks(sequence.num_computed)
        if self.preemption != "swap" or filled > self._host.num_free:
            self._compute_again(sequence)
            return
        host_blocks = self._host.allocate(filled)
        step.swap_out += zip(sequence.block_ids, host_blocks, strict=False)
        step.state_out.append((sequence.state_slot, sequence.order))
        self._release(sequence)
        sequence.host_block_ids, sequence.state = host_blocks, SequenceState.SWAPPED
        insort(self._swapped, sequence, key=_by_order)

    def _compute_again(self, sequence: Sequence) -> None:
        self._release(sequence)
        sequence.num_computed, sequence.state = 0, SequenceState.WAITING
        insort(self._waiting, sequence, key=_by_order)

    def _release(self, sequence: Sequence) -> None:
        """Free all that it holds."""
        self._device.free(sequence.block_ids)
        self._host.free(sequence.host_block_ids)
        self._states.free([sequence.state_slot] if sequence.state_slot >= 0 else [])
        sequence.block_ids, sequence.host_block_ids, sequence.state_slot = [], [], -1

    def check_integrity(self) -> None:
        """AssertionError unless every block has one owner or is free, and every sequence is what its queue says."""
        self._device.check_integrity(b for s in self._running for b in s.block_ids)
        self._host.check_integrity(b for s in self._swapped for b in s.host_block_ids)
        self._states.check_integrity(s.state_slot for s in self._running)
        assert len(self._running) <= self.max_batch, f"{len(self._running)} sequences run, limit {self.max_batch}"
        queues = (
            (self._running, SequenceState.RUNNING),
            (self._swapped, SequenceState.SWAPPED),
            (self._waiting, SequenceState.WAITING),
        )
        for queue, state in queues:
            orders = [s.order for s in queue]
            assert orders == sorted(set(orders)), f"{state.value} sequences are out of order: {orders}"
            for s in queue:
                name = s.name
                assert s.state is state, f"{name} is {s.state.value} in the queue of {state.value}"
                assert s.num_computed < len(s.token_ids), f"{name} has no token left to compute"
                held = s.host_block_ids if state is SequenceState.SWAPPED else s.block_ids
                assert s.num_computed <= len(held) * self.block_size, f"{name}: {s.num_computed} tokens in {held}"
                assert state is SequenceState.SWAPPED or not s.host_block_ids, f"{name} holds host blocks"
                assert state is SequenceState.RUNNING or not s.block_ids, f"{name} holds device blocks"
        queued = {s for queue, _ in queues for s in queue}
        assert queued == self._live, f"{[s.name for s in queued ^ self._live]} are lost or never ended"
