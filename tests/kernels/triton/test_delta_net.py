"""Gated DeltaNet against float64, token by token: CPU kernels and Triton kernels, chunks cut anywhere."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
import torch
import triton
import triton.language as tl
from fluxmoe.kernels.cpu import delta_net as cpu_delta_net
from fluxmoe.kernels.ops import AttentionMetadata, DeltaNetDims, DeltaNetWeights, KernelError, Linear
from fluxmoe.kernels.reference.delta_net import gated_delta_net_torch
from fluxmoe.kernels.triton import flash_linear
from fluxmoe.kernels.triton._delta_net import CHUNK, _unit_lower_inverse

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu
SMALL = DeltaNetDims(key_heads=2, value_heads=4, key_dim=16, value_dim=8, taps=4)
ODD = DeltaNetDims(key_heads=1, value_heads=3, key_dim=5, value_dim=12, taps=3)
ONE = DeltaNetDims(key_heads=2, value_heads=2, key_dim=8, value_dim=8, taps=2)
# For prompts of more than a chunk: few programs, for the interpreter takes a tenth of a second for each.
LONG = DeltaNetDims(key_heads=1, value_heads=2, key_dim=16, value_dim=8, taps=3)
EPS = 1e-6


def weights_of(dims: DeltaNetDims, device: str) -> DeltaNetWeights:
    rate = torch.empty(dims.value_heads).uniform_(0.01, 4)
    vectors = (torch.randn(dims.channels, dims.taps), rate, torch.randn(dims.value_heads), torch.randn(dims.value_dim))
    unused = Linear(torch.empty(0), 0, 0, torch.bfloat16)
    return DeltaNetWeights(unused, *(vector.to(device) for vector in vectors))


def metadata_of(lengths: list[int], past: list[int], slots: list[int], device: str) -> AttentionMetadata:
    def ints(values) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    none = torch.zeros(0)
    contexts = [a + b for a, b in zip(lengths, past, strict=True)]
    return AttentionMetadata(ints([0, *accumulate(lengths)]), ints(contexts), none, none, none, 16, None, ints(slots))


def run(kind, projected, weights, dims, metadata, conv, state, **options):
    """What a kernel puts out; it updates both states."""
    tokens = len(projected)
    if kind == "cpu":
        mixed, out = (torch.full((tokens, width), torch.nan) for width in (dims.channels, dims.value_size))
        wide = torch.cat([projected, torch.full((tokens, 3), torch.nan)], dim=1)  # padded columns, as CpuOps has them
        return cpu_delta_net.gated_delta_net(wide, weights, dims, metadata, conv, state, mixed, out, EPS)
    from fluxmoe.kernels.triton.delta_net import gated_delta_net, workspace_bytes

    out = torch.full((tokens, dims.value_size), torch.nan, dtype=projected.dtype, device=projected.device)
    # Bytes that are NaN in every dtype.
    workspace = torch.full(
        (workspace_bytes(dims, tokens, projected.dtype),), 255, dtype=torch.uint8, device=projected.device
    )
    return gated_delta_net(projected, weights, dims, metadata, conv, state, out, EPS, workspace, **options)


CASES = [("cpu", "cpu", torch.float32), ("triton", DEVICE, torch.float32), ("triton", DEVICE, torch.bfloat16)]
TRITON = CASES[1:]


def assert_near(got, expected, dtype, bf16_error):
    """fp32: element by element. bf16: root mean square of the error over that of the values, and no element far out."""
    error = got.double() - expected
    if dtype == torch.float32:
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)
    else:
        assert error.square().mean().sqrt() <= bf16_error * expected.square().mean().sqrt() + 1e-6
        assert error.abs().max() <= 0.06 * expected.abs().max() + 1e-6


def check(kind, device, dtype, dims, weights, projected, lengths, past, bf16_error=0.02, **options):
    """Against float64, from states that slots hold already; slots of nobody are left alone."""
    slots = list(range(len(lengths), 0, -1))
    metadata = metadata_of(lengths, past, slots, device)
    conv = torch.randn(len(lengths) + 2, dims.taps - 1, dims.channels, device=device).to(dtype)
    state = torch.randn(len(lengths) + 2, dims.value_heads, dims.key_dim, dims.value_dim, device=device)
    conv_before, state_before = conv.clone(), state.clone()
    conv64, state64 = conv.double(), state.double()
    expected = gated_delta_net_torch(projected, weights, dims, metadata, conv64, state64, EPS)
    got = run(kind, projected, weights, dims, metadata, conv, state, **options)
    assert_near(got, expected, dtype, bf16_error)
    assert_near(state[slots], state64[slots], dtype, bf16_error)
    assert torch.equal(conv, conv64.to(dtype)), "inputs are kept as they came"
    unused = [slot for slot in range(len(lengths) + 2) if slot not in slots]
    assert torch.equal(conv[unused], conv_before[unused])
    assert torch.equal(state[unused], state_before[unused])


@pytest.mark.parametrize(("kind", "device", "dtype"), CASES)
@pytest.mark.parametrize("dims", [SMALL, ODD, ONE], ids=["small", "odd", "one"])
@pytest.mark.parametrize(
    ("lengths", "past"),
    [([1], [0]), ([1, 1, 1], [4, 0, 9]), ([19, 1, 2, 5], [0, 3, 1, 0]), ([2, 33], [7, 1])],
    ids=["first", "decode", "mixed", "prompts"],
)
def test_matches_float64(kind, device, dtype, dims, lengths, past):
    projected = torch.randn(sum(lengths), dims.projected, device=device).to(dtype)
    check(kind, device, dtype, dims, weights_of(dims, device), projected, lengths, past)


@pytest.mark.parametrize(("kind", "device", "dtype"), TRITON)
@pytest.mark.parametrize(
    ("lengths", "past"),
    [([63], [0]), ([64, 1], [5, 7]), ([65], [1]), ([1, 130, 2], [3, 0, 9])],
    ids=["less", "exact", "more", "among-decodes"],
)
def test_prompts_around_the_length_of_a_chunk(kind, device, dtype, lengths, past):
    projected = torch.randn(sum(lengths), LONG.projected, device=device).to(dtype)
    check(kind, device, dtype, LONG, weights_of(LONG, device), projected, lengths, past)


def test_a_slice_of_values_may_be_narrower_than_a_program():
    wide = DeltaNetDims(key_heads=1, value_heads=2, key_dim=20, value_dim=44, taps=4)
    projected = torch.randn(67, wide.projected, device=DEVICE)
    check("triton", DEVICE, torch.float32, wide, weights_of(wide, DEVICE), projected, [66, 1], [0, 4])


def plain_rule(q, k, v, g, beta, *, scale, initial_state, output_final_state, cu_seqlens):
    """As flash-linear-attention's is called, token by token."""
    assert output_final_state
    o, state, group = torch.empty_like(v), initial_state.clone(), v.shape[2] // q.shape[2]
    for sequence, (begin, end) in enumerate(pairwise(cu_seqlens.tolist())):
        s = state[sequence]
        for t in range(begin, end):
            query, key = (x[0, t].float().repeat_interleave(group, dim=0) for x in (q, k))
            s *= g[0, t].exp()[:, None, None]
            new = (v[0, t].float() - torch.einsum("hkv,hk->hv", s, key)) * beta[0, t, :, None]
            s += key[:, :, None] * new[:, None, :]
            o[0, t] = scale * torch.einsum("hkv,hk->hv", s, query)
    return o, state


@pytest.mark.parametrize("whose", ["plain", "fla"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("lengths", "past"), [([19, 1, 2, 65, 1], [0, 3, 1, 7, 0]), ([1, 1], [0, 5])], ids=["mixed", "decode"]
)
def test_another_rule_has_the_same_inputs_states_and_outputs(whose, dtype, lengths, past):
    dims = DeltaNetDims(key_heads=1, value_heads=2, key_dim=16, value_dim=16, taps=4)
    rule = plain_rule
    if whose == "fla":
        if not torch.cuda.is_available() or importlib.util.find_spec("fla") is None or dtype == torch.float32:
            pytest.skip("needs a GPU, flash-linear-attention, and bf16, as it rounds fp32 operands")
        dims, rule = replace(dims, key_dim=64, value_dim=64), flash_linear.chunk_rule(torch.device(DEVICE))
    projected = torch.randn(sum(lengths), dims.projected, device=DEVICE).to(dtype)
    # Of keys of 16 numbers, rounded before the rule, some draws are 2.2 % off.
    check("triton", DEVICE, dtype, dims, weights_of(dims, DEVICE), projected, lengths, past, bf16_error=0.03, rule=rule)


def test_a_rule_that_is_not_there_is_one_sentence(monkeypatch):
    with pytest.raises(KernelError, match="need a CUDA device: leave --delta-net out"):
        flash_linear.chunk_rule(torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "fla", None)
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", None)
    with pytest.raises(KernelError, match="fla needs the package flash-linear-attention, which cannot be"):
        flash_linear.chunk_rule(torch.device("cuda"))


# b or a so far out that β is 0 or 1 and the decay none or all.
LOW, HIGH = -100.0, 100.0


@pytest.mark.parametrize(("kind", "device", "dtype"), TRITON)
@pytest.mark.parametrize(
    ("b", "a", "keys", "scale"),
    [
        (None, HIGH, "random", 1.0),
        (None, LOW, "random", 1.0),
        (LOW, None, "random", 1.0),
        (HIGH, None, "random", 1.0),
        (HIGH, LOW, "equal", 1.0),
        (0.0, LOW, "equal", 1.0),
        (HIGH, LOW, "near", 1.0),
        (None, None, "random", 0.0),
        (None, None, "random", 1e4),
    ],
    ids=["all-decays", "none-decays", "beta-0", "beta-1", "equal-beta-1", "equal-beta-half", "near", "zeros", "large"],
)
def test_extreme_gates_and_keys(kind, device, dtype, b, a, keys, scale):
    """Equal keys without decay are the worst case for I + A: all that is below its diagonal is β."""
    dims, tokens = LONG, 70
    weights = weights_of(dims, device)
    weights.conv[:] = 0
    weights.conv[:, -1] = 1
    projected = scale * torch.randn(tokens, dims.projected)
    _, key, _, b_columns, a_columns = projected.split(
        [dims.key_size, dims.key_size, 2 * dims.value_size, dims.value_heads, dims.value_heads], dim=1
    )
    if keys != "random":
        key.mul_(0.1 if keys == "near" else 0).add_(torch.randn(dims.key_size))
    for columns, value in ((b_columns, b), (a_columns, a)):
        if value is not None:
            columns.fill_(value)
    projected = projected.to(device=device, dtype=dtype)
    # Of equal keys o is a sum of 64 roundings of updates that cancel.
    check(kind, device, dtype, dims, weights, projected, [tokens], [3], bf16_error=0.03 if keys == "equal" else 0.02)


def serve(kind, weights, projected, lengths, **options):
    """(outputs, conv_state, state) of one sequence in passes of these lengths."""
    device = projected.device
    # What the slot holds of an earlier sequence must not be read.
    conv = torch.full((1, LONG.taps - 1, LONG.channels), torch.nan, device=device)
    state = torch.full((1, LONG.value_heads, LONG.key_dim, LONG.value_dim), torch.nan, device=device)
    outputs, past = [], 0
    for length in lengths:
        metadata = metadata_of([length], [past], [0], device)
        rows = projected[past : past + length]
        outputs.append(run(kind, rows, weights, LONG, metadata, conv, state, **options).clone())
        past += length
    return torch.cat(outputs), conv, state


@pytest.mark.parametrize(
    ("kind", "cuts"),
    [(kind, cuts) for kind in ("cpu", "triton") for cuts in ([1] * 13, [5, 8], [2, 1, 10], [12, 1])]
    + [("triton", cuts) for cuts in ([64, 66], [1, 129], [63, 2, 65], [129, 1])],
    ids=str,
)
def test_a_prompt_may_be_cut_anywhere(kind, cuts):
    device = "cpu" if kind == "cpu" else DEVICE
    weights = weights_of(LONG, device)
    projected = torch.randn(sum(cuts), LONG.projected, device=device)
    whole = serve(kind, weights, projected, [sum(cuts)])
    for got, expected in zip(serve(kind, weights, projected, cuts), whole, strict=True):
        if kind == "cpu":
            assert torch.equal(got, expected)
        else:
            torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("cuts", [[1] * 13, [2, 1, 10]], ids=str)
def test_batch_invariant_bits_do_not_depend_on_cuts(cuts):
    weights = weights_of(LONG, DEVICE)
    projected = torch.randn(13, LONG.projected, device=DEVICE)
    whole = serve("triton", weights, projected, [13], batch_invariant=True)
    for got, expected in zip(serve("triton", weights, projected, cuts, batch_invariant=True), whole, strict=True):
        assert torch.equal(got, expected)


def test_a_decode_has_the_same_bits_beside_prompts():
    weights = weights_of(LONG, DEVICE)
    projected = torch.randn(9, LONG.projected, device=DEVICE)
    conv = torch.randn(2, LONG.taps - 1, LONG.channels, device=DEVICE)
    state = torch.randn(2, LONG.value_heads, LONG.key_dim, LONG.value_dim, device=DEVICE)
    results = []
    for lengths, past, slots in (([1], [4], [1]), ([1, 8], [4, 0], [1, 0])):
        states = conv.clone(), state.clone()
        metadata = metadata_of(lengths, past, slots, DEVICE)
        out = run("triton", projected[: sum(lengths)], weights, LONG, metadata, *states)
        results.append((out[0], states[0][1], states[1][1]))
    assert all(torch.equal(alone, beside) for alone, beside in zip(*results, strict=True))


@triton.jit
def _inverse_kernel(a_ptr, out_ptr):
    r = tl.arange(0, CHUNK)
    at = r[:, None] * CHUNK + r[None, :]
    tl.store(out_ptr + at, _unit_lower_inverse(tl.load(a_ptr + at)))


@pytest.mark.parametrize("fill", [0.0, 1.0, 0.5, None], ids=["zeros", "equal-keys", "half", "random"])
def test_inverse_of_a_chunk(fill):
    size = CHUNK.value
    a = torch.full((size, size), fill) if fill is not None else 0.3 * torch.randn(size, size)
    a = a.tril(-1).to(DEVICE)
    out = torch.full_like(a, torch.nan)
    _inverse_kernel[(1,)](a, out)
    expected = torch.linalg.inv(torch.eye(size, dtype=torch.float64) + a.cpu().double())
    torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_no_tokens_and_wrong_shapes():
    from fluxmoe.kernels.triton.delta_net import gated_delta_net

    weights = weights_of(SMALL, DEVICE)
    conv = torch.zeros(1, SMALL.taps - 1, SMALL.channels, device=DEVICE)
    state = torch.zeros(1, SMALL.value_heads, SMALL.key_dim, SMALL.value_dim, device=DEVICE)
    empty = metadata_of([], [], [], DEVICE)
    x, out = torch.zeros(0, SMALL.projected, device=DEVICE), torch.zeros(0, SMALL.value_size, device=DEVICE)
    rest = (out, EPS, torch.zeros(0, device=DEVICE))
    assert gated_delta_net(x, weights, SMALL, empty, conv, state, *rest) is out
    row = torch.zeros(1, SMALL.projected, device=DEVICE)
    with pytest.raises(KernelError, match=r"1 tokens need a contiguous workspace of \d+ bytes, got 0"):
        gated_delta_net(row, weights, SMALL, empty, conv, state, *rest)
    with pytest.raises(KernelError, match="projected must be"):
        gated_delta_net(x[:, 1:], weights, SMALL, empty, conv, state, *rest)
    with pytest.raises(KernelError, match="conv_state must be"):
        gated_delta_net(x, weights, SMALL, empty, conv[:, :1], state, *rest)
    with pytest.raises(KernelError, match="state must be fp32"):
        gated_delta_net(x, weights, SMALL, empty, conv, state.half(), *rest)
