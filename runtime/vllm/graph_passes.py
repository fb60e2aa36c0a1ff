"""GraphPasses: a model's passes over streamed slots inside CUDA graphs that another engine captures and launches.

vLLM says four things, and we need no more:

    before_graph   before each graph that it captures or launches, on the stream that it does so
    begin          as a layer's experts are called, in a graph or outside
    end            as a pass that is captured ends, before the capture does
    (nothing)      after a launch, of which the streamer needs to know nothing (CudaStreamer.settle)

A graph holds whole passes, one or several, with their copies: it finds the slots as a whole pass leaves them, and
leaves them so, whatever was captured or launched before it. Nothing here knows vLLM.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress

import torch

from ..experts.streamer import Counters
from ..experts.streamer_cuda import CudaStreamer

EAGER = """give --compilation-config '{"cudagraph_mode": "NONE"}' or --enforce-eager"""


class GraphError(ValueError):
    """A graph was captured that cannot be right when it is launched again."""


class GraphPasses:
    """in_piece: whether the pass that runs is composed of graphs of its pieces."""

    def __init__(self, streamer: CudaStreamer, in_piece: Callable[[], bool]) -> None:
        self.streamer, self._in_piece = streamer, in_piece
        self._capture: ExitStack | None = None
        # Passes that were captured add one when they are launched: int64 [1] on the device.
        self._launched = streamer.store.device.zeros(8).view(torch.int64)

    def before_graph(self) -> None:
        # Pieces of a pass hold no experts, and between them loads run on as they are.
        if not self._in_piece():
            self._abandon()
            self.streamer.settle()

    def begin(self) -> None:
        """GraphError where experts are captured as part of a piece."""
        if not self.streamer.in_capture:
            self._abandon()
        elif self._in_piece():
            raise GraphError(f"fluxmoe: experts that are streamed cannot be in PIECEWISE graphs: {EAGER}")
        elif self._capture is None:
            self._capture = ExitStack()
            self._capture.enter_context(self.streamer.capture())

    def end(self) -> None:
        """GraphError where what was captured is not whole passes."""
        if self._capture is None:
            return
        if not self.streamer.whole:
            self._abandon()
            raise GraphError(f"fluxmoe: a graph holds some layers with experts and not others: {EAGER}")
        self._launched += 1
        capture, self._capture = self._capture, None
        capture.close()

    def _abandon(self) -> None:
        """Forget a capture that failed, of which nobody told."""
        if self._capture is not None:
            capture, self._capture = self._capture, None
            with suppress(GraphError), capture:
                raise GraphError("the capture was given up")

    def counters(self) -> Counters:
        """Of passes inside graphs; waits for the device."""
        launched, streamer = int(self._launched), self.streamer
        loads = 0 if streamer.keeps_all else 2 * len(streamer.order)
        return Counters(host_bytes=launched * streamer.pass_bytes, loads=launched * loads)


def with_graphs(outside: Counters, graphs: GraphPasses | None) -> Counters:
    """Counters of all passes: those outside of graphs, and those inside if there are any."""
    return outside if graphs is None else Counters(*map(sum, zip(outside, graphs.counters(), strict=True)))
