"""A checkpoint as llama.cpp reads it: one GGUF file, its weights as they are.

    magic "GGUF" | version u32 | tensors u64 | keys u64 | (key, type, value) … | (name, sizes, type, offset) … | data

Strings have their length before them, as u64; sizes are counted from the innermost; tensors begin at multiples of 32
bytes. (Format: docs/gguf.md of ggml, version 3; names and keys: llama.cpp's architecture olmoe.) Matrices stay bf16;
vectors and routers are fp32 there. The experts of a layer are one tensor a kind. Rotary positions pair halves of a head
in both, so that no row changes its place. There is no tokenizer: token ids go in and come out.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from fluxmoe.models import ARCHITECTURES
from fluxmoe.models.checkpoint import Checkpoint
from fluxmoe.models.config import ModelConfig
from torch import Tensor

from .checkpoints import check_disk
from .results import UsageError

_ALIGNMENT = 32
_F32, _BF16 = 0, 30
_KINDS = {
    "embed_tokens": "token_embd", "final_norm": "output_norm", "lm_head": "output", "input_norm": "attn_norm",
    "post_attn_norm": "ffn_norm", "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
    "q_norm": "attn_q_norm", "k_norm": "attn_k_norm", "router": "ffn_gate_inp", "gate": "ffn_gate_exps",
    "up": "ffn_up_exps", "down": "ffn_down_exps",
}  # fmt: skip


def write_gguf(source: Path, out: Path) -> Path:
    """Write the file `out`, whole or not at all; about 1 GB of memory at OLMoE-1B-7B's size. UsageError for a model
    that llama.cpp would compute otherwise."""
    checkpoint = Checkpoint(source)
    config = checkpoint.config
    _check(config)
    if out.exists():
        raise UsageError(f"{out} exists already; remove it or give another name")
    check_disk(out, int(1.01 * (config.non_expert_bytes + config.expert_bytes_total)))
    shapes = _shapes(config)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(_header(config, shapes))
            for name, data in _in_order(checkpoint, shapes):
                _align(file)
                file.write(data.view(-1).view(torch.uint8).numpy().data)
                assert data.numel() == int(np.prod(shapes[name][0])), name
            file.flush()
            os.fsync(file.fileno())
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    return out


def _check(config: ModelConfig) -> None:
    """UsageError for what the architecture `olmoe` of llama.cpp does not have."""
    wrong = {
        f"architecture {config.arch}": config.arch != "olmoe", "tied embeddings": config.tie_word_embeddings,
        "clipped projections": config.clip_qkv is not None, "biases": config.attention_bias,
        "renormalised routing": config.norm_topk_prob, "scaled positions": config.rope_scaling is not None,
        f"weights in {config.dtype}": config.dtype != torch.bfloat16,
    }  # fmt: skip
    if any(wrong.values()):
        what = " and ".join(name for name, is_so in wrong.items() if is_so)
        raise UsageError(f"only OLMoE in bf16 as published can be written for llama.cpp, not a model with {what}")


def _shapes(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], int]]:
    """Tensor → (shape, type), in the order of the file: layer by layer, as they are read."""
    found: dict[str, tuple[tuple[int, ...], int]] = {}
    experts, hidden, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
    for role in ARCHITECTURES[config.arch].tensor_roles(config).required.values():
        found[_name(role.kind, role.layer)] = role.shape, _F32 if len(role.shape) == 1 else _BF16
    for layer in config.moe_layers:
        found[_name("router", layer)] = (experts, hidden), _F32
    for layer in config.moe_layers:
        found |= {_name(kind, layer): ((experts, inner, hidden), _BF16) for kind in ("gate", "up")}
        found[_name("down", layer)] = (experts, hidden, inner), _BF16
    return found


def _name(kind: str, layer: int | None) -> str:
    return f"{_KINDS[kind]}.weight" if layer is None else f"blk.{layer}.{_KINDS[kind]}.weight"


def _header(config: ModelConfig, shapes: dict[str, tuple[tuple[int, ...], int]]) -> bytes:
    """All before the data, aligned."""
    keys: dict[str, int | float | str] = {
        "general.architecture": "olmoe", "general.alignment": _ALIGNMENT, "olmoe.vocab_size": config.vocab_size,
        "olmoe.context_length": config.max_position_embeddings, "olmoe.embedding_length": config.hidden_size,
        "olmoe.block_count": config.num_layers, "olmoe.feed_forward_length": config.moe_intermediate_size,
        "olmoe.attention.head_count": config.num_heads, "olmoe.attention.head_count_kv": config.num_kv_heads,
        "olmoe.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "olmoe.rope.freq_base": float(config.rope_theta), "olmoe.rope.dimension_count": config.head_dim,
        "olmoe.expert_count": config.num_experts, "olmoe.expert_used_count": config.top_k,
        "tokenizer.ggml.model": "none",
    }  # fmt: skip
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(shapes), len(keys))]
    for key, value in keys.items():
        parts += [_text(key), _value(value)]
    offset = 0
    for name, (shape, kind) in shapes.items():
        sizes = shape[::-1]
        parts += [_text(name), struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)]
        offset += _padded(int(np.prod(shape)) * (4 if kind == _F32 else 2))
    header = b"".join(parts)
    return header.ljust(_padded(len(header)), b"\0")


def _value(value: int | float | str) -> bytes:
    """With its type before it: u32, f32 or a string."""
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    return struct.pack("<II", 4, value) if isinstance(value, int) else struct.pack("<If", 6, value)


def _in_order(checkpoint: Checkpoint, shapes: dict[str, tuple[tuple[int, ...], int]]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor as the file has it, in the order of `shapes`: experts last, by layer."""
    config = checkpoint.config
    dense = {_name(kind, layer): tensor for kind, layer, tensor in checkpoint.dense_tensors()}
    for name, (_, as_type) in shapes.items():
        if name in dense:
            yield name, (dense[name].float() if as_type == _F32 else dense[name]).contiguous()
    for layer in config.moe_layers:
        kinds: dict[str, Tensor] = {
            kind: torch.empty(shapes[_name(kind, layer)][0], dtype=config.dtype) for kind in ("gate", "up", "down")
        }
        wanted = lambda at, _: at == layer  # noqa: B023, E731 - used before the next
        for _, expert, gate_up, down in checkpoint.experts(wanted):
            kinds["gate"][expert], kinds["up"][expert] = gate_up.chunk(2)
            kinds["down"][expert] = down
        yield from ((_name(kind, layer), tensor) for kind, tensor in kinds.items())


def _align(file: BinaryIO) -> None:
    at = file.tell()
    file.write(b"\0" * (_padded(at) - at))


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
