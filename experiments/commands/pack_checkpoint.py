"""Compress the experts of a checkpoint, losslessly, into a checkpoint that the loader takes in its place.

    python -m fluxmoe.experiments.commands.pack_checkpoint --model DIR --format planar12 --out DIR

Works a layer at a time and holds one in memory; every file is written whole or not at all, decoded again and compared
bit for bit before it counts. Stopped, it goes on where it was when it is run again; until the end the directory is
refused as unfinished. See fluxmoe.models.packed for the files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import torch
from fluxmoe.kernels.formats import DEFAULT_COMPRESSED, codec_of, compressed_formats
from fluxmoe.kernels.packing import Packed, PackingError
from fluxmoe.models.checkpoint import Checkpoint
from fluxmoe.models.packed import INDEX, TENSORS, UNFINISHED, VERSION, expert_file, expert_shape
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ..lib.results import Parser, UsageError, cli_main, write_json

_SHARD_BYTES = 1 << 30
# Everything beside the weights and their indices goes with a model: tokenizer, chat template, generation settings.
_NOT_COPIED = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf")


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="fluxmoe.experiments.commands.pack_checkpoint", description=__doc__.splitlines()[0])
    p.add_argument("--model", required=True, metavar="DIR", help="Hugging Face checkpoint in bf16")
    p.add_argument("--format", default=DEFAULT_COMPRESSED, choices=sorted(compressed_formats()))
    p.add_argument("--out", required=True, metavar="DIR")
    return p


def identity(source: Path, name: str) -> str:
    """Changes when the source or the format does: a packed directory is finished only from what it was begun with."""
    files = sorted((p.name, p.stat().st_size) for p in source.glob("*.safetensors"))
    text = json.dumps([name, VERSION, files, (source / "config.json").read_text()])
    return hashlib.sha256(text.encode()).hexdigest()


def pack_layer(checkpoint: Checkpoint, layer: int, name: str, out: Path) -> None:
    """Write the two files of a layer, unless they are there."""
    shapes = {tensor: expert_shape(checkpoint.config, tensor) for tensor in TENSORS}
    if all(_is_whole(out / expert_file(layer, tensor), name, shape) for tensor, shape in shapes.items()):
        return
    weights = {tensor: torch.empty(shape, dtype=torch.bfloat16) for tensor, shape in shapes.items()}
    for _, expert, gate_up, down in checkpoint.experts(layers={layer}):
        weights["gate_up"][expert], weights["down"][expert] = gate_up, down
    codec = codec_of(name)
    for tensor, weight in weights.items():
        packed = codec.encode(weight)
        decoded = codec.decode(packed)
        assert torch.equal(decoded.view(torch.int16), weight.view(torch.int16)), f"{name} lost bits of layer {layer}"
        packed.save(out / expert_file(layer, tensor))


def _is_whole(path: Path, name: str, shape: tuple[int, ...]) -> bool:
    try:
        packed = Packed.load(path, mmap=True, verify=False)
    except (PackingError, OSError):
        return False
    return packed.format == name and packed.shape == shape


def copy_dense(checkpoint: Checkpoint, out: Path) -> None:
    """Every tensor but the experts, in shards, under the names that it has; index and shards as on the Hub."""
    shard: dict[str, Tensor] = {}
    where: dict[str, str] = {}

    def flush() -> None:
        file = f"model-{len(set(where.values())):05d}.safetensors"
        where.update(dict.fromkeys(shard, file))
        handle, temporary = tempfile.mkstemp(dir=out, suffix=".tmp")
        os.close(handle)
        try:
            save_file(shard, temporary, metadata={"format": "pt"})
            os.replace(temporary, out / file)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        shard.clear()

    for name, tensor in checkpoint.named_dense_tensors():
        shard[name] = tensor.contiguous()
        if sum(t.nbytes for t in shard.values()) >= _SHARD_BYTES:
            flush()
    if shard:
        flush()
    write_json(out / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})


def pack_checkpoint(source: Path, name: str, out: Path) -> dict[str, float]:
    """Returns bytes of the experts before and after, bits a weight, seconds. Raises UsageError, CheckpointError."""
    checkpoint = Checkpoint(source)
    config = checkpoint.config
    if config.dtype != torch.bfloat16:
        raise UsageError(f"{source} holds {config.dtype} weights; the formats compress bfloat16")
    if checkpoint.packed:
        raise UsageError(f"{source} is packed already, in format {checkpoint.packed.format}")
    marker, who = out / UNFINISHED, {"identity": identity(source, name)}
    if (out / INDEX).exists():
        raise UsageError(f"{out} holds a packed checkpoint already; give another --out")
    if marker.exists():
        if json.loads(marker.read_text()) != who:
            raise UsageError(f"{out} was begun with another model or format; remove it or give another --out")
    elif out.exists() and any(out.iterdir()):
        raise UsageError(f"{out} is not empty; give another --out")
    write_json(marker, who)
    begin = time.perf_counter()
    for layer in tqdm(config.moe_layers, "layers", unit="layer"):
        pack_layer(checkpoint, layer, name, out)
    copy_dense(checkpoint, out)
    for path in source.iterdir():
        if path.is_file() and not path.name.endswith(_NOT_COPIED) and path.name != INDEX:
            shutil.copyfile(path, out / path.name)
    names = [expert_file(layer, tensor) for layer in config.moe_layers for tensor in TENSORS]
    sizes = {each: (out / each).stat().st_size for each in names}
    write_json(out / INDEX, {"version": VERSION, "format": name, "files": sizes})
    marker.unlink()
    before, after = config.expert_bytes_total, sum(sizes.values())
    seconds = time.perf_counter() - begin
    return {"before_bytes": before, "after_bytes": after, "bits_per_weight": 16 * after / before, "seconds": seconds}


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    done = pack_checkpoint(Path(args.model), args.format, Path(args.out))
    print(
        f"{args.out}: experts {done['before_bytes'] / 1e9:.3f} → {done['after_bytes'] / 1e9:.3f} GB, "
        f"{done['bits_per_weight']:.3f} bits a weight, {done['before_bytes'] / done['seconds'] / 1e6:.0f} MB/s"
    )


if __name__ == "__main__":
    cli_main(main)
