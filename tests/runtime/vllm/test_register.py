"""The entry point: in every process of vLLM, whatever it serves, so it must cost and change nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
from fluxmoe.runtime.vllm import register

PROJECT = Path(__file__).parents[3] / "pyproject.toml"


def test_the_project_names_it():
    project = tomllib.loads(PROJECT.read_text())["project"]
    module, function = project["entry-points"]["vllm.general_plugins"]["fluxmoe"].split(":")
    assert getattr(import_module(module), function) is register
    # vLLM's builds for the CPU are distributions of another name.
    named = [*project["dependencies"], *project["optional-dependencies"]["vllm"]]
    assert not [each for each in named if each.startswith("vllm")]


def test_importing_it_imports_nothing():
    code = "import fluxmoe.runtime.vllm, sys; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    ours = {name for name in modules if name.startswith("fluxmoe.")}
    assert ours == {"fluxmoe.runtime", "fluxmoe.runtime.vllm"}
    assert not {"torch", "triton", "numba", "numpy", "pandas", "pydantic", "vllm"}.intersection(modules)


def test_calling_it_loads_no_kernels(tmp_path):
    """In a fresh interpreter, where vLLM is what the entry point asks for; torch, which vLLM has loaded, is empty."""
    for name in ("vllm", "vllm/model_executor", "vllm/model_executor/layers"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    package = tmp_path / "vllm/model_executor/layers/quantization"
    package.mkdir()
    (package / "__init__.py").write_text(
        "QUANTIZATION_METHODS = []\n"
        "def register_quantization_config(name): return lambda cls: print(name, cls.__name__)\n"
    )
    (package / "base_config.py").write_text("class QuantizationConfig: pass\n")
    (tmp_path / "torch.py").touch()
    code = "import sys; from fluxmoe.runtime.vllm import register; register(); print(*sys.modules)"
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": path}
    )  # fmt: skip
    registered, modules = run.stdout.splitlines()
    assert registered == "fluxmoe FluxMoEConfig"
    ours = {name for name in modules.split() if name.startswith("fluxmoe.")}
    parts = ("", ".config", ".features", ".hook")
    assert ours == {"fluxmoe.runtime", *(f"fluxmoe.runtime.vllm{part}" for part in parts)}
    assert not {"triton", "numba", "pandas", "pydantic"}.intersection(modules.split())


def test_twice_is_once(vllm):
    register()
    first = vllm.registered["fluxmoe"]
    register()
    assert vllm.registered == {"fluxmoe": first}
    assert vllm.methods == ["fp8", "fluxmoe"]


@pytest.mark.parametrize(
    ("omp", "numba", "then"),
    [("2", None, "2"), ("2", "1", "1"), (None, None, None), ("4,2", None, None), ("", None, None)],
)
def test_numba_gets_the_threads_that_the_worker_was_given(vllm, monkeypatch, omp, numba, then):
    for name, value in (("OMP_NUM_THREADS", omp), ("NUMBA_NUM_THREADS", numba)):
        monkeypatch.setenv(name, value or "")
        if value is None:
            monkeypatch.delenv(name)
    monkeypatch.setitem(sys.modules, "numba.np.ufunc.parallel", SimpleNamespace(_is_initialized=False))
    register()
    assert os.environ.get("NUMBA_NUM_THREADS") == then


def test_numba_keeps_threads_that_run(vllm, monkeypatch):
    """Another number would be an error of the next compilation."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.delenv("NUMBA_NUM_THREADS", raising=False)
    monkeypatch.setitem(sys.modules, "numba.np.ufunc.parallel", SimpleNamespace(_is_initialized=True))
    register()
    assert "NUMBA_NUM_THREADS" not in os.environ
