"""What is installed elsewhere: all of our folders, and every command works from them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Runs the help of every command, which imports it, and says from where.
ALL_COMMANDS = """
import contextlib, io
from fluxmoe.experiments.commands.main import COMMANDS, main
for name in COMMANDS:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as said:
        main([*name.split(), "--help"])
    assert f"usage: fluxmoe {name}" in said.getvalue(), name
print(main.__code__.co_filename)
"""


def test_every_folder_with_code_is_named():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    tops = ("kernels", "runtime", "models", "experiments")
    folders = {path.parent.relative_to(ROOT) for top in tops for path in (ROOT / top).rglob("*.py")}
    named = {f"fluxmoe.{'.'.join(folder.parts)}": str(folder) for folder in folders} | {"fluxmoe": "src/fluxmoe"}
    assert setup["package-dir"] == named
    assert set(setup["packages"]) == set(named)


@pytest.mark.thorough
def test_every_command_works_from_a_wheel(tmp_path):
    pytest.importorskip("setuptools")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        if not name.startswith(("results/", "notebooks/", "tests")):
            (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tmp_path / "source" / name, follow_symlinks=False)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([*build, str(tmp_path), str(tmp_path / "source")], check=True)
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    elsewhere.mkdir()

    def python(*words: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(site)}
        done = subprocess.run(
            [sys.executable, *words], cwd=elsewhere, env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout

    assert python("-c", ALL_COMMANDS).strip() == str(site / "fluxmoe/experiments/commands/main.py")
    run = ("-m", "fluxmoe")
    python(*run, "make-checkpoint", "--arch", "olmoe", "--out", "m", "--layers", "1", "--vocab", "300")
    said = python(
        *run,
        "generate",
        "--model",
        "m",
        "--prompt",
        "x",
        "--max-new-tokens",
        "2",
        "--device",
        "cpu",
        "--kernels",
        "torch",
    )
    assert "2 tokens in" in said
    assert "best: --placement" in python(*run, "plan", "--config", "olmoe-1b-7b", "--gpu", "h100", "--context", "64")
    assert "figure: " in python(*run, "paper", "fig1", "--out", "fig1")
    assert "in all" in python(*run, "gpu-suite", "--list")
    assert "sim_fig7" in python(*run, "reproduce", "--list")
