"""One pool for a cache of experts and KV: KV takes what it needs, the cache has the rest, and no token changes."""

from __future__ import annotations

import random
from typing import Any

import pytest
from fluxmoe.models.config import load_config
from fluxmoe.runtime.experts.disk import StoreError
from fluxmoe.runtime.hardware import HardwareProfile
from fluxmoe.runtime.serving.engine import Engine, EngineConfig
from fluxmoe.runtime.serving.request import Request, SamplingParams
from fluxmoe.runtime.sim.simulator import SimEngine

from .storm import storm_model, storm_request

LAYERS, EXPERTS, PROMPTS = 4, 12, 24
COMMON = dict[str, Any](threads=1, block_size=16, max_context=160, max_batch=8, max_batched_tokens=48)
DISK = dict[str, Any](placement="disk", poison=True)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return storm_model(tmp_path_factory.mktemp("models") / "moe", LAYERS, EXPERTS)


def request(number: int) -> Request:
    return storm_request(number, 89, 59)


@pytest.fixture(scope="module")
def expected(model_dir):
    with Engine(model_dir, EngineConfig(**COMMON)) as engine:
        return [output.token_ids for output in engine.generate(map(request, range(PROMPTS)))]


def budget_of(engine, kv_slabs: int) -> int:
    """Of one like `engine`: room for the least cache and so many slabs of KV."""
    with engine:
        pool, least = engine.kv.pool, LAYERS // 2 * EXPERTS
        return engine.budget.used + (least + kv_slabs - pool.num_slabs) * pool.slab_bytes


def check(engine) -> None:
    """Every slab has one holder, and the ledger knows."""
    cache, pool = engine.pager.store.cache, engine.pool
    assert engine.held_bytes() == engine.budget.lines()
    assert engine.budget.used <= engine.budget.total
    assert cache.places + engine.kv.num_slabs + pool.num_free == pool.num_slabs
    assert cache.places >= engine.pager.footprint.cache_places()
    assert not pool.num_free or cache.places == engine.pager.footprint.layout.cached
    assert set(cache._owners) == set(pool.held("expert_cache"))
    assert {owner: place for place, owner in cache._owners.items() if owner is not None} == cache._place_of
    pool.check_integrity()
    engine.scheduler.check_integrity()


@pytest.mark.parametrize(
    ("preemption", "expert_format"),
    [
        ("recompute", "planar12"),
        ("swap", None),
        pytest.param("recompute", None, marks=pytest.mark.thorough),
        pytest.param("swap", "planar12", marks=pytest.mark.thorough),
    ],
)
def test_a_storm_of_requests(model_dir, expected, preemption, expert_format, monkeypatch):
    """They come, are aborted, and passes and reads fail: each has its own tokens or a prefix of them, and nobody is
    preempted or waits while the cache has more than works."""
    settings = dict[str, Any](**COMMON, **DISK, expert_format=expert_format, preemption=preemption)
    budget = budget_of(Engine(model_dir, EngineConfig(**settings)), 11)
    rng, counts = random.Random(0), dict.fromkeys(("aborted", "failed", "preempted"), 0)
    live, sizes = dict[Any, int](), set[int]()
    with Engine(model_dir, EngineConfig(**settings, budget_bytes=budget)) as engine:
        store: Any = engine.pager.store
        cache, disk, scheduler = store.cache, store.on_disk, engine.scheduler
        least, read = engine.pager.footprint.cache_places(), disk._read

        def failing(*arguments):
            if rng.random() < 0.002:
                raise StoreError("injected")
            return read(*arguments)

        disk._read = failing
        schedule = scheduler.schedule

        def watched():
            step = schedule()
            check(engine)
            has = engine.kv.num_slabs * engine.kv.blocks_per_slab
            if step.num_preempted:
                counts["preempted"] += 1
                assert has == scheduler.most_blocks, "nobody is preempted while the cache can lend"
                assert cache.places == least
            return step

        monkeypatch.setattr(scheduler, "schedule", watched)
        for _ in range(300):
            # Now a few, now many.
            while len(live) < rng.choice((1, 4, 12)):
                number = rng.randrange(PROMPTS)
                live[engine.add(request(number))] = number
            if rng.random() < 0.05:
                engine.abort(rng.choice(list(live)))
                counts["aborted"] += 1
            try:
                engine.step()
            except StoreError:
                counts["failed"] += 1
            check(engine)
            sizes.add(cache.places)
            for handle in [handle for handle in live if handle.finished]:
                tokens, whole = handle.output.token_ids, expected[live.pop(handle)]
                assert handle.output.finish_reason in ("aborted", "length")
                assert tokens == whole[: len(tokens)]
                assert handle.output.finish_reason == "aborted" or tokens == whole
        disk._read = read
        while engine.has_work:
            engine.step()
            check(engine)
        assert scheduler.blocks_used == 0
        assert engine.kv.num_slabs == 1, "what KV does not use is the cache's"
    assert all(counts.values()), counts
    assert min(sizes) == least
    assert len(sizes) > 6


def test_a_request_as_large_as_the_pool_is_served_and_a_larger_one_refused(model_dir):
    settings = dict[str, Any](**COMMON | dict(max_context=512), **DISK)
    budget = budget_of(Engine(model_dir, EngineConfig(**settings)), 4)
    with Engine(model_dir, EngineConfig(**settings, budget_bytes=budget)) as engine:
        blocks = engine.scheduler.most_blocks
        assert engine.kv.num_blocks < blocks == 4 * engine.kv.blocks_per_slab < 512 // 16
        fits = Request((5,) * (16 * blocks - 3), SamplingParams(max_new_tokens=4, ignore_eos=True))
        larger = Request((5,) * (16 * blocks - 2), SamplingParams(max_new_tokens=4, ignore_eos=True))
        served, refused = engine.generate([fits, larger])
        assert (served.finish_reason, len(served.token_ids)) == ("length", 4)
        assert f"the cache has {blocks}" in (refused.error or "")
        check(engine)


def test_kv_takes_what_holds_nothing_and_then_what_the_policy_lets_go(model_dir):
    """Of LRU: what the pass used first, and never what is on its way."""
    with Engine(model_dir, EngineConfig(**COMMON, **DISK, cache_policy="lru")) as engine:
        cache: Any = engine.pager.store.cache
        assert cache.places == LAYERS * EXPERTS, "all fit"
        engine.generate([request(0)])
        cache._settle()
        held = dict(cache._place_of)
        empty = cache.places - len(held)
        cache.shrink(empty)
        assert cache._place_of == held
        last = cache.uses.last
        cache.shrink(3)
        gone = held.keys() - cache._place_of.keys()
        assert len(gone) == 3
        assert max(last[where] for where in gone) <= min(last[where] for where in cache._place_of)


def test_the_simulator_lends_as_the_engine_does(model_dir):
    machine, settings = (load_config(model_dir), HardwareProfile.load("laptop")), dict[str, Any](**COMMON, **DISK)
    budget = budget_of(SimEngine(*machine, EngineConfig(**settings)), 11)
    work = [request(number) for number in range(12)]
    with SimEngine(*machine, EngineConfig(**settings, budget_bytes=budget)) as simulated:
        least = simulated._cache.places
        for each in work:
            simulated.add(each)
        seen = set()
        for _ in simulated.steps():
            lines, pool = simulated.budget.lines(), simulated.kv.pool
            assert lines["expert_cache"] == simulated._cache.places * pool.slab_bytes
            assert lines["expert_cache"] + lines["kv_cache"] + lines["free_slabs"] == pool.num_slabs * pool.slab_bytes
            seen.add(simulated._cache.places)
    assert len(seen) > 3
    assert max(seen) <= least
