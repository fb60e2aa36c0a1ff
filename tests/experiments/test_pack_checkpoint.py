"""pack_checkpoint: the same model in fewer bytes; interrupted, it resumes; damaged, it is refused."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from typing import Any

import pytest
import torch
from fluxmoe.experiments.commands import pack_checkpoint as script
from fluxmoe.experiments.commands.main import call
from fluxmoe.experiments.lib.checkpoints import make_checkpoint
from fluxmoe.experiments.lib.results import UsageError
from fluxmoe.kernels.formats import codec_of, compressed_formats, fitting
from fluxmoe.kernels.packing.expert_file import ExpertFile
from fluxmoe.models.checkpoint import Checkpoint, CheckpointError
from fluxmoe.models.packed import INDEX, UNFINISHED
from fluxmoe.runtime.experts.disk import StoreError
from fluxmoe.runtime.serving.engine import Engine, EngineConfig
from fluxmoe.runtime.serving.request import Request, SamplingParams
from safetensors.torch import load_file, save_file

from ..kernels.packing.crafted import reseal

SIZES = dict[str, Any](
    layers=3, experts=4, top_k=2, hidden=128, moe_intermediate=128, heads=2, vocab=512, max_positions=128
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_checkpoint("qwen3_moe", tmp_path_factory.mktemp("models") / "moe", shard_bytes=400_000, **SIZES)


@pytest.fixture(scope="module")
def fp8_dir(model_dir, tmp_path_factory):
    """The same model, had its experts been FP8: four low mantissa bits of each are zero."""
    out = shutil.copytree(model_dir, tmp_path_factory.mktemp("models") / "fp8")
    for path in out.glob("*.safetensors"):
        tensors = load_file(path)
        experts = {name: tensor for name, tensor in tensors.items() if ".experts." in name}
        coarse = {name: fitting("planar8", tensor) for name, tensor in experts.items()}
        save_file(tensors | coarse, path, metadata={"format": "pt"})
    return out


def tokens_of(directory, placement="packed", **settings) -> list:
    config = EngineConfig(device="cpu", placement=placement, max_context=64, max_batched_tokens=16, **settings)
    with Engine(directory, config) as engine:
        work = [Request(tuple(range(9)), SamplingParams(max_new_tokens=5, ignore_eos=True))]
        return [output.token_ids for output in engine.generate(work)]


@pytest.mark.parametrize("name", compressed_formats())
def test_a_packed_checkpoint_is_the_same_model_in_fewer_bytes(model_dir, fp8_dir, tmp_path, name, capsys):
    out = tmp_path / "packed"
    model_dir = fp8_dir if codec_of(name).lost_bits else model_dir
    call(["pack-checkpoint", "--model", str(model_dir), "--format", name, "--out", str(out)])
    assert "bits a weight" in capsys.readouterr().out
    original, packed = Checkpoint(model_dir), Checkpoint(out)
    assert packed.packed is not None
    assert packed.packed.header.format == name
    key = lambda item: item[:2]  # noqa: E731
    for got, expected in zip(packed.experts(), sorted(original.experts(), key=key), strict=True):
        assert got[:2] == expected[:2]
        for a, b in zip(got[2:], expected[2:], strict=True):
            assert torch.equal(a.view(torch.int16), b.view(torch.int16))
    dense = [sorted((r, l or -1, t.sum().item()) for r, l, t in c.dense_tensors()) for c in (original, packed)]  # noqa: E741
    assert dense[0] == dense[1]
    # Each of these small blocks has room for a raw tile, a half of its weights.
    assert sum(f.stat().st_size for f in out.iterdir()) < 0.97 * sum(f.stat().st_size for f in model_dir.iterdir())
    assert (out / "tokenizer.json").read_bytes() == (model_dir / "tokenizer.json").read_bytes()
    assert tokens_of(out) == tokens_of(model_dir)


def test_zero_mantissa_bits_are_found(model_dir, fp8_dir, tmp_path, capsys):
    pack = lambda model, name, backend: call(  # noqa: E731
        ["pack-checkpoint", "--model", str(model), "--format", name, "--backend", backend, "--out",
         str(tmp_path / f"{model.name}-{name}-{backend}")]
    )  # fmt: skip
    said = "the low 4 of 7 mantissa bits are zero in every weight, as in files that were FP8: --format planar8 leaves "
    pack(fp8_dir, "planar12", "triton")
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(said)
    assert line.endswith(" GB")
    pack(fp8_dir, "dense", "cpu")
    assert capsys.readouterr().out.splitlines()[-1].endswith(", but cpu kernels must decode it first")
    for model, name in ((fp8_dir, "planar8"), (model_dir, "planar12")):
        pack(model, name, "cpu")
        assert "mantissa bits" not in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"do not fit format planar8: .* their low mantissa bits are not zero"):
        script.pack_checkpoint(model_dir, "planar8", tmp_path / "none")


def test_zero_mantissa_bits_that_no_format_leaves_out(model_dir):
    config = Checkpoint(model_dir).config
    expected = f"{3 / 16 * config.expert_bytes_total / 1e9:.3f} GB, which no format leaves out"
    assert script.about_zero_bits(config, "cpu", "huffman", 3).endswith(expected)


def test_qwen3_next_can_be_packed_too(tmp_path):
    sizes = SIZES | {"layers": 4, "head_dim": 32}
    model = make_checkpoint("qwen3_next", tmp_path / "next", **sizes)
    call(["pack-checkpoint", "--model", str(model), "--format", "planar12", "--out", str(tmp_path / "packed")])
    assert tokens_of(tmp_path / "packed") == tokens_of(model)


def test_layers_without_experts_have_no_files(tmp_path):
    model = make_checkpoint("qwen3_moe", tmp_path / "moe", **SIZES, dense_layers=(0,))
    call(["pack-checkpoint", "--model", str(model), "--format", "planar12", "--out", str(tmp_path / "packed")])
    files = {path.name for path in (tmp_path / "packed").glob("*.flux")}
    assert files == {"experts-0000.flux", "experts-0001.flux"}
    assert tokens_of(tmp_path / "packed") == tokens_of(model)


def test_interrupted_it_is_refused_and_resumes(model_dir, tmp_path, monkeypatch):
    out, real = tmp_path / "packed", script._pack_expert
    packed: list[int] = []

    def stop_at_the_seventh(file, blocks, expert, weights, room):
        if len(packed) == 6:
            raise KeyboardInterrupt
        packed.append(expert)
        real(file, blocks, expert, weights, room)

    monkeypatch.setattr(script, "_pack_expert", stop_at_the_seventh)
    with pytest.raises(KeyboardInterrupt):
        script.pack_checkpoint(model_dir, "planar12", out)
    assert {path.name for path in out.iterdir()} == {UNFINISHED, "experts-0000.flux", "experts-0001.flux"}
    with pytest.raises(CheckpointError, match=r"unfinished.*run pack_checkpoint again"):
        Checkpoint(out)
    for other in (dict(name="huffman"), dict(name="planar12", backend="torch")):
        with pytest.raises(UsageError, match="another model, format or backend"):
            script.pack_checkpoint(model_dir, other.pop("name"), out, **other)
    again: list[int] = []

    def noted(*arguments):
        again.append(arguments[2])
        real(*arguments)

    monkeypatch.setattr(script, "_pack_expert", noted)
    script.pack_checkpoint(model_dir, "planar12", out)
    assert len(again) == 8, "the first layer was whole"
    assert len(list(Checkpoint(out).experts())) == 12
    assert not (out / UNFINISHED).exists()
    weights = [*out.glob("*.flux"), *out.glob("*.safetensors")]
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in weights), "others may read them"


def test_two_do_not_pack_into_one_folder(model_dir, tmp_path):
    out = tmp_path / "packed"
    with script._alone(out), pytest.raises(UsageError, match="another process packs into"):
        script.pack_checkpoint(model_dir, "planar12", out)
    assert not out.exists()


# Packs, in processes that are killed at the first call of what changes a folder, the second, and so on, before it or
# after; then goes on, and compares what is there then with what an undisturbed process made.
KILLED = """
import os, signal, sys
from pathlib import Path
from fluxmoe.experiments.commands.pack_checkpoint import pack_checkpoint
from fluxmoe.models.checkpoint import Checkpoint, CheckpointError, ConfigError
from fluxmoe.models.packed import INDEX, UNFINISHED

model, folder, step = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
CALLS = "replace", "link", "unlink", "fsync", "fdatasync", "mkdir", "ftruncate", "chmod"

def forked(out, at=None):
    if not (pid := os.fork()):
        count = 0
        def killing(real):
            def call(*args, **kwargs):
                nonlocal count
                count += 1
                if count == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                found = real(*args, **kwargs)
                count += 1
                if count == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return found
            return call
        for name in CALLS:
            setattr(os, name, killing(getattr(os, name)))
        pack_checkpoint(model, "planar12", out)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def content(out):
    return {path.name: (path.read_bytes(), path.stat().st_mode) for path in out.iterdir()}

assert forked(folder / "whole") == 0
whole, at, refused = content(folder / "whole"), 1, 0
while (status := forked(out := folder / str(at), at)) != 0:
    assert status == -signal.SIGKILL, status
    try:
        Checkpoint(out)
    except (CheckpointError, ConfigError):
        refused += 1
    else:
        there = {name: data for name, (data, _) in content(out).items()}
        assert all(there[name] == data for name, (data, _) in whole.items()), at
    if (out / UNFINISHED).exists() or not (out / INDEX).exists():
        assert forked(out) == 0, at
    assert content(out) == whole, (at, set(content(out)) ^ set(whole))
    at += step
print(at, refused)
"""


@pytest.mark.parametrize("step", [31, pytest.param(1, marks=pytest.mark.thorough)])
def test_killed_at_any_moment_it_is_refused_or_whole_and_resumes(model_dir, tmp_path, step):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, model_dir, tmp_path, str(step)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    moments, refused = map(int, done.stdout.split())
    assert moments > 40
    assert 0 < refused < moments


def test_another_models_directory_is_not_finished(model_dir, tmp_path, monkeypatch):
    """Of the same sizes and the same file names, with other weights."""
    monkeypatch.setattr(script, "copy_dense", lambda *arguments: pytest.fail("stopped"))
    with pytest.raises(pytest.fail.Exception):
        script.pack_checkpoint(model_dir, "planar12", tmp_path / "packed")
    other = make_checkpoint("qwen3_moe", tmp_path / "other", shard_bytes=400_000, **SIZES, seed=7)
    with pytest.raises(UsageError, match="was begun with another model"):
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
    victim = packed_dir / "experts-0001.flux"
    whole = victim.read_bytes()
    flipped = bytearray(whole)
    flipped[-5000] ^= 1
    victim.write_bytes(flipped)
    with pytest.raises(CheckpointError, match=r"experts-0001.flux: .* of expert 3 is corrupt"):
        list(Checkpoint(packed_dir).experts())
    for placement in ("packed", "host", "disk"):
        with pytest.raises(StoreError, match=r"experts-0001.flux: .* of expert 3 is corrupt"):
            tokens_of(packed_dir, placement=placement, expert_format="tiered")
    victim.write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match=r"experts-0001.flux is truncated"):
        Checkpoint(packed_dir)
    victim.unlink()
    with pytest.raises(CheckpointError, match=r"experts-0001.flux is missing"):
        Checkpoint(packed_dir)
    for text, match in (
        ("{", "damaged"), ('{"version": 1}', "version 1, this program reads version 2"), ('{"version": 2}', "damaged"),
    ):  # fmt: skip
        (packed_dir / INDEX).write_text(text)
        with pytest.raises(CheckpointError, match=match):
            Checkpoint(packed_dir)


def test_a_crafted_block_with_a_right_sum_is_refused(packed_dir):
    experts = Checkpoint(packed_dir).packed
    assert experts is not None
    victim, header = packed_dir / "experts-0001.flux", experts.header
    block = torch.empty(header.sizes[1], dtype=torch.uint8)
    with ExpertFile(victim, header) as file:
        file.read(2, 1, block)
        recipe = file.recipe(2, 1)
    assert recipe is not None
    recipe.at(block).planes["offsets"][-2] = 1 << 20
    reseal(victim, header, 2, 1, block, recipe.recipe_text)
    message = r"layer 1: .*experts-0001.flux: down of expert 2 is damaged: its offsets"
    with pytest.raises(CheckpointError, match=message):
        list(Checkpoint(packed_dir).experts())
    for placement in ("packed", "host", "disk"):
        with pytest.raises(StoreError, match=message):
            tokens_of(packed_dir, placement=placement, expert_format="tiered")


def test_a_layer_of_another_model_is_refused(packed_dir, model_dir, tmp_path):
    script.pack_checkpoint(model_dir, "planar12", tmp_path / "other")
    (packed_dir / "experts-0000.flux").write_bytes((tmp_path / "other" / "experts-0000.flux").read_bytes())
    with pytest.raises(CheckpointError, match="holds other experts: format is planar12, not tiered"):
        Checkpoint(packed_dir)
    config = json.loads((packed_dir / "config.json").read_text())
    (packed_dir / "config.json").write_text(json.dumps({**config, "moe_intermediate_size": 64}))
    with pytest.raises(CheckpointError, match=r"not of the model that config.json describes"):
        Checkpoint(packed_dir)


@pytest.mark.parametrize("backend", ["cpu", "torch", "triton"])
@pytest.mark.parametrize("placement", ["resident", "packed", "host", "disk", "balanced"])
def test_same_tokens_from_files_of_any_kernels(model_dir, tmp_path, backend, placement):
    out = tmp_path / "packed"
    script.pack_checkpoint(model_dir, "planar12", out, backend)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.flux")}
    expected = tokens_of(model_dir)
    settings = dict[str, Any](
        placement=placement, expert_format=None if placement in ("resident", "packed") else "planar12"
    )
    assert tokens_of(out, **settings) == expected
    # The disk tier of these kernels is the packed checkpoint itself; for others it is made once beside it.
    made = [path for path in out.iterdir() if path.is_dir()]
    assert len(made) == (placement == "disk" and backend != "cpu")
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.flux")} == before
    assert tokens_of(out, **settings) == expected


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
    with pytest.raises(UsageError, match="compresses bfloat16 weights"):
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
