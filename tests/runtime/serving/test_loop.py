"""The serving loop's face on a real engine: order, handles, streams, aborts, and failures that it survives."""

from __future__ import annotations

import gc
import time
from typing import Any

import numpy as np
import pytest
from fluxmoe.experiments.lib.checkpoints import make_checkpoint
from fluxmoe.runtime import Engine, EngineConfig, Request, SamplingParams
from fluxmoe.runtime.experts.disk import StoreError

COMMON = dict[str, Any](device="cpu", max_batch=6, max_batched_tokens=48, max_context=160)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    out = tmp_path_factory.mktemp("models") / "moe"
    return make_checkpoint(
        arch="qwen3_moe", out=out, layers=3, experts=6, top_k=2, hidden=64, moe_intermediate=48, heads=4, kv_heads=2,
        head_dim=16, vocab=512, dtype="bfloat16", seed=0, max_positions=256,
    )  # fmt: skip


def requests(count=8, seed=1) -> list[Request]:
    rng = np.random.default_rng(seed)
    return [
        Request(tuple(rng.integers(0, 512, rng.integers(1, 40)).tolist()), SamplingParams(int(rng.integers(2, 30))))
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def expected(model_dir):
    """Tokens of each request, served alone."""
    with Engine(model_dir, EngineConfig(**COMMON)) as engine:
        return [engine.generate([request])[0].token_ids for request in requests()]


@pytest.fixture(params=["resident", "host"])
def engine(request, model_dir):
    with Engine(model_dir, EngineConfig(**COMMON, placement=request.param, poison=True)) as engine:
        yield engine
        engine.scheduler.check_integrity()


def tokens_of(outputs) -> list[tuple[int, ...]]:
    return [output.token_ids for output in outputs]


def test_first_come_first_served(engine):
    """A list of requests, none of which waits for its time, starts in its order."""
    handles = [engine.add(Request((1, 2, 3), SamplingParams(2, ignore_eos=True))) for _ in range(10)]
    list(engine.steps())
    starts = [handle.first_token_s for handle in handles]
    assert starts == sorted(starts)
    assert starts[0] < starts[-1]


def test_names_are_the_callers_own_and_mix_up_no_answers(engine, expected):
    same = [Request(r.prompt_ids, r.params, request_id="same") for r in requests()]
    outputs = engine.generate(same)
    assert tokens_of(outputs) == expected
    assert {output.request_id for output in outputs} == {"same"}


def test_a_handle_knows_what_has_come(engine, expected):
    handle = engine.add(requests()[0])
    while not handle.finished:
        assert engine.step() is not None
        assert tuple(handle.token_ids[handle.prompt_len :]) == expected[0][: handle.num_generated]
    assert handle.output.token_ids == expected[0]
    assert engine.step() is None


def test_tokens_are_streamed_as_they_come(engine, expected):
    came: dict = {}
    asked = requests()
    for handle, token in engine.stream(asked):
        came.setdefault(handle, []).append(token)
        assert handle.token_ids[-1] == token
    assert [tuple(came[handle]) for handle in sorted(came, key=lambda h: h.order)] == expected


def test_a_stream_that_is_left_ends_its_requests_alone(engine, expected):
    other = engine.add(requests()[0])
    stream = engine.stream(requests()[1:])
    handles = {next(stream)[0] for _ in range(9)}
    stream.close()
    assert {handle.output.finish_reason for handle in handles} <= {"aborted", "length", "stop"}
    assert not other.finished
    list(engine.steps())
    assert other.output.token_ids == expected[0]
    assert tokens_of(engine.generate(requests())) == expected


def test_answers_after_an_abandoned_iteration_are_new_ones(engine, expected):
    for request in requests(seed=2):
        engine.add(request)
    steps = engine.steps()
    next(steps)
    next(steps)
    del steps
    gc.collect()
    engine.reset()
    assert not engine.has_work
    assert tokens_of(engine.generate(requests())) == expected


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError], ids=lambda e: e.__name__)
@pytest.mark.parametrize("when", [0, 3, 7])
def test_an_exception_in_a_step_leaves_an_engine_that_goes_on(engine, expected, monkeypatch, error, when):
    """In the middle of a pass, once; those who waited for other answers get them."""
    forward, calls = engine.decoder.forward, []
    handles = [engine.add(request) for request in requests()]

    def failing(token_ids, metadata, cache, experts, *rest):
        calls.append(1)
        if len(calls) == when + 1:
            with experts.streamer.layer(0):
                raise error("in the middle")
        return forward(token_ids, metadata, cache, experts, *rest)

    monkeypatch.setattr(engine.decoder, "forward", failing)
    with pytest.raises(error):
        list(engine.steps())
    engine.scheduler.check_integrity()
    list(engine.steps())
    assert [handle.output.token_ids for handle in handles] == expected


@pytest.mark.parametrize("transfer", ["whole", "on_demand"])
def test_an_engine_goes_on_when_a_disk_that_failed_comes_back(model_dir, expected, transfer, monkeypatch):
    with Engine(model_dir, EngineConfig(**COMMON, placement="disk", transfer=transfer)) as engine:
        disk = engine.pager.store.on_disk
        read, calls, broken = disk._read, [], [True]

        def failing(*arguments, **keywords):
            calls.append(1)
            if broken and len(calls) > 9:
                time.sleep(0.02 * (len(calls) - 10))  # so that others are under way when one has failed
                raise StoreError("the disk is gone")
            return read(*arguments, **keywords)

        monkeypatch.setattr(disk, "_read", failing)
        for _ in range(2):
            with pytest.raises(StoreError, match="the disk is gone"):
                engine.generate(requests())
            assert not engine.has_work
        broken.clear()
        assert tokens_of(engine.generate(requests())) == expected


def test_refused_requests_are_finished_with_their_reason(engine):
    handle = engine.add(Request((), SamplingParams(3)))
    assert handle.finished
    assert "empty" in handle.output.error


def test_aborting_frees_what_a_request_holds(engine, expected):
    handles = [engine.add(request) for request in requests()]
    later = engine.add(Request((1, 2), SamplingParams(2), arrival_s=1e6))
    engine.step()
    engine.step()
    engine.abort(handles[0], handles[5], later)
    engine.abort(handles[0])  # again: nothing
    list(engine.steps())
    for i, handle in enumerate(handles):
        got = handle.output.token_ids
        assert got == (expected[i][: len(got)] if i in (0, 5) else expected[i])
    assert later.output.finish_reason == "aborted"
    assert engine.scheduler.blocks_used == 0
