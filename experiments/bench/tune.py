"""Find the tiles of the grouped GEMM for this GPU and write the table that the kernels look them up in.

    fluxmoe bench tune --out results/measured/<gpu>/tune [--shapes …] [--minutes M]

For each bound on rows per expert, and each shape, the candidates below are timed on cold weights, gate_up and down
apart, and the fastest pair of one block_m wins, if it is faster than the rule's by more than timings differ. One that
is wrong, does not compile or does not fit is left out, and counted. Bounds are written to the table as they are found,
so a run that is cut short is of use, and goes on when it is called again. The table is
kernels/triton/tuned/<gpu>.json, to be committed, or --table.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from fluxmoe.kernels.triton import grouped_gemm
from fluxmoe.kernels.triton.tiles import (
    TUNED_DIR,
    Tile,
    Tiles,
    capability_of,
    default_tile,
    fit,
    table_name,
    tile_fields,
)
from torch import Tensor

from ..lib.args import group, option
from ..lib.results import device_name, provenance, write_json
from ..lib.sweep import WrongError, say
from .moe import Layer, Ours, choose, cold_layers, reference, router_logits
from .shapes import MODEL_SHAPES, SHAPES, Shape
from .timing import GpuBench, check, time_calls

# Bounds of the table, and the tokens that are timed for each: rows per expert just at the bound.
BOUNDS = (4, 8, 16, 32, 48, 64, 128, 512)
_SECONDS = 0.02
# Of the rule's time: less is no reason for other tiles.
_LEAST_GAIN = 0.03


def candidates(rows: float, capability: int) -> list[Tile]:
    """Tiles worth a try at `rows` per expert: the rule's neighbours, not a grid; the rule's own is the first."""
    tiles = []
    if rows <= 64:
        block_m = 16 if rows <= 16 else 32 if rows <= 32 else 64
        for block_n, block_k, stages in itertools.product((64, 128), (64, 128, 256), (3, 4, 5)):
            tiles.append(Tile(block_m, block_n, block_k, 4, stages, swap_ab=True))
            tiles.append(Tile(block_m, block_n, block_k, 4, stages))
        tiles += [Tile(block_m, 32, 128, 4, stages) for stages in (4, 5)]
    else:
        for block_m, block_n, stages in itertools.product((64, 128), (128, 256), (3, 4)):
            warps = 8 if block_m * block_n >= 128 * 128 else 4
            for group_m, persistent in ((8, False), (16, False), (8, True)):
                tiles.append(Tile(block_m, block_n, 64, warps, stages, group_m=group_m, persistent=persistent))
            for persistent in (False, True):
                tiles.append(Tile(block_m, block_n, 64, warps, stages, persistent=persistent, tma=True))
    unique = dict.fromkeys([default_tile(rows, capability, 2), *(fit(tile, capability, 2) for tile in tiles)])
    return list(unique)


def tokens_for(shape: Shape, rows: float) -> int:
    """Tokens at which an expert has `rows` rows on average."""
    return min(16384, max(1, round(rows * shape.experts / shape.top_k)))


class Search:
    """The candidates of one shape and bound, on all cold copies of a layer."""

    def __init__(self, shape: Shape, rows: float, layers: list[Layer]) -> None:
        tokens, device = tokens_for(shape, rows), layers[0].device
        self.layers, self.capability = layers, capability_of(device)
        self.x = torch.randn(tokens, shape.hidden, dtype=torch.bfloat16, device=device)
        self.logits = router_logits(shape, tokens, "uniform", 0, device)
        rule = default_tile(rows, self.capability, 2)
        self.ours = Ours(shape, tokens, device, tiles=Tiles(rule, rule))
        out = self.ours.run(layers[0], self.x, self.logits)
        check(out, reference(layers[0], self.x, *choose(self.logits, shape.top_k)))
        # What every candidate must give, by sorted position and by slot: no tile changes either.
        self.expected = {"gate_up": self.ours.h.clone(), "down": self.ours.y.clone()}

    def calls(self, tile: Tile) -> dict[str, Callable[[Layer], Tensor]]:
        """gate_up and down with one tile; down reads what the rule's gate_up gave."""
        ours, routing = self.ours, self.ours.router(self.logits, tile.block_m)
        h = self.expected["gate_up"]
        return {
            "gate_up": lambda layer: grouped_gemm.gate_up(
                self.x, layer.table(), routing, ours.h, torch.bfloat16, tile, ours.num_sms
            ),
            "down": lambda layer: grouped_gemm.down(
                h, layer.table(), routing, ours.y, torch.bfloat16, tile, ours.num_sms
            ),
        }  # fmt: skip

    def best(self, tiles: list[Tile]) -> dict[str, object]:
        """Columns of the row: the fastest right pair of one block_m, or the rule's, which is the first of `tiles`; and
        what the rule's takes."""
        seconds: dict[tuple[int, str], tuple[float, Tile]] = {}
        rule: dict[str, float] = {}
        left_out: list[str] = []
        for tile in tiles:
            for name, call in self.calls(tile).items():
                try:
                    check(call(self.layers[0]), self.expected[name])
                    time_s = time_calls([partial(call, layer) for layer in self.layers], _SECONDS).p50
                except Exception as error:  # one that is wrong, or that this compiler or GPU cannot take
                    left_out.append(f"{name} {tile}: {type(error).__name__}: {' '.join(str(error).split())[:80]}")
                    continue
                if tile == tiles[0]:
                    rule[name] = time_s
                key = (tile.block_m, name)
                seconds[key] = min(seconds.get(key, (float("inf"), tile)), (time_s, tile))
        pairs = [m for m, name in seconds if name == "gate_up" and (m, "down") in seconds]
        if not pairs:
            raise WrongError(f"no candidate is right: {left_out[0]}")
        block_m = min(pairs, key=lambda m: seconds[m, "gate_up"][0] + seconds[m, "down"][0])
        found = {name: seconds[block_m, name] for name in ("gate_up", "down")}
        if len(rule) == 2 and sum(time_s for time_s, _ in found.values()) > (1 - _LEAST_GAIN) * sum(rule.values()):
            found = {name: (rule[name], tiles[0]) for name in found}
        return {
            **{f"{name}_us": time_s * 1e6 for name, (time_s, _) in found.items()},
            **{f"{name}_rule_us": rule[name] * 1e6 for name in found if name in rule},
            "candidates": 2 * len(tiles), "left_out": len(left_out), "first_left_out": (left_out or [""])[0],
            "tiles": json.dumps({name: tile_fields(tile) for name, (_, tile) in found.items()}),
        }  # fmt: skip


def own_table(device: torch.device) -> Path:
    """In which the kernels look."""
    return TUNED_DIR / f"{table_name(device_name(device.type))}.json"


def write_table(path: Path, rows: Iterable[Mapping], device: str) -> None:
    """The bounds that these rows found; those of shapes that they do not name stay as they are."""
    tiles: dict[str, dict] = json.loads(path.read_text())["tiles"] if path.exists() else {}
    for row in (row for row in rows if row["status"] == "ok"):
        shape, bound = SHAPES[row["shape"]], int(row["rows"])
        key = "max" if bound == BOUNDS[-1] else str(bound)
        tiles.setdefault(f"{shape.hidden},{shape.intermediate}", {})[key] = json.loads(row["tiles"])
    write_json(path, {"tiles": tiles, "provenance": provenance(device, 0)})


@dataclass(frozen=True, kw_only=True)
class Arguments:
    shapes: tuple[str, ...] = option("models", tuple(MODEL_SHAPES), choices=tuple(SHAPES))
    minutes: float = option("stop at the next point after this long", 30.0)
    table: Path | None = option("(default: the kernels' own table of this GPU)", None, metavar="FILE")
    where: GpuBench = group()


def run(args: Arguments) -> None:
    device, end, rehearse = args.where.device, time.monotonic() + 60 * args.minutes, args.where.rehearse
    table = args.table or own_table(device)
    layers = cache(cold_layers)
    with args.where.rows("bench tune") as results:
        for bound, name in itertools.product(BOUNDS[:1] if rehearse else BOUNDS, args.shapes):
            if time.monotonic() > end or results.has(shape=name, rows=bound):
                continue
            shape = SHAPES[name]
            tiles = candidates(bound, capability_of(device))[: 2 if rehearse else None]
            work = lambda: Search(shape, bound, layers(shape, device)).best(tiles)  # noqa: B023, E731 - used at once
            say(results.measure(work, shape=name, rows=bound))
            write_table(table, results.rows, device.type)
        print(f"tiles → {table}")
        results.finish()
