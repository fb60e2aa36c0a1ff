"""Packed checkpoints: a Hugging Face checkpoint whose experts are compressed, losslessly, once and for all.

    config.json, tokenizer …            as in the original
    model*.safetensors (+ index)        every tensor but the experts
    layer-0007.gate_up.fluxpack         gate and up of all experts of layer 7, one `packing.Packed` [E, 2I, H]
    layer-0007.down.fluxpack            [E, H, I]
    fluxmoe.packed.json                 format, names and sizes of those files; written last

Layers are numbered as in the decoder; those without experts have no files. The index is what makes a directory a packed
checkpoint, so one that was interrupted is never taken for whole.
`fluxmoe pack-checkpoint` writes them.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path

from fluxmoe.kernels.formats import codec_of, compressed_formats
from fluxmoe.kernels.packing import Packed, PackingError
from torch import Tensor

from .config import ModelConfig

INDEX = "fluxmoe.packed.json"
# What pack_checkpoint keeps beside files that are not all there yet.
UNFINISHED = "fluxmoe.packing.json"
VERSION = 1
TENSORS = ("gate_up", "down")


class CheckpointError(ValueError):
    """A checkpoint whose files are missing, damaged or not what its config says."""


def expert_file(layer: int, tensor: str) -> str:
    return f"layer-{layer:04d}.{tensor}.fluxpack"


def expert_shape(config: ModelConfig, tensor: str) -> tuple[int, int, int]:
    """Shape of one layer's gate_up or down weights."""
    hidden, intermediate = config.hidden_size, config.moe_intermediate_size
    rows, cols = (2 * intermediate, hidden) if tensor == "gate_up" else (hidden, intermediate)
    return config.num_experts, rows, cols


class PackedExperts:
    """The experts of a packed checkpoint. CheckpointError if a file is missing, truncated, or of another model."""

    def __init__(self, directory: Path, config: ModelConfig) -> None:
        self.directory, self.config = directory, config
        path = directory / INDEX
        try:
            index = json.loads(path.read_text())
            version, self.format, sizes = index["version"], index["format"], dict(index["files"])
        except (ValueError, KeyError, TypeError):
            raise CheckpointError(f"{path} is damaged; make the packed checkpoint again") from None
        formats = compressed_formats()
        if version != VERSION or self.format not in formats:
            raise CheckpointError(
                f"{path} is of version {version}, format {self.format!r}; this program reads version {VERSION}, "
                f"formats {', '.join(formats)}"
            )
        self._codec = codec_of(self.format)
        for layer in config.moe_layers:
            for tensor in TENSORS:
                name = expert_file(layer, tensor)
                file = directory / name
                if name not in sizes or not file.exists():
                    raise CheckpointError(f"{file} is missing; make the packed checkpoint again")
                if file.stat().st_size != sizes[name]:
                    raise CheckpointError(
                        f"{file} is truncated or damaged: {file.stat().st_size} bytes, {INDEX} says {sizes[name]}"
                    )

    @staticmethod
    def in_directory(directory: Path) -> bool:
        """Whether `directory` is a packed checkpoint. CheckpointError if it was to become one."""
        if (directory / INDEX).exists():
            return True
        if (directory / UNFINISHED).exists():
            raise CheckpointError(
                f"{directory} is an unfinished packed checkpoint; run pack_checkpoint again to end it"
            )
        return False

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """gate_up [E, 2I, H] and down [E, H, I] of a layer, decoded, once their sums have been checked."""
        weights = []
        for tensor in TENSORS:
            path = self.directory / expert_file(layer, tensor)
            try:
                packed = Packed.load(path, mmap=True)
                if packed.format != self.format or packed.shape != expert_shape(self.config, tensor):
                    raise PackingError(
                        f"{path}: {packed.format} of shape {list(packed.shape)}, config.json and {INDEX} ask for "
                        f"{self.format} of {list(expert_shape(self.config, tensor))}"
                    )
                weights.append(self._codec.decode(packed))
            except (PackingError, OSError) as error:
                raise CheckpointError(f"{error}; make the packed checkpoint again") from None
        return weights[0], weights[1]

    def experts(self, layers: Collection[int] | None = None) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """As `Checkpoint.experts`; holds one layer at a time."""
        for layer in self.config.moe_layers:
            if layers is None or layer in layers:
                gate_up, down = self.layer(layer)
                for expert in range(self.config.num_experts):
                    yield layer, expert, gate_up[expert], down[expert]
