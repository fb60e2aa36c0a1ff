"""One file that travels: the results of a suite as a .tgz of bounded size, taken apart again on another machine.

What comes from elsewhere is unpacked with care: only plain files, under the folder that they are meant for.
"""

from __future__ import annotations

import gzip
import io
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from importlib.metadata import distributions
from pathlib import Path, PurePosixPath

from .results import UsageError, write_atomically

NAME = "results.tgz"
LIMIT_BYTES = 15_500_000
# What can be made again, or is too large to travel.
LOCAL = ("cache", "checkpoints", "site")
# An archive of ours is some MB; more than this is not one.
_UNPACKED_BYTES = 1 << 30
# Of a member beside its content: its header and padding, before compression.
_MEMBER_BYTES = 1536


def pack(folder: Path, limit_bytes: int = LIMIT_BYTES) -> list[str]:
    """Write folder/results.tgz with all files below but LOCAL, the smallest first; returns what did not fit."""
    files = sorted(
        (path.stat().st_size, path.relative_to(folder).as_posix())
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink() and path.relative_to(folder).parts[0] not in (*LOCAL, NAME)
    )
    kept, left_out, room = [], [], limit_bytes
    for size, name in files:
        # Nothing that is far larger than the room compresses into it.
        needed = _compressed((folder / name).read_bytes()) + _MEMBER_BYTES if size <= 16 * limit_bytes else room + 1
        if needed <= room:
            kept.append(name)
            room -= needed
        else:
            left_out.append(f"{name} ({size} bytes)")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in kept:
            tar.add(folder / name, arcname=name, recursive=False)
    write_atomically(folder / NAME, buffer.getvalue())
    return left_out


def _compressed(data: bytes) -> int:
    return len(gzip.compress(data, 6))


def unpack(archive: Path, folder: Path) -> None:
    """Take a results.tgz apart into `folder`, all of it or, where a member is unsafe, nothing. UsageError says why."""
    try:
        with tarfile.open(archive, "r:gz") as tar:
            members = tar.getmembers()
            if sum(member.size for member in members) > _UNPACKED_BYTES:
                raise UsageError(f"{archive} holds more than 1 GiB: it is no archive of results")
            for member in members:
                if not (member.isfile() or member.isdir()):
                    raise UsageError(f"{archive} holds {member.name!r}, which is no plain file; nothing was unpacked")
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts or "\\" in member.name or not path.parts:
                    raise UsageError(f"{archive} holds {member.name!r}, outside of its folder; nothing was unpacked")
            for member in members:
                if content := tar.extractfile(member):  # None for a folder
                    write_atomically(folder / member.name, content.read())
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UsageError(f"{archive} cannot be read as an archive of results: {error}") from None


def install_wheels(wheels: Path, site: Path) -> Iterable[str]:
    """Install the wheels of a folder into `site`, for PYTHONPATH, without network, but those that are here. Yields
    a line for each; UsageError says what pip does not take."""
    found = sorted(wheels.glob("*.whl"))
    if not found:
        raise UsageError(f"{wheels} holds no wheels; put *.whl files there, or leave --wheels out")
    installed = {_canonical(each.metadata["Name"]) for each in distributions()}
    for wheel in found:
        name = _canonical(wheel.name.split("-")[0])
        if name in installed:
            yield f"{wheel.name}: {name} is installed here, and stays"
            continue
        where = ["--quiet", "--no-index", "--no-deps", "--upgrade", "--target", str(site)]
        done = subprocess.run([sys.executable, "-m", "pip", "install", *where, wheel], capture_output=True, text=True)
        if done.returncode:
            raise UsageError(f"{wheel} cannot be installed: {done.stderr.strip()}")
        yield f"{wheel.name}: installed for the suite"


def _canonical(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")
