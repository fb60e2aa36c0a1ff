"""How much KV cache vLLM has, with us and without, in one memory: what we say of the other against the other itself."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from .conftest import fluxmoe, fluxmoe_command, prompts
from .engines import share

# 302 MB of experts, so that what we say could be wrong by more than it may be.
SIZES = ["--layers", "4", "--experts", "32", "--top-k", "4", "--hidden", "512", "--moe-intermediate", "768"]
SIZES += ["--heads", "8", "--kv-heads", "2"]
TOKEN_BYTES = 4 * 2 * 2 * 64 * 2  # layers, keys and values, heads, dimensions, bf16
# What of vLLM's own comes while it loads counts as ours: 41 to 57 MiB were seen with 1.2 GB of experts.
ERROR_BYTES = 64 << 20
# By its answer, and the modules of ours that it has loaded.
CODE = """
import json, sys
from tests_vllm.engines import ask
answer, = ask([json.loads(sys.argv[1])])
print("ANSWER", json.dumps([answer, [name for name in sys.modules if name.startswith("fluxmoe")]]))
"""


class Run(NamedTuple):
    kv_tokens: int
    modules: set[str]
    said: str


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Run]:
    """Engines with one memory, each in a process of its own, since what a process once took counts."""
    model = str(tmp_path_factory.mktemp("kv") / "model")
    fluxmoe_command("make-checkpoint", "--arch", "qwen3_moe", "--out", model, *SIZES)
    alike = {"model": model, "enforce_eager": True, "kv_cache_memory_bytes": None}
    alike |= {"gpu_memory_utilization": share(2 << 30)}

    def run(**llm) -> Run:
        task = {"llm": alike | llm, "prompts": prompts(1, 8), "new_tokens": 2}
        command = [sys.executable, "-c", CODE, json.dumps(task)]
        said = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True).stdout
        answer, modules = json.loads(said.split("ANSWER ")[1].splitlines()[0])
        return Run(answer["kv_tokens"], set(modules), said)

    return {"vllm": run(), "packed": run(**fluxmoe()), "disk": run(**fluxmoe(placement="disk"))}


def test_a_process_without_us_loads_the_entry_alone(runs):
    parts = ("fluxmoe", "fluxmoe.runtime", "fluxmoe.runtime.vllm")
    assert runs["vllm"].modules == {
        *parts,
        *(f"fluxmoe.runtime.vllm.{part}" for part in ("config", "features", "hook")),
    }
    assert "KV cache of" not in runs["vllm"].said


@pytest.mark.parametrize("place", ["packed", "disk"])
def test_the_line_at_start_says_how_much_there_is_with_us_and_without(runs, place):
    line = re.search(r"KV cache of ([\d,]+) tokens; without fluxmoe about ([\d,]+)", runs[place].said)
    assert line is not None
    having, without = (int(number.replace(",", "")) for number in line.groups())
    assert having == runs[place].kv_tokens
    assert abs(without - runs["vllm"].kv_tokens) * TOKEN_BYTES < ERROR_BYTES
