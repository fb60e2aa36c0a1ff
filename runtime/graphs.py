"""Decode steps as CUDA graphs: one launch a step in place of ten a layer.

A step of B sequences, one token each, is padded to the next of a few batch sizes and copied into static buffers by
one transfer. A graph belongs to (padded batch, phase of the streamer): in another phase layers lie in other slots.
The first step of a key runs eagerly, which also compiles its kernels; the second is captured, and replayed from then
on. Padding is a sequence without context whose token has slot -1: it writes no KV, reaches no expert, leaves its state
in a slot that no sequence has, and its logits are dropped. Expert loads are nodes of the graph (CudaStreamer.capture),
so a step needs nothing of the host.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import torch
from fluxmoe.kernels.ops import AttentionMetadata
from torch import Tensor

from .batch import Batch

# Bytes between the arrays of a packed step: what the widest of them (int64) and a vector load ask for.
_ALIGNMENT = 16


class CapturedPass(Protocol):
    """What a streamer offers to graphs; see CudaStreamer."""

    phase: int
    steady: bool

    def capture(self) -> AbstractContextManager[None]: ...
    def replay(self) -> AbstractContextManager[None]: ...


class Graph(Protocol):
    """A captured pass that can be launched; torch.cuda.CUDAGraph."""

    def replay(self) -> None: ...


def batch_sizes(max_batch: int) -> list[int]:
    """Batch sizes that graphs are captured for: 1, 2, 4, then every 8 to 64, every 16 to 256, every 64 beyond."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_batch + 64, 64)]
    return [size for size in sizes if size < max_batch] + [max_batch]


def capture_cuda(work: Callable[[], Tensor]) -> tuple[Graph, Tensor]:
    """`work` as a CUDA graph, and the tensor that every replay leaves its result in."""
    graph = torch.cuda.CUDAGraph()
    # Other threads may allocate meanwhile; only this one is being captured.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
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
        self._host = torch.zeros(end, dtype=torch.uint8, pin_memory=device.type == "cuda")
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
        fields["state_slots"].fill_(self._spare_state)[:count] = meta.state_slots
        fields["num_tokens"].fill_(count)
        fields["block_table"][:count, : meta.block_table.shape[1]] = meta.block_table
        self._device.copy_(self._host, non_blocking=True)


class _Captured(NamedTuple):
    graph: Graph
    logits: Tensor


class DecodeGraphs:
    """Runs decode steps, from the second of their kind on as graphs. One engine owns one.

    forward(token_ids, metadata, logit_rows) → logits [rows, vocab], always in the same memory for the same sizes.
    `capture` makes a graph of a call; tests put in one that simply calls again.
    """

    def __init__(
        self,
        forward: Callable[[Tensor, AttentionMetadata, Tensor], Tensor],
        streamer: CapturedPass,
        max_batch: int,
        max_blocks: int,
        block_size: int,
        device: torch.device,
        spare_state: int = 0,
        capture: Callable[[Callable[[], Tensor]], tuple[Graph, Tensor]] = capture_cuda,
    ) -> None:
        self._forward, self._streamer, self._capture = forward, streamer, capture
        self._sizes = batch_sizes(max_batch)
        self._make = lambda batch: StepBuffers(batch, max_blocks, block_size, device, spare_state=spare_state)
        self._buffers: dict[int, StepBuffers] = {}
        self._graphs: dict[tuple[int, int], _Captured | None] = {}
        self.replays = 0

    @staticmethod
    def buffer_bytes(max_batch: int, max_blocks: int, block_size: int) -> int:
        """Device bytes of the buffers of every batch size, for the ledger."""
        cpu = torch.device("cpu")
        return sum(StepBuffers(batch, max_blocks, block_size, cpu).nbytes for batch in batch_sizes(max_batch))

    def forget(self) -> None:
        """Drop all graphs, whose addresses have changed; each kind of step is captured again."""
        self._graphs.clear()

    def run(self, step: Batch) -> Tensor:
        """Logits fp32 [B, vocab] of a decode step, whose tensors are on the host; valid until the next step."""
        count = len(step.token_ids)
        batch = self._sizes[bisect_left(self._sizes, count)]
        if batch not in self._buffers:
            self._buffers[batch] = self._make(batch)
        buffers = self._buffers[batch]
        buffers.fill(step)
        key = (batch, self._streamer.phase)
        if key not in self._graphs or not self._streamer.steady:
            self._graphs.setdefault(key, None)
            return self._run(buffers)[:count]
        if self._graphs[key] is None:
            self._graphs[key] = _Captured(*self._capture(lambda: self._run_captured(buffers)))
        captured = self._graphs[key]
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
