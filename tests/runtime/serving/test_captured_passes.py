"""Passes inside CUDA graphs: replays keep Algorithm 1's order whatever moves between them, and a capture that fails
leaves no mark."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple

import pytest
from fluxmoe.kernels.formats import FORMATS
from fluxmoe.runtime.experts.placement import Tier, place
from fluxmoe.runtime.experts.streamer_cuda import CudaStreamer
from fluxmoe.runtime.serving.graphs import DecodeGraphs

from ..experts.test_moving_store import EXPERTS, LAYERS, check_pass, moving_store
from ..experts.test_store import block_of, filled
from ..experts.test_streamer import Logged, Recorder, arenas_of, check_order
from .test_graphs import CPU, decode_step


def one_pass(streamer, cuda, layers, fail_at=None):
    for layer in range(layers):
        with streamer.layer(layer) as page:
            for d in (0, 1):
                page.wait(d)
                cuda.log.append(("use", page.table.blocks[0][d].data_ptr(), (layer, d)))
            if layer == fail_at:
                raise MemoryError


@pytest.mark.parametrize("poison", [False, True], ids=["plain", "poison"])
@pytest.mark.parametrize(("layers", "slots"), [(5, 2), (5, 3), (4, 2), (3, 2), (2, 2), (1, 2)])
def test_replays_and_eager_passes_mix_in_order(layers, slots, poison):
    """A captured log is replayed as a whole, as a graph would be; the vector clocks of check_order judge all of it.

    One graph serves every pass, whether the slots divide the layers or not.
    """
    cuda = Recorder()
    with filled(place("host", layers, 2)) as store:
        streamer = Logged(store, slots, poison, cuda=cuda)
        graph, outside = None, cuda.log
        for eager in (True, False, False, True, False, False, False, True, True, False):
            assert streamer.prepare() == 1
            assert streamer.steady or eager
            if eager:
                one_pass(streamer, cuda, layers)
                continue
            if graph is None:
                state, cuda.log = state_of(streamer), []
                with streamer.capture():
                    one_pass(streamer, cuda, layers)
                graph, cuda.log = cuda.log, outside
                assert state == state_of(streamer)
            before = streamer.counters()
            with streamer.replay():
                cuda.log.extend(graph)
            loads = 0 if streamer.keeps_all else 2 * layers
            assert streamer.counters().loads - before.loads == loads
            assert sum(entry[0] == "copy" for entry in graph) == loads
        arenas = arenas_of(store)
        copied = sum(entry[0] == "copy" for entry in cuda.log)
        assert copied == streamer.counters().loads
    check_order(cuda.log, arenas)
    for dropped in ("compute", "load0"):
        if layers > slots:
            with pytest.raises(AssertionError):
                check_order([entry for entry in cuda.log if entry[:2] != ("wait", dropped)], arenas)


def state_of(streamer) -> tuple:
    events = [id(event) for pair in streamer._loaded for event in pair] + [id(event) for event in streamer._computed]
    plans = {visit: id(plan) for visit, plan in streamer._load_plans.items()}
    return events, streamer._issued, streamer._next_visit, streamer.counters(), plans, streamer._capturing


class Injected(Exception):
    pass


class Broken(Recorder):
    """Its call number `fail_at`, counted from when it is armed, raises."""

    def __init__(self):
        super().__init__()
        self.calls, self.fail_at = 0, None

    def _count(self):
        if self.fail_at is not None:
            self.calls += 1
            if self.calls == self.fail_at:
                raise Injected

    class _Stream(Recorder._Stream):
        def wait_event(self, event):
            self.owner._count()
            super().wait_event(event)

    class _Event(Recorder._Event):
        def record(self, stream):
            self.owner._count()
            super().record(stream)

    def Event(self):
        self._count()
        return super().Event()


@pytest.mark.parametrize(("layers", "slots"), [(3, 2), (4, 2)])
def test_a_capture_that_fails_at_any_call_leaves_the_streamer_as_it_was(layers, slots):
    """Making events, forking, loading, waiting, joining: whichever raises, eager passes and captures go on in order."""
    cuda, failures = Broken(), 0
    with filled(place("host", layers, 2)) as store:
        streamer = Logged(store, slots, cuda=cuda)
        one_pass(streamer, cuda, layers)
        for fail_at in range(1, 1000):
            state, outside = state_of(streamer), cuda.log
            cuda.log, cuda.calls, cuda.fail_at = [], 0, fail_at
            failed = False
            try:
                with streamer.capture():
                    one_pass(streamer, cuda, layers)
            except Injected:
                failed = True
            graph, cuda.log, cuda.fail_at = cuda.log, outside, None
            assert state_of(streamer) == state
            if not failed:
                with streamer.replay():
                    cuda.log.extend(graph)
                break
            failures += 1
            if fail_at % 3 == 0:
                one_pass(streamer, cuda, layers)
            assert streamer.steady
        one_pass(streamer, cuda, layers)
        check_order(cuda.log, arenas_of(store))
    assert failures >= 10 * layers


def test_a_pass_that_raises_inside_a_capture_is_joined_so_that_it_can_end():
    cuda = Recorder()
    with filled(place("host", 4, 2)) as store:
        streamer = Logged(store, 2, cuda=cuda)
        one_pass(streamer, cuda, 4)
        state, cuda.log = state_of(streamer), []
        with suppress(MemoryError), streamer.capture():
            one_pass(streamer, cuda, 4, fail_at=1)
        assert state_of(streamer) == state
    recorded = {what: where for kind, where, what in cuda.log if kind == "record"}
    joined = [recorded[what] for kind, where, what in cuda.log[-4:] if (kind, where) == ("wait", "compute")]
    assert joined == ["load0", "load1"]


def moving_streamer(cuda, placement="packed"):
    store = moving_store(place(placement, LAYERS, EXPERTS))
    return store, CudaStreamer(store, 2, cuda=cuda)


def test_tables_are_never_made_inside_a_capture():
    cuda = Recorder()
    with filled(place("balanced", 5, 4, alpha=0.4)) as store:
        streamer = Logged(store, 2, cuda=cuda)
        one_pass(streamer, cuda, 5)
        streamer.prepare()
        store.epochs[3] += 1  # as when an expert has moved
        with pytest.raises(AssertionError, match="prepared before a capture"), streamer.capture():
            one_pass(streamer, cuda, 5)
        streamer.prepare()
        with streamer.capture():
            one_pass(streamer, cuda, 5)


def test_experts_that_move_change_their_tables_in_place_and_graphs_only_with_what_is_launched():
    store, streamer = moving_streamer(Recorder())
    check_pass(streamer)
    known = streamer.prepare()
    tables = {layer: streamer._table(plan) for layer, plan in enumerate(store.load_plans)}
    memory = [(t.addresses.data_ptr(), t.formats.data_ptr()) for t in tables.values()]

    def becomes(where, tier):
        slabs = store.reserve(tier)
        store.fetch(where, tier, slabs, lambda to, block: to.copy_(block))
        store.land(where, tier, slabs)

    def prepared():
        check_pass(streamer)
        streamer.prepare()
        before = streamer.prepare()
        check_pass(streamer)
        assert streamer.prepare() == before
        assert memory == [(t.addresses.data_ptr(), t.formats.data_ptr()) for t in tables.values()]
        return before

    # One of several packed experts becomes dense: another address, another format, the same kernels and copies.
    address = tables[1].addresses[2].tolist()
    becomes((1, 2), Tier.RESIDENT)
    assert prepared() == known
    assert tables[1].addresses[2].tolist() != address
    # An expert leaves: its layer's load copies it from now on.
    store.land((1, 2), Tier.HOST)
    streams = prepared()
    assert streams > known
    # The last packed expert of a layer becomes dense: its kernels need not decode any more.
    assert tables[3].compressed == {"planar12"}
    for expert in range(EXPERTS):
        becomes((3, expert), Tier.RESIDENT)
    assert prepared() > streams
    assert not tables[3].compressed
    store.close()


def test_a_load_under_way_when_an_expert_leaves_counts_as_changed_at_once():
    """The pass reads what the old load brings, and begins the new one: no graph of before does both."""
    store, streamer = moving_streamer(Recorder(), "host")
    check_pass(streamer)
    known = streamer.prepare()
    slabs = store.reserve(Tier.PACKED)
    store.fetch((0, 0), Tier.PACKED, slabs, lambda to, block: to.copy_(block))
    store.land((0, 0), Tier.PACKED, slabs)
    assert streamer.prepare() > known
    store.close()


@cache
def bytes_of(*which) -> bytes:
    return block_of(*which).numpy().tobytes()


class Deferred(CudaStreamer):
    """Copies become part of the graph that is being captured, and are made when it is launched."""

    work: list | None = None

    def do(self, action):
        if self.work is None:
            action()
        else:
            self.work.append(action)

    def _copy(self, target, source, cancelled):
        self.do(lambda: target.copy_(source))
        return source.numel()


class Launched(NamedTuple):
    work: list

    def replay(self):
        for action in self.work:
            action()


@pytest.mark.parametrize("slots", [2, 3])
def test_graphs_read_the_right_experts_whatever_moves_between_steps(slots):
    """Kernels read addresses and formats when they run, as on a GPU, and keep what the host chose at their capture.

    On 5 layers, which neither number of slots divides. Graphs outlive moves that change addresses alone.
    """
    rng = random.Random(slots)
    store = moving_store(place("packed", LAYERS, EXPERTS))
    streamer = Deferred(store, slots, cuda=Recorder())
    names, passes = {each.number: name for name, each in FORMATS.items()}, []

    def kernel(table, layer, d, decoded):
        def read():
            passes.append(layer)
            for expert in range(EXPERTS):
                address, number = table.addresses[expert, d].item(), table.formats[expert, d].item()
                assert names[number] in {"dense", *decoded}, "a kernel that does not decode meets a packed expert"
                expected = bytes_of(layer, expert, d, names[number])
                assert ctypes.string_at(address, len(expected)) == expected, (layer, expert, d)

        return read

    def forward(ids, meta, rows):
        for layer in range(LAYERS):
            with streamer.layer(layer) as page:
                for d in (0, 1):
                    page.wait(d)
                    streamer.do(kernel(page.table, layer, d, page.table.compressed))
        return ids[:, None].float()

    def capture(work, pool) -> Any:
        streamer.work = []
        try:
            result = work()
            return Launched(streamer.work), result
        finally:
            streamer.work = None

    new_pool: Callable[[], Any] = lambda: "pool"  # noqa: E731
    graphs = DecodeGraphs(forward, streamer, 2, 4, 16, CPU, 0, capture, new_pool)
    for step in range(80):
        graphs.run(decode_step(2))
        for _ in range(rng.choice([0, 0, 0, 0, 1, 1, 4])):
            where = rng.randrange(LAYERS), rng.randrange(EXPERTS)
            source = Tier(store.layout.placement.tiers[where])
            # Mostly between packed and dense, which changes no copy; in the first steps nothing else.
            others = {Tier.PACKED: [Tier.RESIDENT] * 4 + [Tier.HOST]}.get(source, [Tier.PACKED])
            target = rng.choice(others) if step > 20 else others[0]
            if target is Tier.HOST:
                store.land(where, Tier.HOST)
            else:
                slabs = store.reserve(target)
                store.fetch(where, target, slabs, lambda to, block: to.copy_(block))
                store.land(where, target, slabs)
    assert len(passes) == 80 * LAYERS * 2
    assert 15 < graphs.replays < 78
    store.close()
