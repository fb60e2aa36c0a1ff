"""Find the tiles of the grouped GEMM for this GPU and write the table that the kernels look them up in.

    python -m fluxmoe.experiments.tune_grouped_gemm [--shapes …] [--minutes M]

For each shape and each bound on rows per expert the candidates below are timed on cold weights, gate_up and down
apart, and the fastest pair of one block_m wins. The table goes to kernels/tuned/<gpu>.json, to be committed; tiles that
do not compile or do not fit are skipped. Shapes are written as they are done, so a run that is cut short is of use.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time

import torch
from fluxmoe.kernels import grouped_gemm
from fluxmoe.kernels.tiles import TUNED_DIR, Tile, capability_of, default_tile, fit, table_name, tile_fields

from .bench_grouped_gemm import Layer, Ours, router_logits
from .common import Parser, cli_main, provenance, write_json
from .gpu import cold_copies, require_gpu, time_calls
from .moe_shapes import SHAPES, Shape

# Bounds of the table, and the tokens that are timed for each: rows per expert just at the bound.
BOUNDS = (4, 16, 32, 64, 128, 512)
_SECONDS = 0.02


def candidates(rows: float, capability: int) -> list[Tile]:
    """Tiles worth a try at `rows` per expert: the rule's neighbours, not a grid."""
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
            tiles.append(Tile(block_m, block_n, 64, warps, stages, tma=True))
    unique = dict.fromkeys([default_tile(rows, capability, 2), *(fit(tile, capability, 2) for tile in tiles)])
    return list(unique)


def tokens_for(shape: Shape, rows: float) -> int:
    """Tokens at which an expert has `rows` rows on average."""
    return max(1, round(rows * shape.experts / shape.top_k))


def tune_point(shape: Shape, rows: float, layers: list[Layer], device: torch.device) -> dict[str, dict]:
    """The best pair of tiles; both of one block_m, since both GEMMs read one block map."""
    tokens = min(16384, tokens_for(shape, rows))
    x = torch.randn(tokens, shape.hidden, dtype=torch.bfloat16, device=device)
    logits = router_logits(shape, tokens, "uniform", 0, device)
    ours = Ours(shape, tokens, device)
    best: dict[tuple[int, str], tuple[float, Tile]] = {}
    for tile in candidates(rows, capability_of(device)):
        routing = ours.router(logits, tile.block_m)
        calls = {
            "gate_up": lambda la, t=tile, r=routing: grouped_gemm.gate_up(
                x, la.table, r, ours.h, torch.bfloat16, t, ours.num_sms
            ),
            "down": lambda la, t=tile, r=routing: grouped_gemm.down(
                ours.h, la.table, r, ours.y, torch.bfloat16, t, ours.num_sms
            ),
        }
        for name, call in calls.items():
            try:
                seconds = time_calls([lambda la=la, c=call: c(la) for la in layers], _SECONDS).p50
            except Exception as error:  # a tile that this compiler or GPU cannot take: any of a dozen error classes
                print(f"  {name} {tile}: {type(error).__name__}", flush=True)
                continue
            key = (tile.block_m, name)
            best[key] = min(best.get(key, (float("inf"), tile)), (seconds, tile))
    block_m = min(
        {m for m, _ in best if (m, "gate_up") in best and (m, "down") in best},
        key=lambda m: best[m, "gate_up"][0] + best[m, "down"][0],
    )
    for name in ("gate_up", "down"):
        print(f"  {name}: {best[block_m, name][0] * 1e6:.1f} µs with {best[block_m, name][1]}", flush=True)
    return {name: tile_fields(best[block_m, name][1]) for name in ("gate_up", "down")}


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="fluxmoe.experiments.tune_grouped_gemm", description=__doc__.splitlines()[0])
    p.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=list(SHAPES))
    p.add_argument("--minutes", type=float, default=30.0, help="stop at the next point after this long")
    p.add_argument("--out", metavar="FILE", help="default: the kernels' own table of this GPU")
    return p


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    device, end = require_gpu(), time.monotonic() + 60 * args.minutes
    out = args.out or TUNED_DIR / f"{table_name(torch.cuda.get_device_name())}.json"
    tiles: dict[str, dict] = {}
    for name in args.shapes:
        shape = SHAPES[name]
        layers = [Layer(shape, device) for _ in range(cold_copies(shape.expert_bytes * shape.experts))]
        found = {}
        for bound in BOUNDS:
            if time.monotonic() < end:
                print(f"{name}, {bound} rows an expert", flush=True)
                found["max" if bound == BOUNDS[-1] else str(bound)] = tune_point(shape, bound, layers, device)
        if "max" in found:
            tiles[f"{shape.hidden},{shape.intermediate}"] = found
            write_json(out, {"tiles": tiles, "provenance": provenance("cuda", 0)})
        del layers
        torch.cuda.empty_cache()
    print(json.dumps(list(tiles)) + f" → {out}")


if __name__ == "__main__":
    cli_main(main)
