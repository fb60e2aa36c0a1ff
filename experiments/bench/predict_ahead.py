"""What the prefill of a whole layer should take on an H200: attention, its projections and experts; and what packed
experts add to it, decoded before their products or a layer ahead (`kernels.triton.decoded_ahead`). `predict` has the
command.

Times are those of dense layers: of attention and experts bounds times what the GPU took over its own, of projections
the rate of its matmuls; norms, routing, RoPE and sums are left out. What decoding ahead adds, by three assumptions:

    hidden    nothing: what it issues and moves fits into what the kernels beside it leave
    beside    each of its instructions delays them by its slot
    in turns  it gets SMs that have nothing else, so its bytes take as long as alone

All ways are measured alike: over_dense has what one adds times what the GPU took over the bound of the dense layer, and
bound_over_dense what it adds by bounds alone.

window_us: how long kernels run beside which an SM has room for its programs by registers and shared memory of the audit
(attention and the down product); decoding_us: what its own programs need at least, a trip to memory and their
instructions one after the other. Beyond the window it is in turns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import product
from pathlib import Path

import torch
from fluxmoe.kernels.audit import Report
from fluxmoe.kernels.expert_table import DOWN, GATE_UP, ExpertTable
from fluxmoe.kernels.formats import DEFAULT_COMPRESSED
from fluxmoe.kernels.launches import record_only, work_of
from fluxmoe.kernels.triton.decoded_ahead import PROGRAMS_AN_SM, DecodedAhead

from ..lib.results import UsageError, load_json, read_csv
from ..lib.sweep import say
from . import attention
from .predict_layer import (
    ARCH,
    CLOCK_HZ,
    ISSUES_PER_CLOCK,
    LATENCY_S,
    META,
    SHARED_BYTES,
    SMS,
    Codes,
    Measured,
    audited,
    predict_layer,
)
from .shapes import SHAPES, Shape
from .timing import Roofs

DECODER = f"decoded_ahead/{DEFAULT_COMPRESSED}"
# Of what runs beside it; and of a decoder's program, how many weights.
BESIDE = {"attention": "attention_prefill/qwen3-30b-a3b", "down": "grouped_gemm down, inf rows"}
_TILE = 64 * 128
SEQUENCES = (1, 8)


def room_beside(code: Report, decoder: Report) -> int:
    """How many of a decoder's programs an SM holds beside one of `code`."""

    def registers(each: Report) -> int:
        # Given in steps of 8 a thread.
        return -(-each.registers // 8) * 8 * 32 * each.num_warps

    by_registers = (65536 - registers(code)) // registers(decoder)
    # A program has 1 KiB of its own.
    by_memory = (SHARED_BYTES - code.shared_bytes - 1024) // (decoder.shared_bytes + 1024)
    return max(0, min(by_registers, by_memory))


class Layer:
    """Seconds of the dense layer's parts on the GPU that was measured, for sequences of equal length."""

    def __init__(
        self, name: str, sequences: int, tokens: int, roofs: Roofs, codes: Codes, measured: Measured, folder: Path
    ) -> None:
        shape, heads = SHAPES[name], attention.SHAPES[name]
        length = tokens // sequences
        with record_only(90, SMS):
            work = work_of(attention.make_case(heads, sequences, length, length, META).ours)
        bound = max(work.nbytes / roofs.bytes_per_s, work.flops / roofs.flops_per_s)
        self.attention_s = bound / _share_of_floor(folder, name, length)
        width = (2 * heads[0] + 2 * heads[1]) * heads[2]
        self.projections_s = 2 * tokens * shape.hidden * width / roofs.flops_per_s
        ways = ("fluxmoe", f"fluxmoe {DEFAULT_COMPRESSED}")
        bounds = [predict_layer(shape, tokens, codes, roofs, way) for way in ways]
        self.experts_s = measured.calibrated(bounds[0], shape, tokens)
        self.first_bound_s = bounds[1].seconds - bounds[0].seconds
        self.over_bound = self.experts_s / bounds[0].seconds

    @property
    def seconds(self) -> float:
        return self.attention_s + self.projections_s + self.experts_s


def _share_of_floor(folder: Path, name: str, length: int) -> float:
    """Of prefill, at the nearest length that was measured."""
    rows = [row for row in read_csv(folder / "rows.csv") if (row["kind"], row["shape"]) == ("prefill", name)]
    ours = [row for row in rows if (row["provider"], row["status"]) == ("fluxmoe", "ok")]
    if not ours:
        raise UsageError(f"{folder} has no prefill of {name}")
    return float(min(ours, key=lambda row: abs(math.log(int(row["queries"]) / length)))["share_of_floor"])


def decoder_seconds(shape: Shape, decoder: Report, roofs: Roofs) -> dict[str, float]:
    """Of all experts of a layer: bytes at memory's rate, instructions at the rate of all SMs, and its own programs'."""
    block = torch.zeros(16, dtype=torch.uint8)
    table = ExpertTable.from_blocks([(block, block)] * shape.experts, "cpu", DEFAULT_COMPRESSED)
    with record_only(90, SMS):
        ahead = DecodedAhead(shape.dims, META)
        work = work_of(lambda: [ahead.of(table, tensor) for tensor in (GATE_UP, DOWN)])
    tiles = shape.experts * shape.expert_bytes / 2 / _TILE
    issued = decoder.num_warps * decoder.instructions / (ISSUES_PER_CLOCK * CLOCK_HZ)  # a program, alone on an SM
    return {
        "bytes": work.nbytes / roofs.bytes_per_s,
        "issue": tiles * issued / SMS,
        "programs": tiles / SMS * (LATENCY_S / PROGRAMS_AN_SM + issued),
    }


def ahead_rows(shapes: Iterable[str], tokens: Iterable[int], roofs: Roofs, path: Path, folder: Path) -> list[dict]:
    """Of models whose attention was measured, for `SEQUENCES` prompts."""
    codes = audited(path)
    measured = Measured(folder, codes)
    named = {row["name"]: Report(**row) for row in load_json(path) if row["arch"] == ARCH}
    if lacking := {DECODER, *BESIDE.values()} - named.keys():
        raise UsageError(f"{path} has no {lacking.pop()}; make it with python -m fluxmoe.kernels.audit --json")
    decoder, rows = named[DECODER], list[dict]()
    fits = {part: room_beside(named[name], decoder) >= PROGRAMS_AN_SM for part, name in BESIDE.items()}
    for name, count, sequences in product(shapes, tokens, SEQUENCES):
        layer = Layer(name, sequences, count, roofs, codes, measured, folder.parent / "attention")
        needs = decoder_seconds(SHAPES[name], decoder, roofs)
        # A third of the products.
        window = fits["attention"] * layer.attention_s + fits["down"] * layer.experts_s / 3
        ways = {
            "dense": 0.0, "decoded first": layer.first_bound_s, "decoded ahead, hidden": 0.0,
            "decoded ahead, beside": needs["issue"], "decoded ahead, in turns": needs["bytes"],
        }  # fmt: skip
        for way, bound in ways.items():
            more = layer.over_bound * bound
            rows.append(
                {
                    "kind": "predicted", "shape": name, "tokens": count, "sequences": sequences, "way": way,
                    "layer_us": 1e6 * (layer.seconds + more), "over_dense": 1 + more / layer.seconds,
                    "bound_over_dense": 1 + bound / layer.seconds,
                    "attention_us": 1e6 * layer.attention_s, "projections_us": 1e6 * layer.projections_s,
                    "experts_us": 1e6 * layer.experts_s, "window_us": 1e6 * window,
                    "decoding_us": 1e6 * needs["programs"],
                }
            )  # fmt: skip
            say(rows[-1])
    return rows
