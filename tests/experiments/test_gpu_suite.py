"""The GPU suite's bookkeeping, on steps that only pretend: slices, limits, what travels; and the rehearsal of the real
ones."""

from __future__ import annotations

import fcntl
import io
import json
import os
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
from fluxmoe.experiments.commands import gpu_suite
from fluxmoe.experiments.commands.gpu_suite import STEPS, Step, Suite, run_process
from fluxmoe.experiments.commands.main import call
from fluxmoe.experiments.lib import archive as gpu_archive
from fluxmoe.experiments.lib.archive import install_wheels, pack, unpack
from fluxmoe.experiments.lib.results import UsageError


class Pretended(Step):
    """A step whose command is code; {out} is its folder."""

    def process(self, root: Path) -> list[str]:
        return ["-c", f"out = {str(root / self.name)!r}\n{self.command}"]


def pretended(name: str, code: str, minutes: float = 1.0, **more) -> Pretended:
    return Pretended(name, code, minutes, "", **more)


# A sweep of four points that begins where its file ends, and dies in the middle of its second.
SWEEP = """
import os, sys, time
os.makedirs(out, exist_ok=True)
have = len(open(out + '/rows.csv').readlines()) if os.path.exists(out + '/rows.csv') else 0
for point in range(have, 4):
    if point == 2 and have < 2: {death}
    with open(out + '/rows.csv', 'a') as file: print(point, os.getpid(), file=file, flush=True)
"""


def statuses(suite: Suite) -> dict[str, str]:
    return {name: record["status"] for name, record in suite.records.items()}


def run(suite: Suite, seconds: float = 60.0) -> dict[str, str]:
    suite.run_slice(seconds, dict)
    return statuses(suite)


@pytest.fixture(autouse=True)
def _short_slices(monkeypatch):
    monkeypatch.setattr(gpu_suite, "_RESERVE_S", 0.0)
    monkeypatch.setattr(gpu_suite, "_LEAST_S", 0.1)


def test_no_step_costs_another(tmp_path):
    steps = [
        pretended("fine", "print('result')"),
        pretended("broken", "raise SystemExit('it broke')"),
        pretended("crash", "import os; os.abort()"),
        pretended("hangs", "import time; time.sleep(60)", 0.01),
        pretended("silent", "import time; time.sleep(60)", stall_s=0.3),
        pretended("absent", "", needs=("no_such_package",)),
        pretended("last", "print('last')"),
    ]
    suite = Suite(tmp_path, steps)
    assert run(suite) == {
        "fine": "ok", "broken": "wrong", "crash": "failed", "hangs": "out of time", "silent": "failed",
        "absent": "left out", "last": "ok",
    }  # fmt: skip
    assert "it broke" in suite.records["broken"]["reason"]
    assert "no_such_package" in suite.records["absent"]["reason"]
    assert "result" in (tmp_path / "logs" / "fine.txt").read_text()
    assert json.loads((tmp_path / "suite.json").read_text())["steps"] == list(suite.records.values())
    with tarfile.open(tmp_path / "results.tgz") as tar:
        assert {"suite.json", "logs/last.txt"} <= set(tar.getnames())


def test_a_call_does_what_the_one_before_left(tmp_path):
    steps = [
        pretended("one", "print(1)"),
        pretended("slow", "import time; time.sleep(60)"),
        pretended("two", "print(2)"),
    ]
    first = Suite(tmp_path, steps)
    assert run(first, 2.0) == {"one": "ok", "slow": "unfinished"}
    assert [step.name for step in Suite(tmp_path, steps).pending()] == ["slow", "two"]
    faster = [steps[0], pretended("slow", "print('done')"), steps[2]]
    assert run(Suite(tmp_path, faster)) == {"one": "ok", "slow": "ok", "two": "ok"}
    assert (tmp_path / "logs" / "one.txt").read_text() == "1\n"
    assert len(json.loads((tmp_path / "suite.json").read_text())["runs"]) == 2
    assert Suite(tmp_path, faster).pending() == []


def test_a_step_keeps_its_rows_and_what_is_left_of_its_minutes(tmp_path):
    step = pretended("sweep", SWEEP.format(death="time.sleep(60)"))
    assert run(Suite(tmp_path, [step]), 1.5) == {"sweep": "unfinished"}
    suite = Suite(tmp_path, [step])
    assert 1 < suite.records["sweep"]["pass_s"] < 3
    assert run(suite) == {"sweep": "ok"}
    rows = [line.split() for line in (tmp_path / "sweep" / "rows.csv").read_text().splitlines()]
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]
    assert rows[0][1] == rows[1][1] != rows[2][1]  # the first two are the first process's


def test_a_slice_goes_on_elsewhere_from_its_archive(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    step = pretended("sweep", SWEEP.format(death="time.sleep(60)"))
    run(Suite(here, [step]), 1.5)
    unpack(here / "results.tgz", there)
    assert run(Suite(there, [step])) == {"sweep": "ok"}
    assert len((there / "sweep" / "rows.csv").read_text().splitlines()) == 4


def test_a_lost_device_starts_its_step_again(tmp_path):
    step = pretended("sweep", SWEEP.format(death=f"sys.exit({gpu_suite.EXIT_AGAIN})"))
    assert run(Suite(tmp_path, [step])) == {"sweep": "ok"}
    assert len((tmp_path / "sweep" / "rows.csv").read_text().splitlines()) == 4
    always = pretended("lost", f"import sys; sys.exit({gpu_suite.EXIT_AGAIN})")
    assert run(Suite(tmp_path / "lost", [always])) == {"lost": "unfinished"}


def test_a_second_pass_is_for_what_may_go_better(tmp_path, monkeypatch):
    steps = [
        pretended("hangs", "import time; time.sleep(60)", 0.005), pretended("wrong", "import sys; sys.exit(1)"),
        pretended("every", "print('again')", every_call=True),
    ]  # fmt: skip
    run(Suite(tmp_path, steps))
    assert [step.name for step in Suite(tmp_path, steps).pending()] == ["every", "hangs"]
    monkeypatch.setattr(gpu_suite, "code_digest", lambda: "mended")
    assert [step.name for step in Suite(tmp_path, steps).pending()] == ["every", "hangs", "wrong"]


def test_some_steps_alone_leave_the_records_of_others(tmp_path):
    steps = [pretended("one", "print(1)"), pretended("two", "print(2)")]
    run(Suite(tmp_path, steps))
    assert run(Suite(tmp_path, [pretended("three", "print(3)")])) == {"one": "ok", "two": "ok", "three": "ok"}


def test_children_end_with_their_step(tmp_path):
    """A child that would live on holds a lock; it is free once the step was killed."""
    lock = tmp_path / "lock"
    child = f"import fcntl, time; f = open({str(lock)!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX); time.sleep(60)"
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    ended = run_process([sys.executable, "-c", parent], tmp_path / "log.txt", 1.5, dict(os.environ))
    assert ended.status == "out of time"
    assert lock.exists()
    with lock.open("w") as file:
        for _ in range(50):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                time.sleep(0.1)
    pytest.fail("a child outlived its step")


def test_the_archive_has_a_size_and_says_what_it_lacks(tmp_path, capsys):
    (tmp_path / "step").mkdir()
    (tmp_path / "step" / "rows.csv").write_text("a,b\n" * 1000)
    (tmp_path / "step" / "trace.gz").write_bytes(os.urandom(400_000))
    (tmp_path / "huge.bin").write_bytes(bytes(4_000_000))
    for local in gpu_archive.LOCAL:
        (tmp_path / local).mkdir()
        (tmp_path / local / "file").write_text("stays")
    assert pack(tmp_path, 100_000) == ["step/trace.gz (400000 bytes)", "huge.bin (4000000 bytes)"]
    assert (tmp_path / "results.tgz").stat().st_size <= 100_000
    with tarfile.open(tmp_path / "results.tgz") as tar:
        names = set(tar.getnames())
    assert "step/rows.csv" in names
    assert "step/trace.gz" not in names
    assert not any(name.split("/")[0] in gpu_archive.LOCAL for name in names)
    # Packed again, the archive does not contain itself.
    size = (tmp_path / "results.tgz").stat().st_size
    pack(tmp_path, 100_000)
    assert abs((tmp_path / "results.tgz").stat().st_size - size) < 100


def test_what_does_not_fit_is_said_in_suite_json_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_archive.pack, "__defaults__", (50_000,))
    suite = Suite(
        tmp_path, [pretended("big", "import os; os.makedirs(out); open(out + '/x', 'wb').write(os.urandom(10**5))")]
    )
    run(suite)
    assert json.loads((tmp_path / "suite.json").read_text())["not_in_archive"] == ["big/x (100000 bytes)"]
    assert "too big for results.tgz: big/x" in capsys.readouterr().out


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, 4 if kind == tarfile.REGTYPE else 0
    return info


@pytest.mark.parametrize(
    "bad",
    [
        member("../outside"), member("/etc/outside"), member("a/../../outside"), member("a\\..\\outside"),
        member("link", tarfile.SYMTYPE, "/etc"), member("hard", tarfile.LNKTYPE, "suite.json"),
        member("device", tarfile.CHRTYPE), member("pipe", tarfile.FIFOTYPE),
    ],
    ids=lambda info: info.name,
)  # fmt: skip
def test_unsafe_archives_are_refused_whole(bad, tmp_path):
    archive, folder = tmp_path / "x.tgz", tmp_path / "in" / "folder"
    with tarfile.open(archive, "w:gz") as tar:
        for info in (member("suite.json"), bad):
            tar.addfile(info, io.BytesIO(b"{}  ") if info.isreg() else None)
    with pytest.raises(UsageError, match="nothing was unpacked"):
        unpack(archive, folder)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["x.tgz"]


@pytest.mark.parametrize("content", [None, b"", b"no archive", b"\x1f\x8b\x08cut"])
def test_what_is_no_archive_is_one_error(content, tmp_path):
    if content is not None:
        (tmp_path / "x.tgz").write_bytes(content)
    with pytest.raises(UsageError, match=r"x\.tgz cannot be read as an archive"):
        unpack(tmp_path / "x.tgz", tmp_path / "out")


def wheel(folder: Path, name: str, **files: str) -> None:
    folder.mkdir(exist_ok=True)
    about = {"METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", "RECORD": "",
             "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"}  # fmt: skip
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as file:
        for path, text in (files | {f"{name}-1.0.dist-info/{each}": text for each, text in about.items()}).items():
            file.writestr(path, text)


def test_wheels_are_installed_behind_what_is_there(tmp_path):
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    wheel(wheels, "newpeer", **{"newpeer/__init__.py": "ANSWER = 42", "newpeer-1.0.data/purelib/beside.py": ""})
    wheel(wheels, "torch", **{"torch/__init__.py": "raise SystemExit"})
    said = list(install_wheels(wheels, site))
    assert ["installed for" in line for line in said] == [True, False]
    assert {path.relative_to(site).as_posix() for path in site.rglob("*.py")} == {"newpeer/__init__.py", "beside.py"}
    suite = Suite(
        tmp_path / "out", [pretended("peer", "import newpeer; print(newpeer.ANSWER)", needs=("newpeer",))], site
    )
    assert run(suite) == {"peer": "ok"}


def test_wheels_that_cannot_be_taken_are_one_error(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UsageError, match="holds no wheels"):
        list(install_wheels(empty, tmp_path / "site"))
    wheel(tmp_path / "unsafe", "evil", **{"../outside.py": ""})
    with pytest.raises(UsageError, match="outside the target directory"):
        list(install_wheels(tmp_path / "unsafe", tmp_path / "site"))
    (empty / "broken-1.0-py3-none-any.whl").write_text("no zip")
    with pytest.raises(UsageError, match=r"broken.* cannot be installed"):
        list(install_wheels(empty, tmp_path / "site"))
    assert not list(tmp_path.rglob("*.py"))


def test_the_first_pass_takes_15_minutes_at_most(capsys):
    call(["gpu-suite", "--list"])
    listed = capsys.readouterr().out.splitlines()
    minutes = [float(line.split()[0]) for line in listed]
    assert len(minutes) == len(STEPS) + 1
    assert minutes[-1] == pytest.approx(sum(minutes[:-1]))
    assert minutes[-1] <= 15
    assert [step.name for step in STEPS][:2] == ["compile", "tests"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--out is missing"),
        (["--out", "{out}", "--minutes", "0"], "--minutes must be positive"),
        (["--out", "{out}", "--rehearse", "--steps", "compile"], "takes no --steps"),
        (["--out", "{out}", "--rehearse", "--wheels", "x"], "takes no --steps, --resume or --wheels"),
    ],
)
def test_what_cannot_be_meant_is_said(arguments, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        call(["gpu-suite", *(part.replace("{out}", str(tmp_path / "out")) for part in arguments)])
    assert not (tmp_path / "out").exists()


def test_results_are_not_overwritten_by_an_archive(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "require_gpu", lambda: None)
    (tmp_path / "suite.json").write_text("{}")
    with pytest.raises(UsageError, match="leave --resume out"):
        call(["gpu-suite", "--out", str(tmp_path), "--resume", "results.tgz"])


def test_every_step_can_be_rehearsed(tmp_path):
    """Every script, argument and import of the real run, in processes of their own, as a person would."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTEST_XDIST_WORKER"}
    command = [
        sys.executable,
        "-m",
        "fluxmoe",
        "gpu-suite",
        "--rehearse",
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record["step"] for record in records] == [step.name for step in STEPS]
    assert {record["status"] for record in records} == {"ok"}
