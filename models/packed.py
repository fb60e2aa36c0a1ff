"""Packed checkpoints: a Hugging Face checkpoint whose experts lie in files as the kernels of one backend read them.

    config.json, tokenizer …       as in the original
    model*.safetensors (+ index)   every tensor but the experts
    experts-0007.flux              all experts of one layer, layers without experts not counted
    fluxmoe.packed.json            what all those files hold; written last

The files are `kernels.packing.expert_file`: a disk tier reads them in place, and loading copies bytes. Other backends
can read them too, at the price of decoding and arranging each expert anew.

The index is what makes a directory a packed checkpoint, so one that was interrupted is never taken for whole.
`fluxmoe pack-checkpoint` writes them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import torch
from fluxmoe.kernels.expert_blocks import ExpertBlocks, blocks_of
from fluxmoe.kernels.formats import FORMATS
from fluxmoe.kernels.ops import KernelError
from fluxmoe.kernels.packing import PackingError
from fluxmoe.kernels.packing.expert_file import ExpertFile, ExpertFileHeader, expert_file_name
from torch import Tensor

from .config import ModelConfig
from .decoder import expert_dims
from .json_files import read_json

INDEX = "fluxmoe.packed.json"
# What pack_checkpoint keeps beside files that are not all there yet.
UNFINISHED = "fluxmoe.packing.json"
VERSION = 2

# (layer, expert) → whether it is wanted; layers are numbered as in the decoder.
Wanted = Callable[[int, int], bool]


class CheckpointError(ValueError):
    """A checkpoint whose files are missing, damaged or not what its config says."""


def header_of(config: ModelConfig, backend: str, expert_format: str, content: str) -> ExpertFileHeader:
    """Of the files that hold a model's experts for a backend. KernelError where the backend cannot hold them so."""
    dims = expert_dims(config)
    sizes = blocks_of(backend, dims).expert_bytes(expert_format)
    dtype = str(config.dtype).removeprefix("torch.")
    return ExpertFileHeader(backend, expert_format, dtype, dims.hidden, dims.intermediate, dims.experts, sizes, content)


class PackedExperts:
    """The experts of a packed checkpoint. CheckpointError if a file is missing, truncated, or of another model."""

    def __init__(self, directory: Path, config: ModelConfig) -> None:
        self.directory, self.config = directory, config
        path = directory / INDEX
        try:
            index = read_json(path)
            version = index["version"]
            if version == VERSION:
                fields = index["experts"]
                self.header = ExpertFileHeader(**{**fields, "sizes": tuple(fields["sizes"])})
        except (OSError, ValueError, KeyError, TypeError):
            raise CheckpointError(f"{path} is damaged; make the packed checkpoint again") from None
        if version != VERSION:
            raise CheckpointError(
                f"{path} is of version {version}, this program reads version {VERSION}; pack the checkpoint again"
            )
        header = self.header
        try:
            if header.format not in FORMATS:
                raise KernelError(f"unknown expert format {header.format!r}")
            expected = header_of(config, header.backend, header.format, header.content)
        except KernelError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None
        if expected != header:
            raise CheckpointError(f"{path} is not of the model that config.json describes; pack the checkpoint again")
        self._files: dict[int, ExpertFile] = {}
        for layer in config.moe_layers:
            with self.file(layer) as file:
                if not file.is_whole:
                    raise CheckpointError(f"{file.path} lacks experts; make the packed checkpoint again")

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

    def file(self, layer: int) -> ExpertFile:
        """A layer's file, open; the caller closes it. CheckpointError."""
        path = self.directory / expert_file_name(self.config.moe_layers.index(layer))
        if not path.exists():
            raise CheckpointError(f"{path} is missing; make the packed checkpoint again")
        try:
            return ExpertFile(path, self.header)
        except PackingError as error:
            raise CheckpointError(str(error)) from None

    @cached_property
    def _blocks(self) -> ExpertBlocks:
        return blocks_of(self.header.backend, expert_dims(self.config))

    def experts(self, wanted: Wanted) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """As `Checkpoint.experts`: weights, decoded, once sums and blocks have been checked."""
        blocks = tuple(torch.empty(nbytes, dtype=torch.uint8, device="cpu") for nbytes in self.header.sizes)
        for layer in self.config.moe_layers:
            with self.file(layer) as file:
                for expert in range(self.config.num_experts):
                    if not wanted(layer, expert):
                        continue
                    try:
                        for d in (0, 1):
                            file.read(expert, d, blocks[d], self._blocks.check_expert)
                        recipes = file.recipes(expert)
                    except PackingError as error:
                        raise CheckpointError(f"layer {layer}: {error}") from None
                    yield layer, expert, *self._blocks.weights_of(self.header.format, (blocks[0], blocks[1]), recipes)


def write_index(directory: Path, header: ExpertFileHeader) -> None:
    """All files are there: `directory` is a packed checkpoint from now on."""
    write_over(directory / INDEX, {"version": VERSION, "experts": asdict(header)})


def write_over(path: Path, value: object) -> None:
    """JSON, whole or not at all, by way of one name: whoever goes on after a kill writes over what it left."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1))
    temporary.replace(path)
