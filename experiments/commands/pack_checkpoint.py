"""Pack a checkpoint: its experts in files as the kernels read them, compressed without loss.

    python -m fluxmoe.experiments.commands.pack_checkpoint --model DIR --format planar12 --out DIR

A packed checkpoint is loaded by copying bytes, and is the disk tier of a model that is larger than memory. Works an
expert at a time; each is restored from its blocks and compared bit for bit before it counts. Stopped, it goes on where
it was when it is run again; until the end the directory is refused as unfinished. See fluxmoe.models.packed for the
files.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path

import torch
from fluxmoe.kernels.expert_blocks import ExpertBlocks, blocks_of
from fluxmoe.kernels.formats import DEFAULT_COMPRESSED, FORMATS
from fluxmoe.kernels.ops import KernelError
from fluxmoe.kernels.packing import PackingError
from fluxmoe.kernels.packing.expert_file import ExpertFile, ExpertFileHeader, expert_file_name
from fluxmoe.models.checkpoint import Checkpoint
from fluxmoe.models.decoder import expert_dims
from fluxmoe.models.packed import INDEX, UNFINISHED, header_of, write_index
from fluxmoe.runtime.memory.budget import format_bytes
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ..lib.results import Parser, UsageError, cli_main, write_json

_SHARD_BYTES = 1 << 30
_PART = "model.safetensors.part"
# Everything beside the weights and their indices goes with a model: tokenizer, chat template, generation settings.
_NOT_COPIED = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf")


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="fluxmoe.experiments.commands.pack_checkpoint", description=__doc__.splitlines()[0])
    p.add_argument("--model", required=True, metavar="DIR", help="Hugging Face checkpoint in bf16 or fp32")
    p.add_argument("--format", default=DEFAULT_COMPRESSED, choices=sorted(FORMATS), help="(default: %(default)s)")
    p.add_argument(
        "--backend", default="triton" if torch.cuda.is_available() else "cpu", choices=["cpu", "triton", "torch"],
        help="whose kernels shall read the files in place; the others must decode them (default here: %(default)s)",
    )  # fmt: skip
    p.add_argument("--out", required=True, metavar="DIR")
    return p


def pack_experts(checkpoint: Checkpoint, header: ExpertFileHeader, out: Path) -> None:
    """Write the files of all layers, but for experts that are there."""
    config, dims = checkpoint.config, expert_dims(checkpoint.config)
    blocks = blocks_of(header.backend, dims)
    gate_up, down = (torch.empty(nbytes, dtype=torch.uint8) for nbytes in header.sizes)
    progress = tqdm(total=len(config.moe_layers) * config.num_experts, desc="experts", unit="expert")
    with progress:
        for rank, layer in enumerate(config.moe_layers):
            with ExpertFile.create(out / expert_file_name(rank), header) as file:
                there = {expert for expert in range(config.num_experts) if file.has(expert)}
                progress.update(len(there))
                wanted = lambda i, expert: i == layer and expert not in there  # noqa: B023, E731 - used before the next
                for _, expert, *weights in checkpoint.experts(wanted):
                    _pack_expert(file, blocks, expert, (weights[0], weights[1]), (gate_up, down))
                    progress.update()
                file.commit()
                file.drop_cache()


def _pack_expert(
    file: ExpertFile, blocks: ExpertBlocks, expert: int, weights: tuple[Tensor, Tensor], room: tuple[Tensor, Tensor]
) -> None:
    name = file.header.format
    recipes = blocks.encode_expert(*weights, room, name)
    bits = torch.int16 if weights[0].element_size() == 2 else torch.int32
    for restored, weight in zip(blocks.weights_of(name, room, recipes), weights, strict=True):
        assert torch.equal(restored.view(bits), weight.contiguous().view(bits)), f"{name} lost bits of expert {expert}"
    file.put(expert, room, recipes)


def copy_dense(checkpoint: Checkpoint, out: Path) -> None:
    """Every tensor but the experts, in shards, under the names that it has; index and shards as on the Hub."""
    shard: dict[str, Tensor] = {}
    where: dict[str, str] = {}

    def flush() -> None:
        file = f"model-{len(set(where.values())):05d}.safetensors"
        where.update(dict.fromkeys(shard, file))
        # Of one name, so that whoever goes on after a kill writes over what it left.
        temporary = out / _PART
        save_file(shard, temporary, metadata={"format": "pt"})
        temporary.chmod(0o666 & ~_umask())  # safetensors lets nobody else read it
        temporary.replace(out / file)
        shard.clear()

    for name, tensor in checkpoint.named_dense_tensors():
        shard[name] = tensor.contiguous()
        if sum(t.nbytes for t in shard.values()) >= _SHARD_BYTES:
            flush()
    if shard:
        flush()
    write_json(out / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})


def pack_checkpoint(source: Path, name: str, out: Path, backend: str = "cpu") -> dict[str, float]:
    """Returns bytes of the experts before and after, bits a weight, seconds. Raises UsageError, CheckpointError."""
    checkpoint = Checkpoint(source)
    config = checkpoint.config
    if checkpoint.packed:
        raise UsageError(f"{source} is packed already, in format {checkpoint.packed.header.format}")
    try:
        header = header_of(config, backend, name, checkpoint.content)
    except KernelError as error:
        raise UsageError(f"{source} cannot be packed: {error}") from None
    marker, who = out / UNFINISHED, {"backend": backend, "format": name, "content": header.content}
    if (out / INDEX).exists():
        raise UsageError(f"{out} holds a packed checkpoint already; give another --out")
    if marker.exists():
        if json.loads(marker.read_text()) != who:
            raise UsageError(f"{out} was begun with another model, format or backend; remove it or give another --out")
    elif out.exists() and any(out.iterdir()):
        raise UsageError(f"{out} is not empty; give another --out")
    layers = len(config.moe_layers)
    _require_room(out, layers * ExpertFile.nbytes(header) + config.non_expert_bytes)
    write_json(marker, who)
    begin = time.perf_counter()
    try:
        pack_experts(checkpoint, header, out)
    except (KernelError, PackingError) as error:
        raise UsageError(f"{source} cannot be packed: {error}") from None
    copy_dense(checkpoint, out)
    for path in source.iterdir():
        if path.is_file() and not path.name.endswith(_NOT_COPIED) and path.name != INDEX:
            shutil.copyfile(path, out / path.name)
    write_index(out, header)
    marker.unlink()
    before, after = config.expert_bytes_total, layers * config.num_experts * sum(header.sizes)
    seconds = time.perf_counter() - begin
    bits = 8 * config.dtype.itemsize
    return {"before_bytes": before, "after_bytes": after, "bits_per_weight": bits * after / before, "seconds": seconds}


def _umask() -> int:
    """What the process forbids on new files, which can only be asked by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _require_room(out: Path, nbytes: int) -> None:
    """UsageError unless the disk has so many bytes free, beside what an interrupted run has left in `out`."""
    nearest = next(path for path in (out, *out.resolve().parents) if path.exists())
    there = sum(path.stat().st_blocks * 512 for path in out.glob("*")) if out.exists() else 0
    free = shutil.disk_usage(nearest).free
    if nbytes - there > free:
        raise UsageError(
            f"{out} needs {format_bytes(nbytes - there)}, and {format_bytes(free)} are free; give --out on another disk"
        )


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    done = pack_checkpoint(Path(args.model), args.format, Path(args.out), args.backend)
    print(
        f"{args.out}: experts {done['before_bytes'] / 1e9:.3f} → {done['after_bytes'] / 1e9:.3f} GB, "
        f"{done['bits_per_weight']:.3f} bits a weight, {done['before_bytes'] / done['seconds'] / 1e6:.0f} MB/s"
    )


if __name__ == "__main__":
    cli_main(main)
