"""Streamed slots inside graphs that another captures and launches, in the order in which vLLM does (which
tests_vllm/test_graphs.py reads in its sources): every read after its load, every load after the reads before it."""

from __future__ import annotations

import random
from contextlib import suppress
from typing import Any

import pytest
from fluxmoe.runtime.experts.placement import Placement, Tier, place
from fluxmoe.runtime.experts.streamer import Counters
from fluxmoe.runtime.vllm.graph_passes import GraphError, GraphPasses, with_graphs

from ..experts.test_store import filled
from ..gpu import Gpu, GpuStreamer, OrderError


class Passes:
    """A model and what vLLM does with it: as CUDAGraphWrapper and the runners call the hooks."""

    def __init__(self, store, slots: int, poison: bool = False, kind: type[GpuStreamer] = GpuStreamer) -> None:
        self.gpu, self.mode = Gpu(), "NONE"
        self.layers = store.layout.num_layers
        self.streamer = kind(store, slots, poison, cuda=self.gpu)
        self.streamer.sources = {
            plan.host_runs[d][0][0].data_ptr(): (plan.layer, d)
            for plan in store.load_plans for d in (0, 1) if plan.streamed
        }  # fmt: skip
        self.graphs: dict[Any, Gpu.CUDAGraph] = {}
        self.hooks = GraphPasses(self.streamer, lambda: self.mode == "PIECEWISE")

    def layer(self, layer: int) -> None:
        self.hooks.begin()
        with self.streamer.layer(layer) as page:
            for d in (0, 1) if layer in self.streamer.order else ():
                page.wait(d)
                self.gpu.read(page.table.blocks[0][d].data_ptr(), (layer, d))

    def eager(self, layers: int | None = None) -> None:
        for layer in range(self.layers if layers is None else layers):
            self.layer(layer)

    def full(self, size: Any, passes: int = 1) -> None:
        """Captured the first time, after a warm-up, launched from then on. passes: as of a draft model's steps."""
        self.mode = "FULL"
        if size not in self.graphs:
            self.mode = "NONE"
            self.eager()
            self.mode, graph = "FULL", Gpu.CUDAGraph()
            self.hooks.before_graph()
            with self.gpu.graph(graph, stream=self.gpu.current_stream()):
                for _ in range(passes):
                    self.eager()
                self.hooks.end()
            self.graphs[size] = graph
        else:
            self.hooks.before_graph()
            self.graphs[size].replay()
        self.mode = "NONE"

    def in_pieces(self) -> None:
        """Experts outside, as with vLLM's splitting_ops: hooks come before every piece, and after none."""
        self.mode = "PIECEWISE"
        for layer in range(self.layers):
            self.hooks.before_graph()
            self.layer(layer)
        self.hooks.before_graph()
        self.mode = "NONE"

    def another_models_graph(self) -> None:
        self.hooks.before_graph()

    def captured_on_another_stream(self, size: Any) -> None:
        """All that vLLM captures, it does so on a stream of its own, which then waits for the first."""
        other = self.gpu.Stream()
        other.wait_stream(self.gpu.main)
        with self.gpu.stream(other):
            self.graphs.pop(size, None)
            self.full(size)
        self.gpu.main.wait_stream(other)


def random_work(passes: Passes, rng: random.Random, steps: int) -> None:
    for _ in range(steps):
        match rng.randrange(12):
            case 0 | 1:
                passes.eager()
            case 2:
                passes.eager(rng.randrange(passes.layers))  # given up
            case 3:
                passes.in_pieces()
            case 4:
                passes.another_models_graph()
            case 5:
                passes.captured_on_another_stream(rng.randrange(4))
            case 6:
                passes.full("a draft's steps", 3)
            case _:
                passes.full(rng.randrange(4))


SHAPES = [(layers, slots) for layers in (1, 2, 3, 4, 5, 7, 8) for slots in (2, 3, 4)]


@pytest.mark.parametrize("poison", [False, True], ids=["plain", "poison"])
@pytest.mark.parametrize(("layers", "slots"), SHAPES)
def test_graphs_of_several_sizes_and_eager_passes_share_slots_in_order(layers, slots, poison):
    with filled(place("host", layers, 2)) as store:
        for seed in range(4):
            passes = Passes(store, slots, poison)
            random_work(passes, random.Random(seed), 40)
            assert len(passes.graphs) >= 3


@pytest.mark.parametrize("slots", [2, 3, 4])
def test_layers_that_do_not_stream_lie_between(slots):
    tiers = place("host", 6, 2).tiers.copy()
    tiers[[0, 3]] = Tier.RESIDENT
    with filled(Placement("balanced", tiers)) as store:
        for seed in range(4):
            passes = Passes(store, slots)
            assert passes.streamer.order == [1, 2, 4, 5]
            random_work(passes, random.Random(seed), 40)


class Forgets(GpuStreamer):
    """That graphs were launched since its events."""

    def _leave_graphs(self) -> None:
        pass


class LeavesLoads(GpuStreamer):
    """That a pass which was given up had left out."""

    _settling = False

    def _issue_until(self, loads: int) -> None:
        if not self._settling:
            super()._issue_until(loads)

    def settle(self) -> None:
        self._settling = True
        super().settle()
        self._settling = False

    @property
    def steady(self) -> bool:
        return True


class DoesNotWait(GpuStreamer):
    """For loads, before a graph."""

    def settle(self) -> None:
        stream = self._cuda.current_stream()
        before = set(stream.done)
        super().settle()
        stream.done = before


@pytest.mark.parametrize("kind", [Forgets, LeavesLoads, DoesNotWait])
def test_the_gpu_sees_each_step_that_is_left_out(kind):
    with filled(place("host", 4, 2)) as store:
        caught = 0
        for seed in range(8):
            passes = Passes(store, 2, kind=kind)
            try:
                random_work(passes, random.Random(seed), 40)
            except OrderError:
                caught += 1
        assert caught


def test_a_graph_before_any_other_pass():
    with filled(place("host", 5, 2)) as store:
        passes, graph = Passes(store, 2, poison=True), Gpu.CUDAGraph()
        passes.hooks.before_graph()
        with passes.gpu.graph(graph, stream=passes.gpu.main):
            passes.eager()
            passes.hooks.end()
        for _ in range(2):
            passes.hooks.before_graph()
            graph.replay()
        passes.eager()


@pytest.mark.parametrize("stop", [0, 1, 3])
def test_a_capture_that_failed_is_forgotten(stop):
    """vLLM does not say that it did: the next hook finds out."""
    with filled(place("host", 4, 2)) as store:
        for following in ("eager", "full"):
            passes = Passes(store, 2)
            passes.eager()
            passes.hooks.before_graph()
            with suppress(MemoryError), passes.gpu.graph(Gpu.CUDAGraph(), stream=passes.gpu.main):
                passes.eager(stop)
                raise MemoryError
            passes.eager() if following == "eager" else passes.full(0)
            random_work(passes, random.Random(stop), 20)


def test_experts_in_a_graph_of_a_piece_are_refused():
    with filled(place("host", 3, 2)) as store:
        passes = Passes(store, 2)
        passes.eager()
        passes.mode = "PIECEWISE"
        with (
            pytest.raises(GraphError, match="cannot be in PIECEWISE graphs: give --compilation-config"),
            passes.gpu.graph(Gpu.CUDAGraph()),
        ):
            passes.layer(0)


@pytest.mark.parametrize(("layers", "slots"), [(5, 2), (4, 2), (3, 3)])
def test_graphs_of_some_layers_are_refused(layers, slots):
    with filled(place("host", layers, 2)) as store:
        for some in range(1, layers):
            passes = Passes(store, slots)
            passes.eager()
            passes.hooks.before_graph()
            with passes.gpu.graph(Gpu.CUDAGraph()):
                passes.eager(some)
                with pytest.raises(GraphError, match="holds some layers with experts and not others"):
                    passes.hooks.end()
            random_work(passes, random.Random(some), 20)


def test_passes_inside_graphs_are_counted_by_the_device():
    """Nobody says when a graph is launched: one of its nodes counts."""
    with filled(place("host", 4, 2)) as store:
        passes = Passes(store, 2)
        passes.full(0)
        assert passes.hooks.counters().loads == 2 * 4  # here it ran as it was captured
        passes.hooks._launched.fill_(3)
        each = sum(plan.host_bytes(d) for plan in store.load_plans for d in (0, 1))
        assert passes.hooks.counters() == Counters(host_bytes=3 * each, loads=3 * 2 * 4)
        outside = passes.streamer.counters()
        assert with_graphs(outside, passes.hooks).host_bytes == outside.host_bytes + 3 * each
        assert with_graphs(outside, None) == outside
