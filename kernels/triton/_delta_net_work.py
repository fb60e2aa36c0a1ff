"""What the kernels of `_delta_net` declare of their launches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..work import Work, contexts, lengths

# Tokens a chunk: rows that fill one wgmma, and few enough for I + A to be inverted in registers.
CHUNK_TOKENS = 64


def recurrent_work(args: Mapping[str, Any]) -> Work:
    """Of sequences that are not left alone: states in and out, and every token's inputs and o."""
    x, dims, state, most = (args[name] for name in ("x_ptr", "DIMS", "state_ptr", "MOST_TOKENS"))
    mine = [(n, context) for n, context in _sequences(args) if n <= most]
    going_on = sum(context > n for n, context in mine)
    inputs = dims.channels + 2 * dims.value_heads
    elements = sum(n for n, _ in mine) * (inputs + dims.value_size) + going_on * (dims.taps - 1) * dims.channels
    return Work(elements * x.element_size() + (len(mine) + going_on) * state[0].nbytes)


def _sequences(args: Mapping[str, Any]) -> list[tuple[float, float]]:
    """(tokens, context) of each."""
    where, tokens = args["where"], len(args["x_ptr"] if "x_ptr" in args else args["qkv_ptr"])
    # Where nobody knows, a single token goes on and a prompt begins.
    return list(zip(lengths(where.query_start, tokens), contexts(where.context_lens, 2), strict=True))


def _prompts(tokens: list[float]) -> list[float]:
    """Of the sequences, those that go in chunks."""
    return [length for length in tokens if length > 1]


def conv_work(args: Mapping[str, Any]) -> Work:
    tokens = sum(n for n, _ in _sequences(args) if n >= args["LEAST_TOKENS"])
    return Work(tokens * args["DIMS"].channels * (args["x_ptr"].element_size() + args["qkv_ptr"].element_size()))


def chunk_work(args: Mapping[str, Any]) -> Work:
    """q, k and gates in; P, (I + A)⁻¹ and gates out. q kᵀ, k kᵀ, and four products in three parts for the inverse."""
    dims, x, qkv, pairs = args["DIMS"], args["x_ptr"], args["qkv_ptr"], args["scores_ptr"]
    prompts = _prompts(lengths(args["query_start_ptr"], len(x)))
    chunks = sum(-(-length // CHUNK_TOKENS) for length in prompts)
    read = 2 * dims.key_size * qkv.element_size() + 2 * dims.value_heads * x.element_size()
    written = dims.value_heads * (2 * CHUNK_TOKENS * pairs.element_size() + 2 * args["gates_ptr"].element_size())
    parts = 3 if pairs.element_size() == 2 else 1
    flops = 2 * chunks * dims.value_heads * CHUNK_TOKENS * CHUNK_TOKENS * (2 * dims.key_dim + 4 * parts * CHUNK_TOKENS)
    return Work(sum(prompts) * (read + written), flops)


def state_work(args: Mapping[str, Any]) -> Work:
    dims, qkv, pairs, state = args["DIMS"], args["qkv_ptr"], args["scores_ptr"], args["state_ptr"]
    mine = [(n, context) for n, context in _sequences(args) if n > 1]
    tokens = sum(n for n, _ in mine)
    states = len(mine) + sum(context > n for n, context in mine)
    token = 2 * (dims.key_size + dims.value_size) * qkv.element_size()
    token += dims.value_heads * (2 * CHUNK_TOKENS * pairs.element_size() + 2 * args["gates_ptr"].element_size())
    flops = 2 * tokens * dims.value_heads * dims.value_dim * (3 * dims.key_dim + 2 * CHUNK_TOKENS)
    return Work(tokens * token + states * state[0].nbytes, flops)


def finish_work(args: Mapping[str, Any]) -> Work:
    """o, z and the output of every token, and the inputs that a convolution keeps."""
    dims, x, out = args["DIMS"], args["x_ptr"], args["out_ptr"]
    kept = 2 * len(args["where"].context_lens) * (dims.taps - 1) * dims.channels
    read = len(x) * dims.value_size * (args["qkv_ptr"].element_size() + x.element_size())
    return Work(read + out.nbytes + kept * x.element_size())
