"""QK-norm, clipping, rotation and KV write against float64 and against the ops reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from fluxmoe.kernels.triton import rope_kv
from fluxmoe.kernels.triton.rope_kv import rope_and_cache_torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu
RTOL = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float32: 2e-5}
BLOCKS = 5
# Called with lists of its first arguments.
rope_and_cache: Callable[..., torch.Tensor] = rope_kv.rope_and_cache


def inputs(tokens, heads, kv_heads, head_dim, block_size, qk_norm, dtype, positions=40):
    """Positional arguments up to slot_mapping; slots are distinct and scattered over all blocks."""
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim).to(dtype)
    widths = {"none": None, "head": (head_dim, head_dim), "full": (heads * head_dim, kv_heads * head_dim)}[qk_norm]
    norms = (None, None) if widths is None else tuple(torch.randn(w) for w in widths)
    rope = (torch.randn(positions, head_dim // 2), torch.randn(positions, head_dim // 2))
    where = (
        torch.randint(positions, (tokens,), dtype=torch.int32),
        torch.randperm(BLOCKS * block_size)[:tokens].to(torch.int64),
    )
    return [None if t is None else t.to(DEVICE) for t in (qkv, *norms, *rope, *where)]


def outputs(tokens, heads, kv_heads, head_dim, block_size, dtype):
    """k_cache, v_cache, q_out, poisoned."""
    shapes = [(BLOCKS, kv_heads, block_size, head_dim)] * 2 + [(tokens, heads, head_dim)]
    return [torch.full(shape, float("nan"), dtype=dtype, device=DEVICE) for shape in shapes]


CASES = [
    # tokens, heads, kv_heads, head_dim, block_size, qk_norm, clip
    (0, 4, 2, 24, 16, "none", 0.0),
    (1, 1, 1, 2, 16, "none", 0.0),
    (5, 4, 2, 24, 16, "head", 0.0),
    (3, 6, 2, 80, 48, "full", 0.7),
    (4, 8, 8, 64, 16, "none", 0.5),
    (2, 3, 1, 24, 16, "full", 0.0),
    (3, 8, 1, 128, 32, "head", 0.9),
    (2, 32, 4, 128, 16, "head", 0.0),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("tokens", "heads", "kv_heads", "head_dim", "block_size", "qk_norm", "clip"), CASES)
def test_matches_float64_and_touches_only_its_slots(
    tokens, heads, kv_heads, head_dim, block_size, qk_norm, clip, dtype
):  # fmt: skip
    args = inputs(tokens, heads, kv_heads, head_dim, block_size, qk_norm, dtype)
    options = dict[str, Any](heads=heads, kv_heads=kv_heads, head_dim=head_dim, block_size=block_size)
    options |= dict(qk_norm=qk_norm, clip=clip, eps=1e-6)
    got = outputs(tokens, heads, kv_heads, head_dim, block_size, dtype)
    expected = outputs(tokens, heads, kv_heads, head_dim, block_size, torch.float64)
    rope_and_cache(*args, *got, **options)
    rope_and_cache_torch(*args, *expected, **options)
    for ours, theirs in zip(got, expected, strict=True):
        # The rotation subtracts: errors are relative to its operands, of order 1.
        atol = 1e-6 if dtype == torch.float32 else 1e-5
        torch.testing.assert_close(
            ours.double(), theirs, rtol=RTOL[dtype], atol=atol if clip == 0 else 2e-5, equal_nan=True
        )


@pytest.mark.parametrize(("qk_norm", "clip"), [("none", 0.0), ("head", 0.0), ("full", 0.8)])
def test_order_of_operations_is_that_of_the_reference_ops(qk_norm, clip):
    """Attention over a single position returns v; over the cache written here, the same q·k as TorchOps'."""
    from fluxmoe.kernels.ops import AttentionMetadata, LayerDims, Limits, RopeTable
    from fluxmoe.kernels.reference.ops import TorchOps

    tokens, heads, kv_heads, head_dim, block_size = 6, 4, 2, 24, 16
    dims = LayerDims(
        hidden=8, heads=heads, kv_heads=kv_heads, head_dim=head_dim, experts=1, vocab=1, dtype=torch.float32,
        qk_norm=qk_norm, clip_qkv=clip,
    )  # fmt: skip
    ops = TorchOps(dims, Limits(tokens, 1, 16, block_size), DEVICE, torch.float32)
    args = inputs(tokens, heads, kv_heads, head_dim, block_size, qk_norm, torch.float32)
    qkv, q_norm, k_norm, cos, sin, positions, slots = args
    caches = [torch.zeros(BLOCKS, block_size, kv_heads, head_dim, device=DEVICE) for _ in range(2)]
    rotated: list[torch.Tensor] = []

    def attend(q, k, v):
        rotated.append(q)
        return q.flatten(1)

    none = torch.zeros(1, 1, dtype=torch.int32, device=DEVICE)
    metadata = AttentionMetadata(
        torch.tensor([0, tokens]), torch.tensor([tokens]), none, positions, slots, block_size
    )  # fmt: skip
    with patch.object(ops, "_attend", attend):
        ops.attention(qkv, q_norm, k_norm, RopeTable(cos, sin), metadata, *caches)
    k_cache, v_cache, q_out = outputs(tokens, heads, kv_heads, head_dim, block_size, torch.float32)
    rope_and_cache(
        *args, k_cache, v_cache, q_out, heads=heads, kv_heads=kv_heads, head_dim=head_dim, block_size=block_size,
        qk_norm=qk_norm, clip=clip, eps=dims.eps,
    )  # fmt: skip
    torch.testing.assert_close(q_out, rotated[0], rtol=1e-5, atol=1e-5)
    for ours, theirs in zip((k_cache, v_cache), caches, strict=True):
        ours = ours.transpose(1, 2).reshape(-1, kv_heads, head_dim)[slots]
        torch.testing.assert_close(ours, theirs.view(-1, kv_heads, head_dim)[slots], rtol=1e-5, atol=1e-5)


def test_a_negative_slot_writes_q_but_no_cache():
    """Padded rows of a captured graph."""
    args = inputs(2, 4, 2, 24, 16, "none", torch.float32)
    args[-1].fill_(-1)
    k_cache, v_cache, q_out = outputs(2, 4, 2, 24, 16, torch.float32)
    rope_and_cache(*args, k_cache, v_cache, q_out, heads=4, kv_heads=2, head_dim=24, block_size=16)
    assert k_cache.isnan().all()
    assert v_cache.isnan().all()
    assert not q_out.isnan().any()


def test_clipping_does_not_hide_a_nan():
    args = inputs(1, 2, 1, 24, 16, "none", torch.float32)
    args[0].fill_(float("nan"))
    k_cache, v_cache, q_out = outputs(1, 2, 1, 24, 16, torch.float32)
    k_cache.zero_(), v_cache.zero_()
    rope_and_cache(*args, k_cache, v_cache, q_out, heads=2, kv_heads=1, head_dim=24, block_size=16, clip=1.0)
    assert q_out.isnan().all()
    assert k_cache.isnan().sum() == v_cache.isnan().sum() == 24


def test_a_token_has_the_same_bits_in_any_batch():
    args = inputs(6, 4, 2, 24, 16, "head", torch.bfloat16)
    whole, alone = outputs(6, 4, 2, 24, 16, torch.bfloat16), outputs(1, 4, 2, 24, 16, torch.bfloat16)
    options = dict[str, Any](heads=4, kv_heads=2, head_dim=24, block_size=16, qk_norm="head")
    rope_and_cache(*args, *whole, **options)
    one = [args[0][4:5], *args[1:5], args[5][4:5], args[6][4:5]]
    rope_and_cache(*one, *alone, **options)
    assert torch.equal(whole[2][4:5], alone[2])
    block, offset = divmod(int(args[6][4]), 16)
    for a, b in zip(whole[:2], alone[:2], strict=True):
        assert torch.equal(a[block, :, offset], b[block, :, offset])


def test_says_what_it_expected():
    args = inputs(2, 4, 2, 24, 16, "none", torch.float32)
    results = outputs(2, 4, 2, 24, 16, torch.float32)
    options = dict[str, Any](heads=4, kv_heads=2, head_dim=24, block_size=16)
    with pytest.raises(ValueError, match="head_dim must be even"):
        rope_and_cache(*args, *results, **(options | {"head_dim": 23}))
    with pytest.raises(ValueError, match="qkv must be"):
        rope_and_cache(*args, *results, **(options | {"heads": 3}))
    with pytest.raises(ValueError, match="needs the weights"):
        rope_and_cache(*args, *results, **options, qk_norm="head")
    with pytest.raises(ValueError, match="none, head, full"):
        rope_and_cache(*args, *results, **options, qk_norm="row")
    with pytest.raises(ValueError, match="k_cache must be"):
        rope_and_cache(*args, results[0].transpose(1, 2), *results[1:], **options)
    args[5] = args[5].long()
    with pytest.raises(ValueError, match=r"positions.*int32.*int64"):
        rope_and_cache(*args, *results, **options)
