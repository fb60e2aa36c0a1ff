"""Experts from files of blocks: in every tier the same bytes as one by one, and whatever fails, no thread goes on."""

from __future__ import annotations

import threading
from collections import Counter
from contextlib import ExitStack

import pytest
import torch
from fluxmoe.kernels.cpu.experts import CpuBlocks
from fluxmoe.kernels.ops import ExpertDims
from fluxmoe.kernels.packing.expert_file import ExpertFile, ExpertFileHeader
from fluxmoe.runtime.experts.config import PagingConfig
from fluxmoe.runtime.experts.disk import StoreError
from fluxmoe.runtime.experts.footprint import EXPERT_LINES
from fluxmoe.runtime.experts.pager import ExpertPager

LAYERS = 3
DIMS = ExpertDims(hidden=128, intermediate=120, experts=6, top_k=2, dtype=torch.bfloat16)
FORMAT = "planar12"
CONFIGS = {
    "packed": PagingConfig(placement="packed", threads=1),
    "packed, another format": PagingConfig(placement="packed", expert_format="tiered", threads=1),
    "resident": PagingConfig(threads=1),
    "dense and packed": PagingConfig(placement="packed", dense_share=0.5, threads=1),
    "host": PagingConfig(placement="host", expert_format=FORMAT, threads=1),
    "disk": PagingConfig(placement="disk", alpha=0.5, expert_format=FORMAT, transfer="whole", threads=1),
    "adaptive": PagingConfig(placement="packed", adaptive=True, planning=False, threads=1),
    "adaptive and dense": PagingConfig(placement="packed", dense_share=0.5, adaptive=True, planning=False, threads=1),
}


def weights_of(layer: int, expert: int) -> list[torch.Tensor]:
    generator = torch.Generator("cpu").manual_seed(100 * layer + expert)
    drawn = (torch.randn(shape, dtype=torch.float32, device="cpu", generator=generator) for shape in DIMS.shapes)
    return [(each / 16).to(DIMS.dtype) for each in drawn]


def opened(config: PagingConfig, files: dict[int, ExpertFile] | None = None) -> ExpertPager:
    pager = ExpertPager(DIMS, LAYERS, config, "cpu", max_tokens=4)
    pager.open(files=files)
    return pager


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Files of all layers, as the CPU kernels read them: folder and header."""
    folder, ops = tmp_path_factory.mktemp("files"), CpuBlocks(DIMS)
    sizes = ops.expert_bytes(FORMAT)
    header = ExpertFileHeader(ops.backend, FORMAT, "bfloat16", DIMS.hidden, DIMS.intermediate, DIMS.experts, sizes, "x")
    blocks = (torch.empty(sizes[0], dtype=torch.uint8), torch.empty(sizes[1], dtype=torch.uint8))
    for layer in range(LAYERS):
        with ExpertFile.create(folder / f"{layer}", header) as file:
            for expert in range(DIMS.experts):
                gate_up, down = weights_of(layer, expert)
                file.put(expert, blocks, ops.encode_expert(gate_up, down, blocks, FORMAT))
            file.commit()
    return folder, header


@pytest.fixture
def files(written):
    folder, header = written
    with ExitStack() as stack:
        yield {layer: stack.enter_context(ExpertFile(folder / f"{layer}", header)) for layer in range(LAYERS)}


def passes(pager: ExpertPager) -> list[torch.Tensor]:
    """What every layer makes of tokens that use all experts."""
    x = torch.linspace(-1, 1, 3 * DIMS.hidden, dtype=torch.float32, device="cpu").view(3, -1)
    ids = torch.tensor([[0, 1], [2, 3], [4, 5]])
    pager.seal()
    return [pager.experts(layer, x, ids, torch.full((3, 2), 0.5)) for layer in range(LAYERS)]


@pytest.mark.parametrize("mapped", [False, True], ids=["copied", "mapped"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_same_as_one_by_one(config, mapped, files):
    calls: Counter[bool] = Counter()
    with opened(config) as expected, opened(config, files if mapped else None) as pager:
        for layer in range(LAYERS):
            for expert in range(DIMS.experts):
                expected.put(layer, expert, *weights_of(layer, expert))
        # One that is here already is left alone.
        pager.put(1, 2, *weights_of(1, 2))
        with pager.put_from(files, lambda: calls.update([True])):
            pass
        assert calls.total() == LAYERS * DIMS.experts - 1
        for got, want in zip(passes(pager), passes(expected), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize(("name", "share"), [("packed", 1), ("dense and packed", 1 / 2), ("resident", 0), ("host", 0),
                                             ("packed, another format", 0)])  # fmt: skip
def test_what_stays_as_its_file_has_it_is_not_copied(name, share, files):
    before = [file.path.read_bytes() for file in files.values()]
    with opened(CONFIGS[name], files) as pager:
        each = pager.footprint.layout.expert_bytes(FORMAT) if share else 0
        assert pager.store.mapped_bytes == share * LAYERS * DIMS.experts * each
        held = {line: pager.store.tier_bytes(tier) for tier, line in EXPERT_LINES.items()}
        assert pager.lines() == pager.lines() | held
        # Another expert in its place is this process's alone.
        pager.put(0, 0, *weights_of(2, 2))
        with pager.put_from(files):
            pass
    assert [file.path.read_bytes() for file in files.values()] == before


@pytest.mark.parametrize("mapped", [False, True], ids=["copied", "mapped"])
@pytest.mark.parametrize("name", ["packed", "resident"])
def test_a_damaged_block_is_one_error_and_ends_all_reads(name, mapped, files, tmp_path):
    healthy = files[1]
    damaged = bytearray(healthy.path.read_bytes())
    damaged[healthy.place(4, 1) + 5] ^= 1
    (tmp_path / "damaged").write_bytes(damaged)
    with ExitStack() as stack:
        file = stack.enter_context(ExpertFile(tmp_path / "damaged", healthy.header))
        each = {**files, 1: file}
        pager = stack.enter_context(opened(CONFIGS[name], each if mapped else None))
        what = f"layer 1: {file.path}: down of expert 4 is corrupt"
        with pytest.raises(StoreError, match=what), pager.put_from(each):
            pass
        with pytest.raises(StoreError, match="expert 4 of layer 1"):
            pager.seal()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("expert-read")]


def test_an_error_of_whoever_loads_beside_it_comes_out(files):
    with opened(CONFIGS["packed"]) as pager, pytest.raises(KeyError, match="dense"), pager.put_from(files):
        raise KeyError("dense")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("expert-read")]


@pytest.mark.parametrize(("name", "decoded"), [("packed", False), ("resident", True), ("dense and packed", True)])
def test_the_ledger_has_what_an_expert_passes_through(name, decoded, files):
    header = files[0].header
    with opened(CONFIGS[name]) as pager:
        beside = pager.host_lines(header)["staging"] - pager.host_lines()["staging"]
    dense = sum(CpuBlocks(DIMS).expert_bytes())
    assert beside == (sum(header.sizes) + 2 * dense if decoded else 0)


def test_only_layers_with_a_file_are_filled(files):
    with opened(CONFIGS["packed"]) as pager:
        with pager.put_from({2: files[2]}):
            pass
        assert {layer for layer in range(LAYERS) if pager.wants(layer, 0)} == {0, 1}
