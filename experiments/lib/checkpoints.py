"""Hugging Face checkpoints of a real architecture, with generated weights distributed as trained ones are.

Weights are normal with a scale of their own per tensor, which gives their exponents the peaked distribution of
trained models (entropy about 2.6 bits; published: 2.57 to 2.74, arXiv 2603.17435); config.json says that they are
generated. The names and files are those that the Hub has, so transformers, vLLM and
our loader read the result alike. The tokenizer is a byte-level BPE: any text round-trips.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from fluxmoe.models import ARCHITECTURES
from fluxmoe.models.config import DTYPES
from fluxmoe.models.naming import Role
from fluxmoe.runtime.memory.budget import format_bytes
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from .args import check, option
from .results import UsageError, allowed, write_json
from .skew import MOST_SKEW, row_scales

# In config.json of what this file wrote.
GENERATED = "generated_weights"
_SPECIAL = ("<|begin|>", "<|end|>")
# 256 bytes and the special tokens: the least vocabulary of a byte-level tokenizer.
_MIN_VOCAB = 256 + len(_SPECIAL)
_WITH_DENSE_LAYERS = ("qwen3_moe", "qwen3_next")


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A model by its sizes."""

    arch: str = option("architecture", choices=tuple(ARCHITECTURES))
    layers: int = option("in all", 4, least=1)
    experts: int = option("of a layer", 8, least=1)
    top_k: int = option("experts of a token", 2, least=1)
    hidden: int = option("width", 256, least=1)
    moe_intermediate: int = option("width of an expert", 256, least=1)
    heads: int = option("of attention", 4, least=1)
    kv_heads: int | None = option("of keys and values (default: as many as heads)", None)
    head_dim: int | None = option("width of a head (default: hidden over heads)", None)
    vocab: int = option(f"tokens, at least {_MIN_VOCAB}: all bytes and the special tokens", 4096, least=_MIN_VOCAB)
    dtype: str = option("of weights", "bfloat16", choices=tuple(DTYPES))
    max_positions: int = option("longest context", 4096, least=1)
    dense_layers: tuple[int, ...] = option(
        "layers with an MLP as wide as the chosen experts together in the place of experts, numbered from 0 "
        f"({', '.join(_WITH_DENSE_LAYERS)})", (), metavar="LAYER",
    )  # fmt: skip

    def __post_init__(self) -> None:
        for f in fields(self):
            check(f, getattr(self, f.name))


def make_checkpoint(
    arch: str, out: Path | str, *, seed: int = 0, scale: float = 1.0, shard_bytes: int = 1 << 30,
    progress: bool = False, router_skew: float = 0.0, **sizes: Any,
) -> Path:  # fmt: skip
    """`write_checkpoint` of a ModelShape's fields by name."""
    return write_checkpoint(ModelShape(arch=arch, **sizes), out, seed, scale, shard_bytes, progress, router_skew)


def write_checkpoint(
    shape: ModelShape, out: Path | str, seed: int = 0, scale: float = 1.0, shard_bytes: int = 1 << 30,
    progress: bool = False, router_skew: float = 0.0,
) -> Path:  # fmt: skip
    """Write a checkpoint to the new directory `out`; all of it or nothing. Peak memory is one shard.

    scale: factor on every matrix; 1 keeps activations of order one (standard deviation 1/sqrt(fan-in)). router_skew:
    how unevenly experts are chosen, see `skew`.
    Raises UsageError and ConfigError on sizes that make no model, or do not fit on the disk.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists already; remove it or choose another --out")
    if not 0 < scale < math.inf or shard_bytes < 1:
        raise UsageError(f"--scale and --shard-bytes must be positive, got {scale} and {shard_bytes}")
    if not 0 <= router_skew <= MOST_SKEW:
        raise UsageError(f"--router-skew must be from 0 to {MOST_SKEW:g}, got {router_skew}")
    config, arch = hf_config(shape), ARCHITECTURES[shape.arch]
    # Before anything is written, a parent directory included.
    model = arch.config_from_hf(config)
    check_disk(out, model.non_expert_bytes + model.expert_bytes_total)
    roles = arch.tensor_roles(model)
    # The first scheme of each architecture is the one on the Hub.
    names = dict(roles.required) | {n: r for ways in roles.expert_schemes for n, r in ways[0].items()}
    zero_centred: frozenset[str] = getattr(arch, "ZERO_CENTRED", frozenset())
    with whole_directory(out) as temporary:
        write_json(temporary / "config.json", config | {GENERATED: True})
        write_json(temporary / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1})
        weights = _Weights(
            model.dtype, seed, scale, zero_centred, row_scales(model.num_experts, model.top_k, router_skew)
        )
        _write_shards(temporary, names, weights, shard_bytes, progress)
        _write_tokenizer(temporary, shape.vocab)
    return out


def check_disk(out: Path, nbytes: int) -> None:
    """UsageError unless `nbytes` are free where `out` will be."""
    there = next(path for path in (out, *out.resolve().parents) if path.exists())
    if nbytes > (free := shutil.disk_usage(there).free):
        raise UsageError(f"{out} needs {format_bytes(nbytes)}, of which {format_bytes(free)} are free on its disk")


@contextmanager
def whole_directory(out: Path) -> Iterator[Path]:
    """A directory beside `out` that becomes it in the end, and is removed where that is not reached.

    What a process that was killed left there is removed too.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    for left in out.parent.glob(f".{out.name}.*.unfinished"):
        process = left.name.split(".")[-2]
        if process.isdigit() and not Path(f"/proc/{process}").exists():
            shutil.rmtree(left, ignore_errors=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.unfinished")
    temporary.mkdir()
    try:
        yield temporary
        share(temporary)
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def hf_config(shape: ModelShape) -> dict[str, Any]:
    """config.json as the Hub has it for a shape."""
    arch, layers, experts, top_k, heads = shape.arch, shape.layers, shape.experts, shape.top_k, shape.heads
    hidden, moe_intermediate, dtype = shape.hidden, shape.moe_intermediate, shape.dtype
    dense = sorted(set(shape.dense_layers))
    if dense and arch not in _WITH_DENSE_LAYERS:
        raise UsageError(f"{arch} has experts in every layer; --dense-layers is for {' and '.join(_WITH_DENSE_LAYERS)}")
    if missing := [layer for layer in dense if not 0 <= layer < layers]:
        raise UsageError(f"--dense-layers {missing[0]} does not exist; {layers} layers are numbered from 0")
    size_of_head = hidden // heads if shape.head_dim is None else shape.head_dim
    config: dict[str, Any] = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": heads if shape.kv_heads is None else shape.kv_heads,
        "head_dim": size_of_head,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.max_positions,
        "dtype": dtype,
        "model_type": arch,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "num_experts_per_tok": top_k,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
        "torch_dtype": dtype,
    }
    if arch == "mixtral":
        extra = {"architectures": ["MixtralForCausalLM"], "num_local_experts": experts, "sliding_window": None}
        return config | extra | {"intermediate_size": moe_intermediate}
    if arch.startswith("qwen3"):
        config |= {
            "num_experts": experts,
            "moe_intermediate_size": moe_intermediate,
            "intermediate_size": top_k * moe_intermediate,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": dense,
        }
    if arch == "qwen3_moe":
        return config | {"architectures": ["Qwen3MoeForCausalLM"], "use_sliding_window": False}
    if arch == "qwen3_next":
        return config | {
            "architectures": ["Qwen3NextForCausalLM"],
            "shared_expert_intermediate_size": moe_intermediate,
            "full_attention_interval": 4,
            "partial_rotary_factor": 0.25,
            # As many value heads as query heads twice, in pairs that share a key head: the published model's shape.
            "linear_num_key_heads": heads,
            "linear_num_value_heads": 2 * heads,
            "linear_key_head_dim": size_of_head // 2,
            "linear_value_head_dim": size_of_head // 2,
            "linear_conv_kernel_dim": 4,
        }
    if config.pop("head_dim") * config["num_attention_heads"] != config["hidden_size"]:
        raise UsageError("olmoe has no head_dim of its own: --head-dim times --heads must be --hidden")
    return config | {
        "architectures": ["OlmoeForCausalLM"],
        "num_experts": experts,
        "intermediate_size": moe_intermediate,
        "norm_topk_prob": False,
        "clip_qkv": None,
    }


@dataclass(frozen=True)
class _Weights:
    """How tensors are made. routers: fp32 [E], the lengths of a router's rows, dealt anew in every layer."""

    dtype: torch.dtype
    seed: int
    scale: float
    zero_centred: frozenset[str]
    routers: Tensor

    def make(self, name: str, role: Role) -> Tensor:
        """One tensor; its generator is seeded by its name too, so a tensor does not depend on the others."""
        # torch's generator takes only 32 bits of a seed, so both go through a checksum.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
        if len(role.shape) == 1:
            return self._vector(role, generator).to(self.dtype)
        # Trained tensors of one kind differ in scale by some tens of per cent.
        jitter = torch.exp(0.2 * torch.randn((), generator=generator))
        spread = 1.0 if role.kind == "embed_tokens" else role.shape[-1] ** -0.5
        # Normalised inputs have unit variance; this gives router logits a spread at which a few experts stand out.
        spread *= 2.0 if role.kind == "router" else 1.0
        matrix = torch.randn(role.shape, generator=generator) * spread * jitter * self.scale
        if role.kind == "router":
            matrix *= self.routers[torch.randperm(len(matrix), generator=generator), None]
        return matrix.to(self.dtype)

    def _vector(self, role: Role, generator: torch.Generator) -> Tensor:
        if role.kind == "a_log":
            return torch.empty(role.shape).uniform_(1, 16, generator=generator).log()
        noise = torch.randn(role.shape, generator=generator)
        if role.kind in self.zero_centred:
            return 0.1 * noise
        if role.kind.endswith("bias") and role.kind != "dt_bias":
            return 0.02 * noise
        return 1 + 0.1 * noise


def _write_shards(directory: Path, names: dict[str, Role], weights: _Weights, shard_bytes: int, progress: bool) -> None:
    shards = list(_split(names, weights.dtype.itemsize, shard_bytes))
    files = [
        "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        for i in range(len(shards))
    ]
    with tqdm(total=len(names), desc="tensors", disable=not progress, leave=False) as bar:
        for file, shard in zip(files, shards, strict=True):
            tensors = {}
            for name in shard:
                tensors[name] = weights.make(name, names[name])
                bar.update()
            try:
                save_file(tensors, directory / file, metadata={"format": "pt"})
            except SafetensorError as error:  # how the library reports a full disk
                raise OSError(f"{file} cannot be written: {error}") from None
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        total = sum(weights.dtype.itemsize * torch.Size(role.shape).numel() for role in names.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(directory / "model.safetensors.index.json", index)


def _split(names: dict[str, Role], itemsize: int, shard_bytes: int) -> Iterator[list[str]]:
    """Names in layer order, cut where a shard would pass `shard_bytes`."""
    shard: list[str] = []
    size = 0
    for name, role in sorted(names.items(), key=lambda item: -1 if item[1].layer is None else item[1].layer):
        nbytes = itemsize * torch.Size(role.shape).numel()
        if shard and size + nbytes > shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += nbytes
    yield shard


def _write_tokenizer(directory: Path, vocab: int) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(_SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # English that every Python has: the docstrings of its standard library.
    modules = (argparse, inspect, json, shutil, tempfile, zlib)
    text = [inspect.getdoc(value) or "" for m in modules for value in vars(m).values() if callable(value)]
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(
        directory / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": _SPECIAL[0], "eos_token": _SPECIAL[1]},
    )


def share(directory: Path) -> None:
    """Give what private-by-default writers (mkdtemp, safetensors) made the modes that the user's umask asks for."""
    directory.chmod(allowed(0o777))
    for path in directory.iterdir():
        path.chmod(allowed(0o666))
