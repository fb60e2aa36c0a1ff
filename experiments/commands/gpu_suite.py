"""Everything that a new GPU should run, in slices: are the kernels right, and how fast are they.

    fluxmoe gpu-suite --out results/measured/<gpu> --minutes 9
    fluxmoe gpu-suite --out results/measured/<gpu> --minutes 9 --resume results.tgz
    fluxmoe gpu-suite --out /tmp/rehearsal --rehearse

A call does the next steps that are unfinished (--list shows them) and stops in time; the next one, on this machine or
on another that is given the archive, goes on. Each step is a process group of its own with its own limit, and leaves a
row for each point as it is measured: one that fails, hangs or finds a wrong number is a record in suite.json and costs
no other. After every step results.tgz holds all so far. When all steps had their minutes, those that ran out of time
get them again, and those that failed if the code has changed. Exits 1 if anything failed or was wrong.
--rehearse runs each step's smallest case without a GPU. Needs no network: this checkout, torch, triton and the packages
of requirements.txt; a step whose packages are missing is left out, and --wheels can bring them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import tomllib
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ..bench.timing import require_gpu
from ..lib import archive
from ..lib.args import option
from ..lib.results import UsageError, code_digest, load_json, provenance, write_json
from ..lib.sweep import EXIT_AGAIN
from . import main as command_line
from .reproduce import RUNS

ROOT = Path(__file__).resolve().parents[2]
# Seconds that a slice keeps for its last archive, and below which no step is worth starting.
_RESERVE_S, _LEAST_S = 8.0, 15.0
# How often a step that lost its device, or stalled, is started again in one slice.
_RESTARTS = 5
_REHEARSAL_S = 170.0


@dataclass(frozen=True)
class Step:
    """One process: `fluxmoe` with `command`; see runs.toml."""

    name: str
    command: str
    minutes: float
    rehearsal: str
    group: str = "interpreted"
    needs: tuple[str, ...] = ()
    stall_s: float = 150.0
    every_call: bool = False

    def process(self, root: Path) -> list[str]:
        """Arguments of Python."""
        return ["-m", "fluxmoe", *self.filled(self.command, root)]

    def filled(self, text: str, root: Path) -> list[str]:
        return [part.format(out=root / self.name, root=root) for part in shlex.split(text)]

    def rehearsed(self, root: Path) -> list[str]:
        """The command with its arguments without a GPU."""
        words = self.filled(self.command, root)
        name = " ".join(words[: 2 if words[0] in ("paper", "bench") else 1])
        return [*name.split(), *self.filled(self.rehearsal, root)]


STEPS = tuple(
    Step(**step | {"needs": tuple(step.get("needs", ()))}) for step in tomllib.loads(RUNS.read_text())["steps"]
)
GROUPS = tuple(dict.fromkeys(step.group for step in STEPS))


@dataclass(frozen=True)
class Ended:
    """How a process ended. status: its exit status, or stalled | out of time."""

    status: int | str
    seconds: float


def run_process(
    command: Sequence[str], log: Path, seconds: float, environment: dict[str, str], stall_s: float = float("inf")
) -> Ended:
    """Run a command in a process group of its own, output appended to `log`; all of it is killed at the limit, or when
    it has said nothing for `stall_s`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    with log.open("a") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
        )
        try:
            heard, size = begin, log.stat().st_size
            while True:
                try:
                    return Ended(process.wait(timeout=0.2), time.monotonic() - begin)
                except subprocess.TimeoutExpired:
                    now = time.monotonic()
                if log.stat().st_size != size:
                    heard, size = now, log.stat().st_size
                if now - begin > seconds:
                    return Ended("out of time", now - begin)
                if now - heard > stall_s:
                    return Ended("stalled", now - begin)
        finally:
            # Children that outlive their parent end too.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class Suite:
    """The records of all steps in one folder: what is done, what comes next, what travels."""

    def __init__(self, out: Path, steps: Sequence[Step] = STEPS, site: Path | None = None) -> None:
        self.out, self.steps = out, steps
        self.environment = _environment(out, site)
        path = out / "suite.json"
        before = load_json(path) if path.exists() else {"steps": [], "runs": []}
        self.records: dict[str, dict] = {record["step"]: record for record in before["steps"]}
        self.runs: list[dict] = before["runs"]

    def pending(self) -> list[Step]:
        """Steps to do, in order: those that have not had their minutes, then those that are worth another try."""
        status = {step: self.records.get(step.name, {}).get("status", "new") for step in self.steps}

        def those(*wanted: str, where: Callable[[Step], bool] = lambda step: True) -> list[Step]:
            return [step for step in self.steps if status[step] in wanted and where(step)]

        steps = those("new", "unfinished") + those("left out", where=lambda s: not _missing(s, self.environment))
        other_code = lambda s: self.records[s.name]["code"] != code_digest()  # noqa: E731
        steps = steps or those("out of time") + those("failed", "wrong", where=other_code)
        return [step for step in self.steps if steps and step.every_call and step not in steps] + steps

    def run_slice(self, seconds: float, facts: Callable[[], dict]) -> None:
        """Do pending steps until `seconds` are over; suite.json and results.tgz are whole after each."""
        end = time.monotonic() + seconds - _RESERVE_S
        self.runs.append({**facts(), "code": code_digest()})
        for step in self.pending():
            left = end - time.monotonic()
            if left < _LEAST_S:
                break
            print(f"{step.name} …", flush=True)
            self.records[step.name] = self._run(step, left)
            print(json.dumps(self.records[step.name], ensure_ascii=False), flush=True)
            self.save()

    def _run(self, step: Step, left: float) -> dict:
        if missing := _missing(step, self.environment):
            return {"step": step.name, "status": "left out", "reason": f"not installed: {', '.join(missing)}"}
        before = self.records.get(step.name, {})
        # A step that a slice's end cut short keeps what is left of its minutes; another pass gives them all again.
        spent = before.get("pass_s", 0.0) if before.get("status") == "unfinished" else 0.0
        share = 60 * step.minutes - spent
        limit, begin = min(share, left), time.monotonic()
        log = self.out / "logs" / f"{step.name}.txt"
        for _ in range(_RESTARTS):
            remaining = limit - (time.monotonic() - begin)
            command = [sys.executable, *step.process(self.out)]
            ended = run_process(command, log, remaining, self.environment, step.stall_s)
            if ended.status not in (EXIT_AGAIN, "stalled") or remaining - ended.seconds < _LEAST_S:
                break
        seconds = time.monotonic() - begin
        record = {
            "step": step.name, "status": _verdict(ended.status, share > left), "seconds": round(
                before.get("seconds", 0.0) + seconds, 1), "pass_s": round(spent + seconds, 1), "code": code_digest(),
            "log": f"logs/{log.name}",
        }  # fmt: skip
        if record["status"] not in ("ok", "unfinished", "out of time"):
            record["reason"] = _last_words(log)
        return record

    def save(self) -> None:
        """suite.json, then the archive; what is too big for it is said in both."""
        path = self.out / "suite.json"
        content = {"steps": list(self.records.values()), "runs": self.runs}
        write_json(path, content)
        if left_out := archive.pack(self.out):
            print(f"too big for {archive.NAME}: {', '.join(left_out)}", flush=True)
            write_json(path, content | {"not_in_archive": left_out})
            archive.pack(self.out)

    def bad(self) -> list[str]:
        return [name for name, record in self.records.items() if record["status"] in ("failed", "wrong")]


def _verdict(status: int | str, slice_ended: bool) -> str:
    """ok | wrong (rows that are) | failed | out of time (its own) | unfinished (the slice's, or a lost device)."""
    if status == "out of time":
        return "unfinished" if slice_ended else "out of time"
    verdicts: dict[int | str, str] = {0: "ok", 1: "wrong", EXIT_AGAIN: "unfinished"}
    return verdicts.get(status, "failed")


def _last_words(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-3:])[-500:]


def _environment(out: Path, site: Path | None) -> dict[str, str]:
    # Behind what is there already, but before the interpreter's own packages.
    paths = [os.environ.get("PYTHONPATH", ""), str(site or "")]
    return {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "TRITON_CACHE_DIR": str(out / "cache" / "triton"),
    }


def _missing(step: Step, environment: dict[str, str]) -> list[str]:
    """Packages that the step's process would not find."""
    site = [Path(p) for p in environment["PYTHONPATH"].split(os.pathsep) if p]
    return [
        name
        for name in step.needs
        if importlib.util.find_spec(name) is None and not any((p / name).exists() for p in site)
    ]


def rehearse(out: Path) -> list[dict]:
    """Every step's smallest case, without a GPU; the groups run at once. A record for each step."""

    def run(group: str) -> list[dict]:
        root, log = out / group.replace(" ", "-"), out / "logs" / f"rehearsal-{group.replace(' ', '-')}.txt"
        environment = {**_environment(root, None), "CUDA_VISIBLE_DEVICES": ""}
        environment.pop("TRITON_INTERPRET", None)
        if group.startswith("interpreted"):
            environment["TRITON_INTERPRET"] = "1"
        log.unlink(missing_ok=True)
        command = [sys.executable, "-m", "fluxmoe", "gpu-suite", "--group", group, "--out", str(root)]
        run_process(command, log, _REHEARSAL_S, environment)
        said = [line.removeprefix("REHEARSED ") for line in log.read_text().splitlines() if "REHEARSED {" in line]
        return [json.loads(line[line.index("{") :]) for line in said]

    with ThreadPoolExecutor(len(GROUPS)) as pool:
        records = [record for group in pool.map(run, GROUPS) for record in group]
    by_name = {record["step"]: record for record in records}
    return [
        by_name.get(step.name, {"step": step.name, "status": "failed", "reason": "the rehearsal did not get to it"})
        for step in STEPS
    ]


def list_steps(steps: Sequence[Step]) -> None:
    until = 0.0
    for step in steps:
        until += step.minutes
        print(f"{step.minutes:5.2f} min, done at {until:5.2f}  {step.name:<16} {' '.join(step.command.split())}")
    print(f"{until:5.2f} min  in all")


def rehearse_step(step: Step, root: Path) -> dict[str, object]:
    """Check the arguments of the real run, then run the smallest case, in this process."""
    begin = time.monotonic()
    record: dict[str, object] = {"step": step.name, "status": "ok"}
    try:
        command_line.arguments(step.filled(step.command, root))
        command_line.call(step.rehearsed(root))
    except BaseException as error:  # SystemExit too, as of a command with wrong rows
        traceback.print_exc()
        record |= {"status": "failed", "reason": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    return record | {"seconds": round(time.monotonic() - begin, 1)}


def rehearse_group(group: str, root: Path) -> None:
    """Rehearse a group of steps in this process; a line of JSON for each."""
    records = []
    for step in (step for step in STEPS if step.group == group):
        records.append(rehearse_step(step, root))
        print("REHEARSED " + json.dumps(records[-1], ensure_ascii=False), flush=True)
    if any(record["status"] != "ok" for record in records):
        sys.exit(1)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    minutes: float = option("stop in time for this", 15.0)
    steps: tuple[str, ...] = option("(default: all)", (), choices=tuple(step.name for step in STEPS))
    resume: Path | None = option("results.tgz of an earlier call, unpacked first", None, metavar="TGZ")
    wheels: Path | None = option("wheels of packages that are not installed here", None, metavar="DIR")
    list: bool = option("print the steps and their predicted minutes", False)
    rehearse: bool = option("no GPU: the smallest case of every step", False)
    group: str | None = option("rehearse a group of steps in this process", None, choices=GROUPS)
    out: Path | None = option("folder of the results", None, metavar="DIR")

    def __post_init__(self) -> None:
        if self.out is None and not self.list:
            raise UsageError("--out is missing: the folder that results go to")
        if self.minutes <= 0:
            raise UsageError("--minutes must be positive")
        if self.rehearse and (self.steps or self.resume or self.wheels):
            raise UsageError("--rehearse runs every step as it is here: it takes no --steps, --resume or --wheels")


def run(args: Arguments) -> None:
    steps = [step for step in STEPS if not args.steps or step.name in args.steps]
    if args.list:
        list_steps(steps)
        return
    assert args.out is not None, "only --list does without"
    out = args.out.resolve()
    if args.group:
        rehearse_group(args.group, out)
        return
    if args.rehearse:
        records = rehearse(out)
        write_json(out / "rehearsal.json", {"steps": records})
        for record in records:
            print(json.dumps(record, ensure_ascii=False))
        if any(record["status"] != "ok" for record in records):
            sys.exit(1)
        return
    begin = time.monotonic()
    require_gpu()
    if args.resume:
        if (out / "suite.json").exists():
            raise UsageError(f"{out} holds results already, and goes on by itself: leave --resume out")
        archive.unpack(args.resume, out)
    site: Path | None = None
    if args.wheels:
        site = out / "site"
        for line in archive.install_wheels(args.wheels, site):
            print(line)
    suite = Suite(out, steps, site)
    suite.run_slice(60 * args.minutes - (time.monotonic() - begin), lambda: provenance("cuda", 0))
    suite.save()
    if left := suite.pending():
        print(f"to do: {', '.join(step.name for step in left)}; call again with the same --out, or with --resume")
    if bad := suite.bad():
        print(f"failed or wrong: {', '.join(bad)}; see {out}/suite.json and {out}/logs", file=sys.stderr)
        sys.exit(1)
