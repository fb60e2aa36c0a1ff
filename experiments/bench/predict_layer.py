"""What a MoE layer should take on an H100 or H200, dense or packed: bounds, what they become by what a GPU has
measured, and the floors of ways to prefill packed experts that are not built; `predict` has the command.

calibrated: a bound times what the one GPU that has run such layers took over its own bound, at the nearest number of
rows an expert. Packed experts have ratios of their own, in place and decoded first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from fluxmoe.kernels.audit import Report
from fluxmoe.kernels.formats import DEFAULT_COMPRESSED, DENSE, FORMATS, fused_formats, weight_tile
from fluxmoe.kernels.launches import record_only
from fluxmoe.kernels.triton.tiles import FUSED_BOUNDS, ROW_BOUNDS, Tile, decodes_first, default_tile, fused_tile
from fluxmoe.kernels.work import Work

from ..lib.results import UsageError, load_json, read_csv
from ..lib.sweep import say
from .moe import OURS, Layer, Ours, format_of, layer_columns
from .shapes import SHAPES, Shape
from .timing import Roofs, Timing

META = torch.device("meta")
SMS, CLOCK_HZ, ISSUES_PER_CLOCK = 132, 1.755e9, 4
SHARED_BYTES = 227 << 10
# Integer operations of an SM's lanes in a clock.
INTEGERS_PER_CLOCK = 64
# Assumed: what SMs together read from L2 (half of 64 bytes a clock and SM), and the time of one load from HBM.
L2_BYTES_PER_S = 7.5e12
LATENCY_S = 0.8e-6
# A kernel inside a graph: launch to launch, its index loads, its epilogue.
FIXED_S = 4e-6
GEMMS = ("gate_up", "down")
# How a layer meets its experts.
IN_PLACE, DECODED_FIRST = "in place", "decoded first"
ARCH = "sm_90"


class Codes(NamedTuple):
    """Machine code: of both GEMMs, by the format that their loop meets and each tile of the rule, and of the decoders
    before them, by format."""

    gemms: dict[tuple[str, str, Tile], Report]
    decoders: dict[str, Report]


def audited(path: Path) -> Codes:
    """From a list of rows of `kernels.audit --json`. UsageError where they lack a kernel at the tiles of today."""
    capability, formats = int(ARCH.removeprefix("sm_")), sorted(fused_formats("triton"))
    rows = {row["name"]: row for row in load_json(path) if row["arch"] == ARCH}

    def report(name: str, tile: Tile | None = None) -> Report:
        row = rows.get(name)
        if row is None or (tile and row["constexprs"]["TILE"] != asdict(tile)):
            raise UsageError(f"{path} has no {name} as it is now; make it with python -m fluxmoe.kernels.audit --json")
        return Report(**row)

    tiles = {f"{bound:.0f} rows": (DENSE, default_tile(bound, capability, 2)) for bound in ROW_BOUNDS}
    for name in formats:
        for bound in FUSED_BOUNDS:
            tile = fused_tile(weight_tile(name), bound, capability)
            tiles[f"{name}, {tile.block_m} rows"] = name, tile
    # Behind a decoder programs stay and take tile after tile.
    stays = replace(tiles["inf rows"][1], persistent=True)
    gemms, decoders = dict[tuple[str, str, Tile], Report](), dict[str, Report]()
    for gemm in GEMMS:
        for label, (name, tile) in tiles.items():
            gemms[gemm, name, tile] = report(f"grouped_gemm {gemm}, {label}", tile)
        for name in formats:
            first = f"grouped_gemm {gemm}, {name}, decoded first"
            decoders[name] = report(f"{first}: decode_experts_kernel")
            gemms[gemm, DENSE, stays] = report(f"{first}: grouped_gemm_kernel", stays)
    return Codes(gemms, decoders)


def gemm_limits(
    n: int, k: int, blocks: float, work: Work, tile: Tile, code: Report, roofs: Roofs, expert_format: str = DENSE
) -> dict:
    """Seconds that each resource needs for one grouped GEMM [n, k] over `blocks` blocks of rows.

    hbm: what the kernel declares. matrix: flops of whole blocks. l2: tiles of both operands.
    issue: instructions of the inner loop. integer: those of them that run on half of the lanes. latency: loads one
    after another, a pipeline's depth at a time. What SMs do counts the last round of tiles as if it were full.
    """
    dense, weight_bytes = expert_format == DENSE, FORMATS[expert_format].bits / 8
    loop, block_k = (code.loop, tile.block_k) if dense else (code.decode_loop, weight_tile(expert_format)[1])
    tiles = blocks * math.ceil(n / tile.block_n)
    tiles = math.ceil(tiles / SMS) * SMS
    steps = tiles * math.ceil(k / block_k)
    resident = SMS * max(
        1, min(SHARED_BYTES // max(1, code.shared_bytes), 65536 // (code.registers * 32 * tile.num_warps))
    )
    waves = max(1.0, tiles / resident)
    return {
        "hbm": work.nbytes / roofs.bytes_per_s,
        "matrix": 2.0 * tiles * tile.block_m * tile.block_n * k / roofs.flops_per_s,
        "l2": steps * (2 * tile.block_m + weight_bytes * tile.block_n) * block_k / L2_BYTES_PER_S,
        "issue": steps * loop["all"] * tile.num_warps / (SMS * ISSUES_PER_CLOCK * CLOCK_HZ),
        "integer": steps * loop["integer"] * tile.num_warps / (SMS * ISSUES_PER_CLOCK / 2 * CLOCK_HZ),
        "latency": waves * math.ceil(k / block_k) / max(1, tile.num_stages - 1) * LATENCY_S,
    }


def expected_blocks(tokens: int, probability: float, block_m: int) -> float:
    """Mean of ceil(X / block_m), X the tokens that one expert gets: binomial."""
    count = np.arange(tokens + 1)
    factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, tokens + 1)))])
    chance = factorials[-1] - factorials - factorials[::-1]
    if probability < 1:
        chance = chance + count * math.log(probability) + (tokens - count) * math.log1p(-probability)
        return float((np.exp(chance) * np.ceil(count / block_m)).sum())
    return float(math.ceil(tokens / block_m))


class Bound(NamedTuple):
    """Of a layer. limit: of both GEMMs; way: dense, in place or decoded first."""

    seconds: float
    limit: str
    work: Work
    way: str


def predict_layer(shape: Shape, tokens: int, codes: Codes, roofs: Roofs, provider: str) -> Bound:
    """Of a layer under uniform routing; provider: one of bench moe's OURS."""
    expert_format = format_of(provider)
    x = torch.empty(tokens, shape.hidden, dtype=torch.bfloat16, device=META)
    with record_only(90, SMS) as launches:
        ours = Ours.of(provider, shape, tokens, META, {})
        ours.run(Layer(shape, META), x, torch.empty(tokens, shape.experts, device=META))
    tile = ours.tiles.gate_up
    blocks = shape.experts * expected_blocks(tokens, shape.top_k / shape.experts, tile.block_m)
    works = [work for launch in launches if (work := launch.work)]
    total, limits = len(launches) * FIXED_S, dict[str, str]()
    for launch, work in zip(launches, works, strict=True):
        if launch.kernel.__name__ == "_decode_experts_kernel":
            code = codes.decoders[expert_format]
            issued = math.prod(launch.grid) * code.num_warps * code.instructions
            total += max(work.nbytes / roofs.bytes_per_s, issued / (SMS * ISSUES_PER_CLOCK * CLOCK_HZ))
        elif launch.kernel.__name__ != "_grouped_gemm_kernel":
            total += work.nbytes / roofs.bytes_per_s
        else:
            name, used = "down" if launch.constexprs["TENSOR"] else "gate_up", launch.constexprs["TILE"]
            assert isinstance(used, Tile), "a GEMM is given a tile"
            n, k = (2 * shape.intermediate, shape.hidden) if name == "gate_up" else (shape.hidden, shape.intermediate)
            # Of a group of experts, its share.
            mine = blocks * work.flops / (2.0 * tokens * shape.top_k * n * k)
            met = expert_format if launch.constexprs["COMPRESSED"] else DENSE
            seconds = gemm_limits(n, k, mine, work, used, codes.gemms[name, met, used], roofs, met)
            limits[name] = max(seconds, key=seconds.__getitem__)
            total += seconds[limits[name]]
    way = DENSE if expert_format == DENSE else IN_PLACE if ours.decoded is None else DECODED_FIRST
    return Bound(total, "/".join(limits.values()), Work(*map(sum, zip(*works, strict=True))), way)


class Measured:
    """What layers took on the one GPU that has run them, over their bounds on it. No numbers without such folders of
    bench moe."""

    def __init__(self, folders: Iterable[Path], codes: Codes) -> None:
        # By way: rows an expert, tokens, and time over bound.
        self._ratios: dict[str, list[tuple[float, int, float]]] = {DENSE: [], IN_PLACE: [], DECODED_FIRST: []}
        # Integer operations of the tile loop's decoding at the full rate, over the time that it took beyond dense.
        self.integer_rate = math.nan
        times: dict[tuple[str, int, str], float] = {}
        providers = (
            "fluxmoe",
            *(f"fluxmoe {DEFAULT_COMPRESSED}{way}" for way in ("", f" {IN_PLACE}", f" {DECODED_FIRST}")),
        )
        for folder in folders:
            for row in read_csv(folder / "rows.csv"):
                if row["provider"] not in providers or row["status"] != "ok":
                    continue
                roofs = Roofs(**load_json(folder / "provenance.json")["roofs"])
                shape, tokens, seconds = SHAPES[row["shape"]], int(row["tokens"]), float(row["time_us"]) * 1e-6
                if row["provider"].endswith(DECODED_FIRST) and not decodes_first(shape.rows_per_expert(tokens)):
                    continue  # by tiles that no engine takes behind a decoder
                bound = predict_layer(shape, tokens, codes, roofs, row["provider"])
                self._ratios[bound.way].append((shape.rows_per_expert(tokens), tokens, seconds / bound.seconds))
                times[row["shape"], tokens, bound.way] = seconds
        if many := [key for key in times if key[2] == IN_PLACE]:
            name, tokens, _ = max(many, key=lambda key: SHAPES[key[0]].rows_per_expert(key[1]))
            beyond_dense = times[name, tokens, IN_PLACE] - times[name, tokens, DENSE]
            self.integer_rate = integer_seconds(SHAPES[name], codes, tokens, 64) / beyond_dense

    def calibrated(self, bound: Bound, shape: Shape, tokens: int) -> float:
        """Seconds: the bound times the ratio of the nearest number of rows an expert, then of tokens."""
        here = shape.rows_per_expert(tokens), tokens

        def apart(there: tuple[float, int, float]) -> tuple[float, ...]:
            return tuple(abs(math.log(one / other)) for one, other in zip(here, there[:2], strict=True))

        return bound.seconds * min(self._ratios[bound.way], key=apart, default=(*here, math.nan))[2]


def integer_seconds(shape: Shape, codes: Codes, tokens: int = 0, block_m: int = 0) -> float:
    """What the integer operations of all weights take at the full rate, each decoded once, or once a block of
    rows; as many as in the tile loop that has fewest."""
    loops = [code for (_, name, _), code in codes.gemms.items() if name == DEFAULT_COMPRESSED]
    weights = shape.experts * shape.expert_bytes / 2 * min(code.integer_per_weight or math.inf for code in loops)
    times = expected_blocks(tokens, shape.top_k / shape.experts, block_m) if block_m else 1.0
    return times * weights / (SMS * INTEGERS_PER_CLOCK * CLOCK_HZ)


class Floor(NamedTuple):
    """A way to prefill packed experts that is not built: seconds beyond the dense layer's, at full rates and at those
    that were measured."""

    way: str
    least_s: float
    likely_s: float
    assumes: str


def floors(
    shape: Shape, tokens: int, codes: Codes, roofs: Roofs, dense_s: float, integers: float, l2: float
) -> list[Floor]:
    """dense_s: of the dense layer; integers, l2: measured shares of the full rate, and of L2's if that limits the dense
    layer."""
    decoded = shape.experts * shape.expert_bytes
    packed = decoded * FORMATS[DEFAULT_COMPRESSED].bits / 16
    once, again = integer_seconds(shape, codes), partial(integer_seconds, shape, codes, tokens)
    read = packed / roofs.bytes_per_s
    return [
        Floor(
            "floor: once, then products", max(read, once), max(read, once / integers),
            "decoded weights never leave L2; no launch and no last round costs anything",
        ),
        Floor(
            "floor: once, on SMs beside those of products", once, once / integers,
            "one launch, no last round; bytes are hidden; a tile of 128 x 256 leaves an SM no room for another program",
        ),
        Floor(
            "floor: in a loop of 256 tokens, then products", again(256), again(256) / integers,
            "the tile multiplies as fast as the dense one",
        ),
        Floor(
            "floor: once, in the loop of other products", packed / L2_BYTES_PER_S,
            (packed + decoded) / (l2 * L2_BYTES_PER_S),
            "a tile decodes for a later one while its wgmma runs; L2 limits both, at least by what is read, likely by "
            "what is written too; tiles wait for one another by flags; the first find decoded weights",
        ),
        Floor(
            "floor: in a loop of 128 tokens, under products", max(0.0, again(128) - dense_s),
            max(0.0, again(128) / integers - dense_s),
            "wgmma runs meanwhile: Triton waits for each one whose operand it has just stored",
        ),
    ]  # fmt: skip


def prefill_rows(
    shapes: Iterable[str], tokens: Iterable[int], roofs: Roofs, codes: Codes, folders: Iterable[Path]
) -> list[dict]:
    """Packed experts over dense ones, in every way that is built, as bounds and calibrated; then floors, which count
    from the calibrated dense layer."""
    measured, rows = Measured(folders, codes), list[dict]()
    for name, count in product(shapes, tokens):
        shape, dense, base = SHAPES[name], 0.0, 0.0
        for provider in ("fluxmoe", *(each for each in OURS if DEFAULT_COMPRESSED in each)):
            bound = predict_layer(shape, count, codes, roofs, provider)
            calibrated = measured.calibrated(bound, shape, count)
            dense, base = dense or bound.seconds, base or calibrated
            rows.append(_way(name, count, provider, bound.seconds, dense, calibrated, base, bound.limit))
        for floor in floors(shape, count, codes, roofs, base, measured.integer_rate, dense / base):
            least, likely = base + floor.least_s, base + floor.likely_s
            rows.append(_way(name, count, floor.way, least, base, likely, base, floor.assumes))
    return rows


def _way(
    name: str, tokens: int, way: str, bound: float, dense: float, calibrated: float, base: float, note: str
) -> dict:
    row = {
        "kind": "predicted", "shape": name, "tokens": tokens, "way": way, "predicted_us": bound * 1e6,
        "over_dense": bound / dense, "calibrated_us": calibrated * 1e6, "calibrated_over_dense": calibrated / base,
        "limit_or_assumption": note,
    }  # fmt: skip
    say(row)
    return row


def layer_rows(
    shapes: Iterable[str], tokens: Iterable[int], roofs: Roofs, codes: Codes, folders: Iterable[Path]
) -> list[dict]:
    """Rows as bench moe has them, and the calibrated time."""
    measured, rows = Measured(folders, codes), list[dict]()
    for name, count in product(shapes, tokens):
        shape, base = SHAPES[name], None
        for expert_format in (DENSE, *sorted(fused_formats("triton"))):
            provider = "fluxmoe" if expert_format == DENSE else f"fluxmoe {expert_format}"
            bound = predict_layer(shape, count, codes, roofs, provider)
            seconds, calibrated = bound.seconds, measured.calibrated(bound, shape, count)
            base = base or seconds
            timing, bits = Timing(seconds, seconds, seconds, bound.limit), FORMATS[expert_format].bits
            columns = layer_columns(bound.work, shape.touched(count), timing, base, roofs, bits)
            point = {"shape": name, "tokens": count, "routing": "uniform", "provider": provider}
            rows.append({"kind": "predicted", **point, **columns, "calibrated_us": calibrated * 1e6})
            say(rows[-1])
    return rows
