"""Blocks that nobody's encoder wrote, with right sums: what a file from elsewhere may hold."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import xxhash
from fluxmoe.kernels.expert_blocks import ExpertBlocks, blocks_of
from fluxmoe.kernels.formats import fitting
from fluxmoe.kernels.host_memory import PAGE
from fluxmoe.kernels.ops import ExpertDims
from fluxmoe.kernels.packing import Packed
from fluxmoe.kernels.packing.expert_file import ExpertFile, ExpertFileHeader

# Rows and columns of planar12's last tiles are not all used.
DIMS = ExpertDims(hidden=232, intermediate=248, experts=1, top_k=1, dtype=torch.bfloat16)
KINDS = [("cpu", "planar12"), ("torch", "planar12"), ("torch", "planar8"), ("torch", "tiered"), ("torch", "huffman")]
GUARD = 4096
Pair = tuple[list[torch.Tensor], list[Packed | None]]


class Crafted:
    """A whole expert in a format; `mutated` ones of it, through a file and back."""

    def __init__(self, backend: str, expert_format: str, folder: Path) -> None:
        self.blocks: ExpertBlocks = blocks_of(backend, DIMS)
        self.format, self.path = expert_format, folder / "experts"
        sizes = self.blocks.expert_bytes(expert_format)
        self.header = ExpertFileHeader(
            backend, expert_format, "bfloat16", DIMS.hidden, DIMS.intermediate, DIMS.experts, sizes, ""
        )
        generator = torch.Generator().manual_seed(1)
        gate_up, down = (torch.randn(shape, generator=generator) * 0.02 for shape in DIMS.shapes)
        # Rare weights at both ends, and for planes of a fixed rate a tile that is stored raw.
        for weight in (gate_up, down):
            weight[0, 0], weight[-1, -1], weight[2, 5], weight[70, 40:42] = 1e-30, 1e30, 1e20, 1e-20
        if backend == "torch":
            gate_up[64:74, 3:6] = 1e-25
        self.whole: list[torch.Tensor] = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
        gate_up, down = (fitting(expert_format, weight.bfloat16()) for weight in (gate_up, down))
        self.recipes = self.blocks.encode_expert(gate_up, down, (self.whole[0], self.whole[1]), expert_format)
        with ExpertFile.create(self.path, self.header) as file:
            file.put(0, self.whole, self.recipes)
            file.commit()
        raw = self.path.read_bytes()
        self.texts: list[bytes] = []
        for at in (PAGE, PAGE + 512):
            length = struct.unpack_from("<QI", raw, at)[1]
            self.texts.append(raw[at + 12 : at + 12 + length])

    def words(self, d: int, block: torch.Tensor) -> list[np.ndarray]:
        """Everything in a block that is not a weight, as integers that can be written to."""
        recipe = self.recipes[d]
        if recipe is not None:
            planes = recipe.at(block).planes
            return [p.numpy() for name, p in planes.items() if name not in ("bytes", "nibbles") and p.numel()]
        raw = block.numpy()
        count, depth, escapes = raw[8:32].view(np.int64).tolist()
        index = 128 + count * depth * 24
        entries = index + 8 * count
        return [part.view(np.int64) for part in (raw[:32], raw[index:entries], raw[entries:][: 8 * (escapes + count)])]

    def mutated(self, random: Random, d: int) -> tuple[torch.Tensor, bytes]:
        """A block and its recipe's text, one of them changed, in up to three places."""
        block, text = self.whole[d].clone(), self.texts[d]
        if text and random.random() < 0.3:
            return block, _mutated_text(random, text)
        parts = self.words(d, block)
        for _ in range(random.randint(1, 3)):
            _mutate(random, random.choice(parts))
        return block, text

    def write(self, d: int, block: torch.Tensor, text: bytes) -> None:
        reseal(self.path, self.header, 0, d, block, text)

    def read(self, d: int) -> tuple[torch.Tensor, Packed | None]:
        """Through the file's own checks. PackingError."""
        block = torch.zeros(self.header.sizes[d], dtype=torch.uint8)
        with ExpertFile(self.path, self.header) as file:
            file.read(0, d, block, self.blocks.check_expert)
            return block, file.recipe(0, d)

    def decode(self, d: int, block: torch.Tensor, recipe: Packed | None) -> torch.Tensor:
        """The dense block, decoded between guards that must not change."""
        size = self.blocks.expert_bytes()[d]
        buffer = torch.full((size + 2 * GUARD,), 0xA5, dtype=torch.uint8)
        self.blocks.decode_expert(self.format, d, block, buffer[GUARD:-GUARD], recipe)
        assert (buffer[:GUARD] == 0xA5).all(), "something was written before the weight"
        assert (buffer[-GUARD:] == 0xA5).all(), "something was written behind the weight"
        return buffer[GUARD:-GUARD]


def reseal(path: Path, header: ExpertFileHeader, expert: int, d: int, block: torch.Tensor, text: bytes) -> None:
    """Write a block and its record, with the sum that belongs to them."""
    with ExpertFile(path, header) as file:
        place = file.place(expert, d)
    total = xxhash.xxh3_64_intdigest(block.numpy().tobytes() + text)
    with path.open("r+b") as raw:
        raw.seek(place)
        raw.write(block.numpy().tobytes())
        raw.seek(PAGE + (2 * expert + d) * 512)
        raw.write((struct.pack("<QI", total, len(text)) + text).ljust(512, b"\0")[:512])


def _mutate(random: Random, words: np.ndarray) -> None:
    """One number becomes a neighbour, an end of its range, another's value, or anything."""
    limits = np.iinfo(words.dtype)
    at = random.choice([0, len(words) - 1, random.randrange(len(words))])
    old = int(words[at])
    new = random.choice(
        [
            old + 1, old - 1, -old, 0, -1, limits.max, limits.min, int(words[random.randrange(len(words))]),
            old + random.choice([1 << 16, -(1 << 16), 1 << 23, 8, -8]), random.randint(limits.min, limits.max),
        ]
    )  # fmt: skip
    words[at] = min(max(new, limits.min), limits.max)


def _mutated_text(random: Random, text: bytes) -> bytes:
    fields = json.loads(text)
    plane = random.choice(fields["planes"])
    odd: Any = random.choice([0, -1, 1, 2**31, 2**62, 2**70, 1.5, float("nan"), float("inf"), "8", None, [], {}])
    match random.randrange(8):
        case 0:
            plane[2] = random.choice([plane[2] + 1, plane[2] - 1, plane[2] * 2, odd])
        case 1:
            plane[1] = random.choice(["int64", "float64", "complex128", "nn", "int32", "uint8", "quint8", odd])
        case 2:
            plane[0] = random.choice(["raw", "", "bytes", odd])
        case 3:
            random.shuffle(fields["planes"])
        case 4:
            fields["shape"] = random.choice(
                [fields["shape"][::-1], [*fields["shape"], 1], [float(n) for n in fields["shape"]], odd]
            )
        case 5:
            fields[random.choice(["format", "metadata", "planes", "shape"])] = odd
        case 6:
            fields.pop(random.choice(list(fields)))
        case 7:
            damaged = bytearray(json.dumps(fields, separators=(",", ":")).encode())
            damaged[random.randrange(len(damaged))] = random.randrange(256)
            return bytes(damaged)
    return json.dumps(fields, separators=(",", ":")).encode()
