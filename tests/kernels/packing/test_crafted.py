"""Crafted blocks with right sums: refused, or decoded without touching anything beyond block and weight."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from random import Random

import numpy as np
import pytest
from fluxmoe.kernels.packing import PackingError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .crafted import KINDS, Crafted

SHARED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def crafted(request, tmp_path_factory) -> Crafted:
    backend, expert_format = request.param
    return Crafted(backend, expert_format, tmp_path_factory.mktemp("crafted"))


def one(crafted: Crafted, random: Random) -> bool:
    """Whether a mutated block was taken, and then decoded."""
    d = random.randrange(2)
    crafted.write(d, *crafted.mutated(random, d))
    with suppress(PackingError):
        crafted.decode(d, *crafted.read(d))
        return True
    return False


def test_what_the_encoder_writes_passes(crafted):
    for d in (0, 1):
        crafted.write(d, crafted.whole[d], crafted.texts[d])
        crafted.decode(d, *crafted.read(d))


@settings(max_examples=100, suppress_health_check=SHARED)
@given(st.integers(0, 2**32))
def test_a_mutated_block_is_refused_or_harmless(crafted, seed):
    one(crafted, Random(seed))


@pytest.mark.thorough
@settings(max_examples=5000, suppress_health_check=SHARED)
@given(st.integers(0, 2**32))
def test_many_mutated_blocks_are_refused_or_harmless(crafted, seed):
    one(crafted, Random(seed))


def test_no_process_dies_of_crafted_blocks(tmp_path):
    """Memory errors show as the death of a process, also where no guard was hit."""
    script = (
        "import sys; from pathlib import Path; from random import Random\n"
        "from tests.kernels.packing.test_crafted import KINDS, Crafted, one\n"
        "for backend, name in KINDS:\n"
        "    folder = Path(sys.argv[1]) / f'{backend}-{name}'; folder.mkdir()\n"
        "    crafted, random = Crafted(backend, name, folder), Random(7)\n"
        "    taken = [one(crafted, random) for _ in range(100)]\n"
        "    assert 0 < sum(taken) < 100, (name, sum(taken))\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", script, tmp_path], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# What made compiled code write or read far away, or decode other weights without a sign, before blocks were checked.


@pytest.mark.parametrize(("backend", "expert_format"), KINDS[:3])
@pytest.mark.parametrize("d", [0, 1])
def test_an_escape_beyond_the_weight(tmp_path, backend, expert_format, d):
    crafted = Crafted(backend, expert_format, tmp_path)
    block = crafted.whole[d].clone()
    if backend == "cpu":
        crafted.words(d, block)[2][0] = 1 << 56
    else:
        # In the first tile: far below its last row.
        crafted.words(d, block)[2].view(np.uint32)[0] = 0xFF80 << 16
    crafted.write(d, block, crafted.texts[d])
    with pytest.raises(PackingError, match=r"experts: .* of expert 0 is damaged: its escapes do not ascend inside"):
        crafted.read(d)


@pytest.mark.parametrize(("backend", "expert_format"), KINDS)
def test_offsets_beyond_the_list(tmp_path, backend, expert_format):
    crafted = Crafted(backend, expert_format, tmp_path)
    block = crafted.whole[1].clone()
    part, at = {"planar12": (1, -1), "planar8": (1, -1), "tiered": (2, -4), "huffman": (1, -2)}[expert_format]
    crafted.words(1, block)[part][at] += 1 << 30
    crafted.write(1, block, crafted.texts[1])
    with pytest.raises(PackingError, match=r"experts: down of expert 0 is damaged: its (offsets|index)"):
        crafted.read(1)


@pytest.mark.parametrize(
    ("backend", "expert_format", "part", "at", "value", "match"),
    [
        ("cpu", "planar12", 0, 0, 121, "a base up to 120"),
        ("cpu", "planar12", 0, 0, -1, "a base up to 120"),
        ("cpu", "planar12", 0, 1, 1, "its header"),
        ("cpu", "planar12", 0, 2, 2, "its header"),
        ("cpu", "planar12", 0, 3, -1, "no room"),
        ("cpu", "planar12", 0, 3, 10**6, "no room"),
        ("cpu", "planar12", 2, -1, 7, "lists that end"),
        ("cpu", "planar12", 2, 1, 5, "do not ascend"),
        ("cpu", "planar12", 2, 0, -1, "do not ascend"),
        ("torch", "planar12", 0, 0, 241, "base"),
        ("torch", "planar12", 0, 0, -1, "base"),
        ("torch", "planar12", 1, 0, 1, "offsets"),
        ("torch", "planar12", 2, 0, 0xFFFF << 16 | 1, "a raw tile"),
        ("torch", "planar8", 0, 0, 241, "base"),
        ("torch", "planar8", 2, 0, 0xFFFF << 16 | 1, "a raw tile"),
        ("torch", "tiered", 0, slice(1024), 0xFF, "as many words"),
        ("torch", "tiered", 3, 0, -1, "as many words"),
        ("torch", "huffman", 0, 0, 12 << 8, "11 bits"),
        ("torch", "huffman", 0, 0, -1, "11 bits"),
    ],
)
def test_each_number_has_its_bounds(tmp_path, backend, expert_format, part, at, value, match):
    crafted = Crafted(backend, expert_format, tmp_path)
    block = crafted.whole[0].clone()
    words = crafted.words(0, block)[part]
    words[at] = np.array(value).astype(words.dtype)
    crafted.write(0, block, crafted.texts[0])
    with pytest.raises(PackingError, match=match):
        crafted.read(0)
