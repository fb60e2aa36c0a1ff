"""Make a Hugging Face checkpoint of a real architecture, with generated weights distributed as trained ones are.

    fluxmoe make-checkpoint --arch qwen3_moe --out DIR --layers 8 --experts 32 --hidden 512

Weights are random, and so are routers: they choose all experts alike, which no trained model does, unless --router-skew
says otherwise; names and files are those that the Hub has. The tokenizer is a byte-level BPE: any text round-trips.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..lib.args import group, option
from ..lib.checkpoints import ModelShape, write_checkpoint


@dataclass(frozen=True, kw_only=True)
class Arguments:
    shape: ModelShape = group()
    out: Path = option("new folder", metavar="DIR")
    seed: int = option("of the weights", 0)
    scale: float = option("factor on every matrix; 1 keeps activations of order one", 1.0)
    router_skew: float = option(
        "how unevenly routers choose: the chance of the expert of rank r falls as r^-SKEW; 0: all alike, as random "
        "weights do; 1.4: as published of Qwen3-30B-A3B (see experiments/lib/skew.py)", 0.0,
    )  # fmt: skip
    shard_bytes: int = option("of a file at most", 1 << 30, least=1)


def run(args: Arguments) -> None:
    out = write_checkpoint(args.shape, args.out, args.seed, args.scale, args.shard_bytes, True, args.router_skew)
    print(f"{out}: {sum(path.stat().st_size for path in out.glob('*.safetensors')) / 1e6:.1f} MB of weights")
