"""ExpertStore: what is put is what is read, from every tier; a failing disk is one clear error."""

from __future__ import annotations

import errno
import os
import tempfile

import numpy as np
import pytest
import torch
from fluxmoe.runtime import store as store_module
from fluxmoe.runtime.placement import Placement, place
from fluxmoe.runtime.store import PAGE, ExpertStore, StoreError, aligned_empty

SIZES = (1000, 515)  # no multiple of the alignment


def block_of(layer: int, expert: int, d: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * layer + 10 * expert + d)
    return torch.randint(0, 256, (SIZES[d],), dtype=torch.uint8, generator=generator)


@pytest.fixture
def small_chunks(monkeypatch):
    """Loads of several chunks from blocks of a test's size."""
    monkeypatch.setattr(store_module, "_CHUNK", PAGE)


def read_all(store: ExpertStore, layer: int, d: int, **settings) -> tuple[int, torch.Tensor]:
    slot = aligned_empty(store.placement.max_streamed * store.strides[d], torch.device("cpu"))
    slot.fill_(0xFF)
    return store.read_into(layer, d, slot, **settings), slot


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


@pytest.mark.parametrize("policy", ["host", "disk"])
@pytest.mark.usefixtures("small_chunks")
def test_a_cancelled_load_stops_at_the_next_chunk(policy, tmp_path):
    asked = []

    def cancelled():
        asked.append(True)
        return len(asked) > 2

    with filled(place(policy, 1, 20), disk_dir=tmp_path) as store:
        copied, slot = read_all(store, 0, 0, cancelled=cancelled)
        assert copied == 2 * PAGE
        assert (slot[copied:] == 0xFF).all()
        copied, slot = read_all(store, 0, 0)
        assert copied == 20 * store.strides[0]
        for expert, (gate_up, _) in store.slot_blocks(0, (slot, slot)).items():
            assert torch.equal(gate_up, block_of(0, expert, 0))


@pytest.mark.usefixtures("small_chunks")
def test_a_file_system_that_refuses_direct_reads_is_read_buffered(tmp_path, monkeypatch):
    real = os.preadv

    with filled(place("disk", 1, 20), disk_dir=tmp_path) as store:
        if not store.direct_io:
            pytest.skip("the temporary directory has no direct reads to refuse")

        def preadv(handle, buffers, offset):
            if handle == store._direct:
                raise OSError(errno.EINVAL, "Invalid argument")
            return real(handle, buffers, offset)

        monkeypatch.setattr(os, "preadv", preadv)
        _, slot = read_all(store, 0, 0)
        assert not store.direct_io
        assert torch.equal(store.slot_blocks(0, (slot, slot))[19][0], block_of(0, 19, 0))


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
def test_a_full_disk_is_one_error_and_leaves_nothing(call, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(StoreError, match="No space left"):
        filled(place("disk", 1, 2), disk_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_spill_file_goes_to_the_temporary_directory_by_default(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with filled(place("disk", 1, 2)) as store:
        assert store._spill_name.startswith(str(tmp_path))


def test_host_memory_that_cannot_be_had_is_one_sentence():
    with pytest.raises(StoreError, match="cannot allocate 1024 TiB of host memory"):
        ExpertStore(place("host", 1, 1), (1 << 50, 64), "cpu")
