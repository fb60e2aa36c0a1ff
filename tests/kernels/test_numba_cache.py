"""Machine code on disk is that of today's files, and a kernel that others call by a symbol is in it once."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
from fluxmoe.kernels import numba_cache

KERNEL = """
from fluxmoe.kernels.numba_cache import Linked, cached_njit
from numba import prange, types
from .helper import step

@cached_njit(nogil=True)
def kernel(x):
    return step(x)

@Linked.of(types.int64(types.int64, types.int64))
def linked_of_a_test(x, y):
    return step(x) * y

@cached_njit(parallel=True, nogil=True)
def calls(x):
    total = 0
    for y in prange(4):
        total += linked_of_a_test(x, y)
    return total
"""
HELPER = """
from numba import njit

@njit
def step(x):
    return x + {}
"""


def load(folder: Path) -> ModuleType:
    """The kernel's module, as a new process would have it."""
    for name in [name for name in sys.modules if name.startswith(folder.name)]:
        del sys.modules[name]
    importlib.invalidate_caches()
    numba_cache._digest.cache_clear()
    return importlib.import_module(f"{folder.name}.kernel")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    # Python's own cache goes by seconds and sizes, which are equal here.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    folder = tmp_path / "kernels_of_a_test"
    folder.mkdir()
    for name, text in {"__init__": "", "kernel": KERNEL, "helper": HELPER.format(1)}.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def test_a_helper_that_changed_is_compiled_again(folder):
    assert load(folder).kernel(1) == 2
    again = load(folder)
    assert again.kernel(1) == 2
    assert again.kernel.stats.cache_hits
    (folder / "helper.py").write_text(HELPER.format(2))
    assert load(folder).kernel(1) == 3


def test_kernels_call_another_by_its_symbol(folder):
    """From Python, and from a loop of threads; machine code of the caller has no copy, and both know their helper."""
    module = load(folder)
    assert module.linked_of_a_test(1, 3) == 6
    assert module.calls(1) == 2 * (0 + 1 + 2 + 3)
    (code,) = module.calls.inspect_llvm().values()
    assert "declare i64 @fluxmoe_linked_of_a_test" in code
    again = load(folder)
    again.linked_of_a_test.link()
    assert again.linked_of_a_test._kernel.cache_hits
    assert (again.calls(1), again.calls.stats.cache_hits != {}) == (12, True)
    (folder / "helper.py").write_text(HELPER.format(2))
    changed = load(folder)
    changed.linked_of_a_test.link()
    assert changed.calls(1) == 18


@pytest.mark.parametrize("where", ["cpu", "packing"])
def test_all_kernels_are_cached_so(where):
    folder = Path(numba_cache.__file__).parent / where
    found = [file.name for file in folder.glob("*.py") if "cache=True" in file.read_text()]
    assert not found
