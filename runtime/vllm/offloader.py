"""FluxMoEOffloader: vLLM's hooks around the graphs that it captures and launches, for experts that are streamed.

vLLM calls them in CUDAGraphWrapper, and in CudaGraphManager of its second model runner: `sync_prev_onload` before each
capture and each launch, `join_after_forward` at the end of a captured pass. Its own prefetch offloader does with them
what `graph_passes` does here.

Streamed experts are in FULL graphs only. To put `vllm::moe_forward` into splitting_ops would not be enough for
PIECEWISE ones: a graph of a piece reads what comes before it under the address that this had in the capture, and what
the operation returns is allocated anew in each pass. So passes that vLLM would compose of such pieces (prefill, mostly)
run without graphs, compiled as ever, and decode steps as FULL graphs.
"""

from __future__ import annotations

import logging
from typing import Any
from weakref import WeakSet

from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.offloader.base import NoopOffloader, get_offloader, set_offloader

from ..experts.streamer_cuda import CudaStreamer
from .graph_passes import GraphPasses

logger = logging.getLogger("vllm.fluxmoe")

_WITHOUT_PIECES = {
    CUDAGraphMode.PIECEWISE: CUDAGraphMode.NONE,
    CUDAGraphMode.FULL_AND_PIECEWISE: CUDAGraphMode.FULL_DECODE_ONLY,
}


class FluxMoEOffloader(NoopOffloader):
    """Of all models in a process whose experts are streamed: a draft model has passes of its own."""

    def __init__(self) -> None:
        self.models: WeakSet[GraphPasses] = WeakSet()

    def sync_prev_onload(self) -> None:
        for passes in self.models:
            passes.before_graph()

    def join_after_forward(self) -> None:
        for passes in self.models:
            passes.end()


def follow(vllm_config: Any, streamer: CudaStreamer) -> GraphPasses:
    """Once a model's experts are loaded, before vLLM compiles and captures: its passes, told of graphs from now on."""
    compilation = vllm_config.compilation_config
    if (without := _WITHOUT_PIECES.get(compilation.cudagraph_mode)) is not None:
        logger.info(
            "FluxMoE: cudagraph_mode %s in the place of %s: experts that are streamed cannot be in PIECEWISE graphs",
            without.name, compilation.cudagraph_mode.name,
        )  # fmt: skip
        compilation.cudagraph_mode = without
    offloader = get_offloader()
    if not isinstance(offloader, FluxMoEOffloader):
        offloader = FluxMoEOffloader()
        set_offloader(offloader)
    passes = GraphPasses(streamer, _in_piece)
    offloader.models.add(passes)
    return passes


def _in_piece() -> bool:
    """Whether the pass that runs now is composed of PIECEWISE graphs."""
    if not is_forward_context_available():
        return False
    return get_forward_context().cudagraph_runtime_mode == CUDAGraphMode.PIECEWISE
