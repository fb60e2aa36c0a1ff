"""Walls of cgroup v2 and of systemd, for real: the tests of walls once more, in a Linux that is a process of its own.

Most machines that tests run on have one version of cgroups, or let nobody make groups. User Mode Linux (Debian:
user-mode-linux) boots a kernel whose memory controller is in v2, as whoever runs the tests, over this machine's files.
Its process 1 may make groups; a service of systemd may not, and asks systemd-run.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LINUX, SYSTEMD = shutil.which("linux.uml"), Path("/lib/systemd/systemd")
ASK = """
from fluxmoe.experiments.lib import wall
with wall.fence(1 << 26) as behind:
    print("WALL", behind._files is wall._V2, behind._enter[0])
"""
TESTS = f"""#!/bin/bash
export PATH={shlex.quote(os.environ["PATH"])}:/usr/sbin:/sbin
mkfs.ext4 -q /dev/ubda && mount /dev/ubda /tmp
export HOME=/tmp PYTHONDONTWRITEBYTECODE=1
export PYTHONPATH={shlex.quote(os.pathsep.join(sys.path))}
cd {shlex.quote(os.getcwd())}
{sys.executable} -c {shlex.quote(ASK)}
{sys.executable} -m pytest -p no:cacheprovider -n 0 --color no -rs {Path(__file__).with_name("test_wall.py")}
echo o > /proc/sysrq-trigger
sleep 60
"""
FIRST = """#!/bin/bash
mount -t proc none /proc
mount -t sysfs none /sys
"""
ALONE = """
mount -t cgroup2 none /sys/fs/cgroup
echo +memory > /sys/fs/cgroup/cgroup.subtree_control
exec {tests}
"""
SERVICE = """
mount -t tmpfs none /run
mkdir -p /run/systemd/system
echo "[Unit]
DefaultDependencies=no
[Service]
ExecStart={tests}
StandardOutput=tty
StandardError=tty
TTYPath=/dev/console" > /run/systemd/system/tests.service
exec {systemd} --unit=tests.service
"""


@pytest.mark.thorough
@pytest.mark.skipif(LINUX is None, reason="needs User Mode Linux (linux.uml)")
@pytest.mark.parametrize(("first", "enter"), [(ALONE, "/bin/sh"), (SERVICE, "systemd-run")], ids=["group", "systemd"])
def test_walls_hold_by_cgroup_v2_and_by_systemd(first, enter, tmp_path):
    if first is SERVICE and not SYSTEMD.exists():
        pytest.skip("needs systemd")
    tests, init = tmp_path / "tests", tmp_path / "init"
    tests.write_text(TESTS)
    init.write_text(FIRST + first.format(tests=tests, systemd=SYSTEMD))
    for script in (tests, init):
        script.chmod(0o755)
    disk = tmp_path / "disk"
    disk.touch()
    os.truncate(disk, 1 << 29)
    boot = [str(LINUX), "mem=2G", f"ubd0={disk}", "rootfstype=hostfs", "rootflags=/", "ro", f"init={init}", "con=null",
            "con0=fd:0,fd:1", "quiet"]  # fmt: skip
    said = subprocess.run(boot, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=900).stdout
    assert f"WALL True {enter}" in said, said
    # None failed, none was skipped.
    assert re.search(r"^\d+ passed in ", said, re.MULTILINE), said
