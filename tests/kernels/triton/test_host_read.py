"""The probe of pinned reads sums all of what it reads."""

from __future__ import annotations

import pytest
import torch
from fluxmoe.kernels.triton.host_read import sum_in_place

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("numel", [1, 4096, 10_001])
def test_sums_what_it_reads(numel):
    x = torch.randint(-1000, 1000, (numel,), dtype=torch.int32)
    out = sum_in_place(x.to(DEVICE), torch.empty(3, dtype=torch.int32, device=DEVICE), 3)
    assert int(out.sum()) == int(x.sum())
