"""Gates of decoder layers against float64: sizes of no block, with and without a score."""

from __future__ import annotations

import pytest
import torch
from fluxmoe.kernels.triton.gates import scale, swiglu
from fluxmoe.kernels.triton.grouped_gemm import interleave

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu
RTOL = {torch.bfloat16: 2**-8, torch.float32: 1e-5}
SIZES = [(0, 8), (1, 1), (3, 40), (2, 1024), (5, 1030)]


@pytest.mark.parametrize("dtype", RTOL, ids=str)
@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize(("tokens", "intermediate"), SIZES)
def test_swiglu_equals_float64(tokens, intermediate, scored, dtype):
    hidden = 24
    gate, up = torch.randn(2, intermediate, tokens).to(dtype)
    # A view of wider rows, as of a matrix that computes more than these.
    rows = torch.full((tokens, 2 * intermediate + 3), float("nan"), dtype=dtype)
    rows[:, : 2 * intermediate] = interleave(torch.cat([gate, up])).T
    x, score = torch.randn(tokens, hidden).to(dtype), torch.randn(1, hidden).to(dtype)
    h = torch.full((tokens, intermediate), float("nan"), dtype=dtype, device=DEVICE)
    got = swiglu(rows.to(DEVICE)[:, : 2 * intermediate], x.to(DEVICE), score.to(DEVICE) if scored else None, h)
    expected = (torch.nn.functional.silu(gate.double()) * up.double()).T
    if scored:
        expected = expected * (x.double() @ score.double().T).sigmoid()
    assert got is h
    torch.testing.assert_close(got.cpu().double(), expected, rtol=RTOL[dtype], atol=1e-6)


@pytest.mark.parametrize("dtype", RTOL, ids=str)
@pytest.mark.parametrize("shape", SIZES)
def test_scale_equals_float64(shape, dtype):
    y, gate = torch.randn(2, *shape).to(dtype)
    guarded = torch.cat([y.flatten(), torch.full((9,), 7.0, dtype=dtype)]).to(DEVICE)
    got = scale(guarded[: y.numel()].view(shape), gate.to(DEVICE))
    expected = y.double() * gate.double().sigmoid()
    torch.testing.assert_close(got.cpu().double(), expected, rtol=RTOL[dtype], atol=1e-6)
    assert (guarded[y.numel() :] == 7.0).all(), "written past the last element"
