"""Storms: experts move at random while requests come, are aborted and preempted, and copies, loads and passes fail.

What holds through it: every request gets its own tokens, or a prefix of them if it is aborted; nothing is leaked; the
engine always goes on.
"""

from __future__ import annotations

import os
import random
import threading
from collections import Counter
from typing import Any

import pytest
from fluxmoe.runtime.experts.disk import StoreError
from fluxmoe.runtime.experts.placement import Tier
from fluxmoe.runtime.experts.planner import Move
from fluxmoe.runtime.memory.budget import BudgetError
from fluxmoe.runtime.serving.engine import Engine, EngineConfig
from fluxmoe.runtime.serving.request import Request

from .storm import storm_model, storm_request

LAYERS, EXPERTS, PROMPTS = 5, 6, 24


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return storm_model(tmp_path_factory.mktemp("models") / "moe", LAYERS, EXPERTS)


def request(number: int) -> Request:
    return storm_request(number, 69, 29)


COMMON = dict[str, Any](threads=1, block_size=16, max_context=128, max_batch=6, max_batched_tokens=48)


@pytest.fixture(scope="module")
def expected(model_dir):
    with Engine(model_dir, EngineConfig(**COMMON)) as engine:
        return [output.token_ids for output in engine.generate(map(request, range(PROMPTS)))]


def tight_budget(model_dir, **settings) -> int:
    """Little more than the least that a refusal names, with which all experts fit and KV of about two requests."""
    with pytest.raises(BudgetError) as refused:
        Engine(model_dir, EngineConfig(**COMMON, **settings, budget_bytes=1, min_kv_tokens=128))
    return (refused.value.least or 0) + (256 << 10)


class Storm:
    """One engine in bad weather, until so many moves were made and requests aborted."""

    def __init__(self, engine: Any, expected: list, seed: int) -> None:
        self.engine = engine
        self.expected, self.rng = expected, random.Random(seed)
        self.live: dict = {}
        self.count: Counter[str] = Counter()
        self.errors: list[str] = []
        self.load_fails = False
        assert engine.pager.mover is not None
        engine.pager.mover.copy = self._copy
        self._whole_pass = engine._execute
        self.engine._execute = self._pass

    def _pass(self, step):
        executed = self._whole_pass(step)
        if self.rng.random() < 0.02:
            raise KeyboardInterrupt("injected")
        return executed

    def delay(self, layer: int, tensor_type: int) -> float:
        if self.load_fails:
            self.load_fails = False
            raise OSError("injected load")
        return self.rng.choice([0.0, 0.0, 0.0, 0.001])

    def _copy(self, target, source) -> None:
        if self.rng.random() < 0.05:
            raise OSError("injected copy")
        target.copy_(source)

    def blow(self, moves: int, aborts: int) -> None:
        mover = self.engine.pager.mover
        while sum(mover.applied.values()) < moves or self.count["aborted"] < aborts:
            self._requests()
            self._moves()
            self.load_fails |= self.rng.random() < 0.06
            try:
                self.engine.step()
            except (StoreError, KeyboardInterrupt) as error:
                self.count[type(error).__name__] += 1
                self.errors.append(str(error))
            self._check()
        assert all("injected" in error for error in self.errors), self.errors
        self.engine._execute = self._whole_pass
        while self.engine.has_work:
            self.engine.step()
        self._check()
        assert not self.live
        self.engine.scheduler.check_integrity()
        assert self.engine.scheduler.blocks_used == 0

    def _requests(self) -> None:
        while len(self.live) < 9:
            number = self.rng.randrange(PROMPTS)
            self.live[self.engine.add(request(number))] = number
        if self.rng.random() < 0.15:
            handle = self.rng.choice(list(self.live))
            self.engine.abort(handle)
            self.count["aborted"] += 1

    def _moves(self) -> None:
        tiers, targets = self.engine.tiers, (Tier.HOST, *self.engine.pager.store.layout.moving_tiers)
        moves = []
        for _ in range(self.rng.randrange(12)):
            layer, expert = self.rng.randrange(LAYERS), self.rng.randrange(EXPERTS)
            source = Tier(tiers[layer, expert])
            moves.append(Move(layer, expert, source, self.rng.choice([t for t in targets if t != source])))
        self.engine.pager.request(moves)
        if self.rng.random() < 0.1:
            self.engine.pager.set_transfer(self.rng.choice(["whole", "on_demand"]))
        self.engine.pager.store.check_integrity()

    def _check(self) -> None:
        for handle, number in list(self.live.items()):
            if not handle.finished:
                continue
            del self.live[handle]
            output, right = handle.output, self.expected[number]
            if output.finish_reason == "aborted":
                assert output.token_ids == right[: len(output.token_ids)], number
            else:
                assert output.error is None, output.error
                assert output.token_ids == right, number
                self.count["finished"] += 1


def weather(model_dir, expected, preemption: str, slots: int, moves: int, aborts: int) -> Counter[str]:
    settings = dict[str, Any](placement="packed", least_alpha=0.0, slots=slots, preemption=preemption, adaptive=True)
    budget = tight_budget(model_dir, **settings)
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    storm: Storm | None = None
    config = EngineConfig(
        **COMMON, **settings, budget_bytes=budget, planning=False, poison=True,
        load_delay=lambda layer, d: storm.delay(layer, d) if storm else 0.0,
    )  # fmt: skip
    with Engine(model_dir, config) as engine:
        storm = Storm(engine, expected, seed=slots)
        storm.blow(moves, aborts)
        assert engine.held_bytes() == engine.budget.lines()
        assert any("injected" in reason for reason in engine.pager.mover.refused)
        done = sum(engine.pager.mover.applied.values())
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == files
    return storm.count + Counter(moves=done)


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_a_storm(model_dir, expected, preemption):
    count = weather(model_dir, expected, preemption, slots=2, moves=300, aborts=10)
    assert count["finished"] > 20


@pytest.mark.thorough
def test_ten_thousand_moves_and_three_hundred_aborts(model_dir, expected):
    total: Counter[str] = Counter()
    for preemption in ("recompute", "swap"):
        for slots in (2, 3):
            total += weather(model_dir, expected, preemption, slots, moves=2500, aborts=75)
    print(dict(total))
    assert total["moves"] >= 10_000
    assert total["aborted"] >= 300
    assert min(total["StoreError"], total["KeyboardInterrupt"]) > 10
