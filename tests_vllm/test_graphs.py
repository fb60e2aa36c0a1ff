"""vLLM's own CUDAGraphWrapper, and the CudaGraphManager of its second model runner, around a model with streamed
experts, on a GPU that knows order alone: their hooks, captures and launches, and pieces between."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fluxmoe.runtime.experts.placement import place
from fluxmoe.runtime.vllm.offloader import FluxMoEOffloader, follow
from vllm.compilation import cuda_graph
from vllm.config import CUDAGraphMode
from vllm.forward_context import override_forward_context
from vllm.model_executor.offloader.base import NoopOffloader, get_offloader, set_offloader
from vllm.v1.worker.gpu import cudagraph_utils
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager

from tests.runtime.experts.test_store import filled
from tests.runtime.gpu import Gpu, OrderError
from tests.runtime.vllm.test_graph_passes import SHAPES, Passes, random_work


class Hosted(Passes):
    """As its parent, with vLLM's forward context and hooks in the place of what stands in for them there."""

    def __init__(self, store, slots: int, monkeypatch) -> None:
        super().__init__(store, slots, poison=True)
        compilation = SimpleNamespace(cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE)
        self._times = 1
        self._vllm_config = SimpleNamespace(compilation_config=compilation)
        set_offloader(NoopOffloader())
        self.hooks = follow(self._vllm_config, self.streamer)
        assert compilation.cudagraph_mode == CUDAGraphMode.FULL_DECODE_ONLY
        assert isinstance(get_offloader(), FluxMoEOffloader)

        @contextmanager
        def anything(*_: Any, **__: Any) -> Iterator[None]:
            yield

        monkeypatch.setattr(torch.cuda, "CUDAGraph", Gpu.CUDAGraph)
        monkeypatch.setattr(torch.cuda, "graph", self.gpu.graph)
        no_pools = SimpleNamespace(get_global_graph_pool=lambda: None, graph_pool_handle=lambda: None)
        for module in (cuda_graph, cudagraph_utils):
            monkeypatch.setattr(module, "current_stream", self.gpu.current_stream)
            monkeypatch.setattr(module, "current_platform", no_pools)
            # The first before 0.32, the second since.
            monkeypatch.setattr(module, "set_graph_pool_id", lambda pool: None, raising=False)
            monkeypatch.setattr(module, "capture_pool", anything, raising=False)
        monkeypatch.setattr(cudagraph_utils, "graph_capture", anything)
        monkeypatch.setattr(cudagraph_utils, "is_global_first_rank", lambda: False)
        monkeypatch.setattr(cuda_graph, "validate_cudagraph_capturing_enabled", lambda: None)
        monkeypatch.setattr(cuda_graph, "weak_ref_tensors", lambda output: output)
        # Before each layer's experts, and after the last: attention, norms and the like.
        self._pieces = [self._wrap(lambda: None, CUDAGraphMode.PIECEWISE) for _ in range(self.layers + 1)]

    def _wrap(self, runnable: Callable[..., Any], mode: CUDAGraphMode) -> cuda_graph.CUDAGraphWrapper:
        return cuda_graph.CUDAGraphWrapper(runnable, self._vllm_config, mode)

    def _passes(self) -> None:
        for _ in range(self._times):
            super().eager()

    @contextmanager
    def _context(self, size: Any, mode: CUDAGraphMode) -> Iterator[None]:
        with override_forward_context(SimpleNamespace(batch_descriptor=size, cudagraph_runtime_mode=mode)):
            yield

    def in_pieces(self) -> None:
        with self._context("piece", CUDAGraphMode.PIECEWISE):
            for layer in range(self.layers):
                self._pieces[layer]()
                self.layer(layer)
            self._pieces[-1]()

    def another_models_graph(self) -> None:
        get_offloader().sync_prev_onload()


class Wrapped(Hosted):
    """By CUDAGraphWrapper."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._model = self._wrap(self._passes, CUDAGraphMode.FULL)
        self.graphs = self._model.concrete_cudagraph_entries

    def full(self, size: Any, passes: int = 1) -> None:
        """A warm-up and a capture the first time, as `_warmup_and_capture`; then a launch."""
        self._times = passes
        if size not in self.graphs:
            with self._context(size, CUDAGraphMode.NONE):
                self._model()
        with self._context(size, CUDAGraphMode.FULL):
            self._model()


class Managed(Hosted):
    """By CudaGraphManager, which captures outside of any forward context, and a pass inside one without graphs."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._manager = SimpleNamespace(
            device=None, pool=None, vllm_config=None, ubatch_runner=None, use_breakable_cg=False, graphs=self.graphs,
            _max_full_descs_to_capture=None, _capture_mem_samples=None,
            _capture_stream=lambda batch: self.gpu.current_stream(),
        )  # fmt: skip

    def full(self, size: Any, passes: int = 1) -> None:
        self._times = passes
        batch = self._batch(size)
        if batch not in self.graphs:
            self._manager._capture_descs = {CUDAGraphMode.FULL: [batch]}
            CudaGraphManager.capture(self._manager, lambda _, warmup: self._forward)
        else:
            CudaGraphManager.run_fullgraph(self._manager, batch)

    @staticmethod
    def _batch(size: Any) -> BatchExecutionDescriptor:
        return BatchExecutionDescriptor(cg_mode=CUDAGraphMode.FULL, num_tokens=size, num_reqs=1)

    def _forward(self, mode: CUDAGraphMode) -> None:
        with self._context(None, mode):
            self._passes()

    def captured_on_another_stream(self, size: Any) -> None:
        self.graphs.pop(self._batch(size), None)
        super().captured_on_another_stream(size)


@pytest.fixture(autouse=True)
def _offloader() -> Iterator[None]:
    yield
    set_offloader(None)


@pytest.mark.parametrize("by", [Wrapped, Managed])
@pytest.mark.parametrize(("layers", "slots"), SHAPES)
def test_reads_follow_loads_and_loads_follow_reads(monkeypatch, layers, slots, by):
    with filled(place("host", layers, 2)) as store:
        for seed in range(2):
            passes = by(store, slots, monkeypatch)
            random_work(passes, random.Random(seed), 40)
            assert len(passes.graphs) >= 3


@pytest.mark.parametrize("by", [Wrapped, Managed])
def test_without_the_hooks_it_would_not_be_right(monkeypatch, by):
    with filled(place("host", 4, 2)) as store:
        passes = by(store, 2, monkeypatch)
        passes.full(0)
        passes.eager()
        monkeypatch.setattr(FluxMoEOffloader, "sync_prev_onload", lambda self: None)
        with pytest.raises(OrderError):
            random_work(passes, random.Random(0), 40)


def test_a_piece_reads_where_its_inputs_lay_in_the_capture(monkeypatch):
    """Why `vllm::moe_forward` cannot be left out of PIECEWISE graphs: what it returns lies elsewhere in each pass.
    vLLM checks it while it is debugged, and only then."""
    with filled(place("host", 2, 2)) as store:
        passes = Wrapped(store, 2, monkeypatch)
        piece = passes._wrap(lambda x: x, CUDAGraphMode.PIECEWISE)
        piece.is_debugging_mode, piece._runnable_str = True, ""
        first, second = torch.zeros(2, 8), torch.zeros(2, 8)
        with passes._context(2, CUDAGraphMode.PIECEWISE):
            piece(first)
            piece(first)
            with pytest.raises(AssertionError, match="Input addresses for cudagraphs are different"):
                piece(second)
