"""Make the results again and say which came true: reproduced, differs (by how much), not possible here (why).

    fluxmoe reproduce --list
    fluxmoe reproduce --only simulated
    fluxmoe reproduce --only sim_fig7_performance_bound ablation

Each run is made in a scratch folder and compared with the committed result: simulated and predicted ones must be the
same, measured ones are shown as ratios with their spread. What scratch has already is not made again unless --force. A
failure is reported at the end and stops none of the others. --update takes what was made into results/.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..lib.args import option
from ..lib.comparison import compare
from ..lib.results import UsageError, code_digest, cores, device_name, family, instructions, write_json

RUNS = Path(__file__).with_name("runs.toml")
_DONE = "done.json"
KINDS = ("measured", "simulated", "predicted")


@dataclass(frozen=True)
class Run:
    """A command whose results go to a folder below results/; see runs.toml."""

    name: str
    command: str
    out: str
    needs: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """One of KINDS."""
        return self.out.partition("/")[0]

    def folder(self, here: str) -> str:
        return self.out.format(here=here)

    def argv(self, scratch: Path, results: Path, here: str, pythons: Mapping[str, str | None]) -> list[str]:
        values = {"out": scratch / self.folder(here), "results": results, "here": here, **pythons}
        return [part.format(**values) for part in shlex.split(self.command)]


def read_runs() -> dict[str, Run]:
    table = tomllib.loads(RUNS.read_text())["runs"]
    return {name: Run(name, **run | {"needs": tuple(run.get("needs", ()))}) for name, run in table.items()}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    only: tuple[str, ...] = option("which runs, by name or kind (default: all)", (), choices=(*KINDS, *read_runs()))
    list: bool = option("print the runs and what they need", False)
    dry_run: bool = option("print the commands and run none", False)
    force: bool = option("make again what scratch has already", False)
    update: bool = option("take what was made into the results", False)
    vllm_python: str | None = option("Python of an environment with vLLM", None, metavar="PATH")
    llama_python: str | None = option("Python of an environment with llama-cpp-python", None, metavar="PATH")
    results: Path = option("the committed results", Path("results"), metavar="DIR")
    scratch: Path = option("where they are made again", Path("scratch/reproduce"), metavar="DIR")

    def __post_init__(self) -> None:
        if self.dry_run and (self.force or self.update):
            raise UsageError("--dry-run runs nothing: --force and --update have no effect")

    @property
    def pythons(self) -> dict[str, str | None]:
        """Peer → Python of the environment that has it."""
        return {"vllm": self.vllm_python, "llama": self.llama_python}


def hardware_folder(results: Path) -> str:
    """Name of this machine's folder: the one with results of such a processor, or a new one."""
    gpu = torch.cuda.is_available()
    name, kind = device_name("cuda" if gpu else "cpu"), None if gpu else instructions()
    folders = sorted(results.glob("measured/*/"))
    likely = None
    for path in (p for folder in folders for p in (folder / "profile.json", *sorted(folder.glob("*/provenance.json")))):
        said = json.loads(path.read_text()) if path.exists() else {}
        # Names of virtual machines say little. What does not know its instructions is of a CPU with AVX2.
        made = {"hardware": said.get("name"), **said.get("provenance", said)}
        same = gpu or ((made.get("instructions") or "AVX2"), made.get("cpus", cores())) == (kind, cores())
        if made["hardware"] != name or not same:
            continue
        folder = path.relative_to(results / "measured").parts[0]
        if gpu or made.get("family") == family():
            return folder
        if made.get("family") is None:  # made before families were written down
            likely = likely or folder
    if likely:
        return likely
    words = [name] if gpu else [name, kind or "", family() or ""]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")


def missing(run: Run, pythons: Mapping[str, str | None]) -> str | None:
    """Why a run is not possible here."""
    if "gpu" in run.needs and not torch.cuda.is_available():
        return "needs a GPU"
    lacking = [f"--{need}-python" for need in run.needs if need != "gpu" and not pythons[need]]
    return f"needs {' and '.join(lacking)}" if lacking else None


def make(run: Run, args: Arguments, here: str) -> int:
    """Exit status of a run into scratch; 0 where scratch has it."""
    folder = args.scratch / run.folder(here)
    marker, state = folder / _DONE, {"run": run.name, "command": run.command, "code": code_digest()}
    if args.force and run.folder(here).count("/") > 1:
        shutil.rmtree(folder, ignore_errors=True)
    elif not args.force and marker.exists() and json.loads(marker.read_text()) == state:
        return 0
    argv = run.argv(args.scratch, args.results, here, args.pythons)
    status = subprocess.run([sys.executable, "-m", "fluxmoe", *argv]).returncode
    if status == 0:
        write_json(marker, state)
    return status


def verdict(run: Run, made: Path, committed: Path) -> str:
    """What comparing says, for the table."""
    if not committed.exists():
        return "new: there is no committed result of this hardware to compare with"
    found = compare(committed, made)
    if run.kind == "measured" and found.speed is not None:
        return f"measured: {found.speed}"
    if found.same:
        return "reproduced"
    return f"differs: {found.told or 'nothing was compared'}"


def run(args: Arguments) -> None:
    runs, here = read_runs(), hardware_folder(args.results)
    chosen = [each for each in runs.values() if not args.only or {each.name, each.kind} & set(args.only)]
    if args.list:
        for each in chosen:
            print(f"{each.name:<30} results/{each.folder(here):<56} {missing(each, args.pythons) or ''}")
        return
    said: dict[str, str] = {}
    for index, each in enumerate(chosen, start=1):
        head = f"[{index}/{len(chosen)}] {each.name}"
        if why := missing(each, args.pythons):
            said[each.name] = f"not possible here: {why}"
        elif args.dry_run:
            print(f"{head}: fluxmoe {shlex.join(each.argv(args.scratch, args.results, here, args.pythons))}")
        else:
            print(f"{head} …", flush=True)
            if status := make(each, args, here):
                said[each.name] = f"failed with exit status {status}; what it printed is above"
                continue
            made, committed = args.scratch / each.folder(here), args.results / each.folder(here)
            said[each.name] = verdict(each, made, committed)
            if args.update:
                shutil.copytree(made, committed, dirs_exist_ok=True, ignore=shutil.ignore_patterns(_DONE, ".lock"))
    for name, words in said.items():
        print(f"{name:<30} {words}")
    if any(words.startswith(("failed", "differs")) for words in said.values()):
        sys.exit(1)
