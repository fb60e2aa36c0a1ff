"""MovingStore: kernels find every expert after any moves, and stores that cannot move are refused."""

from __future__ import annotations

import random

import pytest
import torch
from fluxmoe.kernels.formats import FORMATS
from fluxmoe.runtime.devices import HOST
from fluxmoe.runtime.experts.disk import StoreError
from fluxmoe.runtime.experts.layout import ExpertFormats, ExpertLayout
from fluxmoe.runtime.experts.moving_store import MovingStore
from fluxmoe.runtime.experts.placement import Tier, place
from fluxmoe.runtime.experts.streamer_cpu import ThreadStreamer
from fluxmoe.runtime.memory.slabs import SlabPool

from .test_store import FUSED, RECIPES, SIZES, block_of, decode

LAYERS, EXPERTS = 5, 6
PACKED = ExpertFormats("planar12", "planar12")


def slabs_for(layout: ExpertLayout) -> SlabPool:
    """Twice the slabs of all experts, dense: nobody waits for room."""
    return HOST.make_slabs(4 * layout.placement.tiers.size, layout.slab_bytes, poison=True)


def moving_store(placement, most_streamed=EXPERTS, formats=PACKED) -> MovingStore:
    layout = ExpertLayout(placement, SIZES, formats, FUSED)
    store = MovingStore(layout, HOST, slabs_for(layout), most_streamed, decode)
    for layer in range(len(placement.tiers)):
        for expert in range(placement.tiers.shape[1]):
            blocks = [block_of(layer, expert, d, store.stored(layer, expert)) for d in (0, 1)]
            store.put(layer, expert, blocks, RECIPES)
    store.seal()
    return store


def check_pass(streamer, layers=LAYERS) -> None:
    names = {each.number: name for name, each in FORMATS.items()}
    for layer in range(layers):
        with streamer.layer(layer) as page:
            for d in (0, 1):
                page.wait(d)
                for expert, pair in enumerate(page.table.blocks):
                    expected = block_of(layer, expert, d, names[page.table.formats[expert, d].item()])
                    assert torch.equal(pair[d], expected), (layer, expert, d)
                    assert page.table.addresses[expert, d].item() == pair[d].data_ptr()


@pytest.mark.parametrize("slots", [2, 3])
@pytest.mark.parametrize("formats", [PACKED, ExpertFormats("planar12", "dense")])
def test_kernels_find_every_expert_after_any_moves(slots, formats):
    """Between the three tiers (two where the host's copies are dense), and whichever way host experts cross."""
    rng = random.Random(0)
    begin = place("packed" if formats is PACKED else "resident", LAYERS, EXPERTS)
    store = moving_store(begin, formats=formats)
    streamer = ThreadStreamer(store, slots, poison=True, delay=lambda layer, d: rng.choice([0, 0, 0.001]))
    seen = set()
    for _ in range(60):
        check_pass(streamer)
        if rng.random() < 0.2:
            store.set_transfer("on_demand" if store.layout.formats.transfer == "whole" else "whole")
        for _ in range(rng.randrange(5)):
            where = rng.randrange(LAYERS), rng.randrange(EXPERTS)
            source = Tier(store.layout.placement.tiers[where])
            target = rng.choice([tier for tier in (Tier.HOST, *store.layout.moving_tiers) if tier != source])
            if target is Tier.HOST:
                store.land(where, Tier.HOST)
            elif target is Tier.PACKED or source is Tier.PACKED or formats is not PACKED:
                slabs = store.reserve(target)
                if rng.random() < 0.3:
                    store.give(slabs)
                    continue
                store.fetch(where, target, slabs, lambda to, block: to.copy_(block))
                store.land(where, target, slabs)
            seen.add((source, target))
        store.check_integrity()
    assert len(seen) == (6 if formats is PACKED else 2)
    streamer.close()
    store.close()


def test_stores_that_cannot_move_are_refused():
    with pytest.raises(StoreError, match="without disk"):
        moving_store(place("disk", 2, 3))
    with pytest.raises(StoreError, match="in host memory too"):
        moving_store(place("packed", 2, 4), formats=ExpertFormats("planar12", "dense"))
    with pytest.raises(StoreError, match="give slots more room"):
        moving_store(place("host", 2, 4), most_streamed=3)
    layout = ExpertLayout(place("packed", 2, 3), SIZES, ExpertFormats("tiered", "tiered"), FUSED)
    with pytest.raises(StoreError, match="one format that the GEMM reads"):
        MovingStore(layout, HOST, slabs_for(layout), 3)
