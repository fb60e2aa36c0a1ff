"""make_checkpoint: transformers reads it, its exponents look trained, nothing half-written is left."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fluxmoe.experiments.commands.main import call
from fluxmoe.experiments.lib import checkpoints as module
from fluxmoe.experiments.lib.checkpoints import make_checkpoint
from fluxmoe.experiments.lib.results import UsageError
from fluxmoe.experiments.lib.skew import covered, popularity, synthetic_routing
from fluxmoe.models.checkpoint import Checkpoint
from fluxmoe.models.config import ConfigError
from fluxmoe.runtime.experts.cache_policies import lru, replay
from fluxmoe.runtime.experts.recording import visits_of
from fluxmoe.runtime.serving.engine import Engine, EngineConfig
from fluxmoe.runtime.serving.request import Request, SamplingParams
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

SIZES = dict[str, Any](layers=2, experts=4, top_k=2, hidden=64, moe_intermediate=32, heads=4, kv_heads=2, vocab=512)


@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        ("mixtral", {}),
        ("qwen3_moe", {}),
        ("olmoe", {}),
        ("qwen3_moe", {"dense_layers": [1]}),
        ("qwen3_next", {"dense_layers": [3, 0, 3], "layers": 4}),
    ],
    ids=["mixtral", "qwen3_moe", "olmoe", "qwen3_moe-dense", "qwen3_next-dense"],
)
def test_transformers_reads_it(arch, changes, tmp_path):
    out = make_checkpoint(arch, tmp_path / "m", **{**SIZES, **changes}, shard_bytes=40_000)
    assert len(list(out.glob("*.safetensors"))) > 2
    load: Callable[..., Any] = AutoModelForCausalLM.from_pretrained
    model, info = load(out, output_loading_info=True, dtype=torch.bfloat16)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    checkpoint = Checkpoint(out)
    assert checkpoint.config.dense_layers == tuple(sorted(set(changes.get("dense_layers", ()))))
    ours = {(layer, expert): pair for layer, expert, *pair in checkpoint.experts()}
    theirs = dict(model.named_parameters())
    for (layer, expert), (gate_up, down) in ours.items():
        assert torch.equal(theirs[f"model.layers.{layer}.mlp.experts.gate_up_proj"][expert], gate_up)
        assert torch.equal(theirs[f"model.layers.{layer}.mlp.experts.down_proj"][expert], down)


def test_text_round_trips(tmp_path):
    out = make_checkpoint("qwen3_moe", tmp_path / "m", **SIZES)
    tokenizer = AutoTokenizer.from_pretrained(out)
    for text in ("Beautiful is better than ugly.", "naïve – 日本語 🙂\n\ttabs  and   spaces", ""):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert all(0 <= i < 512 for i in ids)
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_exponents_look_trained(tmp_path):
    """Exponent entropy of trained models is 2.57 to 2.74 bits (ZipServ, arXiv 2603.17435)."""
    out = make_checkpoint("mixtral", tmp_path / "m", **{**SIZES, "moe_intermediate": 256, "hidden": 128})
    weights = torch.cat([gate_up.flatten() for _, _, gate_up, _ in Checkpoint(out).experts()][:1])
    exponents = (weights.view(torch.int16) >> 7) & 0xFF
    share = torch.bincount(exponents.int()).double() / len(exponents)
    share = share[share > 0]
    assert 2.4 < -(share * share.log2()).sum() < 2.8


@pytest.mark.parametrize(("experts", "top_k", "skew"), [(32, 4, 0.0), (32, 4, 1.4), (64, 8, 0.5), (4, 2, 1.0)])
def test_routers_choose_as_unevenly_as_asked(experts, top_k, skew, tmp_path):
    """Of what tokens of a served model chose, by rank: the shares of the most popular half, quarter and eighth."""
    sizes = SIZES | {"experts": experts, "top_k": top_k, "hidden": 256}
    out = make_checkpoint("qwen3_moe", tmp_path / "m", **sizes, router_skew=skew)
    rng, params = np.random.default_rng(0), SamplingParams(1, ignore_eos=True)
    config = EngineConfig(device="cpu", record_routing=True, max_batched_tokens=512)
    with Engine(out, config) as engine:
        engine.generate([Request(tuple(rng.integers(0, 512, 128).tolist()), params) for _ in range(16)])
        assert engine.pager.recorder is not None
        recording = engine.pager.recorder.recording()
    # c r^-skew, at most 0.4; as many experts as there are choices to give are all alike.
    wanted = popularity(experts, top_k, skew)
    assert wanted.sum() == pytest.approx(top_k)
    for layer in range(2):
        counts = np.sort(np.bincount(recording.experts[:, layer].ravel(), minlength=experts))[::-1]
        for part in (2, 4, 8):
            assert covered(counts, experts // part) == pytest.approx(covered(wanted, experts // part), abs=0.09)


def test_curves_are_those_that_were_published():
    """Shares that popular experts take: see the table of lib/skew.py."""
    qwen, gemma, flash = popularity(128, 8, 1.4), popularity(128, 8, 1.0), popularity(512, 10, 0.2)
    assert covered(qwen, 58) < 0.9 < covered(qwen, 65)
    assert [covered(gemma, n) for n in (64, 32, 16)] == pytest.approx([0.89, 0.67, 0.45], abs=0.06)
    assert covered(flash, 32) == pytest.approx(0.10, abs=0.01)
    states = synthetic_routing(1, 512, 10, 1, 700, 0.2, 0.86, seed=0)[:, 0]
    visits = [visit for token in states for visit in visits_of(token[None])]
    assert replay(visits, (1, 512), 64, lru, warm=200).hit_rate == pytest.approx(0.67, abs=0.03)


def test_same_seed_same_bytes(tmp_path):
    paths = [
        make_checkpoint("olmoe", tmp_path / name, **SIZES, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    a, b, c = ((p / "model.safetensors").read_bytes() for p in paths)
    assert a == b
    assert a != c


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"arch": "gpt"}, UsageError, "mixtral"),
        ({"vocab": 100}, UsageError, "--vocab"),
        ({"dtype": "float16"}, UsageError, "bfloat16"),
        ({"top_k": 5}, ConfigError, "5 of 4"),
        ({"kv_heads": 3}, ConfigError, "share"),
        ({"scale": 0.0}, UsageError, "positive"),
        ({"scale": float("inf")}, UsageError, "positive"),
        ({"router_skew": -0.1}, UsageError, "--router-skew must be from 0 to 3"),
        ({"router_skew": float("nan")}, UsageError, "--router-skew"),
        ({"kv_heads": 0}, ConfigError, "num_key_value_heads"),
        ({"head_dim": 0}, ConfigError, "head_dim"),
        ({"head_dim": 7}, ConfigError, "even head_dim"),
        ({"hidden": 0}, UsageError, "--hidden must be at least 1"),
        ({"layers": 0}, UsageError, "--layers must be at least 1"),
        ({"arch": "olmoe", "head_dim": 8}, UsageError, "head_dim"),
        ({"dense_layers": [0]}, UsageError, "mixtral has experts in every layer; --dense-layers is for qwen3_moe"),
        ({"arch": "qwen3_moe", "dense_layers": [1, 2]}, UsageError, "--dense-layers 2 does not exist; 2 layers"),
        ({"arch": "qwen3_moe", "dense_layers": [-1]}, UsageError, "--dense-layers -1 does not exist"),
        ({"arch": "qwen3_next", "dense_layers": [0, 1]}, ConfigError, "at least one layer with experts"),
    ],
)
def test_errors_leave_nothing(changes, error, match, tmp_path):
    with pytest.raises(error, match=match):
        make_checkpoint(**{"arch": "mixtral", "out": tmp_path / "new" / "m", **SIZES, **changes})
    assert list(tmp_path.iterdir()) == []


def test_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def fail(*arguments, **keywords):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(module, "save_file", fail)
    with pytest.raises(OSError, match="cannot be written: No space left"):
        make_checkpoint("mixtral", tmp_path / "m", **SIZES)
    assert list(tmp_path.iterdir()) == []


def test_modes_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        out = make_checkpoint("mixtral", tmp_path / "m", **SIZES)
    finally:
        os.umask(before)
    assert stat.S_IMODE(out.stat().st_mode) == 0o750
    assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {0o640}


@pytest.mark.parametrize("arch", ["mixtral", "qwen3_moe", "olmoe"])
def test_names_and_shards(arch, tmp_path):
    """As on the Hub: one tensor an expert; an index that covers every shard; no shard past the limit."""
    out = make_checkpoint(arch, tmp_path / "m", **SIZES, shard_bytes=70_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    block, gate = ("block_sparse_moe", "w1") if arch == "mixtral" else ("mlp", "gate_proj")
    assert f"model.layers.1.{block}.experts.3.{gate}.weight" in index["weight_map"]
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == shards
    sizes = [sum(t.nbytes for t in load_file(out / name).values()) for name in shards]
    assert max(sizes) <= 70_000
    assert sum(sizes) == index["metadata"]["total_size"]


def test_interrupted_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_write_tokenizer", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        make_checkpoint("mixtral", tmp_path / "m", **SIZES)
    assert list(tmp_path.iterdir()) == []


def test_existing_directory_is_kept(tmp_path, capsys):
    out = tmp_path / "m"
    arguments = [
        "make-checkpoint",
        "--arch",
        "mixtral",
        "--out",
        str(out),
        "--layers",
        "1",
        "--experts",
        "2",
        "--hidden",
        "32",
    ]
    call([*arguments, "--moe-intermediate", "16", "--vocab", "300", "--heads", "2"])
    assert "MB of weights" in capsys.readouterr().out
    before = sorted(p.name for p in out.iterdir())
    with pytest.raises(UsageError, match="exists already"):
        call(arguments)
    assert sorted(p.name for p in out.iterdir()) == before
