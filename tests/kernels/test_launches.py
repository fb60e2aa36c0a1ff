"""Launches compiled and not run: what serving compiles, counted without compiling it."""

from __future__ import annotations

import pytest

from ..compiling import run_script

pytest.importorskip("triton.backends.nvidia")

SERVE = """
from collections import Counter
from types import SimpleNamespace

import torch
from triton.runtime.jit import JITFunction

from fluxmoe.kernels.expert_table import ExpertTable
from fluxmoe.kernels.launches import compile_only
from fluxmoe.kernels.ops import (
    AttentionMetadata, DeltaNetDims, DeltaNetWeights, ExpertDims, LayerDims, Limits, Linear, RopeTable,
)
from fluxmoe.kernels.triton.experts import TritonExperts
from fluxmoe.kernels.triton.ops import TritonOps

compiled = Counter()

def count(kernel, key, signature, device, constexprs, options, attrs, warmup):
    tile = {kernel.params[path[0]].name: value for path, value in constexprs.items()
            if kernel.params[path[0]].is_constexpr or value is None}
    compiled[kernel.__name__, str(tile), options.num_warps, options.num_stages] += 1
    done = SimpleNamespace(src=SimpleNamespace(constants=constexprs), metadata=SimpleNamespace(num_warps=1, name=""))
    kernel.device_caches[device][0][key] = done
    return done

JITFunction._do_compile = count

def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")

def ids(*shape):
    return empty(*shape, dtype=torch.int32)

delta = DeltaNetDims(4, 8, 64, 64, 4)
dims = LayerDims(
    hidden=2048, heads=32, kv_heads=4, head_dim=128, experts=128, vocab=1024, dtype=torch.bfloat16, qk_norm="head",
    delta=delta,
)
block = torch.zeros(16, dtype=torch.uint8)
experts = SimpleNamespace(table=ExpertTable.from_blocks([(block, block)] * 128, "cpu", FORMAT), wait=lambda d: None)

def linear(n, k):
    return Linear(empty(n * k * 2, dtype=torch.uint8), n, k, torch.bfloat16)

with compile_only(90):
    ops = TritonOps(dims, Limits(1024, 256, 4096, 32), "meta")
    expert_ops = TritonExperts(ExpertDims(2048, 768, 128, 8, torch.bfloat16), 1024, "meta", formats=(FORMAT,))
    cache = empty(512, 4, 32, 128)
    norm = empty(128, dtype=torch.float32)
    rope = RopeTable(empty(4096, 64, dtype=torch.float32), empty(4096, 64, dtype=torch.float32))
    weights = DeltaNetWeights(linear(delta.projected, 2048), empty(delta.channels, 4, dtype=torch.float32),
                              *(empty(n, dtype=torch.float32) for n in (8, 8, 64)))
    for sequences, tokens in BATCHES:
        metadata = AttentionMetadata(ids(sequences + 1), ids(sequences), ids(sequences, 128), ids(tokens),
                                     empty(tokens, dtype=torch.int64), 32, ids(1), ids(sequences))
        x = empty(tokens, 2048)
        ops.rms_norm(x, empty(2048, dtype=torch.float32))
        ops.attention(ops.qkv(x, linear(dims.qkv_size, 2048)), norm, norm, rope, metadata, cache, cache)
        ops.delta_net(x, weights, metadata, empty(257, 3, delta.channels),
                      empty(257, 8, 64, 64, dtype=torch.float32))
        routing = expert_ops.route(ops.router(x, linear(128, 2048)), metadata.num_tokens)
        expert_ops.moe_add(x, routing, experts, x)
        ops.logits(empty(sequences, 2048), linear(1024, 2048))
for (kernel, *_), times in sorted(compiled.items()):
    print(kernel, times)
"""
DECODE = [(n, n) for n in [*range(1, 41), *range(48, 240, 16), 3 * 17, 77, 99, 111, 133, 200, 255, 256]]
PREFILL = [(1, 7), (1, 16), (2, 64), (3, 100), (5, 333), (16, 512), (17, 1000), (32, 1024)]


@pytest.mark.parametrize("expert_format", ["dense", "planar12"])
def test_serving_any_batch_compiles_a_kernel_once_a_tile(expert_format, tmp_path):
    """Numbers of tokens, blocks and sequences are not in what a kernel is compiled for: only its tile is."""
    assert len(DECODE) == 60
    lines = run_script(f"FORMAT, BATCHES = {expert_format!r}, {DECODE + PREFILL}\n{SERVE}", tmp_path)
    rows = [line.split() for line in lines]
    kernels = {kernel for kernel, _ in rows}
    assert len(kernels) == 17, kernels
    assert {times for _, times in rows} == {"1"}, lines
    for kernel in kernels:
        # Routing's tiles follow the batch in powers of two up to 32 tokens; two GEMMs share a kernel.
        assert sum(name == kernel for name, _ in rows) <= 8, lines
