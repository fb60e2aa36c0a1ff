"""Checkpoints and questions. Run by `make vllm-test`, in its environment."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

# Before anything reads it. Engines are in this process; one thread each, since two files run at a time.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "INFO",
}
SIZES = ["--experts", "8", "--hidden", "256", "--moe-intermediate", "192", "--vocab", "1024"]


def fluxmoe_command(*argv: str) -> None:
    """`fluxmoe ARGV…`, here."""
    from fluxmoe.experiments.commands.main import call

    call(argv)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Callable[..., str]:
    """arch, layers → the directory of a made checkpoint."""
    made: dict[tuple[str, int], str] = {}

    def make(arch: str, layers: int = 4) -> str:
        if (arch, layers) not in made:
            out = str(tmp_path_factory.mktemp(arch) / "model")
            fluxmoe_command("make-checkpoint", "--arch", arch, "--out", out, "--layers", str(layers), *SIZES)
            made[arch, layers] = out
        return made[arch, layers]

    return make


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
