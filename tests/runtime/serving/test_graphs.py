"""Decode graphs: padding changes nothing, replays keep Algorithm 1's order, and a capture that fails leaves no mark."""

from __future__ import annotations

import ctypes
import random
from contextlib import contextmanager, suppress
from functools import cache
from typing import NamedTuple

import pytest
import torch
from fluxmoe.kernels.formats import FORMATS
from fluxmoe.kernels.ops import AttentionMetadata
from fluxmoe.runtime.experts.placement import Tier, place
from fluxmoe.runtime.experts.streamer_cuda import CudaStreamer
from fluxmoe.runtime.serving.batch import Batch
from fluxmoe.runtime.serving.graphs import DecodeGraphs, StepBuffers, batch_sizes, capture_cuda

from ..experts.test_store import block_of, filled
from ..experts.test_streamer import Logged, Recorder, arenas_of, check_order
from .test_residency import EXPERTS, LAYERS, check_pass, moving_store

CPU = torch.device("cpu")


def decode_step(count: int, blocks: int = 2) -> Batch:
    """Sequence b has b + 1 cached tokens in block b + 1."""
    order = torch.arange(count, dtype=torch.int32)
    table = torch.arange(1, count * blocks + 1, dtype=torch.int32).view(count, blocks)
    return Batch(
        torch.arange(100, 100 + count),
        AttentionMetadata(
            torch.arange(count + 1, dtype=torch.int32),
            order + 1,
            table,
            order,
            table[:, 0].long() * 16,
            16,
            state_slots=order.flip(0),
        ),
        torch.arange(count),
    )


class Streamer:
    """A streamer that counts what is asked of it."""

    def __init__(self):
        self.steady, self.captured, self.replayed, self.changes = True, 0, 0, 1

    def prepare(self):
        return self.changes

    @contextmanager
    def capture(self):
        yield

    @contextmanager
    def replay(self):
        self.replayed += 1
        yield


class Again:
    """A graph whose replay is the call itself, into the memory of the first result."""

    def __init__(self, work):
        self.work, self.result = work, work()

    def replay(self):
        self.result.copy_(self.work())


def graphs_of(streamer, forward, max_batch=12):
    """Its pools are numbers; `graphs.sizes_in` says which sizes were captured in which, in their order."""
    sizes_in: dict[int, list[int]] = {}

    def capture(work, pool):
        graph = Again(work)
        streamer.captured += 1
        sizes_in[pool].append(len(graph.result))
        return graph, graph.result

    def new_pool():
        sizes_in[len(sizes_in) + 1] = []
        return len(sizes_in)

    graphs = DecodeGraphs(forward, streamer, max_batch, 4, 16, CPU, 0, capture, new_pool)
    graphs.sizes_in = sizes_in
    return graphs


def test_batch_sizes_cover_every_batch():
    for max_batch in (1, 2, 3, 7, 8, 64, 100, 257, 1000):
        sizes = batch_sizes(max_batch)
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == max_batch


@pytest.mark.parametrize("count", [1, 3, 8])
def test_a_step_is_padded_with_what_touches_nothing(count):
    buffers = StepBuffers(8, 4, 16, CPU, spare_state=77)
    buffers.fill(decode_step(8))
    step = decode_step(count)
    buffers.fill(step)
    meta = buffers.metadata
    assert buffers.token_ids[:count].equal(step.token_ids)
    assert meta.block_table[:count, :2].equal(step.metadata.block_table)
    assert meta.slot_mapping.tolist() == step.metadata.slot_mapping.tolist() + [-1] * (8 - count)
    assert meta.context_lens.tolist() == step.metadata.context_lens.tolist() + [0] * (8 - count)
    assert meta.query_start.tolist() == list(range(9))
    assert meta.num_tokens.tolist() == [count]
    assert meta.state_slots.tolist() == step.metadata.state_slots.tolist() + [77] * (8 - count)
    assert buffers.logit_rows.tolist() == list(range(8))


def test_ledger_counts_the_buffers():
    graphs = graphs_of(Streamer(), lambda ids, meta, rows: ids[:, None].float())
    for size in (12, 12, *batch_sizes(12)):
        graphs.run(decode_step(size))
    assert sum(b.nbytes for b in graphs._buffers.values()) == DecodeGraphs.buffer_bytes(12, 4, 16)


def test_the_second_step_of_a_size_is_captured_and_later_ones_replayed():
    streamer, calls = Streamer(), []

    def forward(ids, meta, rows):
        calls.append(len(ids))
        return (ids * 2 + meta.context_lens)[:, None].float()

    graphs = graphs_of(streamer, forward)
    for count in (3, 3, 3, 3, 4, 3, 8, 3):
        step = decode_step(count)
        got = graphs.run(step)
        assert got[:, 0].tolist() == (step.token_ids * 2 + step.metadata.context_lens).tolist()
    assert graphs.replays == 5
    # The largest comes first, whatever is asked for; then four sequences; the step of eight was the first of its size.
    assert graphs.sizes_in == {1: [12, 4]}
    assert calls == [12, 12, 12, 4, 4, 4, 4, 4, 8, 4]


def test_what_graphs_have_fixed_changes_and_all_are_captured_again_in_another_pool():
    streamer = Streamer()
    graphs = graphs_of(streamer, lambda ids, meta, rows: ids[:, None].float())
    for _ in range(4):
        graphs.run(decode_step(2))
    streamer.changes += 1
    replays = graphs.replays
    graphs.run(decode_step(2))
    assert graphs.replays == replays
    for _ in range(3):
        graphs.run(decode_step(2))
    assert graphs.sizes_in == {1: [12, 2], 2: [12, 2]}


def test_a_capture_that_fails_is_made_again_by_the_next_step():
    """The error is the step's; nothing of the capture is kept, and no pool without a graph."""
    streamer, broken = Streamer(), True
    graphs = graphs_of(streamer, lambda ids, meta, rows: ids[:, None].float())
    working = graphs._capture

    def capture(work, pool):
        if broken:
            raise RuntimeError("out of memory")
        return working(work, pool)

    graphs._capture = capture
    graphs.run(decode_step(12))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            graphs.run(decode_step(12))
    broken = False
    for _ in range(2):
        assert graphs.run(decode_step(12)).flatten().tolist() == list(range(100, 112))
    assert graphs.replays == 2
    assert [sizes for sizes in graphs.sizes_in.values() if sizes] == [[12]]


def test_no_graph_is_launched_over_loads_that_are_out_of_step():
    streamer = Streamer()
    graphs = graphs_of(streamer, lambda ids, meta, rows: ids[:, None].float())
    graphs.run(decode_step(2))
    streamer.steady = False
    for _ in range(3):
        graphs.run(decode_step(2))
    assert graphs.replays == 0
    streamer.steady = True
    graphs.run(decode_step(2))
    assert graphs.replays == 1


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


def test_a_capture_that_cannot_be_ended_leaves_the_current_stream(monkeypatch):
    """torch sets the capturing stream as the current one, and only a capture that ends well sets the old one back."""
    current = ["compute"]

    @contextmanager
    def stream(to):
        before, current[0] = current[0], to
        try:
            yield
        finally:
            current[0] = before

    class Capture:
        def __init__(self, graph, **settings):
            self.settings = settings

        def __enter__(self):
            current[0] = "capture"

        def __exit__(self, *exception):
            raise RuntimeError("work is not joined")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[0])
    with pytest.raises(RuntimeError, match="not joined"):
        capture_cuda(lambda: None, pool=None)
    assert current == ["compute"]


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

    def capture(work, pool):
        streamer.work = []
        try:
            result = work()
            return Launched(streamer.work), result
        finally:
            streamer.work = None

    graphs = DecodeGraphs(forward, streamer, 2, 4, 16, CPU, 0, capture, lambda: "pool")
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
