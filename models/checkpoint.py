"""Reading a Hugging Face checkpoint: safetensors in, one tensor at a time out.

The headers of all shards are read and checked against the config before anything big is touched. Then shards are
read one after the other; tensors that must wait for a partner in another shard are the only ones kept, so the peak
is what has been placed plus at most one shard.
"""

from __future__ import annotations

import math
import os
import struct
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import ARCHITECTURES
from .config import ConfigError, ModelConfig, load_config
from .json_files import MOST_BYTES, parse_json, read_json
from .naming import Role
from .packed import CheckpointError, PackedExperts, Wanted

_DTYPE_NAMES = {torch.bfloat16: "BF16", torch.float32: "F32"}
_DTYPE_BYTES = {"BF16": 2, "F32": 4}
_MOST_DIMS = 8
# A digest takes dense tensors of so many bytes whole.
_WHOLE_BYTES = 4 << 20
# Recomputed by every implementation; old checkpoints carry them.
_HARMLESS = ("rotary_emb.inv_freq",)


def read_header(path: Path) -> dict[str, dict]:
    """Tensors of a safetensors file: name → {dtype, shape, data_offsets}; checks that they fill the file exactly.

    Everything that the safetensors library refuses when it opens a file is refused here already, before anything
    big has been loaded. The format (https://github.com/huggingface/safetensors): u64 header length,
    JSON header, data.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{path} is no safetensors file: {size} bytes hold no header; download it again")
            length = struct.unpack("<Q", prefix)[0]
            if length > min(MOST_BYTES, size - 8):
                raise CheckpointError(
                    f"{path} is no safetensors file, or damaged: its header claims {length} bytes of a file of {size}, "
                    f"and {MOST_BYTES} are the most; download it again"
                )
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    try:
        header = parse_json(raw, object_pairs_hook=_unique_keys)
    except _DuplicateKeyError as error:
        raise CheckpointError(f"{path} is damaged: its header holds {error} twice; download it again") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: its header is not JSON: {error}; download it again") from None
    if not isinstance(header, dict) or not isinstance(header.pop("__metadata__", {}), dict):
        raise CheckpointError(f"{path} is damaged: its header is not a table of tensors; download it again")
    spans = sorted((*_checked_span(path, name, entry), name) for name, entry in header.items())
    end = 0
    for begin, stop, name in spans:
        if begin != end:
            raise CheckpointError(f"{path} is damaged: tensor {name} begins at byte {begin}, not at {end}, of the data")
        end = stop
    need = 8 + length + end
    if need > size:
        raise CheckpointError(f"{path} is truncated: {size} bytes, its tensors need {need}; download it again")
    if need < size:
        raise CheckpointError(f"{path} is damaged: {size - need} bytes at its end belong to no tensor")
    return header


class _DuplicateKeyError(Exception):
    pass


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise _DuplicateKeyError(next(key for key, count in counts.items() if count > 1))
    return table


def _checked_span(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """data_offsets of a header entry, after checking its fields and that they agree."""
    try:
        (begin, stop), shape, dtype = entry["data_offsets"], entry["shape"], entry["dtype"]
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(f"{path} is damaged: the header entry of {name} is not valid") from None
    valid = isinstance(shape, list) and isinstance(dtype, str) and len(shape) <= _MOST_DIMS
    if not (valid and all(type(n) is int and 0 <= n < 1 << 63 for n in (*shape, begin, stop)) and begin <= stop):
        raise CheckpointError(f"{path} is damaged: the header entry of {name} is not valid")
    if dtype in _DTYPE_BYTES and stop - begin != math.prod(shape) * _DTYPE_BYTES[dtype]:
        raise CheckpointError(
            f"{path} is damaged: tensor {name} has {stop - begin} bytes, {dtype} of shape {shape} has "
            f"{math.prod(shape) * _DTYPE_BYTES[dtype]}"
        )
    return begin, stop


class Checkpoint:
    """One checkpoint directory, checked; `packed`: its experts, where they are compressed (see `packed`).

    Raises ConfigError, CheckpointError.
    """

    def __init__(self, model_dir: Path | str) -> None:
        self.directory = Path(model_dir)
        packed = PackedExperts.in_directory(self.directory)
        self.config: ModelConfig = load_config(self.directory)
        self.packed = PackedExperts(self.directory, self.config) if packed else None
        shards = self._shards()
        self._roles: dict[Path, dict[str, Role]] = {}
        where: dict[str, Path] = {}
        entries: dict[str, dict] = {}
        for path in shards:
            for name, entry in read_header(path).items():
                if name in where:
                    raise CheckpointError(f"tensor {name} is both in {where[name]} and in {path}")
                where[name], entries[name] = path, entry
        for name, role in self._match(set(where)).items():
            path, entry = where[name], entries[name]
            if tuple(entry["shape"]) != role.shape:
                raise CheckpointError(
                    f"{path}: tensor {name} has shape {entry['shape']}, config.json asks for {list(role.shape)}"
                )
            if entry["dtype"] not in (_DTYPE_NAMES[self.config.dtype], "F32" if role.may_be_fp32 else None):
                raise CheckpointError(
                    f"{path}: tensor {name} is {entry['dtype']}, config.json says {_DTYPE_NAMES[self.config.dtype]}"
                )
            self._roles.setdefault(path, {})[name] = role
        self.pending = 0  # tensors that wait for a partner, while `experts` runs

    @cached_property
    def content(self) -> str:
        """Digest that tells models apart: of config, headers, all tensors up to 4 MiB that are no expert's (routers,
        norms), and 4 KiB of every MiB of the others; so that gigabytes are told apart at each start. A packed one has
        that of what was packed."""
        if self.packed:
            return self.packed.header.content
        digest = xxhash.xxh3_128((self.directory / "config.json").read_bytes())
        for path in self._shards():
            roles, entries = self._roles.get(path, {}), read_header(path)
            spans = sorted((*entry["data_offsets"], name) for name, entry in entries.items())
            with path.open("rb") as file:
                handle = file.fileno()
                data = os.fstat(handle).st_size - max((end for _, end, _ in spans), default=0)
                digest.update(os.pread(handle, data, 0))
                for begin, end, name in spans:
                    whole = end - begin <= _WHOLE_BYTES and not (name in roles and roles[name].is_expert)
                    step, most = (_WHOLE_BYTES, _WHOLE_BYTES) if whole else (1 << 20, 4096)
                    for at in range(begin, end, step):
                        digest.update(os.pread(handle, min(most, end - at), data + at))
        return digest.hexdigest()

    def _shards(self) -> list[Path]:
        index, single = self.directory / "model.safetensors.index.json", self.directory / "model.safetensors"
        if not index.exists():
            if not single.exists():
                raise CheckpointError(
                    f"{self.directory} has neither {single.name} nor {index.name}; only safetensors can be read"
                )
            return [single]
        try:
            names = sorted(set(read_json(index)["weight_map"].values()))
        except OSError as error:
            raise CheckpointError(f"{index} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(f"{index} is damaged: it holds no weight_map") from None
        for name in names:
            # An index comes from elsewhere: it must not lead out of its directory.
            if not isinstance(name, str) or not name or "\0" in name or Path(name).name != name:
                raise CheckpointError(f"{index} is damaged: {name!r} is not the name of a file beside it")
            if not os.path.exists(self.directory / name):  # unlike Path's, False also for a name that cannot be
                raise CheckpointError(f"{index} names {name}, which does not exist; download the missing shard")
        return [self.directory / name for name in names]

    def _match(self, names: set[str]) -> dict[str, Role]:
        """Role of every tensor; each required one exactly once, and one complete scheme for each layer's experts."""
        roles = ARCHITECTURES[self.config.arch].tensor_roles(self.config)
        found = dict(roles.required)
        for ways in roles.expert_schemes:
            # The scheme that is most nearly complete is the one meant; what it lacks is what is missing.
            meant = max(ways, key=lambda way: len(way.keys() & names) / len(way))
            found |= meant
        if self.packed:
            found = {name: role for name, role in found.items() if not role.is_expert}
        missing = sorted(found.keys() - names)
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise CheckpointError(f"{self.directory}: tensor {missing[0]} is missing{more}")
        extra = sorted(n for n in names - found.keys() if not n.endswith(_HARMLESS) and not n.startswith(roles.unused))
        if self.config.tie_word_embeddings:
            extra = [n for n in extra if n != "lm_head.weight"]
        if extra:
            raise CheckpointError(
                f"{self.directory}: tensor {extra[0]} is not part of a {self.config.arch} model as config.json has it"
            )
        return found

    @contextmanager
    def _open(self, path: Path) -> Iterator:
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}; download it again") from None

    def dense_tensors(self) -> Iterator[tuple[str, int | None, Tensor]]:
        """(role, layer, tensor) of every non-expert tensor as the decoder wants it, shard by shard."""
        roles = {name: role for table in self._roles.values() for name, role in table.items()}
        place = getattr(ARCHITECTURES[self.config.arch], "place", lambda config, kind, tensor: [(kind, tensor)])
        for name, stored in self.named_dense_tensors():
            for kind, tensor in place(self.config, roles[name].kind, stored):
                # Whoever keeps a view keeps the file mapped. Matrices are packed, but an fp32 vector is placed as it is
                # on a CPU.
                yield kind, roles[name].layer, tensor.clone() if tensor.dim() == 1 else tensor

    def named_dense_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of every non-expert tensor, shard by shard; tensors are views of a file."""
        for path, roles in self._roles.items():
            wanted = [name for name, role in roles.items() if not role.is_expert]
            if wanted:
                with self._open(path) as file:
                    for name in wanted:
                        yield name, file.get_tensor(name)

    def experts(self, wanted: Wanted = lambda layer, expert: True) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """(layer, expert, gate_up [2I, H], down [H, I]) of every expert that is wanted, as soon as its parts have been
        read. Layers are numbered as in the decoder, those without experts too."""
        if self.packed:
            yield from self.packed.experts(wanted)
            return
        parts: dict[tuple[int, int], dict[str, Tensor]] = defaultdict(dict)
        self.pending = 0  # an earlier pass may have been given up half-way

        def add(layer: int, expert: int, kind: str, part: Tensor) -> Iterator[tuple[int, int, Tensor, Tensor]]:
            have = parts[layer, expert]
            have[kind] = part
            self.pending += 1
            if have.keys() >= {"gate", "up"}:
                have["gate_up"] = torch.cat([have.pop("gate"), have.pop("up")])
                self.pending -= 1
            if have.keys() >= {"gate_up", "down"}:
                parts.pop((layer, expert))
                self.pending -= 2
                yield layer, expert, have["gate_up"], have["down"]

        for path, roles in self._roles.items():
            # By expert, so that partners meet early whatever the order of the file.
            ordered = sorted(
                ((name, role) for name, role in roles.items() if role.is_expert),
                key=lambda item: (item[1].layer, item[1].expert or 0),
            )
            if not ordered:
                continue
            with self._open(path) as file:
                for name, role in ordered:
                    assert role.layer is not None, "every expert belongs to a layer"
                    if role.expert is not None:
                        if wanted(role.layer, role.expert):
                            yield from add(role.layer, role.expert, role.kind, file.get_tensor(name))
                        continue
                    fused = file.get_slice(name)
                    for expert in filter(partial(wanted, role.layer), range(self.config.num_experts)):
                        yield from add(role.layer, expert, role.kind.removeprefix("fused_"), fused[expert])
        assert not parts, f"experts without all their parts: {sorted(parts)[:3]}"


__all__ = ["Checkpoint", "CheckpointError", "ConfigError"]
