"""A model whose next token depends on every earlier one, and an executor that reads those back from paged blocks.

It keeps contents per block, as a KV cache does, and spoils every block that nobody owns. A block owned twice, a swap
that loses its data or a prefill that skips a position therefore shows as a wrong token.
"""

from dataclasses import dataclass

from fluxmoe.runtime.serving.request import Request, SamplingParams, Sequence, SequenceState
from fluxmoe.runtime.serving.scheduler import Scheduler

VOCAB = 23
EOS = 3
SPOILED = -1


def mix(state, token):
    """The cached "K/V" of a position: a function of all tokens up to it."""
    return (state * 6364136223846793005 + token * 2654435761 + 1442695040888963407) % 2**61


def reference(request, eos=(EOS,)):
    """Tokens and finish reason of a request that runs alone, without a cache."""
    state = 0
    for token in request.prompt_ids:
        state = mix(state, token)
    params, tokens = request.params, list[int]()
    stops = set(params.stop_token_ids) | (set() if params.ignore_eos else set(eos))
    while len(tokens) < params.max_new_tokens:
        tokens.append((state >> 20) % VOCAB)
        if tokens[-1] in stops:
            return tuple(tokens), "stop"
        state = mix(state, tokens[-1])
    return tuple(tokens), "length"


@dataclass
class FakeExecutor:
    scheduler: Scheduler
    host_blocks: int

    def __post_init__(self):
        self.device, self.host = {}, {}

    def run(self, step):
        size = self.scheduler.block_size
        for source, destination in step.swap_out:
            assert 0 <= destination < self.host_blocks
            self.host[destination] = list(self.device[source])
        for source, destination in step.swap_in:
            self.device[destination] = list(self.host[source])
        self._spoil(self.device, self.scheduler.num_blocks, self.scheduler._running, "block_ids")
        self._spoil(self.host, self.host_blocks, self.scheduler._swapped, "host_block_ids")
        sampled = []
        for sequence, start, length, sample in step.chunks:
            assert length > 0
            assert start == sequence.num_computed
            state = 0
            for position in range(start + length):
                block = self.device[sequence.block_ids[position // size]]
                if position >= start:
                    block[position % size] = mix(state, sequence.token_ids[position])
                state = mix(state, sequence.token_ids[position])
                assert block[position % size] == state, f"position {position} of {sequence.name}"
            if sample:
                assert start + length == len(sequence.token_ids)
                sampled.append((state >> 20) % VOCAB)
        return sampled

    def fail(self, step):
        """The step stopped somewhere: nothing that it may have written is to be trusted."""
        for block in self.device:
            self.device[block] = [SPOILED] * self.scheduler.block_size
        for _, block in step.swap_out:
            self.host[block] = [SPOILED] * self.scheduler.block_size

    def _spoil(self, pool, count, sequences, attribute):
        owned = {block for s in sequences for block in getattr(s, attribute)}
        for block in range(count):
            if block not in owned or block not in pool:
                pool[block] = [SPOILED] * self.scheduler.block_size


def drive(scheduler, requests, host_blocks=0, arrivals=None):
    """Run to the end, checking every step; request i arrives before step arrivals[i] → (outputs by id, steps)."""
    executor, steps, outputs = FakeExecutor(scheduler, host_blocks), [], {}
    pending = sorted(zip(arrivals or [0] * len(requests), range(len(requests)), strict=True))
    # Generous: every request computed from scratch, one token a step, again after each of its tokens.
    limit = 10 + sum((len(r.prompt_ids) + r.params.max_new_tokens) ** 2 for r in requests) + len(requests)
    clock = 0
    while pending or scheduler.has_work:
        while pending and pending[0][0] <= clock:
            request = requests[pending.pop(0)[1]]
            sequence = Sequence(request)
            if answer := scheduler.add(sequence):
                sequence.end("refused", error=answer)
                outputs[request.request_id] = sequence.output
        clock += 1
        if not scheduler.has_work:
            continue
        running = set(map(id, scheduler._running))
        step = scheduler.schedule()
        scheduler.check_integrity()
        check_step(scheduler, step)
        assert not step.num_preempted or {id(c.sequence) for c in step.chunks} <= running
        sampled = executor.run(step)
        for sequence in scheduler.commit(step, sampled):
            assert sequence.state is SequenceState.FINISHED
            assert not sequence.block_ids
            assert not sequence.host_block_ids
            outputs[sequence.request.request_id] = sequence.output
        scheduler.check_integrity()
        steps.append(step)
        assert len(steps) < limit, "no end in sight"
    assert scheduler.blocks_used == scheduler.host_blocks_used == 0
    return outputs, steps


def check_step(scheduler, step):
    assert step.chunks
    assert sum(c.length for c in step.chunks) == step.num_tokens <= scheduler.max_batched_tokens
    assert len(step.chunks) <= scheduler.num_running <= scheduler.max_batch
    assert scheduler.blocks_used <= scheduler.num_blocks
    assert len({id(c.sequence) for c in step.chunks}) == len(step.chunks)
    assert not (step.swap_out and step.swap_in)
    for chunk in step.chunks:
        assert chunk.sequence.state is SequenceState.RUNNING
        assert chunk.sample == (chunk.start + chunk.length == len(chunk.sequence.token_ids))


def request(name, prompt, new, **params):
    return Request(tuple(prompt), SamplingParams(new, **params), request_id=name)


def added(scheduler, request):
    sequence = Sequence(request)
    assert scheduler.add(sequence) is None
    return sequence
