"""Decode graphs: padding changes nothing, when a size is captured and replayed, and what a failed capture leaves."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from fluxmoe.kernels.ops import AttentionMetadata
from fluxmoe.runtime.serving.batch import Batch
from fluxmoe.runtime.serving.graphs import DecodeGraphs, StepBuffers, batch_sizes, capture_cuda

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

    graphs: Any = DecodeGraphs(forward, streamer, max_batch, 4, 16, CPU, 0, capture, new_pool)
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
    meta: Any = buffers.metadata
    wanted: Any = step.metadata
    assert buffers.token_ids[:count].equal(step.token_ids)
    assert meta.block_table[:count, :2].equal(step.metadata.block_table)
    assert meta.slot_mapping.tolist() == step.metadata.slot_mapping.tolist() + [-1] * (8 - count)
    assert meta.context_lens.tolist() == step.metadata.context_lens.tolist() + [0] * (8 - count)
    assert meta.query_start.tolist() == list(range(9))
    assert meta.num_tokens.tolist() == [count]
    assert meta.state_slots.tolist() == wanted.state_slots.tolist() + [77] * (8 - count)
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
    capture: Any = capture_cuda
    with pytest.raises(RuntimeError, match="not joined"):
        capture(lambda: None, pool=None)
    assert current == ["compute"]
