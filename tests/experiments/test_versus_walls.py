"""Peers behind walls: the file that llama.cpp gets, prefill and decode apart, bounds, and whole runs with stand-ins."""

from __future__ import annotations

import errno
import json
import os
import struct
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fluxmoe.experiments.commands.main import call
from fluxmoe.experiments.lib import wall
from fluxmoe.experiments.lib.checkpoints import make_checkpoint
from fluxmoe.experiments.lib.gguf import write_gguf
from fluxmoe.experiments.lib.models import preset_config
from fluxmoe.experiments.lib.page_cache import cached_bytes, drop_cached
from fluxmoe.experiments.lib.results import UsageError, read_csv
from fluxmoe.experiments.serving import phases, walls
from fluxmoe.experiments.serving.bounds import Bounds
from fluxmoe.runtime.disk_rate import read_rate
from fluxmoe.runtime.experts.disk import READERS
from fluxmoe.runtime.memory import machine
from safetensors.torch import load_file

SIZES = dict[str, Any](
    layers=2, experts=4, top_k=2, hidden=64, moe_intermediate=32, heads=2, vocab=512, max_positions=256
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_checkpoint("olmoe", tmp_path_factory.mktemp("models") / "olmoe", **SIZES)


def _read_gguf(data: bytes) -> tuple[dict, dict[str, torch.Tensor]]:
    """Keys and tensors, by the format's description alone."""
    at = 0

    def take(kind: str):
        nonlocal at
        value = struct.unpack_from(f"<{kind}", data, at)[0]
        at += struct.calcsize(f"<{kind}")
        return value

    def text() -> str:
        nonlocal at
        length = take("Q")
        at += length
        return data[at - length : at].decode()

    assert (data[:4], struct.unpack_from("<I", data, 4)) == (b"GGUF", (3,))
    at = 8
    tensors, keys = take("Q"), take("Q")
    found = {}
    for _ in range(keys):
        key, kind = text(), take("I")
        found[key] = text() if kind == 8 else take({4: "I", 6: "f"}[kind])
    infos = []
    for _ in range(tensors):
        name, sizes = text(), [take("Q") for _ in range(take("I"))]
        infos.append((name, sizes[::-1], {0: torch.float32, 30: torch.bfloat16}[take("I")], take("Q")))
    start = -(-at // 32) * 32
    read = {}
    for name, shape, dtype, offset in infos:
        assert offset % 32 == 0
        raw = bytearray(data[start + offset : start + offset + int(np.prod(shape)) * dtype.itemsize])
        read[name] = torch.frombuffer(raw, dtype=dtype).view(*shape)
    return found, read


def test_a_gguf_file_has_the_weights_under_llama_cpps_names(model_dir, tmp_path):
    keys, tensors = _read_gguf(write_gguf(model_dir, tmp_path / "model.gguf").read_bytes())
    assert keys["general.architecture"] == "olmoe"
    assert (keys["olmoe.vocab_size"], keys["olmoe.expert_count"], keys["olmoe.expert_used_count"]) == (512, 4, 2)
    assert (keys["olmoe.attention.head_count"], keys["olmoe.rope.dimension_count"]) == (2, 32)
    weights: dict[str, torch.Tensor] = {}
    for path in model_dir.glob("*.safetensors"):
        weights |= load_file(path)
    expected = {
        "token_embd": weights["model.embed_tokens.weight"], "output": weights["lm_head.weight"],
        "output_norm": weights["model.norm.weight"],
    }  # fmt: skip
    names = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "ffn_gate_inp": "mlp.gate"}
    names |= {f"attn_{part}": f"self_attn.{part}_proj" for part in "qkv"} | {"attn_output": "self_attn.o_proj"}
    names |= {f"attn_{part}_norm": f"self_attn.{part}_norm" for part in "qk"}
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        expected |= {f"blk.{layer}.{mine}": weights[f"{prefix}.{theirs}.weight"] for mine, theirs in names.items()}
        for kind in ("gate", "up", "down"):
            parts = [weights[f"{prefix}.mlp.experts.{expert}.{kind}_proj.weight"] for expert in range(4)]
            expected[f"blk.{layer}.ffn_{kind}_exps"] = torch.stack(parts)
    assert set(tensors) == {f"{name}.weight" for name in expected}
    for name, weight in expected.items():
        is_fp32 = weight.dim() == 1 or "gate_inp" in name
        assert tensors[f"{name}.weight"].dtype == (torch.float32 if is_fp32 else torch.bfloat16), name
        assert torch.equal(tensors[f"{name}.weight"].float(), weight.float()), name


def test_what_llama_cpp_would_compute_otherwise_is_refused(model_dir, tmp_path):
    other = make_checkpoint("qwen3_moe", tmp_path / "qwen", **SIZES)
    with pytest.raises(UsageError, match="not a model with architecture qwen3_moe and renormalised routing"):
        write_gguf(other, tmp_path / "other.gguf")
    (tmp_path / "there.gguf").touch()
    with pytest.raises(UsageError, match="exists already"):
        write_gguf(model_dir, tmp_path / "there.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["qwen", "there.gguf"]


class Counting:
    """A runner whose steps take a second each, on a clock of its own."""

    def __init__(self, monkeypatch):
        self.time_s, self.live, self.kept, self.most = 0.0, 0, [], 0
        monkeypatch.setattr(phases, "time", SimpleNamespace(perf_counter=lambda: self.time_s))

    def prefill(self, prompts, most):
        self.live, self.most = len(prompts), most
        self.time_s += 5
        return [ids[-1] + 1 for ids in prompts]

    def decode(self):
        self.time_s += 1
        return self.live

    def keep(self, count):
        self.live = min(self.live, count)
        self.kept.append(count)

    def counted(self):
        return {"passes": int(self.time_s)}

    def held(self):
        return {"kept": len(self.kept)}


@pytest.mark.parametrize(
    ("batches", "tokens", "seconds", "steps"),
    [
        ([4, 2, 1], 3, 100.0, 3),
        ([4], 10, 2.5, 3),
        ([4, 1], 10, 0.5, 1),
        ([1], 1, 1e-9, 1),
    ],
    ids=["tokens end it", "time ends it", "each has a step, however long", "one of all"],
)
def test_phases_are_timed_apart(batches, tokens, seconds, steps, monkeypatch):
    runner = Counting(monkeypatch)
    answers = list(phases.phases(runner, [[7, 8]] * batches[0], batches, tokens, seconds))
    assert [answer["batch"] for answer in answers] == batches
    assert [answer["decode_tokens"] for answer in answers] == [steps * batch for batch in batches]
    assert [answer["decode_s"] for answer in answers] == [steps] * len(batches)
    assert [answer["passes"] for answer in answers] == [steps] * len(batches)
    assert [answer["kept"] for answer in answers] == [1 + index for index in range(len(batches))]
    assert (answers[0]["prefill_s"], answers[0]["prefill_passes"]) == (5, 5)
    assert answers[0]["first_tokens"] == [9] * batches[0]
    assert not any("prefill_s" in answer for answer in answers[1:])
    assert runner.kept == [*batches, 0]
    assert runner.most == 1 + len(batches) * tokens


@pytest.mark.parametrize(
    ("batch", "kept", "expected"),
    [
        # 8 of 64 experts in 16 layers, 9.437 MB each at 12 bits: 1.208 GB a token.
        (1, 0.0, 2.35e9 / 1.208e9),
        (8, 0.0, 8 * 2.35e9 / (16 * 42.0 * 9.437e6)),
        (1, 0.5, 2 * 2.35e9 / 1.208e9),
        (1, 1.0, None),
        (32, 2.0, None),
    ],
)
def test_the_bound_of_uniform_routing(batch, kept, expected):
    model = preset_config("olmoe-1b-7b")
    bounds = Bounds(model, 2.35e9)
    expert_bytes = bounds.expert_bytes("fluxmoe disk+planar12")
    limit = model.non_expert_bytes + int(kept * 16 * 64 * expert_bytes)
    found = bounds.uniform(expert_bytes, limit, batch)
    assert found == (expected if expected is None else pytest.approx(expected, rel=0.01))
    assert bounds.uniform(expert_bytes, None, batch) is None
    assert Bounds(model, None).uniform(expert_bytes, limit, batch) is None
    assert bounds.expert_bytes("llama.cpp") == bounds.expert_bytes("fluxmoe resident") == 3 * 2048 * 1024 * 2


def test_the_report_compares_medians_and_says_who_was_refused(capsys):
    rows = [
        {"status": "ok", "wall": "8GB", "sequences": 1, "round": number, "provider": who, "decode_tokens_per_s": rate}
        for who, rates in (("fluxmoe packed", (3.0, 9.0, 4.0)), ("llama.cpp", (2.0, 1.0, 2.0)))
        for number, rate in enumerate(rates)
    ]
    rows += [{**rows[0], "provider": "vllm", "status": "refused", "reason": "too large"}] * 2
    walls.report(rows, ["none", "8GB"])
    assert capsys.readouterr().out.splitlines() == [
        "wall 8GB: vllm refused: too large",
        "wall 8GB, 1 sequences, tokens/s in decode: fluxmoe packed 4.00, llama.cpp 2.00; our best is 2.00x theirs",
    ]


def test_agreement_is_of_prompts_that_both_had():
    row = {"status": "ok", "wall": "none", "round": 0}
    rows = [
        {**row, "provider": "fluxmoe packed", "sequences": 2, "first_tokens": "5 6"},
        {**row, "provider": "llama.cpp", "sequences": 2, "first_tokens": "5 7"},
        {**row, "provider": "llama.cpp", "sequences": 4, "first_tokens": "1 2 3 4"},
        {**row, "provider": "vllm", "sequences": 4, "first_tokens": ""},
    ]
    assert walls.agreement(rows) == {"llama.cpp": 0.5}


def test_experts_that_are_mapped_count_as_held(monkeypatch, tmp_path):
    dropped: list = []

    def fence(limit, files):
        dropped.extend(files)
        return nullcontext(SimpleNamespace(peak_bytes=7, mapped_bytes=5))

    monkeypatch.setattr(wall, "fence", fence)
    batches = iter((2, 1))
    peer = SimpleNamespace(ready={}, close=lambda: None, ask=lambda job: None, answer=lambda: {"batch": next(batches)})
    setup = walls.Setup("1GB", 10**9, ((2, 1),))
    asked: Any = SimpleNamespace(prompt_tokens=4, output_tokens=3, seconds=1.0)
    files: Any = SimpleNamespace(all=[tmp_path], weights_bytes=0)
    answers = walls.answers(asked, files, setup, lambda fence: peer, 512)  # type: ignore[arg-type,return-value]
    assert [answer["peak_bytes"] for _, answer in answers] == [12, 12]
    assert dropped == [tmp_path]


def test_nothing_is_asked_while_a_hypervisor_takes_back_what_was_freed(monkeypatch):
    happened: list[str] = []
    monkeypatch.setattr(walls, "drop_cached", lambda paths: happened.append("freed"))
    monkeypatch.setattr(walls, "wait_until_taken_back", lambda since, nbytes: happened.append(f"waited for {nbytes}"))
    peer = SimpleNamespace(
        ready={}, close=lambda: None, ask=lambda job: happened.append("asked"), answer=lambda: {"batch": 1}
    )

    def start(fence):
        happened.append("started")
        return peer

    asked: Any = SimpleNamespace(prompt_tokens=4, output_tokens=3, seconds=1.0)
    files: Any = SimpleNamespace(all=[], weights_bytes=7)
    assert len(list(walls.answers(asked, files, walls.Setup("none", None, ((1,),)), start, 512))) == 1
    assert happened == ["freed", "started", "waited for 7", "asked"]


@pytest.mark.parametrize("sequences", [1, 32, 64])
@pytest.mark.parametrize(("prompt_tokens", "blocks_each"), [(32, 1), (99, 1), (100, 2)])
def test_no_sequence_of_vllm_waits_for_kv(sequences, prompt_tokens, blocks_each, monkeypatch):
    monkeypatch.setattr(walls, "WorkerPeer", lambda name, python, script, settings, **rest: settings["llm"])
    args: Any = SimpleNamespace(
        prompt_tokens=prompt_tokens, output_tokens=20, eager=False, vllm_python="python", patience=1.0
    )
    model = preset_config("olmoe-1b-7b")
    files: Any = SimpleNamespace(source=SimpleNamespace(config=model, weights=Path("model")))
    llm: Any = walls.vllm(args, files, walls.Setup("none", None, ((sequences,),)))(None)
    # vLLM's CPU build has blocks of 128 tokens, gives a sequence whole ones and keeps one for itself.
    assert llm["kv_cache_memory_bytes"] // (128 * model.kv_bytes_per_token) >= sequences * blocks_each + 1
    assert llm["max_model_len"] == prompt_tokens + 1 + 20 + phases.AHEAD


def test_files_of_a_file_system_that_is_only_read_are_dropped_too(tmp_path, monkeypatch):
    def refused(file):
        raise OSError(errno.EINVAL, "Invalid argument")

    (tmp_path / "file").write_bytes(bytes(1 << 20))
    drop_cached([tmp_path])
    (tmp_path / "file").read_bytes()
    monkeypatch.setattr(os, "fdatasync", refused)
    drop_cached([tmp_path])
    assert cached_bytes(tmp_path / "file") == 0 or machine.lies_in_memory(tmp_path)


def test_files_are_read_past_the_page_cache(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(9 << 20))
    assert cached_bytes(path) == 9 << 20
    drop_cached([path])
    for busy in (False, True):
        rate = read_rate([path], seconds=0.05, sizes=(4096, 1 << 20), busy=busy)
        assert rate is None or rate > 0
    assert read_rate([tmp_path / "missing"]) is None


def test_a_disk_is_not_rated_by_memory_that_caches_hold(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    targets, preadv = [], os.preadv

    def recorded(file, parts, at):
        targets.append(np.frombuffer(parts[0], np.uint8).ctypes.data)
        return preadv(file, parts, at)

    monkeypatch.setattr(os, "preadv", recorded)
    assert read_rate([tmp_path / "file"], seconds=0.05, direct=False, sizes=(1 << 16,), memory=16 << 20)
    first = targets[: 4 * READERS]
    assert len(set(first)) == len(first)


# As much of llama_cpp as the worker uses: the token after t is t + 1. It eats memory at a prompt of 33 tokens.
LLAMA = """
import ctypes
from types import SimpleNamespace

__version__ = "0.0-stand-in"
LLAMA_LOAD_MODE_MMAP = 1
eaten = []

def llama_backend_init(): pass
def llama_model_default_params(): return SimpleNamespace()
def llama_context_default_params(): return SimpleNamespace()
def llama_model_load_from_file(path, params):
    assert params.load_mode == LLAMA_LOAD_MODE_MMAP
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"
def llama_init_from_model(model, settings):
    return SimpleNamespace(settings=settings, lengths={})
def llama_model_get_vocab(model): return model
def llama_vocab_n_tokens(vocab): return 512
def llama_get_memory(context): return context.lengths
def llama_memory_seq_rm(memory, sequence, begin, end): del memory[sequence]
def llama_batch_init(tokens, embeddings, sequences):
    zeros = lambda: [0] * tokens
    ids = [[0] for _ in range(tokens)]
    return SimpleNamespace(token=zeros(), pos=zeros(), logits=zeros(), n_seq_id=zeros(), seq_id=ids)
def llama_decode(context, batch):
    context.batch = batch
    if batch.n_tokens == 33:
        eaten.append(b"x" * (3 << 30))
    for i in range(batch.n_tokens):
        sequence = batch.seq_id[i][0]
        assert batch.pos[i] == context.lengths.get(sequence, 0) and sequence < context.settings.n_seq_max
        context.lengths[sequence] = batch.pos[i] + 1
    return 0
def llama_get_logits_ith(context, i):
    assert context.batch.logits[i]
    logits = (ctypes.c_float * 512)()
    logits[(context.batch.token[i] + 1) % 512] = 1
    return ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))
"""
# As much of vllm: all prompts in one step, then a token each.
VLLM = """
from types import SimpleNamespace

__version__ = "0.0-stand-in"

class SamplingParams:
    def __init__(self, max_tokens, **rest): self.max_tokens = max_tokens

class Engine:
    vllm_config = SimpleNamespace(cache_config=SimpleNamespace(num_gpu_blocks=1, block_size=1))
    def __init__(self): self.live = {}
    def add_request(self, name, prompt, params): self.live[name] = []
    def abort_request(self, names):
        for name in names: del self.live[name]
    def step(self):
        for tokens in self.live.values(): tokens.append(3)
        outputs = [SimpleNamespace(token_ids=list(tokens)) for tokens in self.live.values()]
        return [SimpleNamespace(request_id=name, outputs=[o]) for name, o in zip(self.live, outputs)]

class LLM:
    def __init__(self, dtype, max_num_batched_tokens, **rest):
        assert dtype == "bfloat16" and max_num_batched_tokens >= 16
        self.llm_engine = Engine()
"""


@pytest.fixture
def run_walls(model_dir, tmp_path, monkeypatch):
    """Runs the command with stand-ins of both peers; the rows by (wall, provider, sequences)."""
    try:
        wall.check()
    except wall.WallError as error:
        pytest.skip(str(error))
    (tmp_path / "llama_cpp.py").write_text(LLAMA)
    (tmp_path / "vllm.py").write_text(VLLM)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])))

    def run(*argv):
        call(["versus", "walls", "--model", str(model_dir), "--packed", str(tmp_path / "packed"),
              "--gguf", str(tmp_path / "m.gguf"), "--llama-python", sys.executable, "--out", str(tmp_path / "out"),
              "--sequences", "1", "4", "--open-sequences", "2", "--output-tokens", "3", *argv])  # fmt: skip
        rows = read_csv(tmp_path / "out" / "rows.csv")
        return {(row["wall"], row["provider"], int(row["sequences"])): row for row in rows}

    return run


def test_all_engines_behind_walls_and_without(run_walls, tmp_path, capsys, monkeypatch):
    argv = ("--vllm-python", sys.executable, "--walls", "none", "1400MB", "--prompt-tokens", "4", "--rounds", "1",
            "--placements", "packed")  # fmt: skip
    rows = run_walls(*argv)
    out = capsys.readouterr().out
    names = {"fluxmoe packed", "llama.cpp", "vllm"}
    batches = {"none": (1, 2, 4), "1400MB": (1, 4)}
    assert set(rows) == {(name, who, n) for name, each in batches.items() for who in names for n in each}
    for (name, _, batch), row in rows.items():
        assert row["status"] == "ok", row["reason"]
        assert int(row["decode_tokens"]) == 3 * batch
        assert float(row["decode_tokens_per_s"]) > 0
        # Behind a wall the most sequences are prefilled, and become fewer.
        assert bool(row["prefill_tokens_per_s"]) == (name == "none" or batch == 4)
        assert bool(row["peak_bytes"]) == (name != "none")
    prompts = np.random.default_rng(4).integers(0, 512, (4, 4))
    expected = " ".join(str((token + 1) % 512) for token in prompts[:, -1])
    assert rows["none", "llama.cpp", 4]["first_tokens"] == rows["1400MB", "llama.cpp", 4]["first_tokens"] == expected
    assert rows["none", "vllm", 2]["first_tokens"] == "3 3"
    assert "wall 1400MB, 4 sequences, tokens/s in decode: fluxmoe packed" in out
    about = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert about["peers"] == {"llama.cpp": "0.0-stand-in", "vllm": "0.0-stand-in"}
    assert (tmp_path / "out" / "walls.png").stat().st_size > 5000
    monkeypatch.setattr(walls, "answers", lambda *asked: pytest.fail("all is there, and an engine was started"))
    run_walls(*argv)
    assert "round" not in capsys.readouterr().out


@pytest.mark.thorough
def test_what_does_not_start_or_is_killed_is_a_row_with_its_reason(run_walls):
    argv = ("--walls", "300MB", "1400MB", "--prompt-tokens", "33", "--rounds", "2", "--sequences", "1",
            "--placements", "resident", "disk+planar12")  # fmt: skip
    rows = run_walls(*argv)
    for placement in ("resident", "disk+planar12"):
        assert rows["300MB", f"fluxmoe {placement}", 1]["status"] == "refused"
    assert rows["1400MB", "fluxmoe resident", 1]["status"] == "ok"
    # The first that fits is enough.
    assert ("1400MB", "fluxmoe disk+planar12", 1) not in rows
    for name in ("300MB", "1400MB"):
        row = rows[name, "llama.cpp", 1]
        assert row["status"] == "stopped"
        assert "killed by its wall" in row["reason"]


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (("--walls", "much"), "cannot read 'much'"),
        (("--walls", "all"), "takes numbers of bytes"),
        (("--eager",), "is of vLLM"),
        (("--gguf", "x.gguf"), "is for llama.cpp"),
        (("--seconds", "0"), "must be positive"),
    ],
)
def test_user_errors(argv, error, error_of, tmp_path):
    assert error in error_of("versus", "walls", "--preset", "tiny", "--out", tmp_path / "out", *argv)
