"""How long a hypervisor takes back what was freed, if it does."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from fluxmoe.experiments.lib import freed_memory
from fluxmoe.experiments.lib.freed_memory import taken_back, wait_until_taken_back


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        ([("0x0005", "01100101")], True),
        ([("0x0002", "00100110"), ("0x0005", "000001")], True),
        ([("0x0005", "01100001")], False),
        ([("0x0001", "11111111")], False),
        ([("0x0005", "0110")], False),
        ([("balloon", "11111111")], False),
        ([], False),
    ],
    ids=["a balloon", "behind a disk", "without the feature", "no balloon", "short", "no number", "none"],
)
def test_who_takes_back_memory_says_so_among_its_devices(devices, expected, tmp_path):
    for number, (kind, features) in enumerate(devices):
        folder = tmp_path / f"virtio{number}"
        folder.mkdir()
        (folder / "device").write_text(f"{kind}\n")
        (folder / "features").write_text(f"{features}{'0' * 56 if len(features) == 8 else ''}\n")
    assert taken_back(tmp_path) == expected
    assert not taken_back(tmp_path / "missing")


@pytest.mark.parametrize(
    ("nbytes", "since", "taken", "waited"),
    [
        (14 << 30, 100.0, True, 32.0),
        (14 << 30, 90.0, True, 22.0),
        (1 << 30, 100.0, True, 16.0),
        (14 << 30, 60.0, True, 0.0),
        (100 << 20, 100.0, True, 0.0),
        (14 << 30, 100.0, False, 0.0),
    ],
    ids=["all of it", "some of it", "few passes", "over already", "little", "nobody takes it"],
)
def test_what_is_left_of_a_sixteenth_every_two_seconds_is_waited_for(nbytes, since, taken, waited, monkeypatch):
    slept = [0.0]
    monkeypatch.setattr(freed_memory, "time", SimpleNamespace(perf_counter=lambda: 100.0, sleep=slept.append))
    monkeypatch.setattr(freed_memory, "taken_back", lambda: taken)
    wait_until_taken_back(since, nbytes)
    assert sum(slept) == waited
