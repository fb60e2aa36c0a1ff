"""Rows say all that made them: a sweep resumed under any one changed setting makes its rows anew."""

from __future__ import annotations

import csv
import json
import multiprocessing
import shutil
import subprocess
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from fluxmoe.experiments.commands.main import call
from fluxmoe.experiments.lib import effects, models, results, sweep
from fluxmoe.experiments.lib.args import flag_of
from fluxmoe.experiments.lib.checkpoints import make_checkpoint
from fluxmoe.experiments.lib.results import UsageError, load_json, provenance
from fluxmoe.experiments.lib.sweep import Sweep
from fluxmoe.experiments.serving import memory_budget
from fluxmoe.runtime.hardware import HardwareProfile
from fluxmoe.runtime.memory.budget import BudgetError
from fluxmoe.runtime.serving.config import EngineConfig

BASE = {
    "--device": "sim", "--profile": "H100-SXM", "--config": "olmoe-1b-7b", "--requests": "4", "--context": "64",
    "--output-tokens": "8", "--max-batch": "4",
}  # fmt: skip
# One changed value of every setting; those that a sweep varies itself make points of their own.
CHANGES = {
    "--host-format": "tiered", "--slot-format": "decoded", "--transfer": "on_demand", "--slots": "3",
    "--disk-dir": "/tmp", "--kernels": "torch", "--batch-invariant": None, "--threads": "1", "--poison": None,
    "--no-fit-batch": None, "--max-batched-tokens": "128", "--block-size": "16", "--preemption": "swap",
    "--no-cuda-graphs": None, "--profile": "A100-80GB", "--devices": "1", "--config": "mixtral-8x7b", "--requests": "5",
    "--context": "65", "--output-tokens": "9", "--max-batch": "5", "--workload": "fixed", "--arrivals": "7.5",
    "--seed": "1", "--link-bandwidth": "4GB", "--cache-policy": "lru", "--delta-net": "fla",
}  # fmt: skip
# cache-bytes, cache-recording and disk-share are refused but with placements in files.
SWEPT = (
    "cache-bytes",
    "cache-recording",
    "disk-share",
    "budget",
    "placement",
    "alpha",
    "dense-share",
    "expert-format",
    "adaptive",
    "densify",
    "device",
)


def run(out: Path, *changes: str) -> list[dict[str, str]]:
    flags = dict(BASE)
    words = [word for pair in flags.items() for word in pair]
    call(["memory-budget", *words, "--budgets", "1GiB", "2GiB", "--placements", "host", "--out", str(out), *changes])
    with (out / "points.csv").open() as file:
        return list(csv.DictReader(file))


def made_up(patch: pytest.MonkeyPatch) -> list[EngineConfig]:
    """Settings of each run that was made, which is made up."""
    made: list[EngineConfig] = []

    def row(machine, source, settings, lengths, seed):
        made.append(settings)
        return {"tokens_per_s": 1.0, "peak_batch": 1, "kv_blocks": 1, "preemptions": 0, "stall_s": 0.0,
                "transfer_s": 0.0, "tokens_sha256": "x"}  # fmt: skip

    patch.setattr(memory_budget, "row", row)
    patch.setattr(memory_budget, "plot_memory_budget", lambda out: out)
    # Here settings make other rows, whether or not they change anything in them.
    patch.setattr(effects, "refuse_idle", lambda given, setups: None)
    return made


@pytest.fixture
def ran(monkeypatch):
    return made_up(monkeypatch)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder with the rows of BASE, and those rows."""
    folder = tmp_path_factory.mktemp("begun")
    with pytest.MonkeyPatch.context() as patch:
        made = made_up(patch)
        rows = run(folder)
    assert len(made) == 2
    return folder, rows


def test_every_setting_on_the_command_line_is_tried():
    shown = {flag_of(f) for f in fields(EngineConfig) if f.metadata.get("help")} - set(SWEPT)
    assert shown == {flag.removeprefix("--").removeprefix("no-") for flag in CHANGES} & shown


@pytest.mark.parametrize("flag", CHANGES)
def test_rows_made_under_another_setting_are_never_taken(flag, begun, ran, tmp_path, capsys):
    before, first = begun
    shutil.copytree(before, tmp_path, dirs_exist_ok=True)
    value = CHANGES[flag]
    second = run(tmp_path, flag, *([] if value is None else [value]))
    assert len(ran) == 2, f"{flag} made no new rows"
    assert not {row["made"] for row in first} & {row["made"] for row in second}
    assert f"2 rows of {tmp_path} were made otherwise" in capsys.readouterr().out
    with (tmp_path / "old_points.csv").open() as file:
        assert [row["made"] for row in csv.DictReader(file)] == [row["made"] for row in first]


def test_rows_made_under_the_same_settings_are_taken(ran, tmp_path):
    first = run(tmp_path)
    assert run(tmp_path) == first
    assert len(ran) == 2


def test_rows_of_other_code_or_of_another_profile_of_that_name_are_not_taken(ran, tmp_path, monkeypatch):
    profile = tmp_path / "mine.json"
    values = HardwareProfile.load("H100-SXM").to_json()
    profile.write_text(json.dumps(values))
    run(tmp_path / "out", "--profile", str(profile))
    profile.write_text(json.dumps(values | {"memory_bandwidth": 1e12}))
    run(tmp_path / "out", "--profile", str(profile))
    assert len(ran) == 4
    monkeypatch.setattr(sweep, "code_digest", lambda: "other")
    run(tmp_path / "out", "--profile", str(profile))
    assert len(ran) == 6


def test_a_model_is_known_by_its_content(tmp_path):
    sizes = dict[str, Any](layers=1, experts=2, hidden=32, moe_intermediate=16, heads=2, vocab=300)
    one, same, other = (
        models.checkpoint_source(str(make_checkpoint("olmoe", tmp_path / name, seed=seed, **sizes)))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert one.content == same.content != other.content
    assert one.content != replace_layers(one).content


def replace_layers(source: models.Source) -> models.Source:
    return source._replace(config=replace(source.config, max_position_embeddings=77))


def hold(out: str, held, done) -> None:
    with Sweep(out, "test"):
        held.set()
        done.wait(30)


def test_a_row_keeps_its_point_whatever_its_work_calls_its_own(tmp_path):
    """`graphs` of bench engine was whether there are any, until the ledger had a line of that name."""
    with Sweep(tmp_path, "test") as sweep:
        row = sweep.measure(lambda: {"graphs": 123, "x": 1}, graphs=True)
        assert row is not None
        assert (row["graphs"], row["x"]) == (True, 1)
        assert sweep.has(graphs=True)


def test_two_processes_do_not_share_a_folder(tmp_path):
    context = multiprocessing.get_context("spawn")
    held, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(str(tmp_path), held, done))
    other.start()
    assert held.wait(60)
    with pytest.raises(UsageError, match="another process is writing to"):
        Sweep(tmp_path, "test")
    done.set()
    other.join()
    Sweep(tmp_path, "test")


def test_a_file_for_settings_gives_way_to_the_command_line(ran, tmp_path):
    settings = tmp_path / "settings.yaml"
    settings.write_text("max_batch: 9\nslots: 3\ncuda-graphs: false\nplacements: [host, packed]\n")
    run(tmp_path / "out", "--config", str(settings), "--slots", "4")
    assert {config.placement for config in ran} == {"host"}  # `run` says so behind the file
    assert {(config.slots, config.max_batch, config.cuda_graphs) for config in ran} == {(4, 4, False)}
    for text, match in (("{", "cannot be read as YAML"), ("[1]", "must hold settings"), ("slotz: 3", "Unrecognized")):
        settings.write_text(text)
        with pytest.raises(UsageError, match=match):
            run(tmp_path / "out", "--config", str(settings))


def test_a_published_command_names_no_place_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    elsewhere = tmp_path.parent / "elsewhere"
    words = ["versus", "--model", str(elsewhere), "--out", str(tmp_path / "results" / "mine"), "--budgets", "1GiB"]
    monkeypatch.setattr("sys.argv", ["fluxmoe", *words])
    assert provenance()["command"] == "fluxmoe versus --model …/elsewhere --out results/mine --budgets 1GiB"


def test_code_that_lies_in_somebody_elses_repository_says_no_commit(monkeypatch, tmp_path):
    package = tmp_path / "site" / "fluxmoe" / "experiments" / "lib" / "results.py"
    package.parent.mkdir(parents=True)
    package.write_text("")

    for command in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x", "--allow-empty"],
    ):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(results, "__file__", str(package))
    about = provenance()
    assert about["commit"] is None
    assert about["dirty"] is None
    assert about["code"]


def test_where_no_error_knows_a_least_budget_the_end_says_so(tmp_path, capsys):
    def refused():
        raise BudgetError("host memory alone is too much")

    with Sweep(tmp_path, "test") as sweep:
        sweep.measure(refused, budget=1)
        with pytest.raises(SystemExit):
            sweep.finish()
    assert "not known: see the rows' reasons" in capsys.readouterr().out


def test_who_makes_no_row_is_not_named_as_who_made_them(tmp_path, monkeypatch):
    def run(word: str, *points: int) -> dict:
        monkeypatch.setattr("sys.argv", ["fluxmoe", word])
        with Sweep(tmp_path, "test") as sweep:
            for point in points:
                sweep.measure(lambda: {"x": 1}, point=point)
        about = load_json(tmp_path / "provenance.json")
        return {"command": about["command"], "runs": [each["command"] for each in about["runs"]]}

    assert run("first", 1) == {"command": "fluxmoe first", "runs": ["fluxmoe first"]}
    assert run("looks", 1) == {"command": "fluxmoe first", "runs": ["fluxmoe first"]}
    assert run("second", 1, 2) == {"command": "fluxmoe second", "runs": ["fluxmoe first", "fluxmoe second"]}
