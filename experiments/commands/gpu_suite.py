"""Everything that a new GPU should run, in slices: are the kernels right, and how fast are they.

    python -m fluxmoe.experiments.commands.gpu_suite --out results/<gpu> --minutes 9
    python -m fluxmoe.experiments.commands.gpu_suite --out results/<gpu> --minutes 9 --resume results.tgz
    python -m fluxmoe.experiments.commands.gpu_suite --out /tmp/rehearsal --rehearse

A call does the next steps that are unfinished (--list shows them) and stops in time; the next one, on this machine or
on another that is given the archive, goes on. Each step is a process group of its own with its own limit, and leaves a
row for each point as it is measured: one that fails, hangs or finds a wrong number is a record in suite.json and costs
no other. After every step results.tgz holds all so far. When all steps had their minutes, those that ran out of time
get them again, and those that failed if the code has changed. Exits 1 if anything failed or was wrong.
--rehearse runs each step's smallest case without a GPU. Needs no network: this checkout, torch, triton and the packages
of requirements.txt; a step whose packages are missing is left out, and --wheels can bring them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ..bench.timing import EXIT_AGAIN, code_digest, load_json, require_gpu
from ..lib import archive as gpu_archive
from ..lib.results import Parser, UsageError, cli_main, provenance, write_json
from .gpu_steps import GROUPS, STEPS, Step

ROOT = Path(__file__).resolve().parents[2]
# Seconds that a slice keeps for its last archive, and below which no step is worth starting.
_RESERVE_S, _LEAST_S = 8.0, 15.0
# How often a step that lost its device, or stalled, is started again in one slice.
_RESTARTS = 5
_REHEARSAL_S = 170.0


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
        fresh = [s for s in self.steps if self._status(s) in ("new", "unfinished")]
        again = [s for s in self.steps if self._status(s) == "out of time"]
        changed = [
            s
            for s in self.steps
            if self._status(s) in ("failed", "wrong") and self.records[s.name]["code"] != code_digest()
        ]
        found = [s for s in self.steps if self._status(s) == "left out" and not _missing(s, self.environment)]
        todo = [*fresh, *found] or [*again, *changed]
        always = [s for s in self.steps if s.every_call and s not in todo]
        return [*always, *todo] if todo else []

    def _status(self, step: Step) -> str:
        return self.records.get(step.name, {}).get("status", "new")

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
            command = [sys.executable, *step.command(self.out)]
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
        if left_out := gpu_archive.pack(self.out):
            print(f"too big for {gpu_archive.NAME}: {', '.join(left_out)}", flush=True)
            write_json(path, content | {"not_in_archive": left_out})
            gpu_archive.pack(self.out)

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
        command = [sys.executable, "-m", "fluxmoe.experiments.commands.gpu_steps", group, str(root)]
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
    for step in steps:
        print(f"{step.minutes:5.2f} min  {step.name:<16} {step.module} {' '.join(step.arguments)}")
    print(f"{sum(step.minutes for step in steps):5.2f} min  in all")


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="fluxmoe.experiments.commands.gpu_suite", description=__doc__.splitlines()[0])
    p.add_argument("--minutes", type=float, default=25.0, help="stop in time for this (default: %(default)s)")
    p.add_argument("--steps", nargs="+", choices=[step.name for step in STEPS], help="default: all")
    p.add_argument("--resume", type=Path, metavar="TGZ", help="results.tgz of an earlier call, unpacked into DIR first")
    p.add_argument("--wheels", type=Path, metavar="DIR", help="wheels of packages that are not installed here")
    p.add_argument("--list", action="store_true", help="print the steps and their minutes")
    p.add_argument("--rehearse", action="store_true", help="no GPU: the smallest case of every step")
    p.add_argument("--out", type=Path, metavar="DIR")
    return p


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    steps = [step for step in STEPS if not args.steps or step.name in args.steps]
    if args.list:
        list_steps(steps)
        return
    if args.out is None:
        raise UsageError("--out is missing: the folder that results go to")
    if args.minutes <= 0:
        raise UsageError("--minutes must be positive")
    out = args.out.resolve()
    if args.rehearse:
        if args.steps or args.resume or args.wheels:
            raise UsageError("--rehearse runs every step as it is here: it takes no --steps, --resume or --wheels")
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
        gpu_archive.unpack(args.resume, out)
    site: Path | None = None
    if args.wheels:
        site = out / "site"
        for line in gpu_archive.unpack_wheels(args.wheels, site):
            print(line)
    suite = Suite(out, steps, site)
    suite.run_slice(60 * args.minutes - (time.monotonic() - begin), lambda: provenance("cuda", 0))
    suite.save()
    if left := suite.pending():
        print(f"to do: {', '.join(step.name for step in left)}; call again with the same --out, or with --resume")
    if bad := suite.bad():
        print(f"failed or wrong: {', '.join(bad)}; see {out}/suite.json and {out}/logs", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    cli_main(main)
