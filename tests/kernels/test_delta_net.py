"""Gated DeltaNet against float64, token by token: CPU kernels and Triton kernels, chunks cut anywhere."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from fluxmoe.kernels.cpu import delta_net as cpu_delta_net
from fluxmoe.kernels.delta_net_torch import gated_delta_net_torch
from fluxmoe.kernels.ops import AttentionMetadata, DeltaNetDims, DeltaNetWeights, KernelError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu
SMALL = DeltaNetDims(key_heads=2, value_heads=4, key_dim=16, value_dim=8, taps=4)
ODD = DeltaNetDims(key_heads=1, value_heads=3, key_dim=5, value_dim=12, taps=3)
ONE = DeltaNetDims(key_heads=2, value_heads=2, key_dim=8, value_dim=8, taps=2)
EPS = 1e-6


def weights_of(dims: DeltaNetDims, device: str) -> DeltaNetWeights:
    rate = torch.empty(dims.value_heads).uniform_(0.01, 4)
    vectors = (torch.randn(dims.channels, dims.taps), rate, torch.randn(dims.value_heads), torch.randn(dims.value_dim))
    return DeltaNetWeights(None, *(vector.to(device) for vector in vectors))


def metadata_of(lengths: list[int], past: list[int], slots: list[int], device: str) -> AttentionMetadata:
    def ints(values) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    none = torch.zeros(0)
    contexts = [a + b for a, b in zip(lengths, past, strict=True)]
    return AttentionMetadata(ints([0, *accumulate(lengths)]), ints(contexts), none, none, none, 16, None, ints(slots))


def run(kind, projected, weights, dims, metadata, conv, state):
    """What a kernel puts out; it updates both states."""
    tokens = len(projected)
    mixed = torch.full((tokens, dims.channels), torch.nan, device=projected.device)
    if kind == "cpu":
        out = torch.full((tokens, dims.value_size), torch.nan)
        wide = torch.cat([projected, torch.full((tokens, 3), torch.nan)], dim=1)  # padded columns, as CpuOps has them
        return cpu_delta_net.gated_delta_net(wide, weights, dims, metadata, conv, state, mixed, out, EPS)
    from fluxmoe.kernels.delta_net import gated_delta_net

    out = torch.full((tokens, dims.value_size), torch.nan, dtype=projected.dtype, device=projected.device)
    return gated_delta_net(projected, weights, dims, metadata, conv, state, mixed, out, EPS)


CASES = [("cpu", "cpu", torch.float32), ("triton", DEVICE, torch.float32), ("triton", DEVICE, torch.bfloat16)]


@pytest.mark.parametrize(("kind", "device", "dtype"), CASES)
@pytest.mark.parametrize("dims", [SMALL, ODD, ONE], ids=["small", "odd", "one"])
@pytest.mark.parametrize(
    ("lengths", "past"),
    [([1], [0]), ([1, 1, 1], [4, 0, 9]), ([19, 1, 2, 5], [0, 3, 1, 0]), ([2, 33], [7, 1])],
    ids=["first", "decode", "mixed", "chunks"],
)
def test_matches_float64(kind, device, dtype, dims, lengths, past):
    slots = list(range(len(lengths), 0, -1))
    weights, metadata = weights_of(dims, device), metadata_of(lengths, past, slots, device)
    projected = torch.randn(sum(lengths), dims.projected, device=device).to(dtype)
    conv = torch.randn(len(lengths) + 2, dims.taps - 1, dims.channels, device=device).to(dtype)
    state = torch.randn(len(lengths) + 2, dims.value_heads, dims.key_dim, dims.value_dim, device=device)
    conv_before, state_before = conv.clone(), state.clone()
    conv64, state64 = conv.double(), state.double()
    expected = gated_delta_net_torch(projected, weights, dims, metadata, conv64, state64, EPS)
    got = run(kind, projected, weights, dims, metadata, conv, state)
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(state.double(), state64, rtol=1e-4, atol=1e-4)
    assert torch.equal(conv, conv64.to(dtype)), "inputs are kept as they came"
    unused = [slot for slot in range(len(lengths) + 2) if slot not in slots]
    assert torch.equal(conv[unused], conv_before[unused])
    assert torch.equal(state[unused], state_before[unused])


@pytest.mark.parametrize("kind", ["cpu", "triton"])
@pytest.mark.parametrize("cuts", [[1] * 13, [5, 8], [2, 1, 10], [12, 1]], ids=str)
def test_a_prompt_may_be_cut_anywhere(kind, cuts):
    device = "cpu" if kind == "cpu" else DEVICE
    weights = weights_of(SMALL, device)
    projected = torch.randn(13, SMALL.projected, device=device)

    def serve(lengths):
        # What the slot holds of an earlier sequence must not be read.
        conv = torch.full((1, SMALL.taps - 1, SMALL.channels), torch.nan, device=device)
        state = torch.full((1, SMALL.value_heads, SMALL.key_dim, SMALL.value_dim), torch.nan, device=device)
        outputs, past = [], 0
        for length in lengths:
            metadata = metadata_of([length], [past], [0], device)
            outputs.append(run(kind, projected[past : past + length], weights, SMALL, metadata, conv, state).clone())
            past += length
        return torch.cat(outputs), conv, state

    for got, expected in zip(serve(cuts), serve([13]), strict=True):
        if kind == "cpu":
            assert torch.equal(got, expected)
        else:
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_no_tokens_and_wrong_shapes():
    from fluxmoe.kernels.delta_net import gated_delta_net

    weights = weights_of(SMALL, DEVICE)
    conv = torch.zeros(1, SMALL.taps - 1, SMALL.channels, device=DEVICE)
    state = torch.zeros(1, SMALL.value_heads, SMALL.key_dim, SMALL.value_dim, device=DEVICE)
    empty = metadata_of([], [], [], DEVICE)
    x, out = torch.zeros(0, SMALL.projected, device=DEVICE), torch.zeros(0, SMALL.value_size, device=DEVICE)
    rest = (torch.zeros(0, SMALL.channels, device=DEVICE), out, EPS)
    assert gated_delta_net(x, weights, SMALL, empty, conv, state, *rest) is out
    with pytest.raises(KernelError, match="projected must be"):
        gated_delta_net(x[:, 1:], weights, SMALL, empty, conv, state, *rest)
    with pytest.raises(KernelError, match="conv_state must be"):
        gated_delta_net(x, weights, SMALL, empty, conv[:, :1], state, *rest)
    with pytest.raises(KernelError, match="state must be fp32"):
        gated_delta_net(x, weights, SMALL, empty, conv, state.half(), *rest)
