"""ExpertStore: what is put is what is read, from every tier; a failing disk is one clear error."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from fluxmoe.kernels.host_memory import PAGE
from fluxmoe.kernels.packing import Packed
from fluxmoe.kernels.packing.expert_file import ExpertFile, ExpertFileHeader
from fluxmoe.runtime.devices import HOST
from fluxmoe.runtime.experts import disk as disk_module
from fluxmoe.runtime.experts import store as store_module
from fluxmoe.runtime.experts.disk import DiskTier, StoreError
from fluxmoe.runtime.experts.layout import ExpertFormats, ExpertLayout
from fluxmoe.runtime.experts.placement import Placement, Tier, place
from fluxmoe.runtime.experts.static_store import StaticStore
from fluxmoe.runtime.experts.store import ExpertStore

# Sizes that are no multiple of the alignment. A stand-in for compression: `tiered` holds the lower half of every byte,
# and can only be decoded; `planar12` likewise, and is what the GEMM would read.
SIZES = {"dense": (1000, 516), "tiered": (500, 258), "planar12": (500, 258)}
FUSED = frozenset({"planar12"})
CPU = torch.device("cpu")
DENSE_HOST = ExpertFormats("planar12", "dense")
RECIPES = Packed("tiered", (0,), {}), Packed("tiered", (1,), {})


def block_of(layer: int, expert: int, d: int, expert_format: str = "dense") -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * layer + 10 * expert + d)
    dense = torch.randint(0, 16, (SIZES["dense"][d],), dtype=torch.uint8, generator=generator)
    return dense if expert_format == "dense" else dense[0::2] | (dense[1::2] << 4)


def decode(expert_format, tensor_type, block, out, recipe) -> None:
    assert recipe.shape == (tensor_type,)
    out[0::2], out[1::2] = block & 15, block >> 4


def check(expert_format, tensor_type, block, recipe) -> None:
    assert recipe.shape == (tensor_type,)


@pytest.fixture
def small_chunks(monkeypatch):
    """Loads of several chunks from blocks of a test's size."""
    monkeypatch.setattr(store_module, "_CHUNK", PAGE)


def read_all(store: ExpertStore, layer: int, d: int, **settings) -> tuple[int, torch.Tensor]:
    slot = HOST.empty(store.layout.slot_bytes(d)).fill_(0xFF)
    staging = HOST.empty(store.layout.staging_bytes(d, Tier.DISK)).fill_(0xFF)
    return sum(store.read_into(store.load_plans[layer], d, slot, {Tier.DISK: staging}, **settings)), slot


def layout_of(placement: Placement, formats: ExpertFormats = DENSE_HOST) -> ExpertLayout:
    return ExpertLayout(placement, SIZES, formats, FUSED)


def disk_of(layout: ExpertLayout, directory: Path, folder: Path | None = None) -> DiskTier | None:
    members = {i: experts for i in range(layout.num_layers) if (experts := layout.placement.members(i, Tier.DISK))}
    if not members:
        return None
    name = layout.stored(Tier.DISK)
    header = ExpertFileHeader("cpu", name, "bfloat16", 8, 8, layout.num_experts, layout.sizes[name], "content")
    return DiskTier(header, members, folder, directory, check)


def filled(placement: Placement, formats: ExpertFormats = DENSE_HOST, disk_dir: Path | None = None) -> StaticStore:
    layout = layout_of(placement, formats)
    store = StaticStore(layout, HOST, decode, disk_of(layout, disk_dir or Path(tempfile.gettempdir())))
    for layer, row in enumerate(placement.tiers):
        for expert, tier in enumerate(row):
            blocks = [block_of(layer, expert, d, layout.stored(Tier(tier))) for d in (0, 1)]
            store.put(layer, expert, blocks, RECIPES)
    store.seal()
    return store


def mixed(layers=3, experts=9) -> Placement:
    tiers = np.random.default_rng(0).integers(0, 4, size=(layers, experts)).astype(np.int8)
    return Placement("mixed", tiers)


def met_by(formats: ExpertFormats, placement: Placement) -> Placement:
    """Experts that come on demand from files are the cache's affair: here they lie in host memory."""
    if formats.transfer == "whole":
        return placement
    tiers = np.where(placement.tiers == Tier.DISK, Tier.HOST, placement.tiers).astype(np.int8)
    return Placement(placement.name, tiers)


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
    placement = met_by(formats, placement)
    with filled(placement, formats, disk_dir=tmp_path) as store:
        layout = store.layout
        for layer in range(3):
            slot = []
            for d in (0, 1):
                copied, buffer = read_all(store, layer, d)
                size, stride = layout.sizes.get(formats.host, (0, 0))[d], layout.stride(formats.host, d)
                copies = len(placement.members(layer, Tier.HOST)) if layout.streams(Tier.HOST) else 0
                assert copied == copies * stride + len(placement.members(layer, Tier.DISK)) * size
                slot.append(buffer)
            blocks = store.blocks_in_place(layer) | store.slot_blocks(store.load_plans[layer], (slot[0], slot[1]))
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


def test_a_truncated_file_is_named(tmp_path):
    with filled(place("disk", 2, 3), disk_dir=tmp_path) as store:
        descriptor = store.on_disk._files[1]._file
        assert descriptor is not None
        os.ftruncate(descriptor, 100)
        with pytest.raises(StoreError, match=rf"layer 1: reading down of expert . from {tmp_path} failed.*early"):
            read_all(store, 1, 1)


def test_directory_that_does_not_exist(tmp_path):
    layout = layout_of(place("disk", 1, 1))
    with pytest.raises(StoreError, match="nowhere"):
        disk_of(layout, tmp_path / "nowhere")


def test_a_folder_keeps_its_experts_for_the_next_store(tmp_path):
    """What is there need not be put; files that have all are read by several, and added to by one."""
    half, whole = place("disk", 2, 4, alpha=0.5), place("disk", 2, 4)
    folder = tmp_path / "kept"
    with StaticStore(layout_of(half), HOST, decode, disk_of(layout_of(half), tmp_path, folder)) as store:
        for layer, expert in np.argwhere(half.tiers == Tier.RESIDENT).tolist():
            assert store.wants(layer, expert)
            store.put(layer, expert, [block_of(layer, expert, d) for d in (0, 1)], RECIPES)
        with pytest.raises(StoreError, match="by another process"):
            disk_of(layout_of(half), tmp_path, folder)
        for layer, expert in np.argwhere(half.tiers == Tier.DISK).tolist():
            store.put(layer, expert, [block_of(layer, expert, d) for d in (0, 1)], RECIPES)
        store.seal()
        again = StaticStore(layout_of(half), HOST, decode, disk_of(layout_of(half), tmp_path, folder))
        assert not any(again.wants(*where) for where in np.argwhere(half.tiers == Tier.DISK))
        again.close()
    with StaticStore(layout_of(whole), HOST, decode, disk_of(layout_of(whole), tmp_path, folder)) as store:
        wanted = [(i, e) for i in range(2) for e in range(4) if store.wants(i, e)]
        assert wanted == [tuple(where) for where in np.argwhere(half.tiers == Tier.RESIDENT)]
        for layer, expert in wanted:
            store.put(layer, expert, [block_of(layer, expert, d) for d in (0, 1)], RECIPES)
        store.seal()
        _, slot = read_all(store, 1, 0)
        for expert, block in store.slot_blocks(store.load_plans[1], (slot, slot)).items():
            assert torch.equal(block.pair[0], block_of(1, expert, 0))
    os.chmod(folder, 0o555)
    kept = disk_of(layout_of(half), tmp_path, folder)
    assert kept is not None
    kept.close()
    layout = ExpertLayout(half, {**SIZES, "dense": (1001, 516)}, DENSE_HOST, FUSED)
    with pytest.raises(StoreError, match=r"holds other experts: sizes is \(1000, 516\), not \(1001, 516\)"):
        disk_of(layout, tmp_path, folder)


def test_folders_in_memory_or_too_small_are_refused(tmp_path, monkeypatch):
    layout = layout_of(place("disk", 1, 2))
    monkeypatch.setattr(disk_module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 9))
    with pytest.raises(StoreError, match=r"16 KiB of experts do not fit .* where 9 B are free.*--disk-dir"):
        disk_of(layout, tmp_path)
    monkeypatch.setattr(disk_module, "lies_in_memory", lambda path: True)
    with pytest.raises(StoreError, match="lies in memory, not on a disk"):
        disk_of(layout, tmp_path)
    with pytest.raises(StoreError, match="kept/experts lies in memory, not on a disk"):
        disk_of(layout, tmp_path, tmp_path / "kept" / "experts")
    assert list(tmp_path.iterdir()) == []


def test_missing_and_doubled_experts():
    store = StaticStore(layout_of(place("host", 1, 2)), HOST)
    store.put(0, 0, [block_of(0, 0, d) for d in (0, 1)])
    with pytest.raises(StoreError, match="already"):
        store.put(0, 0, [block_of(0, 0, d) for d in (0, 1)])
    with pytest.raises(StoreError, match="lacks expert 1 of layer 0"):
        store.seal()


@pytest.mark.usefixtures("small_chunks")
def test_a_cancelled_load_stops_at_the_next_chunk():
    asked = []

    def cancelled():
        asked.append(True)
        return len(asked) > 2

    with filled(place("host", 1, 20)) as store:
        copied, slot = read_all(store, 0, 0, cancelled=cancelled)
        assert copied == 2 * PAGE
        assert (slot[copied:] == 0xFF).all()
        copied, slot = read_all(store, 0, 0)
        assert copied == 20 * store.layout.stride("dense", 0)
        for expert, block in store.slot_blocks(store.load_plans[0], (slot, slot)).items():
            assert torch.equal(block.pair[0], block_of(0, expert, 0))


def test_a_cancelled_load_reads_no_more_experts_from_disk(tmp_path):
    asked = []

    def cancelled():
        asked.append(True)
        return len(asked) > 5

    with filled(place("disk", 1, 20), disk_dir=tmp_path) as store:
        copied, _ = read_all(store, 0, 0, cancelled=cancelled)
        assert copied == 5 * SIZES["dense"][0]


def test_host_memory_and_files_deliver_at_the_same_time(tmp_path, monkeypatch):
    """Neither tier of a load is done before the other has begun."""
    both, read = threading.Barrier(2, timeout=5), ExpertFile.read

    def meet_and_read(self, *args, **settings):
        both.wait()
        return read(self, *args, **settings)

    def meet_and_copy(target, source, cancelled):
        both.wait()
        return store_module.copy_in_chunks(target, source, cancelled)

    placement = place("three_tiers", 1, 3, alpha=0.34, disk=0.33)
    assert placement.counts() == {"resident": 1, "host": 1, "disk": 1, "packed": 0}
    with filled(placement, disk_dir=tmp_path) as store:
        monkeypatch.setattr(ExpertFile, "read", meet_and_read)
        brought, slot = read_all(store, 0, 0, copy=meet_and_copy)
        assert brought == store.layout.stride("dense", 0) + SIZES["dense"][0]
        for expert, block in store.slot_blocks(store.load_plans[0], (slot, slot)).items():
            assert torch.equal(block.pair[0], block_of(0, expert, 0))


def test_a_copy_that_fails_leaves_no_read_under_way(tmp_path):
    def fail(target, source, cancelled):
        raise MemoryError

    with filled(place("three_tiers", 1, 9, alpha=0.0, disk=0.9), disk_dir=tmp_path) as store:
        with pytest.raises(MemoryError):
            read_all(store, 0, 0, copy=fail)
        assert store.on_disk._under_way == 0


def test_a_file_system_that_refuses_direct_reads_is_read_buffered(tmp_path, monkeypatch):
    real = os.preadv

    with filled(place("disk", 1, 20), disk_dir=tmp_path) as store:
        file = store.on_disk._files[0]
        if not file.direct_io:
            pytest.skip("the temporary directory has no direct reads to refuse")

        def preadv(handle, buffers, offset):
            if handle == file._direct:
                raise OSError(errno.EINVAL, "Invalid argument")
            return real(handle, buffers, offset)

        monkeypatch.setattr(os, "preadv", preadv)
        _, slot = read_all(store, 0, 0)
        assert not file.direct_io
        assert torch.equal(store.slot_blocks(store.load_plans[0], (slot, slot))[19].pair[0], block_of(0, 19, 0))


@pytest.mark.parametrize("call", ["ftruncate", "pwrite", "fdatasync"])
def test_a_full_disk_is_one_error_and_leaves_nothing(call, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(StoreError, match="No space left"):
        filled(place("disk", 1, 2), disk_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_host_memory_that_cannot_be_had_is_one_sentence():
    with pytest.raises(StoreError, match="cannot allocate 1024 TiB of host memory"):
        StaticStore(ExpertLayout(place("host", 1, 1), {"dense": (1 << 50, 64)}), HOST)
