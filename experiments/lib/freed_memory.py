"""Memory that was freed, on a machine whose hypervisor takes it back: meanwhile its cores stand still now and then.

Linux tells a hypervisor that asks for it what is free, in passes two seconds apart, each of a sixteenth of it
(mm/page_reporting.c). One of 0.9 GB stops both of two cores for some 0.1 s (LOG.md): who begins soon after a process of
14 GB has ended is measured with that, and who takes longer to start is not.
"""

from __future__ import annotations

import time
from pathlib import Path

_DEVICES = Path("/sys/bus/virtio/devices")
# A balloon device, and its feature by which free pages are told (virtio 1.2, 5.5).
_BALLOON, _REPORTING = 0x0005, 5
_PASS_S, _PASSES = 2.0, 16
# The least that a pass takes of the largest pages.
_PASS_BYTES = 128 << 20


def taken_back(devices: Path = _DEVICES) -> bool:
    """Whether a hypervisor takes back what is free."""
    return any(_reports(device) for device in devices.glob("*"))


def wait_until_taken_back(since: float, nbytes: int) -> None:
    """Return once a hypervisor, if there is one that does, has what was freed at `since`, a time of perf_counter.

    nbytes: that were freed at most; for less than 128 MiB nobody waits.
    """
    passes = min(_PASSES, nbytes // _PASS_BYTES)
    left = since + passes * _PASS_S - time.perf_counter()
    if left > 0 and taken_back():
        time.sleep(left)


def _reports(device: Path) -> bool:
    try:
        kind, features = (device / "device").read_text(), (device / "features").read_text()
        return int(kind, 16) == _BALLOON and features[_REPORTING] == "1"
    except (OSError, ValueError, IndexError):
        return False
