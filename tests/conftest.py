"""Test-wide fixtures: one torch thread (numba's threads do the work), seeded."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _deterministic():
    torch.set_num_threads(1)
    torch.manual_seed(0)
