"""What `kv_tokens` chooses, against all that it could have chosen."""

from __future__ import annotations

import logging

import pytest
import torch
from fluxmoe.kernels.cpu.experts import CpuExperts
from fluxmoe.kernels.ops import ExpertDims
from fluxmoe.runtime.experts.footprint import Footprint, lay_out
from fluxmoe.runtime.memory.budget import BudgetError
from fluxmoe.runtime.vllm.kv_tokens import Room, choices, least_paging
from fluxmoe.runtime.vllm.paged_model import PagedModel
from fluxmoe.runtime.vllm.settings import PluginConfig

LAYERS = 6
DIMS = ExpertDims(128, 128, 8, 2, torch.bfloat16)
DENSE_BYTES = LAYERS * DIMS.experts * 3 * 128 * 128 * 2
TOKEN_BYTES = 1000


@pytest.fixture(scope="module")
def footprint_of():
    ops = CpuExperts(DIMS, 32)
    return lambda config: Footprint(lay_out(LAYERS, config, ops, dict), config, ops)


def asked(tokens: int, **settings) -> PluginConfig:
    return PluginConfig(placement="balanced", kv_tokens=tokens, **settings)


def room(nbytes: int, shared: bool = True, host_bytes: int | None = None, reads_files: bool = True) -> Room:
    return Room(nbytes, host_bytes, shared, TOKEN_BYTES, reads_files)


def taken(footprint: Footprint, shared: bool) -> int:
    lines, host = footprint.lines(), footprint.host_lines()
    return sum(lines.values()) + (host.get("host_experts", 0) if shared else 0)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("share", [1.5, 1.02, 1.0, 0.9, 0.76, 0.6, 0.45])
def test_nothing_that_pages_less_would_do(footprint_of, shared, share):
    config, total = asked(100), int(share * DENSE_BYTES) + 100 * TOKEN_BYTES
    chosen, tokens = least_paging(config, room(total, shared), footprint_of)
    assert tokens >= 100
    assert tokens == (total - taken(footprint_of(chosen), shared)) // TOKEN_BYTES
    less = list(choices(config, True))
    for each in less[: less.index(chosen)]:
        assert taken(footprint_of(each), shared) + 100 * TOKEN_BYTES > total


def test_paging_grows_as_more_is_asked_for(footprint_of):
    total = 2 * DENSE_BYTES
    order = ("resident", "packed", "balanced", "disk")
    chosen = [least_paging(asked(tokens), room(total), footprint_of)[0] for tokens in range(100, 7800, 200)]
    paging = [(order.index(config.placement), -(config.alpha or 0)) for config in chosen]
    assert paging == sorted(paging)
    assert {place for place, _ in paging} == {0, 1, 3}  # a host tier in the same memory frees nothing


def test_a_host_of_its_own_takes_experts_as_far_as_it_has_room(footprint_of):
    tokens = 2000
    total = int(0.5 * DENSE_BYTES) + tokens * TOKEN_BYTES
    ample, _ = least_paging(asked(tokens), room(total, shared=False, host_bytes=DENSE_BYTES), footprint_of)
    scant, _ = least_paging(asked(tokens), room(total, shared=False, host_bytes=1000), footprint_of)
    assert (ample.placement, scant.placement) == ("balanced", "disk")
    assert ample.alpha is not None
    assert 0 < ample.alpha < 1


@pytest.mark.parametrize("expert_format", [None, "dense", "huffman"])
def test_other_settings_stay_as_they_are(footprint_of, expert_format):
    total = int(1.1 * DENSE_BYTES)
    config = asked(600, slots=3, expert_format=expert_format, disk_dir="/x")
    chosen, _ = least_paging(config, room(total), footprint_of)
    assert (chosen.slots, str(chosen.disk_dir)) == (3, "/x")
    assert chosen.device_format == (expert_format or "planar12")


@pytest.mark.parametrize("reads_files", [True, False])
def test_what_no_placement_leaves_is_refused_with_the_most_that_would_do(footprint_of, reads_files):
    total = DENSE_BYTES
    with pytest.raises(BudgetError, match=r"kv_tokens 1000000: no placement .* at most \d+ would have, with") as error:
        least_paging(asked(10**6), room(total, reads_files=reads_files), footprint_of)
    most = int(str(error.value).split("at most ")[1].split()[0])
    assert least_paging(asked(most), room(total, reads_files=reads_files), footprint_of)[1] == most
    with pytest.raises(BudgetError, match=f"at most {most} would"):
        least_paging(asked(most + 1), room(total, reads_files=reads_files), footprint_of)


def test_no_room_at_all_is_said(footprint_of):
    with pytest.raises(BudgetError, match=r"kv_tokens 1: beside 0 B .* no placement leaves room for any; give vLLM"):
        least_paging(asked(1), room(-1), footprint_of)


def test_a_model_opens_with_what_was_chosen_and_says_it(caplog):
    class Ask:
        def see(self, layer) -> None: ...
        def weigh(self) -> None: ...
        def grown_bytes(self) -> None: ...

        def __call__(self) -> Room:
            return room(DENSE_BYTES)

    caplog.set_level(logging.INFO, logger="vllm.fluxmoe")
    model = PagedModel(asked(150), "cpu", 32, Ask())
    for _ in range(LAYERS):
        model.add_layer(DIMS)
    model.put(0, 0, torch.zeros(256, 128, dtype=torch.bfloat16), torch.zeros(128, 128, dtype=torch.bfloat16))
    assert model.pager.config.placement == "packed"
    said = "FluxMoE: kv_tokens 150: placement packed, planar12, which leaves room for about"
    assert caplog.messages[0].startswith(said)
    model.pager.close()
