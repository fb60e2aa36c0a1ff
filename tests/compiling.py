"""Where kernels are compiled and not run: the tests' own process interprets them."""

from __future__ import annotations

import os
import runpy
import sys
from multiprocessing import forkserver, get_context
from pathlib import Path
from typing import NamedTuple

import pytest


class Ended(NamedTuple):
    status: int | None
    out: str
    err: str


def run_audit(*argv: str, folder: Path, **environment: str) -> Ended:
    """The audit's command line. environment: changes to it."""
    return _run(_audit, argv, environment, folder)


def run_script(text: str, folder: Path) -> list[str]:
    """Lines that a script prints, which is written to `folder`: Triton reads kernels from files alone."""
    path = folder / "script.py"
    path.write_text(text)
    ended = _run(_script, [str(path)], {}, folder)
    assert ended.status == 0, ended.err
    return ended.out.splitlines()


def _run(work, argv, environment, folder: Path, timeout_s: float = 280) -> Ended:
    """In a fork of a process that has imported torch and Triton already: a fresh one takes seconds to."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["fluxmoe.kernels.audit"])
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        forkserver.ensure_running()
    process = context.Process(target=_work, args=(work, argv, environment, folder))
    process.start()
    process.join(timeout_s)
    if process.is_alive():
        process.kill()
        process.join()
    return Ended(process.exitcode, *((folder / name).read_text() for name in ("stdout", "stderr")))


def _work(work, argv, environment, folder: Path) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    os.environ |= environment
    sys.exit(work(argv))


def _audit(argv) -> int:
    from fluxmoe.kernels.audit import main

    return main(argv)


def _script(argv) -> None:
    runpy.run_path(argv[0], run_name="__main__")
