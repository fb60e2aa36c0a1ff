"""Couriers bring the bytes of experts to the device in the background, one batch at a time.

ThreadCourier   CPU: a thread for each batch
StreamCourier   CUDA: one stream, made once; the host enqueues copies and asks later whether they are done
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch

Task = Callable[[], None]


class Courier(ABC):
    """Runs a batch of tasks, which must not raise, behind all work that was enqueued before."""

    @abstractmethod
    def send(self, tasks: Sequence[Task]) -> None:
        """Begin a batch; the one before it must have arrived."""

    @property
    @abstractmethod
    def arrived(self) -> bool:
        """Whether the last batch is done; never waits."""

    @abstractmethod
    def close(self) -> None:
        """Give up tasks that have not begun, and return once nothing is written any more. Idempotent."""


class ThreadCourier(Courier):
    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()

    def send(self, tasks: Sequence[Task]) -> None:
        assert self.arrived, "one batch at a time"
        self._thread = threading.Thread(target=self._run, args=(tasks,), name="expert-arrivals", daemon=True)
        self._thread.start()

    def _run(self, tasks: Sequence[Task]) -> None:
        for task in tasks:
            if self._closing.is_set():
                return
            task()

    @property
    def arrived(self) -> bool:
        return self._thread is None or not self._thread.is_alive()

    def close(self) -> None:
        self._closing.set()
        if self._thread is not None:
            self._thread.join()


class StreamCourier(Courier):
    """cuda: torch.cuda, or a recorder with the same Stream, Event, stream and current_stream in tests.

    The stream is made once: torch hands out a few dozen in turn, so one made for each batch would soon be the stream
    of something else.
    """

    def __init__(self, cuda=torch.cuda) -> None:
        self._cuda, self._stream = cuda, cuda.Stream()
        self._before, self._done = cuda.Event(), cuda.Event()
        self._sent = False

    def send(self, tasks: Sequence[Task]) -> None:
        assert self.arrived, "one batch at a time"
        self._before.record(self._cuda.current_stream())
        self._stream.wait_event(self._before)
        try:
            with self._cuda.stream(self._stream):
                for task in tasks:
                    task()
        finally:
            self._done.record(self._stream)
            self._sent = True

    @property
    def arrived(self) -> bool:
        return not self._sent or self._done.query()

    def close(self) -> None:
        self._stream.synchronize()
