"""Memory inside vLLM: what we say of its KV cache without us against vLLM without us, and what loading takes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from fluxmoe.runtime.vllm.paged_model import PagedModel

from .conftest import fluxmoe, fluxmoe_command, prompts
from .engines import ask, share

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
def model(tmp_path_factory) -> str:
    out = str(tmp_path_factory.mktemp("memory") / "model")
    fluxmoe_command("make-checkpoint", "--arch", "qwen3_moe", "--out", out, *SIZES)
    return out


@pytest.fixture(scope="module")
def runs(model) -> dict[str, Run]:
    """Engines with one memory, each in a process of its own, since what a process once took counts."""
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


def anonymous_bytes() -> int:
    """Memory of this process but for files: those of a checkpoint are mapped while it is loaded."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) << 10  # type: ignore[index]


def test_experts_are_never_whole_while_they_are_loaded(model, monkeypatch):
    """Each goes to its file as soon as it is there: 128 of 2.25 MiB take less than a quarter of a layer's."""
    held: list[int] = []
    put = PagedModel.put

    def measured(*args) -> None:
        held.append(anonymous_bytes())
        put(*args)
        held.append(anonymous_bytes())

    monkeypatch.setattr(PagedModel, "put", measured)
    ask(
        [
            {
                "llm": {"model": model, "enforce_eager": True} | fluxmoe(placement="disk"),
                "prompts": [[5]],
                "new_tokens": 1,
            }
        ]
    )
    assert len(held) == 2 * 4 * 32
    opened = held[1]  # the first opens the pager
    assert max(held) - opened < 8 * 3 * 512 * 768 * 2
