"""Pack a checkpoint: its experts in files as the kernels read them, compressed without loss.

    fluxmoe pack-checkpoint --model DIR --format planar12 --out DIR

A packed checkpoint is loaded by mapping or copying bytes, and is the disk tier of a model that is larger than memory.
Works an expert at a time; each is restored from its blocks and compared bit for bit before it counts. Stopped, it goes
on where it was when it is run again; until the end the directory is refused as unfinished. Says at the end how many low
mantissa bits are zero in all weights, if any are, and which format leaves them out. See fluxmoe.models.packed for the
files.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from fluxmoe.kernels.expert_blocks import ExpertBlocks, blocks_of
from fluxmoe.kernels.formats import DEFAULT_COMPRESSED, FORMATS, codec_of, compressed_formats, fused_formats
from fluxmoe.kernels.ops import KernelError
from fluxmoe.kernels.packing import PackingError
from fluxmoe.kernels.packing.expert_file import ExpertFile, ExpertFileHeader, expert_file_name
from fluxmoe.kernels.packing.mantissa import zero_low_bits
from fluxmoe.models.checkpoint import Checkpoint
from fluxmoe.models.config import ModelConfig
from fluxmoe.models.decoder import expert_dims
from fluxmoe.models.packed import INDEX, UNFINISHED, header_of, write_index, write_over
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ..lib.args import option
from ..lib.checkpoints import check_disk, share
from ..lib.results import UsageError

_SHARD_BYTES = 1 << 30
_PART = "model.safetensors.part"
# Everything beside the weights and their indices goes with a model: tokenizer, chat template, generation settings.
_NOT_COPIED = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    model: Path = option("Hugging Face checkpoint in bf16 or fp32", metavar="DIR")
    format: str = option("lossless format", DEFAULT_COMPRESSED, choices=tuple(sorted(FORMATS)))
    backend: str | None = option(
        "whose kernels read the files in place, which others must decode (default: those of this machine)", None,
        choices=("cpu", "triton", "torch"),
    )  # fmt: skip
    out: Path = option("new folder", metavar="DIR")


def pack_experts(checkpoint: Checkpoint, header: ExpertFileHeader, out: Path) -> int:
    """Write the files of all layers, but for experts that are there. Returns how many low mantissa bits are zero in all
    that was written; 0 where weights are not bf16, or nothing was."""
    config, dims = checkpoint.config, expert_dims(checkpoint.config)
    blocks = blocks_of(header.backend, dims)
    gate_up, down = (torch.empty(nbytes, dtype=torch.uint8) for nbytes in header.sizes)
    zero_bits = set[int]()
    progress = tqdm(total=len(config.moe_layers) * config.num_experts, desc="experts", unit="expert")
    with progress:
        for rank, layer in enumerate(config.moe_layers):
            with ExpertFile.create(out / expert_file_name(rank), header) as file:
                there = {expert for expert in range(config.num_experts) if file.has(expert)}
                progress.update(len(there))
                wanted = lambda i, expert: i == layer and expert not in there  # noqa: B023, E731 - used before the next
                for _, expert, *weights in checkpoint.experts(wanted):
                    _pack_expert(file, blocks, expert, (weights[0], weights[1]), (gate_up, down))
                    zero_bits |= {zero_low_bits(w) if w.dtype == torch.bfloat16 else 0 for w in weights}
                    progress.update()
                file.commit()
                file.drop_cache()
    return min(zero_bits, default=0)


def about_zero_bits(config: ModelConfig, backend: str, name: str, zero_bits: int) -> str:
    """What to say of experts, packed in format `name`, whose low mantissa bits are all zero; "" where none are."""
    made_for = [each for each in compressed_formats() if 0 < codec_of(each).lost_bits < 1 << zero_bits]
    if not zero_bits or name in made_for:
        return ""
    found = f"the low {zero_bits} of 7 mantissa bits are zero in every weight, as in files that were FP8"
    if not made_for:
        return f"{found}: {zero_bits / 16 * config.expert_bytes_total / 1e9:.3f} GB, which no format leaves out"
    best = min(made_for, key=lambda each: FORMATS[each].bits)
    sizes = header_of(config, backend, best, "").sizes
    total = len(config.moe_layers) * config.num_experts * sum(sizes)
    price = "" if best in fused_formats(backend) else f", but {backend} kernels must decode it first"
    return f"{found}: --format {best} leaves them out and takes {total / 1e9:.3f} GB{price}"


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
        temporary.replace(out / file)
        shard.clear()

    for name, tensor in checkpoint.named_dense_tensors():
        shard[name] = tensor.contiguous()
        if sum(t.nbytes for t in shard.values()) >= _SHARD_BYTES:
            flush()
    if shard:
        flush()
    write_over(out / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """`out` is nobody else's to pack into; made if needed, and removed if nothing comes into it. UsageError."""
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UsageError(f"another process packs into {out}; wait for it, or give another --out") from None
    finally:
        os.close(folder)
        if made:
            with suppress(OSError):
                out.rmdir()


def pack_checkpoint(source: Path, name: str, out: Path, backend: str = "cpu") -> dict[str, float]:
    """Returns bytes of the experts before and after, bits a weight, seconds, low mantissa bits that are zero in all
    experts packed now. Raises UsageError, CheckpointError."""
    checkpoint = Checkpoint(source)
    config = checkpoint.config
    if checkpoint.packed:
        raise UsageError(f"{source} is packed already, in format {checkpoint.packed.header.format}")
    try:
        header = header_of(config, backend, name, checkpoint.content)
    except KernelError as error:
        raise UsageError(f"{source} cannot be packed: {error}") from None
    begin = time.perf_counter()
    with _alone(out):
        zero_bits = _pack(checkpoint, header, out)
    before, after = config.expert_bytes_total, len(config.moe_layers) * config.num_experts * sum(header.sizes)
    seconds = time.perf_counter() - begin
    bits = 8 * config.dtype.itemsize
    return {
        "before_bytes": before, "after_bytes": after, "bits_per_weight": bits * after / before, "seconds": seconds,
        "zero_bits": zero_bits,
    }  # fmt: skip


def _pack(checkpoint: Checkpoint, header: ExpertFileHeader, out: Path) -> int:
    """What `pack_experts` returns."""
    source, marker = checkpoint.directory, out / UNFINISHED
    who = {"backend": header.backend, "format": header.format, "content": header.content}
    if marker.exists():
        if json.loads(marker.read_text()) != who:
            raise UsageError(f"{out} was begun with another model, format or backend; remove it or give another --out")
    elif (out / INDEX).exists():
        raise UsageError(f"{out} holds a packed checkpoint already; give another --out")
    elif any(path.name != f"{UNFINISHED}.tmp" for path in out.iterdir()):
        raise UsageError(f"{out} is not empty; give another --out")
    else:
        model = checkpoint.config
        check_disk(out, len(model.moe_layers) * ExpertFile.nbytes(header) + model.non_expert_bytes)
    write_over(marker, who)
    try:
        zero_bits = pack_experts(checkpoint, header, out)
    except (KernelError, PackingError) as error:
        raise UsageError(f"{source} cannot be packed: {error}") from None
    copy_dense(checkpoint, out)
    for path in source.iterdir():
        if path.is_file() and not path.name.endswith(_NOT_COPIED) and path.name != INDEX:
            shutil.copyfile(path, out / path.name)
    # By which vLLM knows, without a flag, who reads the experts.
    config_json = json.loads((out / "config.json").read_text())
    write_over(out / "config.json", config_json | {"quantization_config": {"quant_method": "fluxmoe"}})
    write_index(out, header)
    share(out)
    marker.unlink()
    return zero_bits


def run(args: Arguments) -> None:
    backend = args.backend or ("triton" if torch.cuda.is_available() else "cpu")
    done = pack_checkpoint(args.model, args.format, args.out, backend)
    print(
        f"{args.out}: experts {done['before_bytes'] / 1e9:.3f} → {done['after_bytes'] / 1e9:.3f} GB, "
        f"{done['bits_per_weight']:.3f} bits a weight, {done['before_bytes'] / done['seconds'] / 1e6:.0f} MB/s"
    )
    if about := about_zero_bits(Checkpoint(args.out).config, backend, args.format, int(done["zero_bits"])):
        print(about)
