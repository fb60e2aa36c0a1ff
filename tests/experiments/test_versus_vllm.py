"""Peers in processes of their own: a stand-in that speaks vLLM's interface, and the real transformers."""

from __future__ import annotations

import csv
import json
import os
import sys

import pytest
from fluxmoe.experiments.commands.main import call
from fluxmoe.experiments.lib.checkpoints import make_checkpoint
from fluxmoe.experiments.lib.results import UsageError
from fluxmoe.experiments.serving import engines as peers
from fluxmoe.kernels.cpu import ENVIRONMENT
from fluxmoe.models.config import load_config

# As much of vllm's interface as the worker uses; refuses a small KV cache in its own way.
STAND_IN = """
import time
from types import SimpleNamespace

__version__ = "0.0-stand-in"

class SamplingParams:
    def __init__(self, max_tokens, **rest):
        self.max_tokens = max_tokens

class Engine:
    def __init__(self, kv_tokens):
        cache = SimpleNamespace(num_gpu_blocks=kv_tokens // 16, block_size=16)
        self.vllm_config = SimpleNamespace(cache_config=cache)
        self.waiting = {}

    def add_request(self, name, prompt, params):
        assert isinstance(prompt["prompt_token_ids"], list)
        self.waiting[name] = [0, params.max_tokens]

    def has_unfinished_requests(self):
        return bool(self.waiting)

    def step(self):
        time.sleep(0.001)
        outputs = []
        for name, progress in list(self.waiting.items()):
            progress[0] += 1
            finished = progress[0] == progress[1]
            tokens = SimpleNamespace(token_ids=[0] * progress[0])
            outputs.append(SimpleNamespace(request_id=name, outputs=[tokens], finished=finished))
            if finished:
                del self.waiting[name]
        return outputs

class LLM:
    def __init__(self, model, max_model_len, kv_cache_memory_bytes=None, gpu_memory_utilization=None, **rest):
        print("INFO starting", flush=True)
        if gpu_memory_utilization is not None:
            kv_cache_memory_bytes = int(gpu_memory_utilization * 1e9) - (0 if "quantization" in rest else 10**9)
        else:
            assert rest["dtype"] in ("bfloat16", "float32")
        if kv_cache_memory_bytes < 300_000:
            raise ValueError(f"KV cache of {kv_cache_memory_bytes} is too small for {max_model_len} tokens")
        self.llm_engine = Engine(kv_cache_memory_bytes // 1000)
"""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    out = tmp_path_factory.mktemp("models") / "moe"
    make_checkpoint(
        arch="qwen3_moe", out=out, layers=2, experts=4, top_k=2, hidden=64, moe_intermediate=64, heads=2, kv_heads=2,
        vocab=512, seed=0, max_positions=256,
    )  # fmt: skip
    return out


@pytest.mark.thorough
def test_all_under_a_row_of_budgets(model_dir, tmp_path, capsys):
    (tmp_path / "vllm.py").write_text(STAND_IN)
    model = load_config(model_dir)
    weights = model.expert_bytes_total + model.non_expert_bytes
    budgets = [str(weights + (8 << 10)), str(weights + (4 << 20))]
    arguments = [
        "--vllm-python", sys.executable, "--transformers", "--model", str(model_dir), "--device", "cpu",
        "--placements", "resident", "packed", "host+planar12", "--sequences", "4", "--prompt-tokens", "24",
        "--output-tokens", "8", "--rounds", "1", "--vllm-env", f"PYTHONPATH={tmp_path}", "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    call(["versus", *arguments, "--budgets", budgets[0]])
    capsys.readouterr()
    call(["versus", *arguments, "--budgets", *budgets])  # the second alone is new
    out = capsys.readouterr().out
    assert out.count("theirs") == 1
    assert "90 % of that from" in out
    with (tmp_path / "out" / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    status = {(row["budget"], row["provider"]): (row["status"], row["reason"]) for row in rows}
    assert len(status) == 2 * 5
    assert status[budgets[0], "vllm bfloat16"][1] == "ValueError: KV cache of 8192 is too small for 32 tokens"
    assert "no room for the KV of one sequence" in status[budgets[0], "transformers bfloat16"][1]
    assert "is too small: the least that works" in status[budgets[0], "fluxmoe resident"][1]
    assert {name for (budget, name), (s, _) in status.items() if budget == budgets[1] and s == "ok"} == {
        "fluxmoe resident", "fluxmoe packed", "fluxmoe host+planar12", "vllm bfloat16", "transformers bfloat16",
    }  # fmt: skip
    about = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert about["vllm"] == "0.0-stand-in"
    assert about["vllm_env"] == ["PYTHONPATH"]
    assert (tmp_path / "out" / "versus.png").stat().st_size > 5000


# What the worker asks of vLLM's platform: a GPU of 1 GB.
PLATFORMS = """
from types import SimpleNamespace

current_platform = SimpleNamespace(is_cpu=lambda: False, get_device_total_memory=lambda: 10**9)
"""


@pytest.fixture
def vllm_package(tmp_path, monkeypatch):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text(STAND_IN)
    (tmp_path / "vllm" / "platforms.py").write_text(PLATFORMS)
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


@pytest.mark.thorough
def test_the_plugin_beside_vllm_as_it_is_and_our_engine(vllm_package, model_dir, tmp_path, capsys):
    arguments = [
        "--vllm-python", sys.executable, "--model", str(model_dir), "--device", "cpu", "--budgets", "999MB",
        "--placements", "packed", "disk", "--sequences", "2", "--prompt-tokens", "8", "--output-tokens", "4",
        "--rounds", "1", "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    call(["versus", "vllm-plugin", *arguments])
    assert "vllm + fluxmoe packed holds 998992 tokens of KV" in capsys.readouterr().out
    with (tmp_path / "out" / "rows.csv").open() as file:
        rows = {row["provider"]: row for row in csv.DictReader(file)}
    assert rows["vllm"]["reason"] == "ValueError: KV cache of -1000000 is too small for 12 tokens"
    ran = ["vllm + fluxmoe packed", "vllm + fluxmoe disk", "fluxmoe packed"]
    assert list(rows) == ["vllm", *ran]
    for name in ran:
        row = rows[name]
        assert (row["status"], row["sequences"]) == ("ok", "2")
        assert 0 < float(row["ttft_s"]) < float(row["seconds"])
        assert float(row["tpot_s"]) > 0
        assert int(row["kv_tokens"]) > 0
        assert int(row["peak_bytes"]) > 1 << 20
    assert (tmp_path / "out" / "vllm_plugin.png").stat().st_size > 5000
    call(["versus", "vllm-plugin", *arguments])  # all is there
    assert "holds" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--budgets", "all"], "`all` is no number"),
        (["--vllm-python", "/bin/true"], "has no fluxmoe; install this one there"),
        (["--served", "64", "--engine", "packed"], "our own engine has no server"),
        (["--served", "8"], "fewer requests than --sequences has clients"),
        (["--budgets", "900GiB"], r"6 engines of 900 GiB run at the same time, and .* are free; give fewer"),
    ],
)
def test_what_the_plugins_experiment_refuses(arguments, match, model_dir, tmp_path):
    given = ["--vllm-python", sys.executable, "--model", str(model_dir), "--device", "cpu", *arguments]
    with pytest.raises(UsageError, match=match):
        call(["versus", "vllm-plugin", *given, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out" / "rows.csv").exists()


def test_an_engine_that_stops_is_a_row(model_dir, tmp_path, capsys):
    dies = STAND_IN.replace("time.sleep(0.001)", 'raise MemoryError("out of blocks")')
    (tmp_path / "vllm.py").write_text(dies)
    call(["versus",
        "--vllm-python", sys.executable, "--model", str(model_dir), "--device", "cpu", "--sequences", "2",
        "--prompt-tokens", "8", "--output-tokens", "4", "--rounds", "1", "--vllm-env", f"PYTHONPATH={tmp_path}",
        "--out", str(tmp_path / "out"),
    ])  # fmt: skip
    assert "all: vllm bfloat16 stopped: MemoryError: out of blocks" in capsys.readouterr().out
    with (tmp_path / "out" / "rows.csv").open() as file:
        assert [row["status"] for row in csv.DictReader(file)] == ["stopped", "ok"]


def test_a_budget_counts_fp32_weights_twice(model_dir):
    model = load_config(model_dir)
    weights = model.expert_bytes_total + model.non_expert_bytes
    assert peers.kv_bytes(model, "float32", 3 * weights) == weights
    assert peers.kv_bytes(model, "bfloat16", 3 * weights) == 2 * weights
    assert peers.kv_bytes(model, "bfloat16", None) is None
    with pytest.raises(peers.RefusedError, match="in float32 alone are 4 MiB more than the budget"):
        peers.vllm("python", "float32", {}, {}, kv=-(4 << 20))


def test_all_engines_start_with_one_environment_unless_told_otherwise(monkeypatch):
    """Ours alone with fewer spins, or vLLM with them by accident, are comparisons of environments."""
    started = []

    def popen(command, env, **_):
        started.append(env["GOMP_SPINCOUNT"])
        raise OSError(2, "not started")

    monkeypatch.setattr(peers.subprocess, "Popen", popen)
    monkeypatch.setitem(ENVIRONMENT, "GOMP_SPINCOUNT", "7")
    settings = {"model": "m", "max_model_len": 8, "max_batch": 1, "eager": True, "device": "cpu"}
    for start in (
        lambda: peers.fluxmoe_within("packed", 1 << 30, settings),
        lambda: peers.vllm("python", "bfloat16", settings, {}, None),
        lambda: peers.vllm_within("python", 1 << 30, settings, {}, "packed"),
        lambda: peers.vllm_within("python", 1 << 30, settings, {"GOMP_SPINCOUNT": "9"}),
    ):
        with pytest.raises(UsageError, match="cannot start"):
            start()
    assert started == ["7", "7", "7", "9"]


def test_the_first_error_of_a_log_is_the_reason():
    log = [
        "INFO all well\n",
        "WARNING 11-25 fallback. Exception: no primitive\n",
        "(Engine pid=3) ValueError: too small\n",
        "RuntimeError: see above\n",
    ]
    assert peers.reason_in(log) == "ValueError: too small"
    assert peers.reason_in(["nothing"]) == ""


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--vllm-env", "x"], "KEY=VALUE"),
        (["--budgets", "all", "1GiB"], "give it alone"),
        (["--vllm-python", "x", "--vllm-offload", "1"], "offloads nothing"),
        (["--sequences", "0"], "at least 1"),
        (["--vllm-python", "/no/python"], "cannot start --vllm-python /no/python"),
    ],
)
def test_what_cannot_be_meant(arguments, match, model_dir, tmp_path):
    with pytest.raises(UsageError, match=match):
        call(["versus", "--model", str(model_dir), "--device", "cpu", *arguments, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out" / "rows.csv").exists()
