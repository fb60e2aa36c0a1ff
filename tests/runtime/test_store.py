"""ExpertStore: what is put is what is read, from every tier; a failing disk is one clear error."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from fluxmoe.runtime.placement import Placement, place
from fluxmoe.runtime.store import ExpertStore, StoreError, aligned_empty

SIZES = (1000, 515)  # no multiple of the alignment


def block_of(layer: int, expert: int, d: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * layer + 10 * expert + d)
    return torch.randint(0, 256, (SIZES[d],), dtype=torch.uint8, generator=generator)


def filled(placement: Placement, **settings) -> ExpertStore:
    store = ExpertStore(placement, SIZES, "cpu", **settings)
    for layer, row in enumerate(placement.tiers):
        for expert in range(len(row)):
            store.put(layer, expert, block_of(layer, expert, 0), block_of(layer, expert, 1))
    store.seal()
    return store


def mixed(layers=3, experts=9) -> Placement:
    tiers = np.random.default_rng(0).integers(0, 3, size=(layers, experts)).astype(np.int8)
    return Placement("mixed", tiers)


@pytest.mark.parametrize(
    "placement",
    [place("resident", 3, 5), place("host", 3, 5), place("disk", 3, 5), place("balanced", 3, 5, alpha=0.5), mixed()],
    ids=lambda p: p.name,
)
def test_reads_back_what_was_put(placement, tmp_path):
    with filled(placement, disk_dir=tmp_path) as store:
        for layer in range(3):
            slot = tuple(aligned_empty(placement.max_streamed * s, torch.device("cpu")) for s in store.strides)
            for d in (0, 1):
                copied = store.read_into(layer, d, slot[d])
                assert copied == len(placement.streamed(layer)) * store.strides[d]
            blocks = store.resident_blocks(layer) | store.slot_blocks(layer, slot)
            assert sorted(blocks) == list(range(placement.tiers.shape[1]))
            for expert, pair in blocks.items():
                for d in (0, 1):
                    assert torch.equal(pair[d], block_of(layer, expert, d))
                    assert pair[d].data_ptr() % 64 == 0
        assert store.resident_bytes == ExpertStore.resident_bytes_of(placement, SIZES)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_on_disk_even_without_close(tmp_path):
    store = filled(place("disk", 2, 3), disk_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []
    store.close()
    store.close()


def test_truncated_spill_file_is_named(tmp_path):
    with filled(place("disk", 2, 3), disk_dir=tmp_path) as store:
        os.ftruncate(store._file, 100)
        slot = aligned_empty(3 * store.strides[1], torch.device("cpu"))
        with pytest.raises(StoreError, match=r"down experts of layer 1 from .*fluxmoe-experts.*early"):
            store.read_into(1, 1, slot)


def test_directory_that_does_not_exist(tmp_path):
    with pytest.raises(StoreError, match="nowhere"):
        ExpertStore(place("disk", 1, 1), SIZES, "cpu", disk_dir=tmp_path / "nowhere")


def test_missing_and_doubled_experts():
    store = ExpertStore(place("host", 1, 2), SIZES, "cpu")
    store.put(0, 0, block_of(0, 0, 0), block_of(0, 0, 1))
    with pytest.raises(AssertionError, match="already"):
        store.put(0, 0, block_of(0, 0, 0), block_of(0, 0, 1))
    with pytest.raises(StoreError, match="lacks expert 1 of layer 0"):
        store.seal()
