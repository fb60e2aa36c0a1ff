"""Decode graphs: padding changes nothing, keys are captured once, and replays keep Algorithm 1's order."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from fluxmoe.kernels.ops import AttentionMetadata
from fluxmoe.runtime.batch import Batch
from fluxmoe.runtime.graphs import DecodeGraphs, StepBuffers, batch_sizes
from fluxmoe.runtime.placement import place
from fluxmoe.runtime.streamer import CudaStreamer

from .test_store import filled
from .test_streamer import Recorder, check_order

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
    """A streamer of `phases` phases; counts what is asked of it."""

    def __init__(self, phases=1):
        self.phases, self.passes, self.steady, self.captured, self.replayed = phases, 0, True, 0, 0

    @property
    def phase(self):
        return self.passes % self.phases

    @contextmanager
    def capture(self):
        yield

    @contextmanager
    def replay(self):
        self.replayed += 1
        yield
        self.passes += 1


class Again:
    """A graph whose replay is the call itself, into the memory of the first result."""

    def __init__(self, work):
        self.work, self.result = work, work()

    def replay(self):
        self.result.copy_(self.work())


def graphs_of(streamer, forward, max_batch=12):
    def capture(work):
        graph = Again(work)
        streamer.captured += 1
        return graph, graph.result

    return DecodeGraphs(forward, streamer, max_batch, 4, 16, CPU, 0, capture)


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
    for size in batch_sizes(12):
        graphs.run(decode_step(size))
    assert sum(b.nbytes for b in graphs._buffers.values()) == DecodeGraphs.buffer_bytes(12, 4, 16)


def test_the_second_step_of_a_kind_is_captured_and_later_ones_replayed():
    streamer, calls = Streamer(), []

    def forward(ids, meta, rows):
        calls.append(len(ids))
        return (ids * 2 + meta.context_lens)[:, None].float()

    graphs = graphs_of(streamer, forward)
    for count in (3, 3, 4, 3, 8, 3):
        step = decode_step(count)
        got = graphs.run(step)
        assert got[:, 0].tolist() == (step.token_ids * 2 + step.metadata.context_lens).tolist()
    assert graphs.replays == 4
    assert streamer.captured == 1  # for four sequences; the step of eight was the first of its kind
    assert calls == [4, 4, 4, 4, 4, 8, 4]


def test_each_phase_has_a_graph_of_its_own():
    streamer = Streamer(phases=2)
    graphs = graphs_of(streamer, lambda ids, meta, rows: ids[:, None].float())
    for _ in range(3):
        graphs.run(decode_step(2))
        streamer.passes += streamer.replayed == 0  # an eager pass moves on by itself
    for _ in range(6):
        graphs.run(decode_step(2))
    assert streamer.captured == 2


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


@pytest.mark.parametrize("poison", [False, True], ids=["plain", "poison"])
@pytest.mark.parametrize(("layers", "slots"), [(5, 2), (5, 3), (4, 2), (3, 2), (2, 2), (1, 2)])
def test_replays_and_eager_passes_mix_in_order(layers, slots, poison):
    """A captured log is replayed as a whole, as a graph would be; the vector clocks of check_order judge all of it."""
    cuda = Recorder()
    with filled(place("host", layers, 2)) as store:
        Logged = type(
            "Logged",
            (CudaStreamer,),
            {
                "_copy": lambda self, to, source: cuda.log.append(("copy", to.data_ptr(), source.data_ptr())),
                "_spoil": staticmethod(lambda slot: cuda.log.extend(("use", b.data_ptr(), None) for b in slot)),
            },
        )
        streamer = Logged(store, slots, poison, cuda=cuda)

        def one_pass():
            for layer in range(layers):
                with streamer.layer(layer) as page:
                    for d in (0, 1):
                        page.wait(d)
                        cuda.log.append(("use", page.table.blocks[0][d].data_ptr(), (layer, d)))

        graphs, outside = {}, cuda.log
        for eager in (True, False, False, True, False, False, False, True, True, False):
            assert streamer.steady or eager
            phase = streamer.phase
            if eager or phase not in graphs:
                one_pass()
            if eager:
                continue
            if streamer.phase not in graphs:
                state = (streamer._issued, streamer._next_job, streamer.counters())
                phase, cuda.log = streamer.phase, []
                with streamer.capture():
                    one_pass()
                graphs[phase], cuda.log = cuda.log, outside
                assert state == (streamer._issued, streamer._next_job, streamer.counters())
            else:
                phase = streamer.phase
            before = streamer.counters()
            with streamer.replay():
                cuda.log.extend(graphs[phase])
            loads = 0 if streamer.keeps_all else 2 * layers
            assert streamer.counters().loads - before.loads == loads
            assert sum(entry[0] == "copy" for entry in graphs[phase]) == loads
        arenas = {
            store.plans[layer].host_runs[d][0][0].data_ptr(): (layer, d) for layer in range(layers) for d in (0, 1)
        }
        copied = sum(entry[0] == "copy" for entry in cuda.log)
        assert copied == streamer.counters().loads
    check_order(cuda.log, arenas)
    for dropped in ("compute", "load0"):
        if layers > slots:
            with pytest.raises(AssertionError):
                check_order([entry for entry in cuda.log if entry[:2] != ("wait", dropped)], arenas)
