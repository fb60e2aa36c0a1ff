"""Test-wide fixtures: one torch thread (numba's threads do the work), seeded; Triton interpreted without a GPU."""

import gc
import os
from pathlib import Path

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


# What comes first, by worker in turn. On a fresh clone the first of these compile kernels that many others use, no two
# the same at once; the others take long, and no worker is to be left with them when the rest has ended.
_FIRST = (
    ("kernels/test_expert_ops.py", "kernels/test_audit.py", "experiments/test_gpu_suite.py", "test_notebooks.py"),
    ("kernels/packing/", "kernels/cpu/", "experiments/test_versus_walls.py", "kernels/triton/test_delta_net.py"),
)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Each worker is given one after another of as many equal parts of the tests as there are workers."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers == 1:
        return
    here = Path(__file__).parent
    rest = {item: item.path.relative_to(here).as_posix() for item in items}
    first: list[list[pytest.Item]] = [[] for _ in range(workers)]
    for worker, wanted in enumerate(_FIRST):
        for name in wanted:
            found = [item for item, path in rest.items() if path.startswith(name)]
            first[worker % workers] += found
            for item in found:
                del rest[item]
    left, others = len(items), list(rest)
    for worker, ordered in enumerate(first):
        size = max(0, left // (workers - worker) - len(ordered))
        ordered += others[:size]
        del others[:size]
        left -= len(ordered)
    items[:] = [item for ordered in first for item in ordered] + others


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
