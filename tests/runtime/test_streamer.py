"""Algorithm 1: no read before the load, no overwrite under a read, no hang when a load fails."""

from __future__ import annotations

import os
import random
import threading
import time

import pytest
import torch
from fluxmoe.runtime.placement import place
from fluxmoe.runtime.store import StoreError
from fluxmoe.runtime.streamer import CudaStreamer, ThreadStreamer, slot_bytes, slots_used
from fluxmoe.runtime.timeline import Timeline

from .test_store import SIZES, block_of, filled, mixed

PLACEMENTS = [
    place("resident", 5, 4),
    place("host", 5, 4),
    place("offload", 5, 4, alpha=0.5),
    place("balanced", 5, 4, alpha=0.4),
    place("disk", 4, 3),
    mixed(4, 5),
]


def check_layer(page, layer: int) -> None:
    for d in (0, 1):
        page.wait(d)
        for expert, pair in enumerate(page.table.blocks):
            assert torch.equal(pair[d], block_of(layer, expert, d)), (layer, expert, d)
            assert page.table.addresses[expert, d].item() == pair[d].data_ptr()


@pytest.mark.parametrize("slots", [2, 3, 4])
@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda p: p.name)
def test_reader_sees_every_layer(placement, slots):
    rng = random.Random(0)
    delay = lambda layer, d: rng.choice([0, 0, 0.001])  # noqa: E731
    with filled(placement) as store:
        streamer = ThreadStreamer(store, slots, poison=True, delay=delay)
        for _ in range(6):
            for layer in range(len(placement.tiers)):
                with streamer.layer(layer) as page:
                    check_layer(page, layer)
                    if rng.random() < 0.2:
                        time.sleep(0.001)
                        check_layer(page, layer)
        loads = streamer.counters().loads
        streamer.close()
        assert streamer.slot_bytes == slot_bytes(placement, SIZES, slots)
    layers = len(placement.streamed_layers)
    if layers <= slots:
        assert loads == 2 * layers  # each layer keeps its slot
    else:
        assert 2 * 6 * layers <= loads <= 2 * (6 * layers + slots)


def test_a_skipped_wait_reads_poison():
    """The proof that poison mode works: without wait, the bytes of the load that has not happened are NaN."""
    started = threading.Event()

    def delay(layer, d):
        if layer == 2:
            started.set()
            return 0.2
        return 0.0

    with filled(place("host", 3, 2)) as store:
        streamer = ThreadStreamer(store, 2, poison=True, delay=delay)
        for layer in (0, 1):
            with streamer.layer(layer) as page:
                check_layer(page, layer)
        with streamer.layer(2) as page:
            assert started.wait(5)
            gate_up = page.table.blocks[0][0]
            assert (gate_up == 0xFF).all()
            check_layer(page, 2)
        assert streamer.counters().stall_ns > 0
        streamer.close()


def test_slot_is_not_recycled_while_it_is_read():
    with filled(place("host", 4, 2)) as store:
        streamer = ThreadStreamer(store, 2, poison=True)
        with streamer.layer(0) as page:
            check_layer(page, 0)
            time.sleep(0.05)  # the copier wants this slot for layer 2 all the while
            check_layer(page, 0)
            assert streamer.counters().loads <= 4
        streamer.close()


def test_error_in_the_copy_thread_reaches_the_reader():
    with filled(place("disk", 4, 2)) as store:
        streamer = ThreadStreamer(store, 2)
        with streamer.layer(0) as page:
            check_layer(page, 0)
        os.ftruncate(store._file, 10)

        def visit_the_rest():
            for _ in range(2):
                for layer in (1, 2, 3, 0):
                    with streamer.layer(layer) as page:
                        page.wait(0)
                        page.wait(1)

        with pytest.raises(StoreError, match="early"):
            visit_the_rest()
        streamer.close()


def test_close_is_quick_in_the_middle_of_a_load():
    with filled(place("host", 4, 2)) as store:
        streamer = ThreadStreamer(store, 2, delay=lambda layer, d: 60.0)
        time.sleep(0.01)
        streamer.close()
        assert streamer._thread is None
        streamer.close()


def test_waiting_on_a_closed_streamer_is_an_error():
    with filled(place("host", 4, 2)) as store:
        streamer = ThreadStreamer(store, 2, delay=lambda layer, d: 60.0)
        streamer.close()
        with pytest.raises(StoreError, match="closed"), streamer.layer(0) as page:
            page.wait(0)


def test_all_resident_starts_no_thread():
    with filled(place("resident", 2, 2)) as store:
        before = threading.active_count()
        streamer = ThreadStreamer(store, 2)
        assert threading.active_count() == before
        assert streamer.slot_bytes == 0
        streamer.close()


def test_one_slot_is_refused():
    with pytest.raises(StoreError, match="at least 2"):
        slots_used(place("host", 4, 2), 1)


def test_tables_are_made_once():
    with filled(place("host", 3, 2)) as store:
        streamer = ThreadStreamer(store, 2)
        tables = []
        for _ in range(4):
            for layer in range(3):
                with streamer.layer(layer) as page:
                    page.wait(1)
                    tables.append(id(page.table))
        streamer.close()
        assert len(set(tables)) == 6  # 3 layers x 2 slots


def test_timeline_records_loads_and_their_overlap():
    timeline = Timeline()
    with filled(place("host", 3, 2)) as store:
        streamer = ThreadStreamer(store, 2, timeline=timeline)
        for _ in range(3):
            for layer in range(3):
                with streamer.layer(layer) as page, timeline.span("compute", f"layer {layer}"):
                    check_layer(page, layer)
        streamer.close()
    tracks = {interval.track for interval in timeline.intervals}
    assert {"compute", "load gate_up", "load down"} <= tracks
    assert 0 < timeline.overlap() <= 1


class Recorder:
    """Stands in for torch.cuda: streams and events that log what is enqueued, in the host's order."""

    def __init__(self):
        self.log = []
        self.compute = self._Stream(self, "compute")
        self._active = self.compute
        self._streams = self._events = 0

    class _Stream:
        def __init__(self, owner, name):
            self.owner, self.name = owner, name

        def wait_event(self, event):
            self.owner.log.append(("wait", self.name, event))

        def synchronize(self):
            pass

    class _Event:
        def __init__(self, owner):
            self.owner, self.records = owner, 0

        def record(self, stream):
            self.records += 1
            self.owner.log.append(("record", stream.name, self))

    def Stream(self):
        self._streams += 1
        return self._Stream(self, f"load{self._streams - 1}")

    def Event(self):
        return self._Event(self)

    def current_stream(self):
        return self._active

    def stream(self, stream):
        from contextlib import nullcontext

        return nullcontext()


@pytest.mark.parametrize("slots", [2, 3])
def test_cuda_streamer_orders_every_dependency(slots):
    """Replay the enqueued log on vector clocks: every read is after its load, every load after the last read."""
    layers, iterations = 5, 3
    cuda = Recorder()
    with filled(place("host", layers, 2)) as store:
        streamer = CudaStreamer(store, slots, cuda=cuda)
        copies = []
        streamer._copy = lambda buffer, source: copies.append(len(cuda.log)) or cuda.log.append(("copy", source))
        for _ in range(iterations):
            for layer in range(layers):
                with streamer.layer(layer) as page:
                    for d in (0, 1):
                        page.wait(d)
                        cuda.log.append(("read", layer, d))
    # happened[stream]: set of log positions that are known to be complete before the stream's next operation.
    happened = {"compute": set(), "load0": set(), "load1": set()}
    recorded: dict = {}
    arenas = {store.host_arena(layer, d).data_ptr(): (layer, d) for layer in range(layers) for d in (0, 1)}
    loads = {0: [], 1: []}  # per type: (position, job)
    reads = {0: [], 1: []}
    for position, entry in enumerate(cuda.log):
        if entry[0] == "wait":
            happened[entry[1]] |= recorded.get(entry[2], set())
        elif entry[0] == "record":
            recorded[entry[2]] = set(happened[entry[1]])
        elif entry[0] == "copy":
            layer, d = arenas[entry[1].data_ptr()]
            job = len(loads[d])
            assert layer == job % layers
            if job >= slots:  # write after read: the job that last used this slot was computed
                assert reads[d][job - slots] in happened[f"load{d}"]
            loads[d].append(position)
            happened[f"load{d}"].add(position)
        else:
            _, layer, d = entry
            job = len(reads[d])
            assert layer == job % layers
            assert loads[d][job] in happened["compute"]  # read after write
            reads[d].append(position)
            happened["compute"].add(position)
    assert len(reads[0]) == iterations * layers
    # Prefetch: when a layer begins, loads are enqueued for the slots - 1 layers after it.
    assert len(loads[0]) == iterations * layers + slots - 1
