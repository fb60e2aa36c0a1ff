"""Experts that move while serving: same tokens, no byte unaccounted for, and what fails leaves the old state."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import numpy as np
import pytest
from fluxmoe.experiments.lib.checkpoints import make_checkpoint
from fluxmoe.runtime.experts.mover import StreamCourier
from fluxmoe.runtime.experts.placement import Tier
from fluxmoe.runtime.experts.planner import Move, Plan
from fluxmoe.runtime.hardware import HardwareProfile
from fluxmoe.runtime.memory.budget import BudgetError
from fluxmoe.runtime.memory.slabs import SlabError
from fluxmoe.runtime.serving.engine import Engine, EngineConfig
from fluxmoe.runtime.serving.request import Request, SamplingParams
from fluxmoe.runtime.serving.residency import ComputeProfile

from ..experts.test_moving_store import EXPERTS, LAYERS
from ..experts.test_streamer import Recorder


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    out = tmp_path_factory.mktemp("models") / "moe"
    return make_checkpoint(
        arch="olmoe", out=out, layers=LAYERS, experts=EXPERTS, top_k=2, hidden=128, moe_intermediate=120, heads=4,
        vocab=512, dtype="bfloat16", seed=0, max_positions=512,
    )  # fmt: skip


def residency_of(engine: Engine) -> Any:
    assert engine.residency is not None
    return engine.residency


def requests(count=12) -> list[Request]:
    rng = np.random.default_rng(3)
    return [
        Request(
            tuple(rng.integers(0, 512, rng.integers(1, 90)).tolist()),
            SamplingParams(max_new_tokens=int(rng.integers(20, 90)), ignore_eos=True),
        )
        for i in range(count)
    ]


COMMON = dict[str, Any](device="cpu", max_batch=8, max_batched_tokens=48, max_context=192, poison=True)


def tight_budget(model_dir, extra=0, **settings) -> int:
    """Room for the experts on the device and KV of about two requests."""
    with Engine(model_dir, EngineConfig(**COMMON, adaptive=True, planning=False, **settings)) as engine:
        lines, slab, blocks = engine.budget.lines(), engine.pool.slab_bytes, engine.kv.blocks_per_slab
    fixed = sum(v for k, v in lines.items() if k not in ("kv_cache", "free_slabs"))
    return fixed + -(-10 // blocks) * slab + extra


@pytest.fixture(scope="module")
def expected(model_dir):
    with Engine(model_dir, EngineConfig(**COMMON)) as engine:
        return [output.token_ids for output in engine.generate(requests())]


def serve(engine, each_step=lambda engine, step: None) -> tuple[list, list]:
    steps, handles = [], [engine.add(request) for request in requests()]
    for step in engine.steps():
        steps.append(step)
        assert engine.held_bytes() == engine.budget.lines()
        assert sum(engine.held_bytes().values()) <= engine.budget.total
        assert engine.kv.num_blocks == engine.scheduler.num_blocks
        engine.pool.check_integrity()
        engine.scheduler.check_integrity()
        each_step(engine, step)
    return [handle.output.token_ids for handle in handles], steps


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_kv_grows_into_what_experts_leave(model_dir, expected, preemption):
    """One expert a layer leaves at a time: fewer expert bytes, more KV blocks, larger batches, the same tokens."""
    budget = tight_budget(model_dir, placement="packed")
    config = EngineConfig(
        **COMMON, placement="packed", budget_bytes=budget, adaptive=True, planning=False, preemption=preemption
    )

    def one_a_layer(engine, step):
        if step.iteration % 10 == 9 and step.iteration < 30:
            expert = EXPERTS - 1 - step.iteration // 10
            moves = [Move(layer, expert, Tier.PACKED, Tier.HOST) for layer in range(LAYERS)]
            engine.pager.request(moves)

    with Engine(model_dir, config) as engine:
        before = engine.budget.lines()
        tokens, steps = serve(engine, one_a_layer)
        after = engine.budget.lines()
        assert engine.pager.mover.refused == []
        assert engine.pager.mover.applied["to HOST"] == 3 * LAYERS
    assert tokens == expected
    assert after["packed_experts"] < before["packed_experts"]
    assert after["kv_cache"] > before["kv_cache"]
    assert steps[-1].device_experts == LAYERS * (EXPERTS - 3)
    assert max(s.batch for s in steps[35:]) > max(s.batch for s in steps[:9])


def test_kv_that_may_not_grow_gets_back_what_it_gave_to_experts(model_dir, expected):
    """Experts come, for which KV gives blocks, and leave again."""
    budget = tight_budget(model_dir, placement="packed") + (1 << 20)
    config = EngineConfig(
        **COMMON, placement="host", expert_format="planar12", budget_bytes=budget, adaptive=True, planning=False,
        grow_kv=False,
    )  # fmt: skip

    def come_and_go(engine, step):
        there = step.iteration % 20 == 5
        if there or step.iteration % 20 == 15:
            tiers = (Tier.HOST, Tier.PACKED) if there else (Tier.PACKED, Tier.HOST)
            engine.pager.request(Move(layer, 0, *tiers) for layer in range(LAYERS))

    with Engine(model_dir, config) as engine:
        before = engine.kv.num_blocks
        tokens, _ = serve(engine, come_and_go)
        while engine.pager.mover.busy:
            residency_of(engine).between_iterations()
        engine.pager.request(
            Move(layer, 0, Tier.PACKED, Tier.HOST) for layer in range(LAYERS) if engine.tiers[layer, 0] == Tier.PACKED
        )
        residency_of(engine).between_iterations()
        assert engine.pager.mover.applied["to PACKED"] > 0
        assert engine.kv.num_blocks == before
    assert tokens == expected


def test_thousands_of_random_moves_under_load_with_failures(model_dir, expected):
    rng = random.Random(5)

    def random_moves(engine, step):
        store, moves = engine.pager.store, []
        for _ in range(rng.randrange(12)):
            layer, expert = rng.randrange(LAYERS), rng.randrange(EXPERTS)
            tier = Tier(store.layout.placement.tiers[layer, expert])
            others = [target for target in (Tier.HOST, Tier.PACKED, Tier.RESIDENT) if target != tier]
            moves.append(Move(layer, expert, tier, rng.choice(others)))
        if rng.random() < 0.1:
            store.set_transfer(rng.choice(["whole", "on_demand"]))
        engine.pager.request(moves)
        store.check_integrity()
        sizes.append(engine.kv.num_blocks)

    def flaky(target, source):
        time.sleep(rng.choice([0, 0, 0.002]))
        if rng.random() < 0.1:
            raise OSError("injected")
        target.copy_(source)

    requested = done = 0
    sizes: list[int] = []
    for seed in range(3):
        shape = dict[str, Any](placement="packed", least_alpha=0.0, slots=2 + seed % 2)
        config = EngineConfig(
            **COMMON, **shape, budget_bytes=tight_budget(model_dir, **shape), adaptive=True, planning=False,
            preemption=("recompute", "swap", "recompute")[seed],
            load_delay=lambda layer, d: rng.choice([0.0, 0.0, 0.0, 0.001]),
        )  # fmt: skip
        with Engine(model_dir, config) as engine:
            engine.pager.mover.copy = flaky
            tokens, steps = serve(engine, random_moves)
            assert tokens == expected
            requested += 6 * len(steps)
            done += sum(engine.pager.mover.applied.values())
            assert any("injected" in reason for reason in engine.pager.mover.refused)
            assert {"to HOST", "to PACKED", "to RESIDENT"} <= engine.pager.mover.applied.keys()
    assert requested > done > 200
    changes = np.diff(sizes)
    assert min((changes > 0).sum(), (changes < 0).sum()) > 20


def test_the_planner_gives_memory_to_kv_and_takes_it_back(model_dir, expected):
    """Short of KV it sends experts away; once the queue is empty and blocks are free, they come back."""
    shape = dict[str, Any](placement="packed", least_alpha=0.0)
    budget = tight_budget(model_dir, **shape)
    config = EngineConfig(**COMMON, **shape, budget_bytes=budget, adaptive=True, plan_every=2, theta=0.01)
    with Engine(model_dir, config) as engine:
        tokens, steps = serve(engine)
        reasons = residency_of(engine).driver.last_reason
    assert tokens == expected
    alphas = [step.device_experts for step in steps]
    assert min(alphas) < LAYERS * EXPERTS
    assert alphas[-1] > min(alphas), reasons


def test_idle_memory_makes_experts_dense(model_dir, expected):
    """With room for everything, all experts come from the host, become packed, then dense; the tokens stay."""
    config = EngineConfig(
        **COMMON, placement="host", expert_format="planar12", adaptive=True, densify=True, least_alpha=0.0,
        plan_every=1, theta=0.01, preemption="swap",
    )  # fmt: skip
    with Engine(model_dir, config) as engine:
        tokens, steps = serve(engine)
        tiers, applied = engine.pager.store.layout.placement.tiers, engine.pager.mover.applied
    assert tokens == expected
    assert steps[0].device_experts == 0
    assert steps[-1].device_experts == LAYERS * EXPERTS
    assert applied["to PACKED"] == LAYERS * EXPERTS
    assert applied["to RESIDENT"] == (tiers == Tier.RESIDENT).sum() > 0


def test_the_planner_chooses_how_host_experts_cross(model_dir, expected):
    """Links of which one is slow: host experts cross the other way, and the tokens stay."""
    host = dict[str, Any](
        name="x", device="cpu", num_devices=1, memory_bytes=1e9, host_memory_bytes=1e9, matmul_flops=1e9
    )
    host |= dict(memory_bandwidth=1e9, disk_bandwidth=1e9)
    for copy, read, chosen in ((1e3, 1e12, "on_demand"), (1e12, 1e3, "whole")):
        config = EngineConfig(
            **COMMON, placement="host", adaptive=True, least_alpha=0.0, transfer="auto", plan_every=2,
            profile=HardwareProfile(**host, host_bandwidth=copy, kernel_host_bandwidth=read),
        )  # fmt: skip
        with Engine(model_dir, config) as engine:
            residency_of(engine).driver.planner.decide = lambda tiers, *rest: Plan((), "stay", 1.0)
            tokens, steps = serve(engine)
            assert engine.pager.transfer == chosen
        assert tokens == expected
        assert (steps[-1].streamed_bytes == 0) == (chosen == "on_demand")


def test_the_least_used_expert_of_each_layer_leaves_first(model_dir):
    budget = tight_budget(model_dir, placement="packed", least_alpha=0.0)
    shape = dict[str, Any](placement="packed", least_alpha=0.0, budget_bytes=budget)
    config = EngineConfig(**COMMON, **shape, adaptive=True, plan_every=4, theta=0.01)
    with Engine(model_dir, config) as engine:
        asked, planner = [], residency_of(engine).driver.planner
        decide = planner.decide

        def spy(tiers, seen, popularity):
            plan = decide(tiers, seen, popularity)
            asked.append((tiers, popularity, plan))
            return plan

        planner.decide = spy
        serve(engine)
    tiers, popularity, plan = next(entry for entry in asked if entry[2].moves)
    # What the router did, counted: top_k a token and layer.
    assert len(set(popularity.sum(axis=1).tolist())) == 1
    for move in plan.moves:
        assert popularity[move.layer, move.expert] == popularity[move.layer][tiers[move.layer] == Tier.PACKED].min()


def test_compute_is_the_least_that_as_many_sequences_took():
    """Waiting does not count as compute; slow growth does, in time; batches of other sizes are apart."""
    profile = ComputeProfile()
    assert profile.compute_s(8, 0.010) == 0.010
    assert profile.compute_s(9, 0.050) == pytest.approx(0.0101)
    assert profile.compute_s(8, 0.009) == 0.009
    assert profile.compute_s(64, 0.080) == 0.080
    for _ in range(300):
        longer = profile.compute_s(8, 0.020)
    assert longer == 0.020


def test_moves_that_cannot_be_made_leave_the_state(model_dir):
    budget = tight_budget(model_dir, placement="packed")
    config = EngineConfig(**COMMON, placement="packed", budget_bytes=budget, adaptive=True, planning=False)
    with Engine(model_dir, config) as engine:
        residency, mover, tiers = residency_of(engine), engine.pager.mover, engine.pager.tiers
        store: Any = engine.pager.store
        mover.request(
            [
                Move(0, 0, Tier.HOST, Tier.PACKED),
                Move(0, 1, Tier.PACKED, Tier.DISK),
                *[Move(1, e, Tier.PACKED, Tier.HOST) for e in range(4)],
                Move(1, 0, Tier.PACKED, Tier.HOST),
            ]
        )
        residency.between_iterations()
        assert "expert 0 of layer 0 is packed" in " ".join(mover.refused)
        # Those to the host are made first.
        reasons = " ".join(mover.refused)
        assert "cannot become on disk" in reasons
        assert "all that a slot holds" in reasons
        assert len(mover.refused) == 4
        assert (engine.pager.tiers != tiers).sum() == 3
        # Memory that the pool refuses: an expert that left stays away.
        serve(engine)
        assert not mover.busy
        store.reserve = lambda tier: (_ for _ in ()).throw(SlabError("no memory today"))
        mover.request([Move(1, 0, Tier.HOST, Tier.PACKED)])
        residency.between_iterations()
        assert "stays in host memory: no memory today" in mover.refused[-1]
        store.check_integrity()


def test_kv_keeps_room_for_a_request_that_has_yet_to_come(model_dir):
    """While nobody asks for anything, experts come, and leave KV enough for one request of full context."""
    budget = tight_budget(model_dir, placement="host", expert_format="planar12", extra=1 << 20)
    config = EngineConfig(
        **COMMON, placement="host", expert_format="planar12", budget_bytes=budget, adaptive=True, planning=False
    )
    with Engine(model_dir, config) as engine:
        mover, before = engine.pager.mover, engine.kv.num_blocks
        mover.request([Move(layer, e, Tier.HOST, Tier.PACKED) for layer in range(LAYERS) for e in range(EXPERTS)])
        while mover.busy:
            residency_of(engine).between_iterations()
        assert engine.kv.num_blocks < before
        assert "no more slabs than one request may need" in mover.refused[-1]
        long = Request((1,), SamplingParams(max_new_tokens=COMMON["max_context"] - 1, ignore_eos=True))
        assert len(engine.generate([long])[0].token_ids) == COMMON["max_context"] - 1


def test_a_budget_without_room_for_kv_is_one_sentence(model_dir):
    with Engine(model_dir, EngineConfig(**COMMON, placement="packed", adaptive=True)) as engine:
        lines = engine.budget.lines()
    least = sum(v for k, v in lines.items() if k not in ("kv_cache", "free_slabs"))
    with pytest.raises(BudgetError, match=r"for KV|too small"):
        Engine(model_dir, EngineConfig(**COMMON, placement="packed", adaptive=True, budget_bytes=least + 1000))


def test_closing_gives_up_experts_that_are_on_their_way(model_dir):
    """Closed once the copy under way is done, which nobody cuts off; those behind it never begin."""
    config = EngineConfig(**COMMON, placement="host", expert_format="planar12", adaptive=True, planning=False)
    entered, release, copied, closed = threading.Event(), threading.Event(), [], threading.Event()

    def slow(target, source):
        entered.set()
        assert release.wait(10)
        assert not closed.is_set()
        target.copy_(source)
        copied.append(source.numel())

    engine = Engine(model_dir, config)
    mover: Any = engine.pager.mover
    mover.copy = slow
    engine.pager.request([Move(0, expert, Tier.HOST, Tier.PACKED) for expert in range(3)])
    residency_of(engine).between_iterations()
    assert entered.wait(5)

    def close():
        engine.close()
        closed.set()

    closer = threading.Thread(target=close)
    closer.start()
    assert not closed.wait(0.1)
    assert mover.courier._closing.is_set()
    release.set()
    closer.join(10)
    assert closed.is_set()
    assert len(copied) == 2  # both blocks of one expert
    assert not any(thread.name == "expert-arrivals" for thread in threading.enumerate())


class SlowEvents(Recorder):
    """The device is always behind: an event is done when it is asked the second time."""

    class _Event(Recorder._Event):
        def record(self, stream):
            super().record(stream)
            self.asked = 0

        def query(self):
            self.asked += 1
            return self.asked > 1


def test_any_number_of_batches_arrive_on_one_stream_which_nobody_waits_for(model_dir, expected):
    rng, cuda = random.Random(7), SlowEvents()

    def random_moves(engine, step):
        store = engine.pager.store
        where = rng.randrange(LAYERS), rng.randrange(EXPERTS)
        tier = Tier(store.layout.placement.tiers[where])
        target = {Tier.HOST: Tier.PACKED, Tier.PACKED: Tier.RESIDENT, Tier.RESIDENT: Tier.PACKED}[tier]
        engine.pager.request([Move(*where, tier, target if rng.random() < 0.8 else Tier.HOST)])
        assert threading.active_count() == threads

    config = EngineConfig(
        **COMMON, placement="host", expert_format="planar12", adaptive=True, planning=False, least_alpha=0.0
    )
    with Engine(model_dir, config) as engine:
        engine.pager.mover.courier = StreamCourier(cuda)
        threads = threading.active_count()
        for _ in range(3):
            tokens, _ = serve(engine, random_moves)
            assert tokens == expected
        applied = engine.pager.mover.applied
    batches = sum(entry[:2] == ("wait", "load0") for entry in cuda.log)
    assert batches >= 40
    assert cuda._streams == 1
    assert applied["to PACKED"] + applied["to RESIDENT"] >= 40
