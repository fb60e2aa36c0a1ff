"""What every experiment script shares: error convention, provenance, atomic result files."""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn


def cli_main(main: Callable[[], None]) -> None:
    """Run a script's main; an error that a user can cause becomes one `error:` line and exit status 2.

    User errors are `ValueError` subclasses that our packages define (ConfigError, BudgetError, …) and `OSError`.
    A bare ValueError, like any other exception, is a bug of ours and keeps its traceback.
    """
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        ours = isinstance(error, OSError) or type(error).__module__.startswith("fluxmoe.") or is_script_error(error)
        if not ours:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


class UsageError(ValueError):
    """An argument of a script that cannot be meant."""


class Parser(argparse.ArgumentParser):
    """ArgumentParser that keeps the error convention: one `error:` line, exit status 2."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see --help)")


def is_script_error(error: BaseException) -> bool:
    """Errors defined in the script itself: run with `python -m`, its module is called `__main__`."""
    return type(error).__module__ == "__main__"


def write_atomically(path: Path | str, data: bytes | str) -> None:
    """Write `path` whole or not at all (a temporary file beside it, then rename)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    payload = data.encode() if isinstance(data, str) else data
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(payload)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path | str, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_csv(path: Path | str, rows: Iterable[Mapping[str, Any]], columns: Sequence[str] | None = None) -> None:
    """Write `rows`; columns: which, in which order (default: all that any row has). What a row lacks stays empty."""
    rows = list(rows)
    text = io.StringIO()
    columns = columns or list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())


def read_csv(path: Path | str) -> list[dict[str, str]]:
    """The rows of a CSV that `write_csv` wrote; none if it is not there."""
    path = Path(path)
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def resume(out: Path, settings: Mapping[str, Any], table: str = "points.csv") -> tuple[list[dict[str, str]], str]:
    """What a stopped sweep left in `table` of `out`, and the identity of `settings`, which provenance.json must keep
    under that name. UsageError if the rows there are of other settings."""
    identity = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]
    rows = read_csv(out / table)
    if rows and json.loads((out / "provenance.json").read_text()).get("identity") != identity:
        raise UsageError(f"{out} holds points of another model, workload or setting; give another --out")
    return rows, identity


def provenance(device: str = "cpu", seed: int | None = None) -> dict[str, Any]:
    """What made a result: commit, command, device, versions, seed, time (UTC); dirty: whether tracked files other than
    results differed from the commit."""
    packages = ("torch", "triton", "numba", "numpy", "transformers")
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!/results")),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "device": device,
        "hardware": device_name(device),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "seed": seed,
        "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def device_name(device: str) -> str:
    """Human name of the processor that ran the experiment; of the host, for what was simulated."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    try:
        root = Path(__file__).resolve().parent
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
