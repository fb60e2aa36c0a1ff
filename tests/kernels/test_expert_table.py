"""Expert tables: what kernels rely on is checked, and updates stay in place."""

from __future__ import annotations

import pytest
import torch
from fluxmoe.kernels.expert_table import ExpertTable
from fluxmoe.kernels.formats import DENSE, FORMATS


def blocks(experts: int, skip: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    one = lambda: torch.zeros(64 + skip, dtype=torch.uint8)[skip:]  # noqa: E731
    return [(one(), one()) for _ in range(experts)]


def check(table: ExpertTable, pairs, formats) -> None:
    assert table.addresses.tolist() == [[block.data_ptr() for block in pair] for pair in pairs]
    assert table.formats.tolist() == [[FORMATS[name].number] * 2 for name in formats]
    assert table.compressed == set(formats) - {DENSE}
    assert table.blocks == tuple(pairs)


@pytest.mark.parametrize("forward", [False, True])
def test_updates_stay_in_place(forward):
    """Of tables that a forward pass made, too: experts move between passes."""
    with torch.inference_mode(forward):
        table = ExpertTable.from_blocks(blocks(3), "cpu")
    memory = table.addresses.data_ptr(), table.formats.data_ptr()
    for formats in ([DENSE, "planar12", DENSE], [DENSE] * 3):
        pairs = blocks(3)
        table.update(pairs, formats)
        check(table, pairs, formats)
    assert memory == (table.addresses.data_ptr(), table.formats.data_ptr())


@pytest.mark.parametrize("skip", [1, 8, 15])
def test_blocks_that_vector_loads_cannot_read_are_refused(skip):
    with pytest.raises(ValueError, match="expert 0: a block must begin at a multiple of 16 bytes"):
        ExpertTable.from_blocks(blocks(1, skip), "cpu")
    pairs = blocks(2)
    table = ExpertTable.from_blocks(pairs, "cpu")
    with pytest.raises(ValueError, match="expert 1: a block must begin"):
        table.update([blocks(1)[0], blocks(1, skip)[0]], "planar12")
    check(table, pairs, [DENSE] * 2)


def test_what_is_no_table_is_refused():
    assert ExpertTable.from_blocks(blocks(2, 16), "cpu").num_experts == 2
    assert ExpertTable.from_blocks([], "cpu").addresses.shape == (0, 2)
    with pytest.raises(ValueError, match="contiguous uint8"):
        ExpertTable.from_blocks([(torch.zeros(4), torch.zeros(4))], "cpu")
    with pytest.raises(ValueError, match="2 experts need as many formats, got 1"):
        ExpertTable.from_blocks(blocks(2), "cpu", [DENSE])
    with pytest.raises(ValueError, match="no GEMM reads format 'tiered': decode it first, to one of dense, planar12"):
        ExpertTable.from_blocks(blocks(2), "cpu", [DENSE, "tiered"])
    with pytest.raises(AssertionError, match="1 blocks for a table of 2"):
        ExpertTable.from_blocks(blocks(2), "cpu").update(blocks(1))


def test_a_table_on_a_gpu_is_not_updated_inside_a_capture(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    table = ExpertTable.from_blocks(blocks(1), "cpu")
    with pytest.raises(AssertionError, match="updated before a capture"):
        table.update(blocks(1))


def test_the_staging_of_an_update_is_written_once_the_copy_before_it_is_done(monkeypatch):
    log = []

    class Event:
        def synchronize(self):
            log.append("wait")

        def record(self):
            log.append("record")

    real = torch.empty_like
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "Event", Event)

    def pinned(tensor, pin_memory):
        log.append("pin")
        return real(tensor)

    monkeypatch.setattr(torch, "empty_like", pinned)
    table = ExpertTable.from_blocks(blocks(2), "cpu")
    with monkeypatch.context() as on_gpu:
        on_gpu.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
        for _ in range(2):
            pairs = blocks(2)
            table.update(pairs, "planar12")
    check(table, pairs, ["planar12"] * 2)
    assert log == ["pin", "pin", "wait", "record", "wait", "record"]
