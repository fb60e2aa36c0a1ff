"""Decode steps as CUDA graphs: one launch a step in place of ten a layer.

A step of B sequences, one token each, is padded to the next of a few batch sizes and copied into static buffers by
one transfer. Each padded size has one graph. Its first step runs eagerly, which also compiles its kernels; the second
is captured, and replayed from then on. Padding is a sequence without context whose token has slot -1: it writes no KV,
reaches no expert, leaves its state in a slot that no sequence has, and its logits are dropped. Expert loads are nodes
of the graph (CudaStreamer.capture), so a step needs nothing of the host but tables that are up to date, which
`prepare` sees to before each step; when it says that what the graphs have fixed has changed, they are dropped.

All graphs share one memory pool. The largest is captured first: until it is there all steps are padded to the largest
size. What it leaves in the pool is room enough for each of the others, which are captured as they come; so the pool is
as large as the largest needs, and no size that nobody asks for is ever compiled or captured.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from fluxmoe.kernels.ops import AttentionMetadata
from torch import Tensor

from ..devices import device_of
from .batch import Batch

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE

    from ..experts.streamer_cuda import CudaStreamer

# Bytes between the arrays of a packed step: what the widest of them (int64) and a vector load ask for.
_ALIGNMENT = 16
# What torch gives cuBLAS on each stream (its default for Hopper, the largest), and the least that its allocator takes.
_CUBLAS_BYTES, _SEGMENT = 32 << 20, 2 << 20


class Graph(Protocol):
    """A captured pass that can be launched; torch.cuda.CUDAGraph."""

    def replay(self) -> None: ...


def batch_sizes(max_batch: int) -> list[int]:
    """Batch sizes that graphs are captured for: 1, 2, 4, then every 8 to 64, every 16 to 256, every 64 beyond."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_batch + 64, 64)]
    return [size for size in sizes if size < max_batch] + [max_batch]


def capture_cuda(work: Callable[[], Tensor], pool: _POOL_HANDLE) -> tuple[Graph, Tensor]:
    """`work` as a CUDA graph with memory of `pool`, and the tensor that every replay leaves its result in."""
    graph = torch.cuda.CUDAGraph()
    # torch leaves the stream that it captured on as the current one where ending the capture fails: the outer context
    # has the old one back in any case. Other threads may allocate meanwhile; only this one is being captured.
    with (
        torch.cuda.stream(torch.cuda.current_stream()),
        torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
    ):
        result = work()
    return graph, result


class StepBuffers:
    """The tensors of one padded decode step, as views of one buffer on the device that one copy fills."""

    def __init__(
        self, batch: int, max_blocks: int, block_size: int, device: torch.device, spare_state: int = 0
    ) -> None:
        self.batch, self._spare_state = batch, spare_state
        shapes = {
            "token_ids": (torch.int64, (batch,)),
            "slot_mapping": (torch.int64, (batch,)),
            "logit_rows": (torch.int64, (batch,)),
            "positions": (torch.int32, (batch,)),
            "context_lens": (torch.int32, (batch,)),
            "query_start": (torch.int32, (batch + 1,)),
            "state_slots": (torch.int32, (batch,)),
            "num_tokens": (torch.int32, (1,)),
            "block_table": (torch.int32, (batch, max_blocks)),
        }
        places, end = {}, 0
        for name, (dtype, shape) in shapes.items():
            places[name] = end
            end += -(-torch.Size(shape).numel() * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        self._host = torch.zeros(end, dtype=torch.uint8, pin_memory=device_of(device).asynchronous)
        self._device = torch.zeros(end, dtype=torch.uint8, device=device)

        def views(buffer: Tensor) -> dict[str, Tensor]:
            return {
                name: buffer[places[name] :][: torch.Size(shape).numel() * dtype.itemsize].view(dtype).view(shape)
                for name, (dtype, shape) in shapes.items()
            }

        self._fields = views(self._host)
        device_fields = views(self._device)
        self.token_ids, self.logit_rows = device_fields.pop("token_ids"), device_fields.pop("logit_rows")
        self.metadata = AttentionMetadata(block_size=block_size, **device_fields)
        self._fields["logit_rows"].copy_(torch.arange(batch))
        self._fields["query_start"].copy_(torch.arange(batch + 1))

    @property
    def nbytes(self) -> int:
        return self._device.nbytes

    def fill(self, step: Batch) -> None:
        """Copy a step of at most `batch` sequences (tensors on the host) in, padding the rest.

        Whoever reads the logits waits for the device, so the last copy out of the staging buffer is done.
        """
        fields, meta, count = self._fields, step.metadata, len(step.token_ids)
        fields["token_ids"].zero_()[:count] = step.token_ids
        fields["positions"].zero_()[:count] = meta.positions
        fields["context_lens"].zero_()[:count] = meta.context_lens
        fields["slot_mapping"].fill_(-1)[:count] = meta.slot_mapping
        assert meta.state_slots is not None, "batches of an engine have them"
        fields["state_slots"].fill_(self._spare_state)[:count] = meta.state_slots
        fields["num_tokens"].fill_(count)
        fields["block_table"][:count, : meta.block_table.shape[1]] = meta.block_table
        self._device.copy_(self._host, non_blocking=True)


class _Captured(NamedTuple):
    graph: Graph
    logits: Tensor


class DecodeGraphs:
    """Runs decode steps, from the second of their size on as graphs. One engine owns one.

    forward(token_ids, metadata, logit_rows) → logits [rows, vocab], always in the same memory for the same sizes.
    `capture` makes a graph of a call; tests put in one that simply calls again. An error of a capture is raised, and
    leaves everything as it was: the next step of that size is captured again. `new_pool`: a memory pool for the graphs
    that live at a time.
    """

    def __init__(
        self,
        forward: Callable[[Tensor, AttentionMetadata, Tensor], Tensor],
        streamer: CudaStreamer,
        max_batch: int,
        max_blocks: int,
        block_size: int,
        device: torch.device,
        spare_state: int = 0,
        capture: Callable[[Callable[[], Tensor], _POOL_HANDLE], tuple[Graph, Tensor]] = capture_cuda,
        new_pool: Callable[[], _POOL_HANDLE] = torch.cuda.graph_pool_handle,
    ) -> None:
        self._forward, self._streamer, self._capture, self._new_pool = forward, streamer, capture, new_pool
        self._sizes = batch_sizes(max_batch)
        self._make = lambda batch: StepBuffers(batch, max_blocks, block_size, device, spare_state=spare_state)
        self._buffers: dict[int, StepBuffers] = {}
        # By padded size; None: it ran eagerly once.
        self._graphs: dict[int, _Captured | None] = {}
        self._changes = 0
        self._pool: _POOL_HANDLE | None = None
        self.replays = 0

    @staticmethod
    def buffer_bytes(max_batch: int, max_blocks: int, block_size: int) -> int:
        """Device bytes of the buffers of every batch size, for the ledger."""
        cpu = torch.device("cpu")
        return sum(StepBuffers(batch, max_blocks, block_size, cpu).nbytes for batch in batch_sizes(max_batch))

    @staticmethod
    def pool_bytes(max_batch: int, hidden: int, itemsize: int) -> int:
        """Device bytes of the graphs' memory pool, for the ledger: an estimate.

        What a pass allocates beside its workspace is cuBLAS's workspace, which the capturing stream has of its own, and
        the gathered rows that are sampled from, in segments of 2 MiB. What the driver keeps for a graph's nodes is not
        in it.
        """
        rows = max_batch * hidden * itemsize
        return _CUBLAS_BYTES + -(-rows // _SEGMENT) * _SEGMENT

    def run(self, step: Batch) -> Tensor:
        """Logits fp32 [B, vocab] of a decode step, whose tensors are on the host; valid until the next step."""
        changes = self._streamer.prepare()
        if changes != self._changes:
            # A pool whose graphs are all gone cannot be used again.
            self._graphs, self._pool, self._changes = {}, None, changes
        count, largest = len(step.token_ids), self._sizes[-1]
        batch = self._sizes[bisect_left(self._sizes, count)] if self._graphs.get(largest) else largest
        if batch not in self._buffers:
            self._buffers[batch] = self._make(batch)
        buffers = self._buffers[batch]
        buffers.fill(step)
        if batch not in self._graphs or not self._streamer.steady:
            logits = self._run(buffers)
            self._graphs.setdefault(batch, None)
            return logits[:count]
        captured = self._graphs[batch]
        if captured is None:
            pool = self._pool or self._new_pool()
            captured = _Captured(*self._capture(lambda: self._run_captured(buffers), pool))
            self._graphs[batch], self._pool = captured, pool
        with self._streamer.replay():
            captured.graph.replay()
        self.replays += 1
        return captured.logits[:count]

    def _run_captured(self, buffers: StepBuffers) -> Tensor:
        # Inside the capture: the streamer's copy streams fork from the stream that is being captured.
        with self._streamer.capture():
            return self._run(buffers)

    def _run(self, buffers: StepBuffers) -> Tensor:
        return self._forward(buffers.token_ids, buffers.metadata, buffers.logit_rows)
