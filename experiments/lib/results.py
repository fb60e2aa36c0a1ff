"""Files of results: written whole or not at all, with what made them."""

from __future__ import annotations

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
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("kernels", "models", "runtime", "experiments")


class UsageError(ValueError):
    """An argument that is invalid, or has no effect."""


def write_atomically(path: Path | str, data: bytes | str) -> None:
    """Write `path` whole or not at all (a temporary file beside it, then rename)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    payload = data.encode() if isinstance(data, str) else data
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(payload)
        os.chmod(temporary, allowed(0o666))
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def allowed(mode: int) -> int:
    """`mode` without what the user's umask takes away."""
    umask = os.umask(0)
    os.umask(umask)
    return mode & ~umask


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


def values_by(rows: Iterable[Mapping[str, Any]], by: str, column: str = "tokens_per_s") -> dict[Any, list[float]]:
    """What `column` says in the rows that are ok, those of one `by` together: the repeats of a point."""
    found: dict[Any, list[float]] = {}
    for row in rows:
        if row["status"] == "ok":
            found.setdefault(row[by], []).append(float(row[column]))
    return found


def digest(*values: Any) -> str:
    """16 hex digits that change with the content of any of `values`, which need only be printable."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


@cache
def code_digest() -> str:
    """Names the code that made a row, also where there is no git: a digest of all sources of our packages."""
    found, root = hashlib.sha256(), Path(__file__).resolve().parents[2]
    for path in sorted(path for package in _PACKAGES for path in (root / package).rglob("*.py")):
        found.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return found.hexdigest()[:12]


def check_out(out: Path) -> None:
    """UsageError unless `out` is a folder, or can become one, that can be written."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; give a folder")
    _check_writable(out if out.exists() else out.parent)


def output_file(text: str) -> Path:
    """The path of a file that will be written; UsageError where it cannot be, so before any work."""
    path = Path(text)
    if path.is_dir():
        raise UsageError(f"{text} is a folder; give the name of a file")
    _check_writable(path.parent)
    return path


def _check_writable(folder: Path) -> None:
    there = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UsageError(f"{folder} cannot be written: {there}: {error.strerror}") from None


def load_json(path: Path | str) -> Any:
    """A JSON file's content; UsageError if it cannot be read."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}") from None


def provenance(device: str = "cpu", seed: int | None = None) -> dict[str, Any]:
    """What made a result: code, command, device, versions, seed, time (UTC). commit and dirty (whether tracked files
    other than results differ from it): None where this code lies in no repository of its own, as in a wheel."""
    packages = ("torch", "triton", "numba", "numpy", "transformers")
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None
        if (changed := _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!/results")) is None
        else bool(changed),
        "code": code_digest(),
        "command": " ".join(["fluxmoe", *map(anywhere, sys.argv[1:])]),
        "device": device,
        "hardware": device_name(device),
        "instructions": instructions() if device == "cpu" else None,
        "family": family() if device == "cpu" else None,
        "cpus": cores(),
        "python": platform.python_version(),
        "versions": {name: version_of(name) for name in packages},
        "seed": seed,
        "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def write_result(
    out: Path, experiment: str, tables: Mapping[str, Iterable[Mapping[str, Any]]],
    facts: Mapping[str, Any] | None = None, seed: int | None = None,
) -> None:  # fmt: skip
    """A result that is made in one piece: `tables`, rows by file name, and provenance.json, whose `experiment` says
    which figure is drawn; facts: what else it says, the device if that is no CPU. Rows that are made one by one go
    through `Sweep`."""
    about = {"device": "cpu", **(facts or {})}
    for name, rows in tables.items():
        write_csv(out / name, rows)
    write_json(out / "provenance.json", {"experiment": experiment, **provenance(about["device"], seed), **about})


def anywhere(word: str) -> str:
    """A word of a command line as it may stand in a published file: absolute paths are those of one machine."""
    path = Path(word)
    if not path.is_absolute():
        return word
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else f"…/{path.name}"


def cores() -> int | None:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def instructions() -> str | None:
    """The widest vector instructions of the CPU that peers have kernels for; None where the system does not say."""
    names = {"avx512_bf16": "AVX-512 BF16", "avx512f": "AVX-512", "avx2": "AVX2"}
    flags = (_cpuinfo("flags") or "").split()
    return next((name for flag, name in names.items() if flag in flags), None)


def family() -> str | None:
    """The CPU's family and model, as 25/17: two generations may have one name and the same instructions. None where the
    system does not say."""
    generation, model = _cpuinfo("cpu family"), _cpuinfo("model\t")
    return f"{generation}/{model}" if generation and model else None


def device_name(device: str) -> str:
    """Human name of the processor that ran the experiment; of the host, for what was simulated."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name()
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(entry: str) -> str | None:
    """What the system says of the first core; None where it says nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(entry)), None)


def _git(*arguments: str) -> str | None:
    """What git says of our repository; None where this file is not tracked by the one that it lies in."""
    here = Path(__file__).resolve()

    def run(*command: str) -> str | None:
        try:
            done = subprocess.run(["git", *command], cwd=here.parent, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    return run(*arguments) if run("ls-files", "--error-unmatch", here.name) is not None else None


def version_of(name: str) -> str | None:
    """Of an installed package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
