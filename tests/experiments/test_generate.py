"""The generate command: what it writes, and one `error:` line for everything that a user can get wrong."""

from __future__ import annotations

import csv
import json
import shutil
import struct
import subprocess
import sys
from types import SimpleNamespace
from typing import Any, cast

import pytest
from fluxmoe.experiments.commands import generate
from fluxmoe.experiments.commands.main import call
from fluxmoe.experiments.lib import wall
from fluxmoe.experiments.lib.checkpoints import make_checkpoint
from fluxmoe.runtime.devices import HOST
from fluxmoe.runtime.experts.recording import Recording
from fluxmoe.runtime.hardware import HardwareProfile
from fluxmoe.runtime.memory.budget import BudgetError


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    out = tmp_path_factory.mktemp("models") / "moe"
    make_checkpoint(
        arch="olmoe", out=out, layers=2, experts=4, top_k=2, hidden=32, moe_intermediate=16, heads=2, kv_heads=2,
        vocab=512, seed=0, max_positions=64,
    )  # fmt: skip
    return out


def run(*arguments) -> None:
    call(["generate", *map(str, arguments)])


def test_writes_the_documented_json(model_dir, tmp_path, capsys):
    out, trace, steps = tmp_path / "out.json", tmp_path / "trace.json", tmp_path / "steps.csv"
    run(
        "--model", model_dir, "--prompt", "Beautiful is better", "than ugly.", "--max-new-tokens", 5, "--budget",
        "4MiB", "--placement", "host", "--device", "cpu", "--ignore-eos", "--json", out, "--trace", trace,
        "--steps", steps,
    )  # fmt: skip
    result = json.loads(out.read_text())
    assert [len(o["token_ids"]) for o in result["outputs"]] == [5, 5]
    for output in result["outputs"]:
        assert set(output) == {"prompt_ids", "token_ids", "text", "finish_reason"}
        assert output["finish_reason"] == "length"
        assert isinstance(output["text"], str)
    wanted = {
        "tokens_per_s", "decode_tokens_per_s", "wall_s", "peak_batch", "preemptions", "streamed_bytes", "stall_s"
    }  # fmt: skip
    assert wanted <= set(result["metrics"])
    table = list(csv.DictReader(steps.open()))
    assert len(table) == 5
    assert sum(int(row["streamed_bytes"]) for row in table) == result["metrics"]["streamed_bytes"]
    memory = result["memory"]
    assert memory["budget"] == 4 << 20
    assert sum(v for k, v in memory.items() if k != "budget") <= memory["budget"]
    assert result["placement"]["host"] == 8
    assert {"commit", "command", "versions", "seed"} <= set(result["provenance"])
    events = json.loads(trace.read_text())
    events = events["traceEvents"] if isinstance(events, dict) else events
    assert {"compute"} <= {e.get("args", {}).get("name") for e in events}
    assert "tokens/s" in capsys.readouterr().out


def test_routing_is_recorded(model_dir, tmp_path):
    out = tmp_path / "routing.npz"
    run("--model", model_dir, "--prompt", "a", "--max-new-tokens", 4, "--ignore-eos", "--device", "cpu",
        "--record-routing", out)  # fmt: skip
    recording = Recording.load(out)
    assert recording.shape == (2, 4)
    assert recording.position.max() == 2
    assert {"commit", "content", "model", "versions"} <= set(recording.about)


def test_prompts_file_of_ids_and_strings(model_dir, tmp_path):
    prompts, out = tmp_path / "p.json", tmp_path / "o.json"
    prompts.write_text(json.dumps([[1, 2, 3], [4]]))
    run("--model", model_dir, "--prompts", prompts, "--max-new-tokens", 2, "--device", "cpu", "--json", out)
    assert [o["prompt_ids"] for o in json.loads(out.read_text())["outputs"]] == [[1, 2, 3], [4]]


def test_sampling_is_reproducible(model_dir, tmp_path):
    results = []
    for name, budget in (("a", "all"), ("b", "3MiB")):
        out = tmp_path / name
        run(
            "--model", model_dir, "--prompt", "now", "--max-new-tokens", 8, "--temperature", 1.0, "--top-p", 0.9,
            "--seed", 3, "--ignore-eos", "--device", "cpu", "--budget", budget, "--json", out,
        )  # fmt: skip
        results.append(json.loads(out.read_text())["outputs"])
    assert results[0] == results[1]


COMMON = ("--max-new-tokens", 2, "--device", "cpu")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--prompt", "", *COMMON), "empty"),
        (("--prompt", "x", "--max-new-tokens", 1000, "--device", "cpu"), "context"),
        (("--prompt", "x", "--max-new-tokens", 0, "--device", "cpu"), "max-new-tokens"),
        (("--prompt", "x", *COMMON, "--budget", "10KiB"), "least"),
        (("--prompt", "x", *COMMON, "--budget", "lots"), "lots"),
        (("--prompt", "x", *COMMON, "--placement", "nowhere"), "nowhere"),
        (("--prompt", "x", *COMMON, "--placement", "balanced", "--alpha", "1.5"), "alpha"),
        (("--prompt", "x", *COMMON, "--placement", "host", "--slots", "1"), "slots"),
        (("--prompt", "x", *COMMON, "--block-size", "24"), "16"),
        (("--prompt", "x", *COMMON, "--max-batch", "0"), "max"),
        (("--prompt", "x", *COMMON, "--temperature", "-1"), "temperature"),
        (("--prompts", "nowhere.json", *COMMON), "nowhere.json"),
        (("--prompt", "x"), "max-new-tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_user_errors_are_one_line(model_dir, arguments, expected, tmp_path, error_of):
    out = tmp_path / "out.json"
    assert expected in error_of("generate", "--model", model_dir, *arguments, "--json", out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [("{", "JSON"), ("[]", "non-empty"), ("[3]", "prompt 0"), ("[[]]", "empty"), ("[[99999]]", "vocabulary")],
)
def test_bad_prompt_files(model_dir, tmp_path, error_of, content, expected):
    path = tmp_path / "prompts.json"
    path.write_text(content)
    assert expected in error_of("generate", "--model", model_dir, "--prompts", path, *COMMON)


def damage_truncate(directory):
    shard = next(directory.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])


def damage_header(directory):
    shard = next(directory.glob("*.safetensors"))
    data = shard.read_bytes()
    shard.write_bytes(struct.pack("<d", float("nan")) + data[8:])


def damage_architecture(directory):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "model_type": "gpt_neverheard"}))


def damage_shape(directory):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "intermediate_size": 24}))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (damage_truncate, ".safetensors"),
        (damage_header, ".safetensors"),
        (damage_architecture, "gpt_neverheard"),
        (damage_shape, "shape"),
        (lambda d: (d / "config.json").unlink(), "config.json"),
        (lambda d: shutil.rmtree(d), "copy"),
    ],
)
def test_damaged_checkpoints(model_dir, tmp_path, error_of, damage, expected):
    copy = tmp_path / "copy"
    shutil.copytree(model_dir, copy)
    damage(copy)
    assert expected in error_of("generate", "--model", copy, "--prompt", "x", *COMMON)


def test_module_runs_as_a_command(model_dir, tmp_path):
    command = [sys.executable, "-m", "fluxmoe", "generate", "--model", str(tmp_path / "none")]
    done = subprocess.run(
        [*command, "--prompt", "x", "--max-new-tokens", "1"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_profile_sets_the_balanced_share(model_dir, tmp_path):
    """Host copies at a third of the memory's bandwidth: a quarter of each layer streams."""
    rates = HardwareProfile.load("laptop").to_json() | {"memory_bandwidth": 30e9, "host_bandwidth": 10e9}
    profile, out = tmp_path / "p.json", tmp_path / "o.json"
    profile.write_text(json.dumps(rates))
    run(
        "--model", model_dir, "--prompt", "hello", "--max-new-tokens", 2, "--device", "cpu", "--placement", "balanced",
        "--profile", profile, "--json", out,
    )  # fmt: skip
    counts = json.loads(out.read_text())["placement"]
    assert (counts["host"], counts["resident"]) == (2, 6)


def test_adaptive_serving_gives_the_same_tokens(tmp_path):
    model = make_checkpoint(
        arch="olmoe", out=tmp_path / "m", layers=3, experts=4, top_k=2, hidden=128, moe_intermediate=120, heads=4,
        vocab=512, seed=0, max_positions=64,
    )  # fmt: skip
    tokens: list[list[int]] = []
    for extra in ([], ["--adaptive"]):
        out = tmp_path / f"{len(tokens)}.json"
        common = ("--model", model, "--prompt", "ab", "cdef", "--max-new-tokens", 9, "--device", "cpu", "--ignore-eos")
        run(*common, "--placement", "packed", "--json", out, *extra)
        tokens.append([output["token_ids"] for output in json.loads(out.read_text())["outputs"]])
    assert tokens[0] == tokens[1]


def test_formats_that_cannot_move_are_one_line(model_dir, error_of):
    moving = ("--placement", "disk", "--adaptive")
    assert "without disk" in error_of("generate", "--model", model_dir, "--prompt", "x", *COMMON, *moving)


def test_experts_are_packed_for_the_disk_tier_once(model_dir, tmp_path, capsys):
    model, common = shutil.copytree(model_dir, tmp_path / "m"), ("--prompt", "a", *COMMON, "--placement", "disk")
    run("--model", model, *common)
    [folder] = model.glob("fluxmoe-*")
    assert f"packed experts into {folder}, once" in capsys.readouterr().err
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert times
    run("--model", model, *common)
    assert "packed" not in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times


def test_a_wall_changes_no_token_and_a_small_one_is_one_line(model_dir, tmp_path, error_of, capsys):
    try:
        wall.check()
    except wall.WallError as error:
        pytest.skip(str(error))
    common = ["--model", model_dir, "--prompt", "ab", "--max-new-tokens", 3, "--device", "cpu"]
    for name, more in (("free", ()), ("walled", ("--wall", "1GB"))):
        run(*common, *more, "--json", tmp_path / name)
    free, walled = (json.loads((tmp_path / name).read_text()) for name in ("free", "walled"))
    assert walled["outputs"] == free["outputs"]
    assert walled["provenance"]["command"] == free["provenance"]["command"]
    assert walled["memory_check"]["ledger_bytes"] < walled["wall"]["peak_bytes"] < walled["wall"]["bytes"] == 10**9
    assert "of 953.7 MiB, of which" in capsys.readouterr().out
    assert "19.07 MiB is too small for the interpreter" in error_of("generate", *common, "--wall", "20MB")
    assert "is no number of bytes" in error_of("generate", *common, "--wall", "all")


def test_behind_a_wall_a_refusal_names_the_wall_that_would_do(monkeypatch):
    def refuse(args):
        error = BudgetError("refused")
        error.least = 5 << 20
        raise error

    monkeypatch.setattr(generate, "serve", refuse)
    monkeypatch.setattr(type(HOST), "free_bytes", lambda self: 3 << 30)
    args = SimpleNamespace(engine=SimpleNamespace(budget_bytes=None))
    # A GiB of the wall was taken before the engine came.
    least = (1 << 30) + HOST.free_for(5 << 20)
    with pytest.raises(BudgetError, match=rf"^refused; as it is, this takes --wall {least} \("):
        generate._serve_inside(cast(Any, args), 4 << 30)
    args.engine.budget_bytes = 1
    with pytest.raises(BudgetError, match=r"^refused$"):
        generate._serve_inside(cast(Any, args), 4 << 30)
