"""RMSNorm against float64: edge sizes first."""

from __future__ import annotations

import pytest
import torch
from fluxmoe.kernels.reference import ops as reference
from fluxmoe.kernels.triton.norm import MAX_HIDDEN, rms_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu
# Half a unit in the last place of the result, plus fp32 arithmetic.
RTOL = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float32: 1e-5}


@pytest.mark.parametrize("dtype", RTOL)
@pytest.mark.parametrize(("tokens", "hidden"), [(0, 8), (1, 1), (1, 3), (5, 16), (2, 129), (3, 2048), (2, 5120)])
def test_matches_float64(tokens, hidden, dtype):
    x, weight = torch.randn(tokens, hidden, device=DEVICE).to(dtype), torch.randn(hidden, device=DEVICE)
    got = rms_norm(x, weight, 1e-6)
    assert got.dtype == dtype
    expected = reference.rms_norm(x.double(), weight.double(), 1e-6)
    torch.testing.assert_close(got.double(), expected, rtol=RTOL[dtype], atol=1e-6)


def test_bf16_is_rounded_to_nearest_not_truncated():
    x, weight = torch.randn(4, 512, device=DEVICE).bfloat16(), torch.ones(512, device=DEVICE)
    expected = reference.rms_norm(x.double(), weight.double(), 1e-6).bfloat16()
    assert (rms_norm(x, weight, 1e-6) != expected).float().mean() < 0.01


def test_a_row_has_the_same_bits_in_any_batch():
    x, weight = torch.randn(7, 100, device=DEVICE).bfloat16(), torch.randn(100, device=DEVICE)
    assert torch.equal(rms_norm(x, weight, 1e-6)[3:4], rms_norm(x[3:4], weight, 1e-6))


def test_writes_where_told_also_in_place():
    x, weight = torch.randn(3, 48, device=DEVICE), torch.randn(48, device=DEVICE)
    expected, out = rms_norm(x, weight, 1e-5), torch.full_like(x, float("nan"))
    assert rms_norm(x, weight, 1e-5, out) is out
    assert torch.equal(out, expected)
    rms_norm(x, weight, 1e-5, x)
    assert torch.equal(x, expected)


def test_eps_keeps_a_row_of_zeros_at_zero():
    x = torch.zeros(2, 24, device=DEVICE, dtype=torch.bfloat16)
    assert torch.equal(rms_norm(x, torch.ones(24, device=DEVICE), 1e-6), x)


def test_nan_stays_in_its_row():
    x, weight = torch.randn(3, 24, device=DEVICE), torch.ones(24, device=DEVICE)
    x[1, 5] = float("nan")
    got = rms_norm(x, weight, 1e-6)
    assert got[1].isnan().all()
    assert not got[[0, 2]].isnan().any()


def test_says_what_it_expected():
    x, weight = torch.randn(2, 8, device=DEVICE), torch.randn(8, device=DEVICE)
    for args, message in (
        ((x.double(), weight), "float64"),
        ((x.T, weight), "contiguous"),
        ((x, weight[:7]), r"\[8\].*\(7,\)"),
        ((x, weight.half()), "fp32"),
        ((torch.empty(0, MAX_HIDDEN + 1, device=DEVICE), weight), str(MAX_HIDDEN)),
    ):
        with pytest.raises(ValueError, match=message):
            rms_norm(*args, 1e-6)
    with pytest.raises(ValueError, match="out must be"):
        rms_norm(x, weight, 1e-6, torch.empty(2, 9, device=DEVICE))
