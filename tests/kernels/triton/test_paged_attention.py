"""Paged attention against float64, and the properties that hold bit for bit."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fluxmoe.kernels.triton.paged_attention import (
    AttentionTile,
    attention_tile,
    choose_num_splits,
    padded_dim,
    paged_attention,
    paged_attention_torch,
    workspace_bytes,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu
UNIT = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2e-6}


def batch(chunks, *, heads=4, kv_heads=2, head_dim=24, block_size=16, dtype=torch.float32, window=0) -> SimpleNamespace:
    """chunks: (context, queries) of each sequence, whose blocks lie scattered in a cache that is NaN elsewhere.

    Table entries beyond a context, and those of blocks wholly below every query's window, are garbage.
    """
    blocks = [-(-context // block_size) for context, _ in chunks]
    num_blocks = sum(blocks) + 2
    shape = (num_blocks, kv_heads, block_size, head_dim)
    k_cache, v_cache = (torch.full(shape, float("nan"), dtype=dtype) for _ in range(2))
    free = iter(torch.randperm(num_blocks).tolist())
    table = torch.full((len(chunks), max([*blocks, 1]) + 2), 1 << 30, dtype=torch.int32)
    for s, (context, queries) in enumerate(chunks):
        low = max(0, context - queries - window + 1) if window else 0
        for position in range(low, context):
            index = position // block_size
            if table[s, index] == 1 << 30:
                table[s, index] = next(free)
            k_cache[table[s, index], :, position % block_size] = torch.randn(kv_heads, head_dim).to(dtype)
            v_cache[table[s, index], :, position % block_size] = torch.randn(kv_heads, head_dim).to(dtype)
    starts = [0, *itertools.accumulate(queries for _, queries in chunks)]
    return SimpleNamespace(
        q=(2 * torch.randn(starts[-1], heads, head_dim)).to(dtype).to(DEVICE),
        k=k_cache.to(DEVICE),
        v=v_cache.to(DEVICE),
        table=table.to(DEVICE),
        contexts=torch.tensor([c for c, _ in chunks], dtype=torch.int32, device=DEVICE),
        starts=torch.tensor(starts, dtype=torch.int32, device=DEVICE),
        options=dict(scale=head_dim**-0.5, window=window, block_size=block_size),
        max_query_len=max([n for _, n in chunks], default=0),
    )


def run(b, **options) -> torch.Tensor:
    guarded = torch.full((len(b.q) + 2, *b.q.shape[1:]), float("nan"), dtype=b.q.dtype, device=DEVICE)
    guarded[len(b.q) :] = 7.0
    # Poisoned: empty shares must not be read.
    workspace = torch.full((1 << 20,), float("nan"), device=DEVICE)
    options = dict[str, Any](max_query_len=b.max_query_len, workspace=workspace) | b.options | options
    out = paged_attention(b.q, b.k, b.v, b.table, b.contexts, b.starts, out=guarded[: len(b.q)], **options)
    assert (guarded[len(b.q) :] == 7.0).all(), "written past the last token"
    return out


def reference(b) -> torch.Tensor:
    return paged_attention_torch(b.q, b.k, b.v, b.table, b.contexts, b.starts, **b.options)


def assert_matches(got, expected, dtype):
    """Scale-aware: probabilities and result are rounded to `dtype`, so errors grow with the values averaged."""
    scale = expected.abs().max().item() if expected.numel() else 0.0
    error = (got.cpu().double() - expected).abs()
    assert not got.isnan().any()
    # `max` of nothing is an error.
    assert error.numel() == 0 or error.max() <= 2 * UNIT[dtype] * scale + 1e-6, (error.max().item(), scale)
    rms = error.square().mean().sqrt() if error.numel() else 0.0
    assert rms <= 0.5 * UNIT[dtype] * scale + 1e-6, (float(rms), scale)


MIXED = [(70, 70), (33, 1), (5, 5), (40, 7), (1, 1)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("chunks", "shape"),
    [
        ([], {}),
        ([(0, 0)], {}),
        ([(1, 1)], {}),
        ([(1, 1), (16, 1), (17, 1), (100, 1)], {}),
        ([(3, 3)], {"heads": 1, "kv_heads": 1}),
        (MIXED, {}),
        ([(65, 65), (64, 2), (63, 1)], {"heads": 3, "kv_heads": 1, "head_dim": 80, "block_size": 48}),
        ([(97, 1), (48, 1)], {"heads": 8, "kv_heads": 1, "head_dim": 80, "block_size": 48}),
        ([(20, 20)], {"heads": 8, "kv_heads": 1, "head_dim": 64}),
        ([(50, 3)], {"heads": 5, "kv_heads": 1, "head_dim": 128, "block_size": 32}),
        ([(40, 1), (20, 2)], {"heads": 2, "kv_heads": 2, "head_dim": 256, "block_size": 32}),
    ],
)
def test_matches_float64(chunks, shape, dtype):
    b = batch(chunks, dtype=dtype, **shape)
    assert_matches(run(b), reference(b), dtype)


def test_float16_too():
    for chunks in (MIXED[1:], [(40, 1)]):
        b = batch(chunks, dtype=torch.float16)
        assert_matches(run(b), reference(b), torch.float16)


@pytest.mark.parametrize("window", [1, 7, 16, 40])
def test_sliding_window_reads_nothing_below_itself(window):
    for chunks in (MIXED, [(c, 1) for c, _ in MIXED]):
        b = batch(chunks, window=window)
        assert_matches(run(b), reference(b), torch.float32)


@pytest.mark.parametrize("num_splits", [2, 5])
@pytest.mark.parametrize("window", [0, 500])
def test_splits_agree_with_one_another_and_empty_ones_add_nothing(num_splits, window):
    b = batch([(600, 1), (257, 1), (1, 1), (0, 1)], heads=3, kv_heads=1, window=window)
    got = run(b, num_splits=num_splits)
    assert_matches(got, reference(b), torch.float32)
    torch.testing.assert_close(got, run(b, num_splits=1), rtol=1e-5, atol=1e-6)


def test_one_sequence_of_32768_in_the_shares_that_an_h100_takes():
    splits = choose_num_splits(1, 1, 32768, 132)
    assert splits == 64
    b = batch([(32768, 1)], heads=2, kv_heads=1)
    assert_matches(run(b, num_splits=splits), reference(b), torch.float32)


def test_a_split_never_exceeds_the_context():
    """Graph of 5 splits, captured for long contexts, replayed on short ones: only the first share has work."""
    b = batch([(5, 1), (100, 1)])
    assert torch.equal(run(b, num_splits=5), run(b, num_splits=1))


@pytest.mark.parametrize("num_splits", [1, 3])
def test_padding_of_a_graph_gets_zeros(num_splits):
    b = batch([(9, 1), (0, 1), (0, 1)])
    got = run(b, num_splits=num_splits)
    assert not got[0].isnan().any()
    assert torch.equal(got[1:], torch.zeros_like(got[1:]))
    b = batch([(9, 4), (0, 3)])
    got = run(b)
    assert torch.equal(got[4:], torch.zeros_like(got[4:]))


def test_sequences_without_queries_are_skipped():
    b = batch([(9, 0), (5, 2), (7, 0), (8, 3), (3, 0)])
    assert_matches(run(b), reference(b), torch.float32)
    b = batch([(9, 0), (5, 1), (7, 0)])
    for num_splits in (1, 2):
        assert_matches(run(b, num_splits=num_splits), reference(b), torch.float32)


def test_more_sequences_than_one_compare_finds():
    chunks = [(0, 0)] * 290 + [(3, 2), (0, 0), (5, 5)]
    b = batch(chunks, heads=1, kv_heads=1, head_dim=2)
    assert_matches(run(b), reference(b), torch.float32)


def test_nan_of_a_position_in_use_shows():
    b = batch([(300, 1), (20, 1)])
    b.v[b.table[0, 0], 0, 3] = float("nan")
    for num_splits in (1, 2):
        got = run(b, num_splits=num_splits)
        assert got[0, :2].isnan().all()
        assert not got[1].isnan().any()


def part(b, sequence: int, first: int, stop: int) -> SimpleNamespace:
    """Queries first … stop - 1 of one sequence, as a batch of its own."""
    start, end = b.starts[sequence].item(), b.starts[sequence + 1].item()
    context = b.contexts[sequence].item() - (end - start) + stop
    return SimpleNamespace(
        q=b.q[start + first : start + stop].contiguous(),
        k=b.k,
        v=b.v,
        table=b.table[sequence : sequence + 1],
        contexts=torch.tensor([context], dtype=torch.int32, device=DEVICE),
        starts=torch.tensor([0, stop - first], dtype=torch.int32, device=DEVICE),
        options=b.options,
        max_query_len=stop - first,
    )


@pytest.fixture
def _rowwise_matmul(monkeypatch):
    """The interpreter multiplies with BLAS, whose sums depend on where in a matrix a row lies; a GPU's do not."""

    def matmul(a, b, dtype=None):
        return sum(a[:, k, None] * b[None, k, :] for k in range(a.shape[1]))

    monkeypatch.setattr(np, "matmul", matmul)


@pytest.mark.usefixtures("_rowwise_matmul")
@pytest.mark.parametrize("window", [0, 21])
@pytest.mark.parametrize(
    "shape", [{"dtype": torch.bfloat16}, {"heads": 3, "kv_heads": 1, "block_size": 48}, {"heads": 8, "kv_heads": 1}]
)
def test_batch_invariant_bits_depend_on_the_sequence_alone(shape, window):
    """Alone or beside others; a prompt at once, in odd chunks or token by token."""
    b = batch([(33, 1), (38, 38), (70, 3)], window=window, **shape)
    together = run(b, batch_invariant=True)
    for sequence in range(3):
        rows = together[b.starts[sequence] : b.starts[sequence + 1]]
        for cuts in ([0, len(rows)], [0, 7, 20, 38], [*range(0, 38, 3), 38] if sequence == 1 else range(4)):
            cuts = sorted({min(c, len(rows)) for c in cuts})
            pieces = [run(part(b, sequence, *cut), batch_invariant=True) for cut in itertools.pairwise(cuts)]
            assert torch.equal(torch.cat(pieces), rows)


def test_output_does_not_depend_on_which_blocks_hold_the_context():
    b = batch([(70, 1), (33, 1)])
    expected = run(b)
    move = torch.randperm(len(b.k))
    moved_k, moved_v = torch.empty_like(b.k), torch.empty_like(b.v)
    moved_k[move], moved_v[move] = b.k.clone(), b.v.clone()
    known = b.table < len(b.k)
    b.table[known] = move.to(torch.int32).to(DEVICE)[b.table[known].long()]
    b.k, b.v = moved_k, moved_v
    assert torch.equal(run(b), expected)


def test_splits_fill_the_device_with_shares_worth_starting():
    assert choose_num_splits(1, 4, 255, 132) == 1
    assert choose_num_splits(1, 4, 512, 132) == 2
    assert choose_num_splits(1, 4, 1 << 20, 132) == 64
    assert choose_num_splits(16, 4, 1 << 20, 132) == 5
    assert choose_num_splits(66, 4, 1 << 20, 132) == 1
    assert choose_num_splits(0, 4, 0, 132) == 1
    for sequences, kv_heads, context, sms in itertools.product((1, 7, 64), (1, 4, 8), (300, 5000), (1, 108)):
        splits = choose_num_splits(sequences, kv_heads, context, sms)
        assert 1 <= splits <= 64
        assert splits == 1 or context // splits >= 256
        assert splits == 1 or sequences * kv_heads * (splits - 1) < 2 * sms


def test_workspace_holds_every_smaller_batch():
    sizes = dict[str, Any](heads=32, kv_heads=4, head_dim=128, max_context=4096, num_sms=132)
    most = workspace_bytes(64, **sizes)
    assert most == max(
        sequences * choose_num_splits(sequences, 4, 4096, 132) * 32 * 130 * 4
        for sequences in range(1, 65)
        if choose_num_splits(sequences, 4, 4096, 132) > 1
    )
    assert workspace_bytes(64, **(sizes | {"max_context": 300})) == 0
    assert workspace_bytes(64, **sizes, window=128) == 0


def test_default_splits_fit_the_workspace_promised(monkeypatch):
    from fluxmoe.kernels.triton import paged_attention as module

    monkeypatch.setattr(module, "num_sms_of", lambda device: 8)
    b = batch([(600, 1), (30, 1)])
    need = workspace_bytes(2, 4, 2, 24, b.table.shape[1] * 16, 8)
    assert need > 0
    assert_matches(run(b, workspace=torch.empty(need, dtype=torch.uint8, device=DEVICE)), reference(b), torch.float32)
    with pytest.raises(ValueError, match=r"splits of 2 sequences need \d+ contiguous bytes, got none"):
        run(b, workspace=None)


def test_tiles_hold_whole_tokens_and_fit_shared_memory():
    assert attention_tile(128, 8, 2, 1, 89) == AttentionTile(16, 2, 64, 4, 3)
    assert attention_tile(128, 8, 2, 1, 90) == AttentionTile(16, 2, 64, 4, 5)
    assert attention_tile(128, 4, 2, 512, 90) == AttentionTile(128, 32, 64, 8, 5)
    assert attention_tile(128, 4, 2, 512, 89) == AttentionTile(128, 32, 32, 8, 5)
    shapes = itertools.product((24, 80, 128, 256), (1, 3, 8, 64), (2, 4), (1, 5, 999), (80, 89, 90, 100, 120))
    for dim, group, itemsize, queries, capability in shapes:
        tile = attention_tile(dim, group, itemsize, queries, capability)
        assert tile.block_q >= 1
        assert tile.block_q * group <= tile.block_rows
        assert tile.block_rows & (tile.block_rows - 1) == 0
        buffers = max(1, (tile.num_stages - 1) // 2)
        # K and V, and the queries; 99 KiB is the least of any GPU since sm_80.
        needed = (2 * buffers * tile.block_kv + tile.block_rows) * padded_dim(dim) * itemsize
        assert needed <= (227 if capability in (90, 100) else 99) * 1024


def test_says_what_it_expected():
    b = batch([(9, 1), (3, 1)])
    for name, value, message in (
        ("q", b.q.transpose(0, 1), "q must be contiguous"),
        ("k", b.k.bfloat16(), r"k_cache must be.*float32.*bfloat16"),
        ("v", b.v[:, :, :8], "v_cache must be"),
        ("table", b.table[:1], "2 contexts need"),
        ("contexts", b.contexts.long(), "context_lens must be int32"),
        ("options", b.options | {"block_size": 24}, "multiple of 16, got 24"),
        ("options", b.options | {"window": -1}, "must not be negative"),
        ("options", b.options | {"scale": 0.0}, "scale must be positive, got 0.0"),
        ("options", b.options | {"num_splits": 65}, "1 to 64, got 65"),
    ):
        with pytest.raises(ValueError, match=message):
            run(SimpleNamespace(**(vars(b) | {name: value})))
    with pytest.raises(ValueError, match="3 heads need"):
        run(SimpleNamespace(**(vars(b) | {"q": b.q[:, :3].contiguous()})))
    with pytest.raises(ValueError, match="at most 64 heads"):
        run(batch([(1, 1)], heads=65, kv_heads=1))
