"""Test-wide fixtures: one torch thread (numba's threads do the work), seeded; Triton interpreted without a GPU."""

import gc
import os

# Before OpenMP starts: two workers of pytest whose threads spin while they wait take seven times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import pytest
import torch

# Before the first import of triton, which decides once. `fluxmoe.kernels.audit` compiles in a process of its own.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    from .interpreter import speed_up

    speed_up()

# The machine may be busy: how long an example takes says nothing. And a run says of a commit what the next one says.
hypothesis.settings.register_profile("same", deadline=None, derandomize=True)
hypothesis.settings.load_profile("same")


def pytest_collection_finish():
    """What imports and collection made stays: with a million objects of torch and transformers to walk, each collection
    in a test took 0.2 s."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _deterministic():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def exact_bf16():
    """CPU kernels that do not round what they multiply with bf16 weights, for references that do not either."""
    from fluxmoe.kernels.cpu import tile

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tile, "BF16_KIND", tile.BF16)
        yield
