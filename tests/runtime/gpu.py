"""A GPU in the place of torch.cuda, as far as order goes: streams, events and graphs, and what each piece of work may
rely on to be done before it.

Work reads and writes buffers, by address. It is checked when it is enqueued: whatever was enqueued before and touches
the same buffer, one of both writing, must certainly be done before it, by order of a stream, by an event that its
stream waited for, or by the graph that it is in; and a reader must find what it says. Times say nothing here: a wait
that is missing is an error even where it would seldom be missed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fluxmoe.runtime.experts.streamer_cuda import CudaStreamer


class OrderError(AssertionError):
    """Two pieces of work have no order, or a capture was left open at an end."""


class _Stream:
    def __init__(self, gpu: Gpu, name: str) -> None:
        self.gpu, self.name = gpu, name
        self.done: set = set()  # work that is certainly done when the stream's next begins

    def wait_event(self, event: Event) -> None:
        if (capture := self.gpu.capture) is not None and (self in capture.streams or event.capture is capture):
            if event.capture is not capture:
                raise OrderError("a graph waits for an event that was recorded outside of it")
            capture.streams.setdefault(self, set()).update(event.done)
            return
        if event.capture is not None:
            raise OrderError("an event that was recorded in a graph is waited for outside")
        self.done |= event.done

    def wait_stream(self, stream: _Stream) -> None:
        event = self.gpu.Event()
        event.record(stream)
        self.wait_event(event)

    def synchronize(self) -> None:
        pass


class Event:
    def __init__(self) -> None:
        self.done: set = set()
        self.capture: Capture | None = None

    def record(self, stream: _Stream) -> None:
        capture = stream.gpu.capture
        self.capture = capture if capture is not None and stream in capture.streams else None
        self.done = set(stream.done if self.capture is None else self.capture.streams[stream])


class Capture:
    """What a graph holds: nodes in the order of their capture, (work before it, buffer, what it writes or reads)."""

    def __init__(self, origin: _Stream) -> None:
        self.origin = origin
        self.streams: dict[_Stream, set[int]] = {origin: set()}
        self.nodes: list[tuple[set[int], int, Any, bool]] = []


class Gpu:
    """torch.cuda, as far as CudaStreamer and vLLM's graphs use it."""

    def __init__(self) -> None:
        self._current = self.main = _Stream(self, "main")
        self._work = self._streams = 0
        # By buffer: its last writer and what that wrote; all that has touched it since, itself included.
        self._content: dict[int, tuple[int, Any]] = {}
        self._touched: dict[int, set] = {}
        self.capture: Capture | None = None
        self.synchronize = lambda: None

    def Stream(self) -> _Stream:
        self._streams += 1
        return _Stream(self, f"stream {self._streams}")

    def Event(self) -> Event:
        return Event()

    def current_stream(self) -> _Stream:
        return self._current

    @contextmanager
    def stream(self, stream: _Stream) -> Iterator[None]:
        before, self._current = self._current, stream
        try:
            yield
        finally:
            self._current = before

    def is_current_stream_capturing(self) -> bool:
        return self.capture is not None and self._current in self.capture.streams

    # Work.

    def write(self, buffer: int, content: Any) -> None:
        self._enqueue(buffer, content, True)

    def read(self, buffer: int, content: Any) -> None:
        self._enqueue(buffer, content, False)

    def _enqueue(self, buffer: int, content: Any, writes: bool) -> None:
        stream, capture = self._current, self.capture
        if capture is None:
            stream.done.add(self._run(stream.done, buffer, content, writes))
        elif stream in capture.streams:
            done = capture.streams[stream]
            capture.nodes.append((set(done), buffer, content, writes))
            done.add(len(capture.nodes) - 1)
        else:
            raise OrderError(f"work on {stream.name} while another stream is captured")

    def _run(self, done: set, buffer: int, content: Any, writes: bool) -> int:
        work, self._work = self._work, self._work + 1
        if writes:
            if not self._touched.get(buffer, set()) <= done:
                raise OrderError(f"{content} overwrites a buffer in use")
            self._content[buffer], self._touched[buffer] = (work, content), {work}
        else:
            writer, found = self._content[buffer]
            if writer not in done or found != content:
                raise OrderError(f"read {found}, or half of it, in the place of {content}")
            self._touched[buffer].add(work)
        return work

    # Graphs.

    @contextmanager
    def graph(self, graph: CUDAGraph, pool: Any = None, stream: _Stream | None = None) -> Iterator[None]:
        with self.stream(stream or self.Stream()):
            self.capture = capture = Capture(self._current)
            try:
                yield
            finally:
                self.capture = None
            unjoined = set(range(len(capture.nodes))) - capture.streams[capture.origin]
            if unjoined:
                raise OrderError(f"{len(unjoined)} pieces of work in no order with the end of the graph")
            graph.nodes, graph.gpu = capture.nodes, self

    class CUDAGraph:
        nodes: list
        gpu: Gpu

        def replay(self) -> None:
            gpu, begin = self.gpu, set(self.gpu.current_stream().done)
            assert gpu.capture is None, "a graph is not launched inside another"
            ran: list[int] = []
            for before, buffer, content, writes in self.nodes:
                ran.append(gpu._run(begin | {ran[i] for i in before}, buffer, content, writes))
            gpu.current_stream().done.update(ran)


CUDAGraph = Gpu.CUDAGraph


class GpuStreamer(CudaStreamer):
    """Its copies and its poison are work of a Gpu. `sources`: what a load brings, by the address that it copies."""

    sources: dict[int, Any]

    def _copy(self, target, source, cancelled) -> int:
        self._cuda.write(target.data_ptr(), self.sources[source.data_ptr()])
        return source.numel()

    def _spoil(self, slot) -> None:
        for buffer in slot:
            self._cuda.write(buffer.data_ptr(), "poison")
