"""ExpertStore: what is put is what is read, from every tier; a failing disk is one clear error."""

from __future__ import annotations

import errno
import os
import tempfile

import numpy as np
import pytest
import torch
from fluxmoe.runtime.devices import HOST, PAGE
from fluxmoe.runtime.experts import store as store_module
from fluxmoe.runtime.experts.layout import ExpertFormats, ExpertLayout
from fluxmoe.runtime.experts.placement import Placement, Tier, place
from fluxmoe.runtime.experts.spill import StoreError
from fluxmoe.runtime.experts.static_store import StaticStore
from fluxmoe.runtime.experts.store import ExpertStore

# Sizes that are no multiple of the alignment. A stand-in for compression: `tiered` holds the lower half of every byte,
# and can only be decoded; `planar12` likewise, and is what the GEMM would read.
SIZES = {"dense": (1000, 516), "tiered": (500, 258), "planar12": (500, 258)}
FUSED = frozenset({"planar12"})
CPU = torch.device("cpu")
DENSE_HOST = ExpertFormats("planar12", "dense")


def block_of(layer: int, expert: int, d: int, expert_format: str = "dense") -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * layer + 10 * expert + d)
    dense = torch.randint(0, 16, (SIZES["dense"][d],), dtype=torch.uint8, generator=generator)
    return dense if expert_format == "dense" else dense[0::2] | (dense[1::2] << 4)


def decode(expert_format, tensor_type, block, out, recipe) -> None:
    assert recipe == f"recipe {tensor_type}"
    out[0::2], out[1::2] = block & 15, block >> 4


@pytest.fixture
def small_chunks(monkeypatch):
    """Loads of several chunks from blocks of a test's size."""
    monkeypatch.setattr(store_module, "_CHUNK", PAGE)


def read_all(store: ExpertStore, layer: int, d: int, **settings) -> tuple[int, torch.Tensor]:
    slot = HOST.empty(store.layout.slot_bytes(d)).fill_(0xFF)
    staging = HOST.empty(store.layout.staging_bytes(d, (Tier.DISK,))).fill_(0xFF)
    return sum(store.read_into(store.plans[layer], d, slot, staging, **settings)), slot


def layout_of(placement: Placement, formats: ExpertFormats = DENSE_HOST) -> ExpertLayout:
    return ExpertLayout(placement, SIZES, formats, FUSED)


def filled(placement: Placement, formats: ExpertFormats = DENSE_HOST, **settings) -> StaticStore:
    layout = layout_of(placement, formats)
    store = StaticStore(layout, HOST, decode, **settings)
    for layer, row in enumerate(placement.tiers):
        for expert, tier in enumerate(row):
            blocks = [block_of(layer, expert, d, layout.stored(Tier(tier))) for d in (0, 1)]
            store.put(layer, expert, blocks, ("recipe 0", "recipe 1"))
    store.seal()
    return store


def mixed(layers=3, experts=9) -> Placement:
    tiers = np.random.default_rng(0).integers(0, 4, size=(layers, experts)).astype(np.int8)
    return Placement("mixed", tiers)


FORMATS = {
    "dense": DENSE_HOST,
    "in place": ExpertFormats("planar12", "planar12"),
    "host decoded": ExpertFormats("planar12", "planar12", slot="decoded"),
    "all decoded": ExpertFormats("tiered", "tiered"),
    "on demand": ExpertFormats("tiered", "planar12", transfer="on_demand"),
}
PLACEMENTS = [
    place("resident", 3, 5),
    place("packed", 3, 5),
    place("hybrid", 3, 5),
    place("host", 3, 5),
    place("disk", 3, 5),
    place("balanced", 3, 5, alpha=0.5),
    place("balanced", 3, 5, alpha=0.7, device_tier=Tier.PACKED, dense=0.2),
    mixed(),
]


@pytest.mark.parametrize("formats", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda p: p.name)
def test_reads_back_what_was_put(placement, formats, tmp_path):
    with filled(placement, formats, disk_dir=tmp_path) as store:
        layout = store.layout
        for layer in range(3):
            tiers = [tier for tier in (Tier.HOST, Tier.DISK) if layout.streams(tier)]
            payload = sum(len(placement.members(layer, tier)) for tier in tiers)
            slot = []
            for d in (0, 1):
                copied, buffer = read_all(store, layer, d)
                assert copied == payload * layout.stride(formats.host, d)
                slot.append(buffer)
            blocks = store.blocks_in_place(layer) | store.slot_blocks(store.plans[layer], tuple(slot))
            assert sorted(blocks) == list(range(placement.tiers.shape[1]))
            for expert, block in blocks.items():
                read = layout.read(Tier(placement.tiers[layer, expert]))
                assert block.expert_format == read
                for d in (0, 1):
                    assert torch.equal(block.pair[d], block_of(layer, expert, d, read)), (layer, expert, d)
                    assert block.pair[d].data_ptr() % 64 == 0
        for tier in (Tier.RESIDENT, Tier.PACKED, Tier.HOST):
            assert store.tier_bytes(tier) == layout.tier_bytes(tier)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_on_disk_even_without_close(tmp_path):
    store = filled(place("disk", 2, 3), disk_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []
    store.close()
    store.close()


def test_truncated_spill_file_is_named(tmp_path):
    with filled(place("disk", 2, 3), disk_dir=tmp_path) as store:
        os.ftruncate(store.spill._file, 100)
        with pytest.raises(StoreError, match=r"down experts of layer 1 from .*fluxmoe-experts.*early"):
            read_all(store, 1, 1)


def test_directory_that_does_not_exist(tmp_path):
    with pytest.raises(StoreError, match="nowhere"):
        StaticStore(layout_of(place("disk", 1, 1)), HOST, disk_dir=tmp_path / "nowhere")


def test_missing_and_doubled_experts():
    store = StaticStore(layout_of(place("host", 1, 2)), HOST)
    store.put(0, 0, [block_of(0, 0, d) for d in (0, 1)])
    with pytest.raises(StoreError, match="already"):
        store.put(0, 0, [block_of(0, 0, d) for d in (0, 1)])
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
        assert copied == 20 * store.layout.stride("dense", 0)
        for expert, block in store.slot_blocks(store.plans[0], (slot, slot)).items():
            assert torch.equal(block.pair[0], block_of(0, expert, 0))


@pytest.mark.usefixtures("small_chunks")
def test_a_file_system_that_refuses_direct_reads_is_read_buffered(tmp_path, monkeypatch):
    real = os.preadv

    with filled(place("disk", 1, 20), disk_dir=tmp_path) as store:
        if not store.spill.direct_io:
            pytest.skip("the temporary directory has no direct reads to refuse")

        def preadv(handle, buffers, offset):
            if handle == store.spill._direct:
                raise OSError(errno.EINVAL, "Invalid argument")
            return real(handle, buffers, offset)

        monkeypatch.setattr(os, "preadv", preadv)
        _, slot = read_all(store, 0, 0)
        assert not store.spill.direct_io
        assert torch.equal(store.slot_blocks(store.plans[0], (slot, slot))[19].pair[0], block_of(0, 19, 0))


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
        assert store.spill.name.startswith(str(tmp_path))


def test_host_memory_that_cannot_be_had_is_one_sentence():
    with pytest.raises(StoreError, match="cannot allocate 1024 TiB of host memory"):
        StaticStore(ExpertLayout(place("host", 1, 1), {"dense": (1 << 50, 64)}), HOST)
