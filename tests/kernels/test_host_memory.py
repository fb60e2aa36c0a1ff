"""Large host memory: aligned, zeros, on large pages, no more of it held than was asked for, and given back."""

import gc
from pathlib import Path

import pytest
from fluxmoe.kernels.host_memory import PAGE, host_zeros

MIB = 1 << 20
SMAPS = Path("/proc/self/smaps")


def mapping_at(address: int) -> dict[str, str]:
    """The entries of /proc/self/smaps about the mapping that an address lies in; none where there is none."""
    found: dict[str, str] | None = None
    for line in SMAPS.read_text().splitlines():
        name, _, rest = line.partition(" ")
        if not name.endswith(":"):
            begin, end = (int(bound, 16) for bound in name.split("-"))
            if found:
                return found
            found = {} if begin <= address < end else None
        elif found is not None:
            found[name[:-1]] = rest.strip()
    return found or {}


@pytest.mark.parametrize("nbytes", [0, 1, PAGE + 1, 2 * MIB - 1, 2 * MIB, 5 * MIB + 3])
def test_zeros_from_the_beginning_of_a_page(nbytes):
    memory = host_zeros(nbytes)
    assert memory.numel() == nbytes
    assert not memory.any()
    assert nbytes == 0 or memory.data_ptr() % (2 * MIB if nbytes >= 2 * MIB else PAGE) == 0


@pytest.mark.skipif(not SMAPS.exists(), reason="Linux tells of mappings")
def test_whole_large_pages_are_asked_for_and_the_end_is_not():
    memory = host_zeros(5 * MIB + 1)
    at = memory.data_ptr()
    memory.fill_(1)
    for place in (at, at + 4 * MIB - 1):
        assert "hg" in mapping_at(place)["VmFlags"].split()
    assert "hg" not in mapping_at(at + 4 * MIB)["VmFlags"].split()
    assert mapping_at(at)["Rss"] == f"{4 * MIB // 1024} kB"
    del memory
    gc.collect()
    assert mapping_at(at) == {}


def test_memory_that_cannot_be_had():
    with pytest.raises(MemoryError, match="cannot map"):
        host_zeros(1 << 60)
