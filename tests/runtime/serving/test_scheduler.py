"""The scheduler driven by a model whose next token depends on every earlier one, read back from paged blocks."""

import itertools

import pytest
from fluxmoe.runtime.serving.kv_cache import BlockAllocator
from fluxmoe.runtime.serving.request import Sequence, SequenceState
from fluxmoe.runtime.serving.scheduler import Scheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from .fake_executor import EOS, VOCAB, FakeExecutor, added, drive, reference, request


@st.composite
def workloads(draw):
    count = draw(st.integers(1, 7))
    requests = []
    for i in range(count):
        prompt = draw(st.lists(st.integers(0, VOCAB - 1), min_size=draw(st.integers(0, 8)), max_size=11))
        params = {"ignore_eos": draw(st.booleans()), "stop_token_ids": draw(st.sampled_from([(), (5,), (7, 8)]))}
        requests.append(request(i, prompt, draw(st.integers(1, 10)), **params))
    return requests, draw(st.lists(st.integers(0, 12), min_size=count, max_size=count))


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    workload=workloads(),
    spare_blocks=st.integers(-1, 5),
    block_size=st.integers(1, 5),
    max_batch=st.integers(1, 6),
    max_batched_tokens=st.integers(1, 18),
    preemption=st.sampled_from(["recompute", "swap"]),
    host_blocks=st.integers(0, 10),
)
def test_tokens_do_not_depend_on_limits(
    workload, spare_blocks, block_size, max_batch, max_batched_tokens, preemption, host_blocks
):
    requests, arrivals = workload
    # Around what the largest request needs: below it is refused, far above nothing is ever preempted.
    largest = max(len(r.prompt_ids) + r.params.max_new_tokens for r in requests)
    num_blocks = max(1, (largest - 1) // block_size + spare_blocks)
    scheduler = Scheduler(
        BlockAllocator(num_blocks), block_size, max_batch, max_batched_tokens, preemption, 18, host_blocks, (EOS,)
    )
    outputs, _ = drive(scheduler, requests, host_blocks, arrivals)
    assert outputs.keys() == {r.request_id for r in requests}
    for r in requests:
        output, total = outputs[r.request_id], len(r.prompt_ids) + r.params.max_new_tokens
        fits = len(r.prompt_ids) > 0 and total <= 18 and total - 1 <= num_blocks * block_size
        if fits:
            assert (output.token_ids, output.finish_reason) == reference(r)
        else:
            assert (output.token_ids, output.finish_reason) == ((), "refused")
            assert output.error


def crowd(count=6, prompt=7, new=9):
    return [request(i, [(3 * i + j) % VOCAB for j in range(prompt)], new, ignore_eos=True) for i in range(count)]


@pytest.mark.parametrize("host_blocks", [0, 2, 3, 100], ids=lambda n: f"{n} host blocks")
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_preemption_happens_and_changes_no_token(preemption, host_blocks):
    requests = crowd()
    # 4 sequences are admitted at 2 blocks each; each ends at 4 blocks.
    scheduler = Scheduler(BlockAllocator(8), 4, 6, 64, preemption, 100, host_blocks)
    outputs, steps = drive(scheduler, requests, host_blocks)
    assert {i: o.token_ids for i, o in outputs.items()} == {r.request_id: reference(r)[0] for r in requests}
    preempted = sum(s.num_preempted for s in steps)
    moved = sum(len(s.swap_out) for s in steps)
    assert preempted > 0
    assert moved == sum(len(s.swap_in) for s in steps)
    recomputed = sum(s.prefill_tokens for s in steps) - sum(len(r.prompt_ids) for r in requests)
    if preemption == "recompute" or host_blocks == 0:
        assert moved == 0
        assert recomputed > 0
    elif host_blocks == 100:
        assert moved > 0
        assert recomputed == 0
    else:
        # The pool holds one sequence, so some are swapped and some fall back.
        assert moved > 0
        assert recomputed > 0


def test_blocks_freed_by_swap_out_are_used_in_the_same_step():
    scheduler = Scheduler(BlockAllocator(4), 2, 2, 64, "swap", 100, 4)
    a, b = request("a", [1, 2, 3], 6, ignore_eos=True), request("b", [4, 5, 6], 6, ignore_eos=True)
    outputs, steps = drive(scheduler, [a, b], host_blocks=4)
    assert [len(s.swap_out) for s in steps if s.swap_out] == [2]
    assert outputs["a"].token_ids == reference(a)[0]
    assert outputs["b"].token_ids == reference(b)[0]


def test_swap_keeps_a_block_that_is_filled_in_part():
    scheduler = Scheduler(BlockAllocator(5), 4, 2, 64, "swap", 100, 4)
    a, b = request("a", [1] * 8, 8, ignore_eos=True), request("b", [2] * 5, 8, ignore_eos=True)
    outputs, steps = drive(scheduler, [a, b], host_blocks=4)
    # "b" has 6 … 8 tokens in two blocks when "a" needs its block.
    assert [len(s.swap_out) for s in steps if s.swap_out] == [2]
    assert outputs["b"].token_ids == reference(b)[0]


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_the_latest_arrival_is_preempted_and_returns_before_newcomers(preemption):
    scheduler = Scheduler(BlockAllocator(6), 2, 3, 64, preemption, 100, 100)
    for name in "abc":
        added(scheduler, request(name, [1, 2, 3, 4], 5, ignore_eos=True))
    added(scheduler, request("d", [1], 2, ignore_eos=True))
    executor, order = FakeExecutor(scheduler, 100), []
    while scheduler.has_work:
        step = scheduler.schedule()
        order.append("".join(str(c.sequence.request.request_id) for c in step.chunks))
        scheduler.commit(step, executor.run(step))
    # Step 0 fills the cache with three prompts; at position 4 "a" takes c's blocks, one of which "b" then gets.
    assert order[:3] == ["abc", "ab", "ab"]
    first = {name: next(i for i, names in enumerate(order) if i > 0 and name in names) for name in "cd"}
    assert first["c"] <= first["d"]
    assert all("d" not in names for names in order[: first["c"]])


def test_a_step_that_preempts_admits_and_resumes_nobody():
    scheduler = Scheduler(BlockAllocator(6), 2, 4, 64, "swap", 100, 1)
    for name, length in (("a", 3), ("b", 5), ("c", 1)):
        added(scheduler, request(name, [1] * length, 6, ignore_eos=True))
    executor, plan = FakeExecutor(scheduler, 1), []
    for _ in range(4):
        step = scheduler.schedule()
        names = "".join(str(c.sequence.request.request_id) for c in step.chunks)
        plan.append((names, step.num_preempted, len(step.swap_out), len(step.swap_in), scheduler.blocks_used))
        scheduler.commit(step, executor.run(step))
    # Step 2: "a" takes the block of "c", which is swapped; "b" lacks one too, and three do not fit in the host
    # pool. Those it gives up would let "c" back in at once.
    assert plan == [("abc", 0, 0, 0, 6), ("abc", 0, 0, 0, 6), ("a", 2, 1, 0, 3), ("ac", 0, 0, 1, 5)]


def test_prefill_is_chunked_by_what_decodes_leave():
    scheduler = Scheduler(BlockAllocator(100), 4, 4, 8, "recompute", 100)
    added(scheduler, request("a", [1] * 4, 10, ignore_eos=True))
    added(scheduler, request("b", [2] * 18, 2, ignore_eos=True))
    executor, plan = FakeExecutor(scheduler, 0), list[list[tuple]]()
    for _ in range(5):
        step = scheduler.schedule()
        plan.append([(c.sequence.request.request_id, c.start, c.length, c.sample) for c in step.chunks])
        plan[-1].append((step.decode_tokens, step.prefill_tokens))
        scheduler.commit(step, executor.run(step))
    assert plan == [
        [("a", 0, 4, True), ("b", 0, 4, False), (0, 8)],
        [("a", 4, 1, True), ("b", 4, 7, False), (1, 7)],
        [("a", 5, 1, True), ("b", 11, 7, True), (1, 7)],
        [("a", 6, 1, True), ("b", 18, 1, True), (2, 0)],
        [("a", 7, 1, True), (1, 0)],
    ]


def test_the_last_token_of_a_prompt_alone_is_prefill():
    scheduler = Scheduler(BlockAllocator(9), 4, 1, 4, "recompute", 100)
    added(scheduler, request("a", [1] * 5, 3, ignore_eos=True))
    counts = []
    while scheduler.has_work:
        step = scheduler.schedule()
        counts.append((step.prefill_tokens, step.decode_tokens))
        scheduler.commit(step, [0 for chunk in step.chunks if chunk.sample])
    assert counts == [(4, 0), (1, 0), (0, 1), (0, 1)]


def test_admission_waits_for_the_blocks_of_the_whole_prompt():
    scheduler = Scheduler(BlockAllocator(5), 4, 4, 4, "recompute", 100)
    added(scheduler, request("a", [1] * 12, 1, ignore_eos=True))
    added(scheduler, request("b", [1] * 12, 1, ignore_eos=True))
    added(scheduler, request("c", [1] * 4, 1, ignore_eos=True))
    step = scheduler.schedule()
    # One chunk of "a" needs one block only; "c" would fit beside it but may not pass "b".
    assert [c.sequence.request.request_id for c in step.chunks] == ["a"]
    assert scheduler.blocks_used == 3
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.num_swapped) == (1, 2, 0)


def test_more_blocks_let_more_in():
    blocks = BlockAllocator(2)
    scheduler = Scheduler(blocks, 4, 4, 64, "recompute", 100)
    big = request("big", [1] * 9, 1)
    assert "needs 3 KV blocks of 4 tokens, the cache has 2" in (scheduler.add(Sequence(big)) or "")
    added(scheduler, request("a", [1] * 8, 1))
    added(scheduler, request("b", [2] * 8, 1))
    scheduler.commit(scheduler.schedule(), [0])
    blocks.add(range(7, 10))
    added(scheduler, big)
    scheduler.check_integrity()
    step = scheduler.schedule()
    assert [c.sequence.request.request_id for c in step.chunks] == ["b", "big"]
    scheduler.check_integrity()


EDGES = {
    "one block": ((1, 8, 4, 64), (5, 4)),
    "one block of one token": ((1, 1, 4, 64), (1, 1)),
    "block size 1": ((14, 1, 4, 64), (5, 6)),
    "prompt fills blocks exactly": ((5, 4, 4, 64), (8, 6)),
    "prompt fills the cache": ((2, 4, 4, 64), (8, 1)),
    "batch of 1": ((9, 4, 1, 64), (7, 9)),
    "one token a step": ((9, 4, 4, 1), (7, 9)),
    "budget below the batch": ((9, 4, 4, 2), (3, 9)),
    "max_new_tokens 1": ((9, 4, 4, 64), (7, 1)),
}


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize(("limits", "lengths"), EDGES.values(), ids=EDGES.keys())
def test_edges(limits, lengths, preemption):
    requests = crowd(5, *lengths)
    blocks, *sizes = limits
    scheduler = Scheduler(BlockAllocator(blocks), sizes[0], sizes[1], sizes[2], preemption, sum(lengths), 3)
    outputs, _ = drive(scheduler, requests, 3)
    for r in requests:
        assert (outputs[r.request_id].token_ids, outputs[r.request_id].finish_reason) == reference(r)


def test_refusals_say_why_and_stop_nobody():
    scheduler = Scheduler(BlockAllocator(4), 4, 4, 64, "recompute", 20)
    good = request("good", [1, 2, 3], 4, ignore_eos=True)
    refused = {
        "empty": ([], 1, "the prompt is empty"),
        "long": ([1] * 15, 6, "is 21 tokens, more than the limit of 20"),
        "wide": ([1] * 12, 6, "needs 5 KV blocks of 4 tokens, the cache has 4"),
    }
    outputs, _ = drive(scheduler, [request(n, p, k) for n, (p, k, _) in refused.items()] + [good])
    for name, (_, _, sentence) in refused.items():
        assert outputs[name].finish_reason == "refused"
        assert sentence in outputs[name].error
    assert outputs["good"].token_ids == reference(good)[0]
    # The last sampled token needs no KV: 12 + 5 - 1 fills the cache.
    added(scheduler, request("just fits", [1] * 12, 5))


@pytest.mark.parametrize(
    ("params", "eos", "expected"),
    [
        ({}, (4,), ([9, 4], "stop")),
        ({"ignore_eos": True}, (4,), ([9, 4, 7, 5], "length")),
        ({"ignore_eos": True, "stop_token_ids": (7, 4)}, (4,), ([9, 4], "stop")),
        ({"stop_token_ids": (7,)}, (), ([9, 4, 7], "stop")),
        ({}, (5,), ([9, 4, 7, 5], "stop")),
    ],
    ids=["eos", "eos ignored", "stop id that is eos", "stop id", "stop on the last token"],
)
def test_stop_conditions(params, eos, expected):
    scheduler = Scheduler(BlockAllocator(8), 4, 1, 64, "recompute", 100, eos_token_ids=eos)
    sequence, stream = added(scheduler, request("a", [1], 4, **params)), iter([9, 4, 7, 5])
    finished: list = []
    while not finished:
        finished = scheduler.commit(scheduler.schedule(), [next(stream)])
    assert finished == [sequence]
    assert (list(sequence.output.token_ids), sequence.finish_reason) == expected
    assert not scheduler.has_work


def test_schedule_and_commit_alternate():
    scheduler = Scheduler(BlockAllocator(8), 4, 1, 64, "recompute", 100)
    with pytest.raises(AssertionError, match="nothing to schedule"):
        scheduler.schedule()
    sequence = added(scheduler, request("a", [1], 4))
    with pytest.raises(AssertionError, match="still waiting"):
        _ = sequence.output
    step = scheduler.schedule()
    with pytest.raises(AssertionError, match="commit the last step"):
        scheduler.schedule()
    scheduler.commit(step, [0])
    with pytest.raises(AssertionError, match="once"):
        scheduler.commit(step, [0])
    with pytest.raises(AssertionError, match="1 sequences are sampled, got 0 tokens"):
        scheduler.commit(scheduler.schedule(), [])


@pytest.mark.parametrize("damage", ["leak", "share", "uncovered", "state", "lost"])
def test_integrity_can_fail(damage):
    scheduler = Scheduler(BlockAllocator(8), 4, 4, 64, "recompute", 100)
    a, b = added(scheduler, request("a", [1] * 5, 4)), added(scheduler, request("b", [1] * 5, 4))
    scheduler.commit(scheduler.schedule(), [0, 0])
    scheduler.check_integrity()
    if damage == "leak":
        a.block_ids.pop()
    elif damage == "share":
        a.block_ids[0] = b.block_ids[0]
    elif damage == "uncovered":
        a.token_ids += [0] * 9
        a.num_computed += 9
    elif damage == "state":
        a.state = SequenceState.SWAPPED
    else:
        scheduler._running.remove(a)
        scheduler._device.free(a.block_ids)
    with pytest.raises(AssertionError):
        scheduler.check_integrity()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": BlockAllocator(0)}, "num_blocks must be at least 1, got 0"),
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"max_batch": 0}, "max_batch must be at least 1"),
        ({"max_batched_tokens": 0}, "max_batched_tokens must be at least 1"),
        ({"host_blocks": -1}, "host_blocks must be at least 0"),
        ({"preemption": "drop"}, "must be one of recompute, swap, got 'drop'"),
    ],
)
def test_refuses_impossible_limits(change, message):
    limits = {
        "blocks": BlockAllocator(1),
        "block_size": 1,
        "max_batch": 1,
        "max_batched_tokens": 1,
        "preemption": "swap",
        "max_model_len": 1,
    }
    with pytest.raises(ValueError, match=message):
        Scheduler(**(limits | change))


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("reset", [False, True], ids=["given up", "reset"])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(fails=st.sets(st.integers(0, 60), min_size=1, max_size=12))
def test_steps_that_fail_change_no_token(preemption, reset, fails):
    """Whatever a failed step has written, it is computed again; or, after a reset, whoever asks again gets answers."""
    requests = crowd()
    scheduler = Scheduler(BlockAllocator(8), 4, 6, 64, preemption, 100, 5)
    executor = FakeExecutor(scheduler, 5)
    sequences, count = [added(scheduler, r) for r in requests], 0
    while scheduler.has_work:
        step = scheduler.schedule()
        tokens = executor.run(step)
        if count in fails:
            executor.fail(step)
            if reset:
                live = scheduler.reset()
                assert {s.finish_reason for s in live} == {"aborted"}
                sequences = [added(scheduler, s.request) if s in live else s for s in sequences]
            else:
                scheduler.give_up(step)
        else:
            scheduler.commit(step, tokens)
        scheduler.check_integrity()
        count += 1
    assert [s.output.token_ids for s in sequences] == [reference(r)[0] for r in requests]
    assert scheduler.blocks_used == scheduler.host_blocks_used == 0


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_aborts_free_what_is_held_and_leave_the_others_alone(preemption):
    requests = crowd()
    for victim, when in itertools.product(range(6), range(14)):
        scheduler = Scheduler(BlockAllocator(8), 4, 6, 64, preemption, 100, 5)
        executor = FakeExecutor(scheduler, 5)
        sequences, count = [added(scheduler, r) for r in requests], 0
        while scheduler.has_work:
            if count == when and not sequences[victim].finished:
                scheduler.abort(sequences[victim])
                scheduler.check_integrity()
            if scheduler.has_work:
                scheduler.commit(step := scheduler.schedule(), executor.run(step))
            count += 1
        for i, (sequence, r) in enumerate(zip(sequences, requests, strict=True)):
            expected = reference(r)[0]
            got = sequence.output.token_ids
            assert got == expected[: len(got)] if i == victim else got == expected
        assert scheduler.blocks_used == scheduler.host_blocks_used == 0
