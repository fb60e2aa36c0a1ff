"""CPU kernels against the torch reference: every operation, edge sizes first."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from fluxmoe.kernels.attention_layer import AttentionLayer
from fluxmoe.kernels.cpu import gates, gemm, simd, tile
from fluxmoe.kernels.cpu.ops import CpuOps
from fluxmoe.kernels.ops import AttentionBlock, AttentionMetadata, DenseMlp, LayerDims, Limits, Linear, RopeTable
from fluxmoe.kernels.reference.ops import TorchOps

DTYPES = [torch.bfloat16, torch.float32]
DIMS = LayerDims(
    hidden=48, heads=4, kv_heads=2, head_dim=24, experts=5, vocab=100, dtype=torch.float32
)  # fmt: skip
LIMITS = Limits(tokens=64, sequences=8, context=160, block_size=32)

# How bf16 is multiplied: on every machine, and on this one.
BF16_KINDS = [tile.BF16, tile.BF16_DOT] if tile.HAS_DOT else [tile.BF16]


@pytest.fixture(params=BF16_KINDS, ids=["fma", "dot"][: len(BF16_KINDS)])
def bf16_kind(request, monkeypatch) -> int:
    monkeypatch.setattr(tile, "BF16_KIND", request.param)
    return request.param


def tolerance(dtype: torch.dtype, fp32: float = 1e-4) -> float:
    """Relative and absolute: inputs of products are rounded to bf16 where the kernels do so."""
    return 5e-2 if tile.kind_of(dtype) == tile.BF16_DOT else fp32


def pair(dims: LayerDims, limits: Limits = LIMITS) -> tuple[CpuOps, TorchOps]:
    return CpuOps(dims, limits), TorchOps(dims, limits)


def arranged(ops, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
    n, k = weight.shape
    block = torch.zeros(ops.arranged_bytes(n, k), dtype=torch.uint8)
    ops.arrange(weight, block)
    return Linear(block, n, k, weight.dtype, bias)


def test_bf16_is_multiplied_by_what_is_faster(monkeypatch):
    monkeypatch.setattr(tile, "HAS_DOT", True)
    assert [tile.bf16_kind(cpu) for cpu in ("znver4", "znver5")] == [tile.BF16_DOT] * 2
    assert [tile.bf16_kind(cpu) for cpu in ("cooperlake", "emeraldrapids")] == [tile.BF16] * 2
    monkeypatch.setattr(tile, "HAS_DOT", False)
    assert tile.bf16_kind("znver3") == tile.BF16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (15, 3), (16, 16), (33, 70), (160, 129)])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5, 6, 7, 13, 64])
def test_linear_matches_float64(n, k, rows, dtype, bf16_kind):
    weight, x = torch.randn(n, k).to(dtype), torch.randn(rows, k)
    block = torch.zeros(gemm.arranged_bytes(n, k, dtype), dtype=torch.uint8)
    gemm.arrange(weight, block)
    kind, y = tile.kind_of(dtype), torch.full((max(rows, 1), gemm.padded(n)), float("nan"))
    y = gemm.linear(x, block, n, kind, y, gemm.Scratch(64, 2, k))
    expected = x.to(tile.x_dtype(kind)).double() @ weight.double().t()
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5 * k**0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (17, 5), (48, 31)])
def test_packing_is_bit_exact(n, k, dtype):
    bits = torch.int16 if dtype == torch.bfloat16 else torch.int32
    info = torch.iinfo(bits)
    weight = torch.randint(info.min, info.max, (n, k), dtype=bits).view(dtype)  # NaN and Inf patterns included
    block = torch.zeros(gemm.arranged_bytes(n, k, dtype), dtype=torch.uint8)
    gemm.arrange(weight, block)
    assert torch.equal(gemm.restore(block, n, k, dtype).view(bits), weight.view(bits))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 3, 700], ids=["none", "one", "few", "many threads"])
def test_rows_of_an_arranged_weight_are_its_rows(tokens, dtype):
    weight, chosen = torch.randn(37, 31).to(dtype), torch.randint(37, (tokens,))
    block = torch.zeros(gemm.arranged_bytes(37, 31, dtype), dtype=torch.uint8)
    gemm.arrange(weight, block)
    got = gemm.rows_of(block, tile.kind_of(dtype), chosen, torch.full((tokens, 31), float("nan")))
    assert torch.equal(got, weight[chosen].float())


def test_kernels_that_take_addresses_refuse_rows_that_lie_apart():
    ops = CpuOps(DIMS, LIMITS)
    with pytest.raises(AssertionError, match="side by side"):
        ops.rms_norm(torch.randn(3, 96)[:, ::2], torch.ones(48))


def test_rows_do_not_depend_on_their_batch(bf16_kind):
    """The property that makes tokens independent of batch, budget and placement: same bits alone or together."""
    ops = CpuOps(replace(DIMS, dtype=torch.bfloat16), LIMITS)
    weight = arranged(ops, torch.randn(100, 48).bfloat16())
    x = torch.randn(64, 48)
    together = ops.qkv(x, weight).clone()
    for rows in (1, 2, 5, 6, 7, 8, 9, 30):
        for first in (0, 11, 34):
            alone = ops.qkv(x[first : first + rows].contiguous(), weight)
            assert torch.equal(alone, together[first : first + rows])


def test_exp_is_accurate():
    from numba import njit

    @njit
    def apply(x, y):
        for i in range(len(x)):
            y[i] = simd.exp_f32(x[i])

    x = torch.linspace(-87, 88, 100_001)
    y = torch.empty_like(x)
    apply(x.numpy(), y.numpy())
    torch.testing.assert_close(y.double(), x.double().exp(), rtol=3e-7, atol=0)


def test_round_bf16_matches_torch():
    from numba import njit

    @njit
    def apply(x, y):
        for i in range(len(x)):
            y[i] = simd.round_bf16(x[i])

    bits = torch.randint(-(2**31), 2**31 - 1, (100_000,), dtype=torch.int32)
    x = torch.cat([bits.view(torch.float32), torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan")])])
    y = torch.empty(len(x), dtype=torch.int16)
    apply(x.numpy(), y.numpy().view("uint16"))
    expected = x.bfloat16()
    finite = ~x.isnan()
    assert torch.equal(y.view(torch.bfloat16)[finite].view(torch.int16), expected[finite].view(torch.int16))
    assert y.view(torch.bfloat16)[~finite].isnan().all()


def mlp_of(ops, weights) -> DenseMlp:
    gate_up, down, score = weights
    return DenseMlp(arranged(ops, gate_up), arranged(ops, down), None if score is None else arranged(ops, score))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scored", [True, False], ids=["shared expert", "dense layer"])
@pytest.mark.parametrize(("tokens", "hidden", "intermediate"), [(0, 48, 40), (1, 16, 16), (5, 33, 17), (64, 48, 40)])
def test_mlp_matches_reference(tokens, hidden, intermediate, scored, dtype, bf16_kind):
    """Its buffer holds an MLP of 40, wider than some."""
    dims = replace(DIMS, hidden=hidden, mlp=40, dtype=dtype)
    shapes = [(2 * intermediate, hidden), (hidden, intermediate), (1, hidden)]
    gate_up, down, score = (torch.randn(shape).to(dtype) / 4 for shape in shapes)
    x, residual = torch.randn(tokens, hidden), torch.randn(tokens, hidden)
    gate, up = (x.double() @ gate_up.double().t()).chunk(2, dim=-1)
    y = (gate * gate.sigmoid() * up) @ down.double().t()
    expected = residual + y * ((x.double() @ score.double().t()).sigmoid() if scored else 1)
    for ops in pair(dims):
        mlp = mlp_of(ops, (gate_up, down, score if scored else None))
        got = ops.mlp_add(x, mlp, residual.clone())
        close = tolerance(dtype)
        torch.testing.assert_close(got.double(), expected, rtol=close, atol=close)


@pytest.mark.parametrize("gate", ["swiglu", "scale"])
def test_gates_of_an_element_do_not_depend_on_its_neighbours(gate):
    """torch's silu and sigmoid fail this: the ends of what a thread gets go through another exp."""
    score, x = torch.randn(2, 63, 40)

    def run(n: int) -> torch.Tensor:
        if gate == "swiglu":
            return gates.swiglu(torch.cat([score[:, :n], x[:, :n]], dim=1), n)
        return gates.scale(x[:, :n].clone(), score[:, :n].contiguous())

    whole = run(40)
    assert all(torch.equal(run(n), whole[:, :n]) for n in range(1, 40))


def metadata_for(chunks: list[tuple[int, int]], block_size: int, table: torch.Tensor) -> AttentionMetadata:
    """chunks: (tokens already cached, tokens of this pass) for each sequence."""
    positions = [torch.arange(past, past + new) for past, new in chunks]
    slots = [table[b, p // block_size] * block_size + p % block_size for b, p in enumerate(positions)]
    return AttentionMetadata(
        query_start=torch.tensor([0, *torch.tensor([n for _, n in chunks]).cumsum(0).tolist()], dtype=torch.int32),
        context_lens=torch.tensor([past + new for past, new in chunks], dtype=torch.int32),
        block_table=table.to(torch.int32),
        positions=torch.cat(positions).to(torch.int32),
        slot_mapping=torch.cat(slots).to(torch.int64),
        block_size=block_size,
    )


def run_attention(ops, qkv_of, passes, block_size, num_blocks, table, norms, rope) -> list[torch.Tensor]:
    """Feed several passes over one cache; qkv_of[b] holds sequence b's rows for all its positions."""
    d = ops.dims
    shapes = ops.kv_block_shape(block_size, d.kv_heads, d.head_dim)
    k_cache, v_cache = (torch.zeros(num_blocks, *shape, dtype=d.dtype) for shape in shapes)
    outputs = []
    for chunks in passes:
        rows = torch.cat([qkv_of[b][past : past + new] for b, (past, new) in enumerate(chunks)])
        meta = metadata_for(chunks, block_size, table)
        outputs.append(ops.attention(rows.clone(), *norms, rope, meta, k_cache, v_cache).clone())
    return outputs


@pytest.mark.parametrize("chunks", [[(0, 5), (0, 3)], [(7, 1), (30, 1)], [(40, 0)]], ids=["prompts", "decode", "none"])
def test_attention_as_one_call_has_the_bits_of_its_parts(chunks):
    """Alone and, with a gate and biases, one operation after another."""
    d, tokens = replace(DIMS, attention_gate=True), sum(new for _, new in chunks)
    ops = CpuOps(d, LIMITS)
    x, residual = torch.randn(tokens, d.hidden), torch.randn(tokens, d.hidden)
    qkv, out = (arranged(ops, torch.randn(shape)) for shape in ((d.qkv_size, d.hidden), (d.hidden, d.heads * 24)))
    angles = torch.randn(160, 12)
    meta = metadata_for(chunks, 32, torch.arange(2 * len(chunks)).view(len(chunks), 2))
    k, v = (torch.randn(2 * len(chunks), *shape) for shape in ops.kv_block_shape(32, d.kv_heads, d.head_dim))
    for gate, bias in itertools.product((None, arranged(ops, torch.randn(d.heads * 24, d.hidden))), (None, 1.0)):
        biased = out if bias is None else replace(out, bias=torch.randn(d.hidden))
        block = AttentionBlock(qkv, biased, RopeTable(angles.cos(), angles.sin()), gate=gate)
        results = []
        for attend in (ops.attend, partial(AttentionLayer.attend, ops)):
            k_cache, v_cache = k.clone(), v.clone()
            results.append((attend(x, block, meta, k_cache, v_cache, residual.clone()), k_cache, v_cache))
        assert all(torch.equal(*each) for each in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "qk_norm", "clip", "window"),
    [
        (1, 1, 2, "none", 0.0, 0),
        (4, 4, 16, "full", 0.5, 0),
        (4, 2, 24, "head", 0.0, 0),
        (8, 1, 10, "none", 0.0, 7),  # group larger than a tile; window inside a block
        (4, 2, 64, "head", 0.0, 33),
        (16, 16, 16, "none", 0.0, 0),  # several KV heads in a task
        (32, 16, 18, "none", 0.0, 19),
    ],
)
def test_attention_matches_reference(heads, kv_heads, head_dim, qk_norm, clip, window, block_size, dtype, bf16_kind):
    dims = replace(
        DIMS, heads=heads, kv_heads=kv_heads, head_dim=head_dim, qk_norm=qk_norm, clip_qkv=clip, window=window,
        dtype=dtype,
    )  # fmt: skip
    limits = Limits(tokens=128, sequences=8, context=128, block_size=block_size)
    rope = RopeTable(torch.randn(128, head_dim // 2), torch.randn(128, head_dim // 2))
    width = {"none": 0, "head": 1, "full": None}[qk_norm]
    norms: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    if width is None:
        norms = (torch.rand(heads * head_dim), torch.rand(kv_heads * head_dim))
    elif width:
        norms = (torch.rand(head_dim), torch.rand(head_dim))
    # Prefill in odd chunks beside decode steps, on scattered blocks.
    passes = [[(0, 40), (0, 1), (0, 17)], [(40, 1), (1, 1), (17, 30)], [(41, 23), (2, 1), (47, 1)]]
    qkv_of = [torch.randn(64, dims.qkv_size) for _ in range(3)]
    table = torch.randperm(16)[: 3 * (64 // block_size)].view(3, -1)
    results = []
    for ops in pair(dims, limits):
        results.append(run_attention(ops, qkv_of, passes, block_size, 16, table, norms, rope))
    for got, expected in zip(*results, strict=True):
        close = tolerance(dtype, 2e-4)
        torch.testing.assert_close(got, expected, rtol=close, atol=close)


@pytest.mark.parametrize("window", [0, 21])
def test_attention_does_not_depend_on_chunking(window, bf16_kind):
    """Same bits whether a prompt comes at once, in odd chunks or token by token."""
    dims = replace(DIMS, dtype=torch.bfloat16, window=window)
    ops = CpuOps(dims, LIMITS)
    rope = RopeTable(torch.rand(64, 12), torch.rand(64, 12))
    qkv_of = [torch.randn(50, dims.qkv_size)]
    table = torch.tensor([[3, 1]])
    outputs = []
    for cuts in ([0, 50], [0, 7, 20, 43, 50], list(range(51))):
        passes = [[(a, b - a)] for a, b in itertools.pairwise(cuts)]
        outputs.append(torch.cat(run_attention(ops, qkv_of, passes, 32, 4, table, (None, None), rope)))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_block_size_must_fit_the_vector():
    with pytest.raises(ValueError, match="multiple of 16"):
        CpuOps(DIMS, LIMITS).kv_block_shape(24, 2, 24)


@pytest.mark.parametrize("mlp", [0, 17])
def test_workspace_is_what_is_held(mlp):
    ops = CpuOps(replace(DIMS, mlp=mlp), LIMITS)
    of_attention = [value for value in vars(ops._attention).values() if isinstance(value, np.ndarray)]
    held: list[torch.Tensor | np.ndarray] = [*ops._buffers.values(), *of_attention]
    scratch = ops._scratch
    arrays = scratch.counter.nbytes + scratch.row_table.nbytes + scratch.rounded.nbytes
    transient = 8 * 48 * 4  # sampled rows
    assert ops.workspace_bytes == sum(t.nbytes for t in held) + arrays + transient


@pytest.mark.parametrize("panels", [0, 1, 3, 64, 1000])
@pytest.mark.parametrize("panel_bytes", [512, 16 << 10, 3 << 20])
@pytest.mark.parametrize("threads", [1, 2, 16])
def test_tasks_have_every_panel_once_and_shrink(panels, panel_bytes, threads):
    first = gemm.tasks_of(panels, panel_bytes, threads)
    sizes = np.diff(first)
    assert (first[0], first[-1]) == (0, panels)
    assert (sizes > 0).all()
    assert (np.diff(sizes) <= 0).all()
    assert all(size * panel_bytes <= 1 << 20 or size == 1 for size in sizes)
