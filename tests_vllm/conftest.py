"""Checkpoints, and engines in processes of their own. Run by `make vllm-test`, in its environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Deterministic and alike for all: two threads, unbound.
ENVIRONMENT = {"OMP_NUM_THREADS": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "INFO"}
SIZES = ["--layers", "4", "--experts", "8", "--hidden", "256", "--moe-intermediate", "192", "--vocab", "1024"]


def run(*command: str, **environment: str) -> str:
    """stdout and stderr of a command that must succeed."""
    done = subprocess.run(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, **ENVIRONMENT, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:]
    return done.stdout


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Callable[[str], str]:
    """arch → the directory of a made checkpoint."""
    made: dict[str, str] = {}

    def make(arch: str) -> str:
        if arch not in made:
            out = str(tmp_path_factory.mktemp(arch) / "model")
            run(sys.executable, "-m", "fluxmoe.experiments.lib.checkpoints", "--arch", arch, "--out", out, *SIZES)
            made[arch] = out
        return made[arch]

    return make


@pytest.fixture(scope="session")
def engines(tmp_path_factory) -> Callable[..., list[dict]]:
    """Tasks → answers, see `engines.py`."""

    def ask(tasks: list[dict], **environment: str) -> list[dict]:
        directory = tmp_path_factory.mktemp("engines")
        (directory / "tasks.json").write_text(json.dumps(tasks))
        files = (str(directory / name) for name in ("tasks.json", "results.json"))
        run(sys.executable, str(HERE / "engines.py"), *files, **environment)
        return json.loads((directory / "results.json").read_text())

    return ask


def fluxmoe(**settings) -> dict:
    """Arguments of vllm.LLM."""
    return {"quantization": "fluxmoe", "additional_config": {"fluxmoe": settings}}


def prompts(count: int, length: int, vocab: int = 1024) -> list[list[int]]:
    """Token ids without a pattern, the same in every run."""
    state, ids = 12345, []
    for _ in range(count * length):
        state = (1103515245 * state + 12345) % 2**31
        ids.append(3 + (state >> 8) % (vocab - 3))
    return [ids[begin : begin + length] for begin in range(0, len(ids), length)]
