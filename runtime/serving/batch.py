"""From a scheduler's step to the tensors of one forward pass."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from fluxmoe.kernels.ops import AttentionMetadata
from torch import Tensor

from .scheduler import Step


class Batch(NamedTuple):
    """T tokens of B sequences, flat; `logit_rows` int64 [B'] are the rows from which a token is sampled."""

    token_ids: Tensor
    metadata: AttentionMetadata
    logit_rows: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on `device`; itself when it is there already."""
        if self.token_ids.device == device:
            return self
        meta = self.metadata
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(meta)
            if isinstance(value := getattr(meta, field.name), Tensor)
        }
        return Batch(
            self.token_ids.to(device, non_blocking=True),
            replace(meta, **moved),
            self.logit_rows.to(device, non_blocking=True),
        )


def build_batch(step: Step, block_size: int) -> Batch:
    """Flatten the step's chunks in order, on the host; every array is made once in numpy."""
    chunks = step.chunks
    lengths = np.array([chunk.length for chunk in chunks], dtype=np.int64)
    starts = np.array([chunk.start for chunk in chunks], dtype=np.int64)
    query_start = np.zeros(len(chunks) + 1, dtype=np.int32)
    np.cumsum(lengths, out=query_start[1:])
    token_ids: list[int] = []
    for chunk in chunks:
        known = chunk.sequence.token_ids
        token_ids += known[chunk.start : chunk.start + chunk.length]
    tables = [chunk.sequence.block_ids for chunk in chunks]
    block_table = np.zeros((len(chunks), max(map(len, tables))), dtype=np.int32)
    for row, table in enumerate(tables):
        block_table[row, : len(table)] = table
    owner = np.repeat(np.arange(len(chunks)), lengths)
    positions = np.arange(len(token_ids)) - np.repeat(query_start[:-1] - starts, lengths)
    slots = block_table[owner, positions // block_size].astype(np.int64) * block_size + positions % block_size
    sampled = [row for row, chunk in enumerate(chunks) if chunk.sample]
    send = torch.from_numpy
    metadata = AttentionMetadata(
        query_start=send(query_start),
        context_lens=send((starts + lengths).astype(np.int32)),
        block_table=send(block_table),
        positions=send(positions.astype(np.int32)),
        slot_mapping=send(slots),
        block_size=block_size,
        state_slots=send(np.array([chunk.sequence.state_slot for chunk in chunks], dtype=np.int32)),
    )
    logit_rows = query_start[1:][sampled].astype(np.int64) - 1
    return Batch(send(np.array(token_ids, dtype=np.int64)), metadata, send(logit_rows))
