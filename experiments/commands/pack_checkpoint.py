"""Compress the experts of a checkpoint, losslessly, into a checkpoint that the loader takes in its place.

    fluxmoe pack-checkpoint --model DIR --format planar12 --out DIR

Works a layer at a time and holds one in memory; every file is written whole or not at all, decoded again and compared
bit for bit before it counts. Stopped, it goes on where it was when it is run again; until the end the directory is
refused as unfinished. See fluxmoe.models.packed for the files.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from fluxmoe.kernels.formats import DEFAULT_COMPRESSED, FORMATS, codec_of, compressed_formats
from fluxmoe.kernels.packing import Packed, PackingError
from fluxmoe.models.checkpoint import Checkpoint
from fluxmoe.models.packed import INDEX, TENSORS, UNFINISHED, VERSION, expert_file, expert_shape
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ..lib.args import option
from ..lib.checkpoints import check_disk, share
from ..lib.models import content_digest
from ..lib.results import UsageError, digest, write_json

_SHARD_BYTES = 1 << 30
# Everything beside the weights and their indices goes with a model: tokenizer, chat template, generation settings.
_NOT_COPIED = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    model: Path = option("Hugging Face checkpoint in bf16", metavar="DIR")
    format: str = option("lossless format", DEFAULT_COMPRESSED, choices=tuple(sorted(compressed_formats())))
    out: Path = option("new folder", metavar="DIR")


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
    marker, who = out / UNFINISHED, {"identity": digest(name, VERSION, content_digest(source))}
    if (out / INDEX).exists():
        raise UsageError(f"{out} holds a packed checkpoint already; give another --out")
    if marker.exists():
        if json.loads(marker.read_text()) != who:
            raise UsageError(f"{out} was begun with another model or format; remove it or give another --out")
    elif out.exists() and any(out.iterdir()):
        raise UsageError(f"{out} is not empty; give another --out")
    else:
        room = config.non_expert_bytes + config.expert_bytes_total * FORMATS[name].bits / 16
        check_disk(out, int(room))
    for left in out.glob("*.tmp"):  # of a process that was killed
        left.unlink()
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
    share(out)
    marker.unlink()
    before, after = config.expert_bytes_total, sum(sizes.values())
    seconds = time.perf_counter() - begin
    return {"before_bytes": before, "after_bytes": after, "bits_per_weight": 16 * after / before, "seconds": seconds}


def run(args: Arguments) -> None:
    done = pack_checkpoint(args.model, args.format, args.out)
    print(
        f"{args.out}: experts {done['before_bytes'] / 1e9:.3f} → {done['after_bytes'] / 1e9:.3f} GB, "
        f"{done['bits_per_weight']:.3f} bits a weight, {done['before_bytes'] / done['seconds'] / 1e6:.0f} MB/s"
    )
