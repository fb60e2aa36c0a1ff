"""Packed experts against dense ones, bit for bit, many times over.

    fluxmoe bench bit-equality --out results/measured/<gpu>/bit_equality

One tile of 16, 32 and 64 rows, gate_up and down: the same GEMM on an expert that is dense and on the same expert
compressed, in launches that may meet both, as serving's. Output is compared on the device after every launch, so a race
that goes wrong once in a thousand shows; a row counts the launches that differed, and those that differed from their
own first.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from fluxmoe.kernels.expert_table import ExpertTable
from fluxmoe.kernels.formats import DEFAULT_COMPRESSED, DENSE, weight_tile
from fluxmoe.kernels.ops import ExpertDims
from fluxmoe.kernels.triton import grouped_gemm
from fluxmoe.kernels.triton.experts import TritonBlocks
from fluxmoe.kernels.triton.routing import Router
from fluxmoe.kernels.triton.tiles import capability_of, fused_tile, num_sms_of
from torch import Tensor

from ..lib.args import group, option
from ..lib.sweep import WrongError, say
from .experts import encoded, random_expert, table_of
from .timing import GpuBench

FUSED = DEFAULT_COMPRESSED
ROWS = (16, 32, 64)
TENSORS = ("gate_up", "down")
# Qwen3-30B-A3B's expert, and for rehearsals the smallest that the format takes.
SIZES, _TINY = (2048, 768), (128, 128)


class Twins:
    """One expert, dense in one table and packed in the other; both tables hold a packed one beside it."""

    def __init__(self, hidden: int, intermediate: int, device: torch.device) -> None:
        self.sizes, self.device = (hidden, intermediate), device
        dims = ExpertDims(hidden, intermediate, 1, 1, torch.bfloat16)
        weights = random_expert(dims, device)
        dense, packed = (encoded(TritonBlocks(dims), weights, name)[0] for name in (DENSE, FUSED))
        # With a packed expert in each, both launch the same kernel.
        self.tables = [table_of([dense, packed], device, (DENSE, FUSED)), table_of([packed] * 2, device, FUSED)]

    def outputs(self, tensor: str, rows: int):
        """A function each, dense and packed, that runs the GEMM and returns its output."""
        hidden, intermediate = self.sizes
        tile = fused_tile(weight_tile(FUSED), rows, capability_of(self.device))
        logits = torch.tensor([[1.0, 0.0]], device=self.device).repeat(rows, 1)
        routing = Router(rows, 2, 1, True, self.device)(logits, tile.block_m)
        width, n = (hidden, intermediate) if tensor == "gate_up" else (intermediate, hidden)
        x = torch.randn(rows, width, dtype=torch.bfloat16, device=self.device)
        gemm = getattr(grouped_gemm, tensor)

        def run(table: ExpertTable, out: Tensor) -> Tensor:
            return gemm(x, table, routing, out.fill_(torch.nan), torch.bfloat16, tile, num_sms_of(self.device))

        return [
            partial(run, table, torch.empty(rows, n, dtype=torch.bfloat16, device=self.device)) for table in self.tables
        ]


def count_mismatches(dense, packed, repeats: int) -> dict[str, int]:
    """Launches of `repeats` that differed; nothing is read back before the end."""
    first = dense().clone()
    counts = torch.zeros(3, dtype=torch.int64, device=first.device)
    for _ in range(repeats):
        outputs = dense(), packed()
        pairs = (outputs[0], first), (outputs[1], first), outputs
        counts += ~torch.stack([(a.view(torch.int16) == b.view(torch.int16)).all() for a, b in pairs])
    names = ("dense_differs_from_its_first", "packed_differs_from_it", "packed_differs_from_dense")
    return dict(zip(names, counts.tolist(), strict=True))


def compare(twins: Twins, tensor: str, rows: int, repeats: int) -> dict:
    dense, packed = twins.outputs(tensor, rows)
    counts = count_mismatches(dense, packed, repeats)
    if any(counts.values()):
        raise WrongError(f"of {repeats} launches {counts}")
    assert not torch.isnan(dense()).any(), "rows were left unwritten"
    return {"repeats": repeats, **counts}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    repeats: int = option("launches of each", 1000, least=1)
    where: GpuBench = group()


def run(args: Arguments) -> None:
    device, rehearse = args.where.device, args.where.rehearse
    torch.manual_seed(0)
    twins = Twins(*(_TINY if rehearse else SIZES), device)
    with args.where.rows("bench bit-equality", {"repeats": args.repeats}) as results:
        for rows in ROWS[:1] if rehearse else ROWS:
            for tensor in TENSORS:
                work = partial(compare, twins, tensor, rows, args.repeats)
                say(results.measure(work, rows=rows, tensor=tensor))
        results.finish()
