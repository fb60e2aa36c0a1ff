"""Loads on the virtual clock, held against Algorithm 1 written out visit by visit."""

from __future__ import annotations

import numpy as np
import pytest
from fluxmoe.kernels.formats import DENSE
from fluxmoe.runtime.experts.disk import StoreError
from fluxmoe.runtime.experts.layout import ExpertLayout
from fluxmoe.runtime.experts.placement import Placement, Tier
from fluxmoe.runtime.sim.cost_model import Load
from fluxmoe.runtime.sim.simulator import VirtualStreamer
from hypothesis import given
from hypothesis import strategies as st


def layout_of(streams: list[bool]) -> ExpertLayout:
    tiers = np.array([[Tier.HOST if streamed else Tier.RESIDENT] * 2 for streamed in streams], np.int8)
    return ExpertLayout(Placement("test", tiers), {DENSE: (64, 64)})


def expected(order, slots, loads, compute, passes):
    """Seconds at which each load is done and each visit computed: a load waits for the link and for the newest visit
    before it that had its slot."""
    visits = [layer for _ in range(passes) for layer in order]
    slot = [order.index(layer) % slots for layer in visits]
    done, finished = list[float](), list[float]()
    link, decoder, now = 0.0, 0.0, 0.0
    for v, layer in enumerate(visits):
        # Computing visit v needs loads up to v alone, and these only visits before it.
        for n in range(len(done), v + 1):
            before = [u for u in range(n) if slot[u] == slot[n]]
            free = finished[before[-1]] if before else 0.0
            load = loads[visits[n]]
            link, decoder = max(link, free) + load.link_s, max(decoder, free) + load.decode_s
            done.append(max([free] + [link] * (load.link_s > 0) + [decoder] * (load.decode_s > 0)))
        now = max(now + compute[layer], done[v])
        finished.append(now)
    return done, finished


seconds = st.sampled_from([0.0, 0.5, 1.0, 3.0])


@given(st.data(), st.lists(st.booleans(), min_size=1, max_size=7), st.integers(2, 5), st.integers(1, 4))
def test_loads_are_done_when_the_algorithm_says(data, streams, slots, passes):
    layers = len(streams)
    loads = [Load(data.draw(seconds), data.draw(seconds), i) for i in range(layers)]
    compute = [data.draw(seconds) for _ in range(layers)]
    streamer = VirtualStreamer(layout_of(streams), slots, False, loads)
    order = [layer for layer in range(layers) if streams[layer]]
    keeps_all = len(order) <= slots
    done, finished = expected(order, slots, loads, compute, 1 if keeps_all else passes)
    now, v = 0.0, 0
    for number in range(passes):
        for layer in range(layers):
            if layer not in streamer:
                assert not streams[layer]
                continue
            arrived = streamer.begin(layer)
            if keeps_all and number:
                assert arrived.load is None
                continue
            assert (arrived.at_s, arrived.load) == (done[v], loads[layer])
            now = max(now + compute[layer], arrived.at_s)
            assert now == finished[v]
            streamer.finish(layer, now)
            v += 1


def test_layers_come_in_order_and_two_slots_are_the_least():
    loads = [Load(1.0, 0.0, 8)] * 3
    streamer = VirtualStreamer(layout_of([True] * 3), 2, False, loads)
    with pytest.raises(AssertionError, match="out of order"):
        streamer.begin(1)
    with pytest.raises(StoreError, match="at least 2 slots"):
        VirtualStreamer(layout_of([True] * 3), 1, False, loads)
    # Where experts move, layers that stream nothing have their turns too.
    assert 0 in VirtualStreamer(layout_of([False] * 3), 2, True, loads)
