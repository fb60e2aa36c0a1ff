"""Machine code on disk is that of today's files."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
from fluxmoe.kernels import numba_cache

KERNEL = """
from fluxmoe.kernels.numba_cache import cached_njit
from .helper import step

@cached_njit(nogil=True)
def kernel(x):
    return step(x)
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


def test_a_helper_that_changed_is_compiled_again(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    # Python's own cache goes by seconds and sizes, which are equal here.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    folder = tmp_path / "kernels_of_a_test"
    folder.mkdir()
    for name, text in {"__init__": "", "kernel": KERNEL, "helper": HELPER.format(1)}.items():
        (folder / f"{name}.py").write_text(text)
    assert load(folder).kernel(1) == 2
    again = load(folder)
    assert again.kernel(1) == 2
    assert again.kernel.stats.cache_hits
    (folder / "helper.py").write_text(HELPER.format(2))
    assert load(folder).kernel(1) == 3


@pytest.mark.parametrize("where", ["cpu", "packing"])
def test_all_kernels_are_cached_so(where):
    folder = Path(numba_cache.__file__).parent / where
    found = [file.name for file in folder.glob("*.py") if "cache=True" in file.read_text()]
    assert not found
