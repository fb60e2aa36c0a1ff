"""What a lossless format of bf16 weights is: `Packed`, the bytes; `Codec`, how they are made and read.

A weight is [rows, cols] or [E, rows, cols] of bf16. A format cuts it into planes, 1-D tensors that lie one behind the
other in a file or in one block of bytes. Where a format would not save anything (random bits, a handful of weights),
the weight is stored as it is, in the single plane `raw`: no weight ever takes more than its own bytes.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

RAW = "raw"
_DTYPES = {"uint8": torch.uint8, "int16": torch.int16, "int32": torch.int32}
# No tensor and no file of experts has more elements or bytes.
MAX_SIZE = 1 << 40
# Planes of a block start at multiples of this: more than the widest load of a GPU, and a whole number of its sectors.
BLOCK_ALIGNMENT = 256


class PackingError(ValueError):
    """A weight, a buffer or a file that a format cannot take."""


@dataclass(frozen=True, eq=False)
class Packed:
    """One encoded weight: format name, shape of the weight, planes (1-D, contiguous, on one device), small integers.

    Planes keep their order: those whose size follows from the shape come first, so their place in a block does too.
    """

    format: str
    shape: tuple[int, ...]
    planes: dict[str, Tensor]
    metadata: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, plane in self.planes.items():
            if plane.dim() != 1 or not plane.is_contiguous():
                raise PackingError(f"plane {name!r} must be 1-D and contiguous, got {tuple(plane.shape)}")

    @property
    def numel(self) -> int:
        """Weights."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Bytes of all planes, without the padding between planes of a block or a file."""
        return sum(plane.nbytes for plane in self.planes.values())

    @property
    def device(self) -> torch.device:
        return next((plane.device for plane in self.planes.values()), torch.device("cpu"))

    @property
    def is_raw(self) -> bool:
        return RAW in self.planes

    @property
    def recipe_text(self) -> bytes:
        """All but the planes' bytes, as JSON."""
        planes = [(name, str(each.dtype).removeprefix("torch."), each.numel()) for name, each in self.planes.items()]
        fields = {"format": self.format, "shape": self.shape, "metadata": self.metadata, "planes": planes}
        return json.dumps(fields, separators=(",", ":")).encode()

    @classmethod
    def from_recipe(cls, text: bytes) -> Packed:
        """What a `recipe_text` describes, with planes on device "meta". PackingError if it describes nothing."""
        try:
            fields = json.loads(text)
            shape, sizes = tuple(fields["shape"]), [count for _, _, count in fields["planes"]]
            if not all(type(n) is int and 0 <= n < MAX_SIZE for n in (*shape, *sizes)):
                raise ValueError("sizes are integers")
            planes = {
                name: torch.empty(count, dtype=_DTYPES[dtype], device="meta") for name, dtype, count in fields["planes"]
            }
            return cls(fields["format"], shape, planes, fields["metadata"])
        except (ValueError, KeyError, TypeError):
            raise PackingError("it is no recipe") from None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Packed:
        """The same on another device."""
        planes = {name: plane.to(device, non_blocking=non_blocking) for name, plane in self.planes.items()}
        return Packed(self.format, self.shape, planes, self.metadata)

    def _places(self) -> Iterator[tuple[str, int, Tensor]]:
        offset = 0
        for name, plane in self.planes.items():
            yield name, offset, plane
            offset += align(plane.nbytes)

    @property
    def block_bytes(self) -> int:
        """Bytes of the block that `pack_into` fills."""
        return sum(align(plane.nbytes) for plane in self.planes.values())

    def at(self, block: Tensor) -> Packed:
        """These planes read from `block`, uint8 [≥ block_bytes] on any device, which holds a copy of a filled block.

        Nothing is copied: whoever moves a block as plain bytes gets the weight back with this.
        """
        if block.dtype != torch.uint8 or block.dim() != 1 or not block.is_contiguous():
            raise PackingError(f"a block must be contiguous uint8 [bytes], got {tuple(block.shape)} {block.dtype}")
        if block.numel() < self.block_bytes:
            raise PackingError(f"a block of {self.block_bytes} bytes is needed, got {block.numel()}")
        if block.storage_offset() % 16:
            raise PackingError(f"a block must start at a multiple of 16 bytes, got {block.storage_offset()}")
        planes = {name: block[o : o + plane.nbytes].view(plane.dtype) for name, o, plane in self._places()}
        return Packed(self.format, self.shape, planes, self.metadata)

    def pack_into(self, block: Tensor) -> Packed:
        """Copy the planes into `block` and return `at(block)`."""
        placed = self.at(block)
        for name, plane in self.planes.items():
            placed.planes[name].copy_(plane)
        return placed


def align(nbytes: int) -> int:
    """Up to where the next plane of a block may begin."""
    return -(-nbytes // BLOCK_ALIGNMENT) * BLOCK_ALIGNMENT


class Codec(ABC):
    """How weights are made into planes and back. Subclasses do it for those that are worth it, the others stay raw.

    lost_bits: of the mantissa, those that the format takes for zero; weights that have them set do not shrink.
    """

    name: str
    lost_bits = 0

    @abstractmethod
    def room(self, n: int, k: int) -> int:
        """Bytes of a block that holds a weight [n, k], if it is like trained ones."""

    def encode(self, weight: Tensor) -> Packed:
        """weight bf16 [rows, cols] or [E, rows, cols], any device, any strides → Packed on the CPU.

        PackingError on other dtypes or ranks.
        """
        if weight.dtype != torch.bfloat16 or weight.dim() not in (2, 3):
            raise PackingError(f"a weight must be bf16 of 2 or 3 dimensions, got {tuple(weight.shape)} {weight.dtype}")
        shape = tuple(weight.shape)
        source = weight.detach().cpu().contiguous().view(torch.int16)
        if source.numel():
            bits = source.numpy().view(np.uint16).reshape(-1, *shape[-2:])
            encoded = self._encode(bits)
            if encoded is not None:
                packed = Packed(self.name, shape, {name: _tensor(plane) for name, plane in encoded.items()})
                if packed.nbytes < source.nbytes:
                    return packed
        return Packed(self.name, shape, {RAW: source.reshape(-1).clone()})

    def decode(self, packed: Packed, out: Tensor | None = None, parallel: bool = True) -> Tensor:
        """The weight, bit for bit, on the device of `packed`, in `out` (contiguous, bf16, same shape) if given.

        parallel: on the CPU, by all threads of numba; without, by the calling thread alone.
        """
        out, bits = self._output(packed, out)
        if not packed.is_raw and bits.numel():
            if packed.device.type == "cpu":
                arrays = {name: _array(plane) for name, plane in packed.planes.items()}
                self._decode_cpu(arrays, bits.numpy().view(np.uint16).reshape(-1, *packed.shape[-2:]), parallel)
            else:
                self._decode_triton(packed.planes, bits)
        return out

    def decode_triton(self, packed: Packed, out: Tensor | None = None) -> Tensor:
        """As `decode`, by Triton: on CUDA, or on the CPU where TRITON_INTERPRET=1."""
        out, bits = self._output(packed, out)
        if not packed.is_raw and bits.numel():
            self._decode_triton(packed.planes, bits)
        return out

    def check(self, packed: Packed) -> None:
        """PackingError unless whatever reads the planes, which lie in host memory, stays inside them and the weight.

        A sum says that bytes are as they were written, not who wrote them; and compiled code believes what it reads.
        So every offset, position, count and number in the planes must be one that `encode` may write for this shape.
        Weights themselves may be any. Reads under 1 % of the planes, of `tiered` a quarter.
        """
        self.check_planes(packed)
        if not packed.is_raw:
            self._check({name: _array(plane) for name, plane in packed.planes.items()}, packed.shape)

    def check_planes(self, packed: Packed) -> None:
        """PackingError unless `packed`, which may be without data, has the planes of this format and of its shape."""
        if packed.format != self.name:
            raise PackingError(f"format {self.name} cannot decode {packed.format}")
        expected = {RAW: (torch.int16, packed.numel)} if packed.is_raw else self._planes(packed.shape)
        if list(packed.planes) != list(expected):
            raise PackingError(f"planes of {packed.format} are {list(expected)}, got {list(packed.planes)}")
        for name, plane in packed.planes.items():
            dtype, size = expected[name]
            if plane.dtype != dtype or size not in (None, plane.numel()):
                raise PackingError(
                    f"plane {name!r} of {packed.format} {packed.shape} must have {'some' if size is None else size} "
                    f"{dtype}, has {plane.numel()} {plane.dtype}"
                )

    def fitting(self, weight: Tensor) -> Tensor:
        """weight bf16 without its `lost_bits`: what the format is for, where a benchmark or a test makes weights."""
        return (weight.view(torch.int16) & ~self.lost_bits).view(torch.bfloat16) if self.lost_bits else weight

    def bits_per_weight(self, packed: Packed) -> float:
        """Bits of all planes over weights; 16 for an empty weight."""
        return packed.nbytes * 8 / packed.numel if packed.numel else 16.0

    def _output(self, packed: Packed, out: Tensor | None) -> tuple[Tensor, Tensor]:
        """(out, its bits int16), raw weights already copied."""
        self.check_planes(packed)
        if out is None:
            out = torch.empty(packed.shape, dtype=torch.bfloat16, device=packed.device)
        expected = (packed.shape, torch.bfloat16, packed.device)
        if (tuple(out.shape), out.dtype, out.device) != expected or not out.is_contiguous():
            raise PackingError(
                f"out must be contiguous {expected[0]} {expected[1]} on {expected[2]}, "
                f"got {tuple(out.shape)} {out.dtype} on {out.device}"
            )
        bits = out.view(torch.int16)
        if packed.is_raw:
            bits.view(-1).copy_(packed.planes[RAW])
        return out, bits

    @abstractmethod
    def _planes(self, shape: tuple[int, ...]) -> dict[str, tuple[torch.dtype, int | None]]:
        """Dtype and elements of each plane of a weight, in their order; None where the weight's values decide."""

    @abstractmethod
    def _encode(self, bits: np.ndarray) -> dict[str, np.ndarray] | None:
        """uint16 [E, rows, cols], not empty → planes; None to store it raw."""

    @abstractmethod
    def _check(self, planes: dict[str, np.ndarray], shape: tuple[int, ...]) -> None:
        """PackingError for what a decoder must not be given, see `check`; dtypes and sizes of planes are right."""

    @abstractmethod
    def _decode_cpu(self, planes: dict[str, np.ndarray], out: np.ndarray, parallel: bool) -> None:
        """planes → out uint16 [E, rows, cols]."""

    @abstractmethod
    def _decode_triton(self, planes: dict[str, Tensor], out: Tensor) -> None:
        """planes → out int16 of the weight's shape."""


def check_offsets(name: str, offsets: np.ndarray, end: int) -> None:
    """PackingError unless `offsets`, signed, ascend from 0 to `end`."""
    if offsets[0] != 0 or offsets[-1] != end or (offsets[1:] < offsets[:-1]).any():
        raise PackingError(f"its {name} do not ascend from 0 to {end}")


def _tensor(plane: np.ndarray) -> Tensor:
    signed = {np.dtype(np.uint16): np.int16, np.dtype(np.uint32): np.int32}
    return torch.from_numpy(plane.view(signed.get(plane.dtype, plane.dtype)))


def _array(plane: Tensor) -> np.ndarray:
    """Numpy's unsigned view: bits, not numbers, so that shifts bring in zeros."""
    unsigned = {torch.int16: np.uint16, torch.int32: np.uint32}
    array = plane.numpy()
    return array.view(unsigned.get(plane.dtype, array.dtype))
