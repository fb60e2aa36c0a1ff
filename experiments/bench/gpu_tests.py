"""The tests that make sense on a GPU, a row each, at once: pytest's marker `gpu`, in parallel processes.

    python -m fluxmoe.experiments.bench.gpu_tests --out results/<gpu>/tests

Goes on where it was stopped, but for tests that failed. A test whose kernel breaks the device ends its process, so that
the tests behind it do not fail for it. This module is also the pytest plugin that does it.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.util
import os
import tempfile
from pathlib import Path

import pytest
import torch

from ..lib.results import Parser, UsageError, cli_main, provenance, read_csv, write_csv, write_json
from .timing import code_digest, require_gpu

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = ("test", "status", "reason", "seconds", "code")
_ROWS, _DONE = "FLUXMOE_TEST_ROWS", "FLUXMOE_TESTS_DONE"


# The plugin.


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what has a row. The list was written before pytest began: every process must see the same tests."""
    done = set(Path(os.environ[_DONE]).read_text().splitlines())
    kept = [item for item in items if item.nodeid not in done]
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
    items[:] = kept


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """An error that the device raises later belongs to the test that caused it."""
    result = yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A row for each test, written by the process that has all reports."""
    if report.when == "call" or not report.passed:
        status = {"passed": "ok", "skipped": "absent", "failed": "failed"}[report.outcome]
        _add_row(report, status, report.duration)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A row for a file that cannot be imported; absent where a package lacks."""
    if report.failed:
        _add_row(report, "absent" if "ModuleNotFoundError" in str(report.longrepr) else "failed", 0.0)


def _add_row(report: pytest.CollectReport | pytest.TestReport, status: str, seconds: float) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = crash.message if crash else str(report.longrepr or "")
        with open(os.environ[_ROWS], "a", newline="") as file:
            row = (report.nodeid, status, " ".join(reason.split())[-300:], round(seconds, 2), code_digest())
            csv.writer(file, lineterminator="\n").writerow(row)


def pytest_runtest_logfinish(nodeid: str) -> None:
    """Start over with a fresh context after a kernel that broke this one."""
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):
            torch.cuda.synchronize()
            return
        os._exit(1)


# The command.


def run_tests(out: Path, arguments: list[str], workers: int) -> int:
    """Run what has no row that is ok; the exit status of pytest."""
    rows = out / "rows.csv"
    kept = [row for row in read_csv(rows) if row["status"] == "ok" or row["code"] == code_digest()]
    kept = [row for row in kept if row["status"] != "absent"]
    write_csv(rows, kept, COLUMNS)
    with tempfile.NamedTemporaryFile("w", prefix="fluxmoe-done-") as done:
        done.write("\n".join(row["test"] for row in kept))
        done.flush()
        os.environ |= {_ROWS: str(rows.resolve()), _DONE: done.name}
        # Whatever the checkout's own options ask for may not be installed here.
        options = [
            "-o",
            "addopts=",
            "-q",
            "-m",
            "gpu",
            "-p",
            "fluxmoe.experiments.bench.gpu_tests",
            "-p",
            "no:cacheprovider",
        ]
        options += ["--continue-on-collection-errors"]
        if workers > 1:
            options += ["-n", str(workers), "--dist", "worksteal", "--max-worker-restart", "50"]
        return int(pytest.main([*options, *arguments]))


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="fluxmoe.experiments.bench.gpu_tests", description=__doc__.splitlines()[0])
    p.add_argument("tests", nargs="*", default=["tests/kernels", "tests/runtime"], help="(default: %(default)s)")
    p.add_argument("--workers", type=int, default=8, help="processes, with pytest-xdist (default: %(default)s)")
    p.add_argument("--rehearse", action="store_true", help="no GPU: kernels are interpreted")
    p.add_argument("--out", required=True, metavar="DIR")
    return p


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if args.workers < 1:
        raise UsageError("--workers must be at least 1")
    device = require_gpu(args.rehearse).type
    workers = args.workers if importlib.util.find_spec("xdist") else 1
    out = Path(args.out)
    write_json(out / "provenance.json", {**provenance(device, 0), "workers": workers, "code": code_digest()})
    status = run_tests(out, [f"{ROOT / test}" for test in args.tests], workers)
    failed = [row for row in read_csv(out / "rows.csv") if row["status"] == "failed"]
    for row in failed:
        print(f"failed: {row['test']}: {row['reason']}")
    # 1: a test failed, which the rows say; 5: no test was left to run.
    if status not in (0, 1, 5) or failed:
        raise SystemExit(1)


if __name__ == "__main__":
    cli_main(main)
