"""A pager's life: it is filled, opened and closed, and leaves nothing behind."""

from __future__ import annotations

import ast
import threading
from pathlib import Path

import numpy as np
import pytest
from fluxmoe import runtime
from fluxmoe.kernels.cpu.experts import CpuExperts
from fluxmoe.runtime.devices import CpuDevice
from fluxmoe.runtime.experts.config import PagingConfig
from fluxmoe.runtime.experts.disk import StoreError
from fluxmoe.runtime.experts.footprint import EXPERT_LINES
from fluxmoe.runtime.experts.pager import ExpertPager
from fluxmoe.runtime.experts.placement import Tier
from fluxmoe.runtime.experts.planner import Move
from fluxmoe.runtime.experts.streamer_cpu import ThreadStreamer

from .test_pager import DIMS, LAYERS, TOKENS, fill, filled, opened, weights_of

# Filling.


@pytest.mark.parametrize("adaptive", [False, True])
def test_experts_that_come_twice_or_never_or_in_another_shape(adaptive):
    with opened(PagingConfig(placement="host", adaptive=adaptive, threads=1)) as pager:
        gate_up, down = weights_of(0, 0)
        pager.put(0, 0, gate_up, down)
        with pytest.raises(StoreError, match="expert 0 of layer 0 is stored already"):
            pager.put(0, 0, gate_up, down)
        for layer, expert in ((LAYERS, 0), (0, DIMS.experts), (-1, 0), (0, -1)):
            with pytest.raises(StoreError, match="does not exist"):
                pager.put(layer, expert, gate_up, down)
        with pytest.raises(StoreError, match=r"gate_up of an expert must be \[240, 128\] torch.bfloat16, got \[128"):
            pager.put(0, 1, down, gate_up)
        with pytest.raises(StoreError, match=r"got \[128, 120\] torch.float32"):
            pager.put(0, 1, gate_up, down.float())
        with pytest.raises(StoreError, match=r"lacks expert 1 of layer 0 \(17 in all\)"):
            pager.seal()


def test_nothing_is_allocated_before_it_is_opened(tmp_path, monkeypatch):
    config = PagingConfig(placement="disk", alpha=0.5, disk_dir=tmp_path)
    monkeypatch.setattr(CpuDevice, "empty", lambda device, nbytes: pytest.fail("memory is allocated"))
    pager = ExpertPager(DIMS, LAYERS, config, "cpu", TOKENS)
    lines = pager.lines()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    with filled(config) as same:
        assert lines == same.held_bytes()
    pager.close()


@pytest.mark.parametrize("placement", [dict(placement="packed"), dict(placement="packed", dense_share=0.5)])
def test_lines_of_experts_that_move_are_whole_slabs_of_the_pool(placement):
    config = PagingConfig(**placement, adaptive=True, threads=1)
    pager = ExpertPager(DIMS, LAYERS, config, "cpu", TOKENS)
    pool = pager.device.make_slabs(60, pager.footprint.layout.slab_bytes + 192)
    pager.open(pool)
    fill(pager)
    assert pager.held_bytes() == pager.lines(pool.slab_bytes)
    for tier, line in EXPERT_LINES.items():
        each = 2 if tier is Tier.RESIDENT else 1
        assert len(pool.held(line)) == each * (pager.tiers == tier).sum()
    pager.close()


@pytest.mark.parametrize(
    "placement", [dict(placement="packed", dense_share=0.5), dict(placement="balanced", alpha=0.5)]
)
def test_a_pool_of_the_pagers_own_has_room_for_all_experts(placement):
    with filled(PagingConfig(**placement, adaptive=True, threads=1)) as pager:
        assert pager.held_bytes() == pager.lines()
        hosted = [(int(i), int(e)) for i, e in zip(*np.nonzero(pager.tiers == Tier.HOST), strict=True)]
        assert bool(hosted) == bool(pager.lines()["free_slabs"])
        pager.request(Move(*where, Tier.HOST, pager.footprint.layout.moving_tiers[-1]) for where in hosted)
        pager.apply_moves()
        while pager.mover.busy:
            pager.apply_moves()
        assert pager.mover.refused == []
        assert pager.held_bytes()["free_slabs"] == 0


# Ends.


@pytest.mark.parametrize(
    "config",
    [PagingConfig(placement="host"), PagingConfig(placement="packed", adaptive=True)],
    ids=["static", "moving"],
)
def test_close_can_come_at_any_time_and_twice(config):
    threads = threading.active_count()
    pager = ExpertPager(DIMS, LAYERS, config, "cpu", TOKENS)
    pager.close()
    for close in (opened(config).close, filled(config).close):
        close()
        close()
    assert threading.active_count() == threads


def test_close_cuts_a_load_off():
    begun = threading.Event()

    def delay(layer, d):
        begun.set()
        return 60.0

    pager = filled(PagingConfig(placement="host", load_delay=delay, threads=1))
    assert begun.wait(10)
    pager.close()
    pager.close()
    assert not any(thread.name == "expert-copy" for thread in threading.enumerate())


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc to see open files")
@pytest.mark.parametrize(
    ("config", "part"),
    [
        (PagingConfig(placement="disk"), ThreadStreamer),
        (PagingConfig(placement="packed", adaptive=True), ThreadStreamer),
        (PagingConfig(placement="disk"), CpuExperts),
    ],
    ids=["spill file", "pool", "kernels"],
)
def test_a_failed_start_leaves_nothing_open(config, part, monkeypatch):
    def refuse(*arguments, **more):
        raise MemoryError("refused")

    before, threads = sorted(Path("/proc/self/fd").iterdir()), threading.active_count()
    monkeypatch.setattr(part, "__init__", refuse)
    with pytest.raises(MemoryError, match="refused"):
        filled(config)
    assert sorted(Path("/proc/self/fd").iterdir()) == before
    assert threading.active_count() == threads


# Who knows whom.


@pytest.mark.parametrize(
    ("folder", "knows"), [("experts", {"memory", "devices", "hardware", "timeline"}), ("memory", {"devices"})]
)
def test_a_pager_knows_nothing_of_serving(folder, knows):
    """No module of these folders imports a model, a scheduler or an experiment."""
    for path in (Path(runtime.__file__).parent / folder).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.ImportFrom) and node.module):
                continue
            if node.level == 2:
                assert node.module.partition(".")[0] in knows, f"{path}: {node.module}"
            elif node.level == 0 and node.module.startswith("fluxmoe"):
                assert node.module.startswith("fluxmoe.kernels"), f"{path}: {node.module}"
