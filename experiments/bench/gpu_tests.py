"""The tests that make sense on a GPU, a row each, at once: pytest's marker `gpu`, in parallel processes.

    fluxmoe bench tests --out results/measured/<gpu>/tests

Goes on where it was stopped, but for tests that failed. A test whose kernel breaks the device ends its process, so that
the tests behind it do not fail for it. This module is also the pytest plugin that does it.
"""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from ..lib.args import group, option
from ..lib.results import UsageError, code_digest, read_csv, write_csv, write_result
from .timing import GpuBench

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
        # Of a skipped test: (the path of its file, line, why).
        told = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        reason = crash.message if crash else str(told or "")
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
        options = ["-o", "addopts=", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
        options += ["-p", __name__]
        if workers > 1:
            options += ["-n", str(workers), "--dist", "worksteal", "--max-worker-restart", "50"]
        return int(pytest.main([*options, *arguments]))


@dataclass(frozen=True, kw_only=True)
class Arguments:
    tests: tuple[str, ...] = option("which", ("tests/kernels", "tests/runtime"))
    workers: int = option("processes, with pytest-xdist", 8, least=1)
    where: GpuBench = group()


def run(args: Arguments) -> None:
    device, out = args.where.device.type, args.where.out
    wanted = [ROOT / test for test in args.tests]
    if missing := [path for path in wanted if not path.exists()]:
        raise UsageError(f"{missing[0]} is not there; an installed package has no tests: run this in a checkout")
    workers = args.workers if importlib.util.find_spec("xdist") else 1
    write_result(out, "bench tests", {}, {"device": device, "workers": workers}, 0)
    status = run_tests(out, [str(path) for path in wanted], workers)
    failed = [row for row in read_csv(out / "rows.csv") if row["status"] == "failed"]
    for row in failed:
        print(f"failed: {row['test']}: {row['reason']}")
    # 1: a test failed, which the rows say; 5: no test was left to run.
    if status not in (0, 1, 5) or failed:
        raise SystemExit(1)
