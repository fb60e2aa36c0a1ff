"""stream_copy is a copy, at every length and alignment."""

import pytest
import torch
from fluxmoe.kernels.cpu.copy import stream_copy


@pytest.mark.parametrize("offset", [0, 1, 32])
@pytest.mark.parametrize("n", [0, 1, 127, 128, 129, 1 << 16, (1 << 16) + 77])
def test_copies_exactly(n, offset):
    source = torch.randint(0, 256, (n + 64,), dtype=torch.uint8)
    target = torch.full((n + 64,), 7, dtype=torch.uint8)
    stream_copy(target[offset : offset + n], source[offset : offset + n])
    assert torch.equal(target[offset : offset + n], source[offset : offset + n])
    assert (target[:offset] == 7).all()
    assert (target[offset + n :] == 7).all()
