"""pack_checkpoint: the same model in fewer bytes; interrupted, it resumes; damaged, it is refused."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys

import pytest
import torch
from fluxmoe.experiments.commands import pack_checkpoint as script
from fluxmoe.experiments.commands.main import call
from fluxmoe.experiments.lib.checkpoints import make_checkpoint
from fluxmoe.experiments.lib.results import UsageError
from fluxmoe.kernels.formats import compressed_formats
from fluxmoe.models.checkpoint import Checkpoint, CheckpointError
from fluxmoe.models.packed import INDEX
from fluxmoe.runtime.serving.engine import Engine, EngineConfig
from fluxmoe.runtime.serving.request import Request, SamplingParams

SIZES = dict(layers=3, experts=4, top_k=2, hidden=128, moe_intermediate=128, heads=2, vocab=512, max_positions=128)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_checkpoint("qwen3_moe", tmp_path_factory.mktemp("models") / "moe", shard_bytes=400_000, **SIZES)


def tokens_of(directory) -> list:
    config = EngineConfig(device="cpu", placement="packed", max_context=64, max_batched_tokens=16)
    with Engine(directory, config) as engine:
        work = [Request(tuple(range(9)), SamplingParams(max_new_tokens=5, ignore_eos=True))]
        return [output.token_ids for output in engine.generate(work)]


@pytest.mark.parametrize("name", compressed_formats())
def test_a_packed_checkpoint_is_the_same_model_in_fewer_bytes(model_dir, tmp_path, name, capsys):
    out = tmp_path / "packed"
    call(["pack-checkpoint", "--model", str(model_dir), "--format", name, "--out", str(out)])
    assert "bits a weight" in capsys.readouterr().out
    original, packed = Checkpoint(model_dir), Checkpoint(out)
    assert packed.packed.format == name
    key = lambda item: item[:2]  # noqa: E731
    for got, expected in zip(packed.experts(), sorted(original.experts(), key=key), strict=True):
        assert got[:2] == expected[:2]
        for a, b in zip(got[2:], expected[2:], strict=True):
            assert torch.equal(a.view(torch.int16), b.view(torch.int16))
    dense = [sorted((r, l or -1, t.sum().item()) for r, l, t in c.dense_tensors()) for c in (original, packed)]  # noqa: E741
    assert dense[0] == dense[1]
    assert sum(f.stat().st_size for f in out.iterdir()) < 0.9 * sum(f.stat().st_size for f in model_dir.iterdir())
    assert (out / "tokenizer.json").read_bytes() == (model_dir / "tokenizer.json").read_bytes()
    assert tokens_of(out) == tokens_of(model_dir)


def test_qwen3_next_can_be_packed_too(tmp_path):
    sizes = SIZES | {"layers": 4, "head_dim": 32}
    model = make_checkpoint("qwen3_next", tmp_path / "next", **sizes)
    call(["pack-checkpoint", "--model", str(model), "--format", "planar12", "--out", str(tmp_path / "packed")])
    assert tokens_of(tmp_path / "packed") == tokens_of(model)


def test_layers_without_experts_have_no_files(tmp_path):
    model = make_checkpoint("qwen3_moe", tmp_path / "moe", **SIZES, dense_layers=(0,))
    call(["pack-checkpoint", "--model", str(model), "--format", "planar12", "--out", str(tmp_path / "packed")])
    files = {path.name for path in (tmp_path / "packed").glob("*.fluxpack")}
    assert files == {f"layer-000{layer}.{tensor}.fluxpack" for layer in (1, 2) for tensor in ("gate_up", "down")}
    assert tokens_of(tmp_path / "packed") == tokens_of(model)


def test_interrupted_it_is_refused_and_resumes(model_dir, tmp_path, monkeypatch):
    out, real, power = tmp_path / "packed", script.pack_layer, [False]

    def stop_at_the_second(checkpoint, layer, name, directory):
        if layer == 1 and not power[0]:
            raise KeyboardInterrupt
        real(checkpoint, layer, name, directory)

    monkeypatch.setattr(script, "pack_layer", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        script.pack_checkpoint(model_dir, "planar12", out)
    with pytest.raises(CheckpointError, match=r"unfinished.*run pack_checkpoint again"):
        Checkpoint(out)
    first = (out / "layer-0000.down.fluxpack").stat().st_mtime_ns
    with pytest.raises(UsageError, match="another model or format"):
        script.pack_checkpoint(model_dir, "huffman", out)
    power[0] = True
    script.pack_checkpoint(model_dir, "planar12", out)
    assert (out / "layer-0000.down.fluxpack").stat().st_mtime_ns == first
    assert len(list(Checkpoint(out).experts())) == 12


def test_it_is_never_finished_from_another_model_of_the_same_sizes(model_dir, tmp_path, monkeypatch):
    other = make_checkpoint("qwen3_moe", tmp_path / "other", shard_bytes=400_000, seed=1, **SIZES)
    monkeypatch.setattr(script, "pack_layer", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        script.pack_checkpoint(model_dir, "planar12", tmp_path / "packed")
    with pytest.raises(UsageError, match="another model or format"):
        script.pack_checkpoint(other, "planar12", tmp_path / "packed")


def test_files_have_ordinary_modes(model_dir, tmp_path):
    before = os.umask(0o027)
    try:
        script.pack_checkpoint(model_dir, "planar12", tmp_path / "packed")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "packed").iterdir()} == {0o640}


@pytest.fixture
def packed_dir(model_dir, tmp_path):
    script.pack_checkpoint(model_dir, "tiered", tmp_path / "packed")
    return tmp_path / "packed"


def test_damaged_files_are_named(packed_dir):
    victim = packed_dir / "layer-0001.gate_up.fluxpack"
    whole = victim.read_bytes()
    flipped = bytearray(whole)
    flipped[5000] ^= 1
    victim.write_bytes(flipped)
    with pytest.raises(CheckpointError, match=r"layer-0001.gate_up.fluxpack: corrupt plane"):
        list(Checkpoint(packed_dir).experts())
    victim.write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match=r"layer-0001.gate_up.fluxpack is truncated"):
        Checkpoint(packed_dir)
    victim.unlink()
    with pytest.raises(CheckpointError, match=r"layer-0001.gate_up.fluxpack is missing"):
        Checkpoint(packed_dir)
    (packed_dir / INDEX).write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        Checkpoint(packed_dir)


def test_a_layer_of_another_model_is_refused(packed_dir):
    first, second = (packed_dir / f"layer-0000.{t}.fluxpack" for t in ("gate_up", "down"))
    index = json.loads((packed_dir / INDEX).read_text())
    first.write_bytes(second.read_bytes())
    index["files"][first.name] = first.stat().st_size
    (packed_dir / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"shape \[4, 128, 128\].*ask for tiered of \[4, 256, 128\]"):
        list(Checkpoint(packed_dir).experts())


def test_what_cannot_be_packed_is_one_sentence(model_dir, packed_dir, tmp_path):
    with pytest.raises(UsageError, match="holds a packed checkpoint already"):
        script.pack_checkpoint(model_dir, "tiered", packed_dir)
    with pytest.raises(UsageError, match="is packed already, in format tiered"):
        script.pack_checkpoint(packed_dir, "planar12", tmp_path / "again")
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("x")
    with pytest.raises(UsageError, match="not empty"):
        script.pack_checkpoint(model_dir, "tiered", full)
    fp32 = make_checkpoint("qwen3_moe", tmp_path / "fp32", dtype="float32", **SIZES)
    with pytest.raises(UsageError, match="bfloat16"):
        script.pack_checkpoint(fp32, "tiered", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_command_line_error_is_one_line(tmp_path):
    command = [
        sys.executable,
        "-m",
        "fluxmoe",
        "pack-checkpoint",
        "--model",
        str(tmp_path),
        "--out",
        "x",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error:")
    assert done.stderr.count("\n") == 1
