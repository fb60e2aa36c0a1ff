"""Turns on the host's clock, and experts as benchmarks encode them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from fluxmoe.experiments.bench.experts import encoded, random_expert, table_of
from fluxmoe.experiments.bench.timing import host_times, times_in_turns
from fluxmoe.kernels.expert_blocks import blocks_of
from fluxmoe.kernels.formats import FORMATS
from fluxmoe.kernels.ops import ExpertDims

DIMS = ExpertDims(512, 512, 4, 2, torch.bfloat16)


@pytest.mark.parametrize(("rounds", "calls", "expected"), [(1, 1, [0, 0]), (2, 3, [0, 0, 1, 2, 0, 1, 2])])
def test_the_first_call_is_not_counted(rounds, calls, expected):
    seen: list[int] = []
    times = host_times([partial(seen.append, i) for i in range(calls)], rounds=rounds)
    assert seen == expected
    assert len(times) == len(expected) - 1


@pytest.mark.parametrize(("turns", "seconds", "made"), [(5, float("inf"), 5), (2, 0.0, 2), (9, 0.0, 3)])
def test_all_take_part_in_each_turn(turns, seconds, made):
    order: list[tuple[int, str]] = []

    def run(name: str, turn: int) -> float:
        order.append((turn, name))
        return 10.0 * turn + "abc".index(name)

    times = times_in_turns(run, "abc", turns, seconds)
    assert {name: each.tolist() for name, each in times.items()} == {
        name: [10.0 * turn + i for turn in range(made)] for i, name in enumerate("abc")
    }
    assert sorted(order) == [(turn, name) for turn in range(made) for name in "abc"]
    assert made < 5 or order != sorted(order)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize(("expert_format", "bits"), [("dense", 16.0), ("planar12", 12.0), ("tiered", 10.9)])
def test_blocks_hold_the_weights_in_so_many_bits(backend, expert_format, bits):
    encoder = blocks_of(backend, DIMS)
    weights = random_expert(DIMS)
    blocks, found = encoded(encoder, weights, expert_format)
    assert [block.numel() for block in blocks] == list(encoder.expert_bytes(expert_format))
    assert found == pytest.approx(bits, abs=0.2)
    if expert_format == "dense":
        restored = encoder.restore_expert(blocks)
        assert all(torch.equal(one, other) for one, other in zip(restored, weights, strict=True))


@pytest.mark.parametrize("expert_format", ["dense", "planar12"])
def test_nothing_is_encoded_where_nothing_runs(expert_format):
    weights = random_expert(DIMS, "meta")
    blocks, bits = encoded(blocks_of("triton", DIMS), weights, expert_format)
    assert {block.device.type for block in blocks} == {"meta"}
    assert bits == FORMATS[expert_format].bits
    assert table_of([blocks] * 4, torch.device("meta"), expert_format).addresses.device.type == "cpu"
