"""The ledger: parsing, conservation, and the sentence that names the least budget."""

from __future__ import annotations

import pytest
from fluxmoe.runtime.devices import HOST
from fluxmoe.runtime.memory import machine
from fluxmoe.runtime.memory.budget import (
    BudgetError,
    HostShortError,
    MemoryBudget,
    explained,
    format_bytes,
    parse_bytes,
    require,
)
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("512MiB", 512 << 20),
        ("1.5 GB", 1_500_000_000),
        ("123456", 123456),
        ("10b", 10),
        ("2k", None),
        ("all", None),
        ("1GiB", 1 << 30),
        ("0", 0),
        ("9007199254740993", 9007199254740993),  # no float holds it
    ],
)
def test_parse(text, expected):
    if text == "2k":
        with pytest.raises(BudgetError, match="512MiB"):
            parse_bytes(text)
    else:
        assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "lots", "-1", "1e9", "5 MiB GiB", "inf", "9" * 400])
def test_nonsense_is_refused(text):
    with pytest.raises(BudgetError, match="cannot read"):
        parse_bytes(text)


def test_format():
    assert [format_bytes(n) for n in (0, 1023, 1024, 3 << 19, 5 << 30, 10 << 40)] == [
        "0 B",
        "1023 B",
        "1 KiB",
        "1.5 MiB",
        "5 GiB",
        "10 TiB",
    ]


def test_least_budget_and_what_takes_it():
    require(30, {"a": 10, "b": 20})
    with pytest.raises(BudgetError) as info:
        require(29, {"weights": 10, "slots": 0, "kv_cache": 20}, hint="do this")
    message = str(info.value)
    assert "30 bytes" in message
    assert "weights 10 B" in message
    assert "slots" not in message
    assert message.endswith("do this")


@given(st.integers(0, 1000), st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 400)), max_size=30))
def test_never_over_and_nothing_lost(total, moves):
    budget, expected = MemoryBudget(total), dict.fromkeys("abc", 0)
    for line, nbytes in moves:
        if sum(expected.values()) + nbytes > total:
            before = budget.lines()
            with pytest.raises(BudgetError):
                budget.reserve(line, nbytes)
            assert budget.lines() == before
        else:
            budget.reserve(line, nbytes)
            expected[line] += nbytes
        assert {k: v for k, v in budget.lines().items() if v} == {k: v for k, v in expected.items() if v}
        assert budget.used + budget.free == total
        assert budget.free >= 0


def test_all_means_a_part_of_what_is_free():
    assert 1 << 20 < HOST.available_bytes() < 1 << 46


@pytest.mark.parametrize(
    ("membership", "mount", "names"),
    [
        ("0::/box/job", "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")),
        ("5:cpu:/\n4:memory:/box/job", "sys/fs/cgroup/memory", tuple(machine._CGROUP_FILES[1])),
    ],
    ids=["v2", "v1"],
)
def test_a_container_leaves_what_its_tightest_cgroup_leaves(tmp_path, membership, mount, names):
    limit, use, cache = names

    def group(path, limit_text, used):
        directory = tmp_path / mount / path
        directory.mkdir(parents=True, exist_ok=True)
        (directory / limit).write_text(f"{limit_text}\n")
        (directory / use).write_text(f"{used}\n")
        (directory / "memory.stat").write_text(f"anon 1\n{cache} 30\n")

    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(membership + "\n")
    assert machine._cgroups(tmp_path) == []
    group("box/job", "max", 100)
    group("box", 1000, 400)
    assert min(free for _, free in machine._cgroups(tmp_path)) == 630  # droppable page cache is free
    group("box/job", 90, 120)
    assert min(free for _, free in machine._cgroups(tmp_path)) == 0


@pytest.mark.parametrize(
    ("free", "available", "walled"),
    [
        (1000 << 20, 744 << 20, True),
        (2000 << 20, 1600 << 20, True),
        (256 << 20, 0, True),
        (5, 0, True),
        (8000 << 20, 7488 << 20, True),
        (8000 << 20, 6400 << 20, False),
    ],
)
def test_all_respects_the_container(monkeypatch, free, available, walled):
    """Of a machine that others use, too, it leaves a fifth; of a container of any size 512 MiB at most."""
    monkeypatch.setattr(machine, "_cgroups", lambda: [(2 * free, free)])
    monkeypatch.setattr(machine, "_meminfo", lambda entry: 16 << 30 if walled else 2 * free)
    assert HOST.available_bytes() == available
    if available:
        assert HOST.free_for(available) == free


def test_an_error_says_whose_budget_it_is_and_the_least_with_what_lies_beside():
    says = r"^placement host: a budget of 5 B .* 7 B.*10 bytes in all$"
    with pytest.raises(BudgetError, match=says) as raised, explained("placement host", beside=3):
        require(5, {"weights": 7})
    assert raised.value.least == 10


@pytest.mark.parametrize(
    ("beside", "together", "says", "least"),
    [
        (0, True, "", 7),
        (3, True, "; with 3 B of host memory beside it 10 bytes in all", 10),
        (3, False, "; with 3 B of host memory beside it 10 bytes in all", 7),
    ],
)
def test_what_does_not_know_the_least_is_told(beside, together, says, least):
    with pytest.raises(BudgetError) as raised, explained("this", beside, together, least=lambda: 7):
        raise BudgetError("refused")
    assert str(raised.value) == f"this: refused; the least that works is 7 bytes (7 B){says}"
    assert raised.value.least == least


def test_no_budget_helps_a_host_without_memory():
    with pytest.raises(BudgetError, match=r"^this: short$") as raised, explained("this", 3, least=lambda: 7):
        raise HostShortError("short")
    assert raised.value.least is None
