"""Algorithm 1: no read before the load, no overwrite under a read, no hang when a load fails."""

from __future__ import annotations

import os
import random
import threading
import time
from contextlib import nullcontext, suppress
from types import SimpleNamespace

import pytest
import torch
from fluxmoe.runtime.experts import store as store_module
from fluxmoe.runtime.experts.config import PagingConfig
from fluxmoe.runtime.experts.disk import StoreError
from fluxmoe.runtime.experts.footprint import Footprint, slot_schedule
from fluxmoe.runtime.experts.placement import Placement, Tier, place
from fluxmoe.runtime.experts.streamer_cpu import ThreadStreamer
from fluxmoe.runtime.experts.streamer_cuda import CudaStreamer
from fluxmoe.runtime.timeline import Timeline

from .test_store import CPU, FORMATS, block_of, filled, layout_of, met_by, mixed

KERNELS = SimpleNamespace(device=CPU, workspace_bytes=0)
PLACEMENTS = [
    place("resident", 5, 4),
    place("packed", 5, 4),
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
            expert_format = "planar12" if page.table.formats[expert, d] else "dense"
            assert torch.equal(pair[d], block_of(layer, expert, d, expert_format)), (layer, expert, d)
            assert page.table.addresses[expert, d].item() == pair[d].data_ptr()


@pytest.mark.parametrize("slots", [2, 3, 4])
@pytest.mark.parametrize("formats", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda p: p.name)
def test_reader_sees_every_layer(placement, formats, slots):
    placement = met_by(formats, placement)
    rng = random.Random(0)
    delay = lambda layer, d: rng.choice([0, 0, 0.001])  # noqa: E731
    with filled(placement, formats) as store:
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
        assert streamer.slot_bytes == Footprint(store.layout, PagingConfig(slots=slots), KERNELS).slot_bytes
    layers = len(store.layout.streamed_layers)
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
        for file in store.on_disk._files.values():
            assert file._file is not None
            os.ftruncate(file._file, 10)

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


def test_close_gives_up_a_load_at_the_next_chunk(monkeypatch):
    """Close arrives inside the first of 64 chunks, and no other is copied."""
    entered, release, chunks = threading.Event(), threading.Event(), []

    def slow_copy(target, source):
        chunks.append(source.numel())
        entered.set()
        assert release.wait(5)

    monkeypatch.setattr(store_module, "_CHUNK", 64)
    monkeypatch.setattr(store_module, "stream_copy", slow_copy)
    with filled(place("host", 3, 4)) as store:
        streamer = ThreadStreamer(store, 2)
        assert entered.wait(5)
        closer = threading.Thread(target=streamer.close)
        closer.start()
        assert streamer._closing.wait(5)
        release.set()
        closer.join(5)
        assert not closer.is_alive()
    assert chunks == [64]
    assert streamer.counters().loads == 0


def test_gate_up_can_be_read_while_down_still_loads():
    release = threading.Event()
    with filled(place("host", 3, 2)) as store:
        delay = lambda layer, d: 0.0 if d == 0 or release.wait(5) else 60.0  # noqa: E731
        streamer = ThreadStreamer(store, 2, delay=delay)
        with streamer.layer(0) as page:
            page.wait(0)
            assert streamer.counters().loads == 1
            release.set()
            page.wait(1)
        streamer.close()


def test_a_missed_wait_reads_poison_however_far_the_copier_is_behind():
    """The copier has not even begun to recycle the slot: old weights must not pass for the layer's own."""
    release = threading.Event()
    delay = lambda layer, d: 60.0 if layer == 1 and not release.wait(5) else 0.0  # noqa: E731
    with filled(place("host", 4, 2)) as store:
        streamer = ThreadStreamer(store, 2, poison=True, delay=delay)
        with streamer.layer(0) as page:
            check_layer(page, 0)
        for missed in (1, 2):
            with streamer.layer(missed) as page:
                for pair in page.table.blocks:
                    assert all((block == 0xFF).all() for block in pair)
        release.set()
        streamer.close()


@pytest.mark.parametrize("poison", [False, True])
@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda p: p.name)
def test_a_pass_after_one_that_was_given_up(placement, poison):
    """At any layer, inside or outside the context, waited for or not."""
    layers = range(len(placement.tiers))
    with filled(placement) as store:
        streamer = ThreadStreamer(store, 2, poison)
        for stop in layers:
            for waits in (0, 1, 2):
                with suppress(KeyboardInterrupt):
                    for layer in layers[: stop + 1]:
                        with streamer.layer(layer) as page:
                            if layer < stop:
                                check_layer(page, layer)
                            else:
                                for d in range(waits):
                                    page.wait(d)
                                raise KeyboardInterrupt
                for layer in layers:
                    with streamer.layer(layer) as page:
                        check_layer(page, layer)
        streamer.close()


def test_layers_out_of_order_are_a_bug():
    with filled(place("host", 4, 2)) as store:
        streamer = ThreadStreamer(store, 2)
        with pytest.raises(AssertionError, match="layer 2 visited out of order, expected 0"), streamer.layer(2):
            pass
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
        slot_schedule(layout_of(place("host", 4, 2)), 1, moves=False)


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
        assert len(set(tables)) == 3  # one a layer, though 2 slots do not divide 3 layers


def test_timeline_records_loads_and_their_overlap():
    timeline = Timeline()
    with filled(place("host", 3, 2)) as store:
        streamer = ThreadStreamer(store, 2, timeline=timeline)
        for _ in range(3):
            for layer in range(3):
                with streamer.layer(layer) as page, timeline.span("compute", f"layer {layer}"):
                    check_layer(page, layer)
        streamer.close()
    computed, loaded = ([s for s in timeline.spans if s.kind == kind] for kind in ("compute", "load"))
    assert {s.track for s in (*computed, *loaded)} == {"compute", "copy"}
    assert any(load.start_ns < c.end_ns and c.start_ns < load.end_ns for load in loaded for c in computed)


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
        return nullcontext()


class Logged(CudaStreamer):
    """Copies and poison are only logged."""

    def _copy(self, target, source, cancelled):
        self._cuda.log.append(("copy", target.data_ptr(), source.data_ptr()))
        return source.numel()

    def _spoil(self, slot):
        self._cuda.log.extend(("use", buffer.data_ptr(), None) for buffer in slot)


@pytest.mark.parametrize("interrupted", [False, True], ids=["whole passes", "a pass given up"])
@pytest.mark.parametrize("poison", [False, True], ids=["plain", "poison"])
@pytest.mark.parametrize(("layers", "slots"), [(5, 2), (5, 3), (3, 2), (2, 2), (1, 2)])
def test_cuda_streamer_orders_every_dependency(layers, slots, poison, interrupted):
    """Replay the enqueued log on vector clocks: reads follow their load, loads follow all use of their slot."""
    cuda = Recorder()

    def visit(iteration, layer):
        with streamer.layer(layer) as page:
            for d in (0, 1):
                page.wait(d)
                cuda.log.append(("use", page.table.blocks[0][d].data_ptr(), (layer, d)))
            if interrupted and (iteration, layer) == (1, layers // 2):
                raise KeyboardInterrupt

    with filled(place("host", layers, 2)) as store:
        streamer = Logged(store, slots, poison, cuda=cuda)
        for iteration in range(3):
            with suppress(KeyboardInterrupt):
                for layer in range(layers):
                    visit(iteration, layer)
        arenas = arenas_of(store)
    check_order(cuda.log, arenas)
    copies = sum(entry[0] == "copy" for entry in cuda.log)
    # Prefetch: the last layer of a pass runs while layers of the next are loaded, up to the first that has its slot.
    assert copies == 2 * (layers if layers <= slots else 3 * layers + (layers - 1) % slots)


@pytest.mark.parametrize("formats", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("placement", [p for p in PLACEMENTS if p.name != "disk"], ids=lambda p: p.name)
def test_cuda_streamer_loads_what_was_stored(placement, formats):
    """With streams that run at once: what is copied, staged and decoded is right, whatever its order."""
    tiers = placement.tiers.copy()
    tiers[tiers == Tier.DISK] = Tier.HOST
    with filled(Placement(placement.name, tiers), formats) as store:
        streamer = CudaStreamer(store, 2, cuda=Recorder())
        for _ in range(3):
            for layer in range(len(tiers)):
                with streamer.layer(layer) as page:
                    check_layer(page, layer)


def arenas_of(store) -> dict[int, tuple[int, int]]:
    """(layer, tensor type) by the address of what its load copies from host memory."""
    return {plan.host_runs[d][0][0].data_ptr(): (plan.layer, d) for plan in store.load_plans for d in (0, 1)}


def check_order(log, arenas) -> None:
    """Reads and poison run on the compute stream, copies on their type's; only what an event covers is certain."""
    # Log positions certainly done by a stream's next work.
    done: dict[str, set] = {"compute": set(), "load0": set(), "load1": set()}
    recorded: dict = {}
    # By slot buffer: positions of all its uses; position and arena of its latest copy.
    uses: dict[int, set] = {}
    copied: dict[int, tuple] = {}
    for position, (kind, where, what) in enumerate(log):
        if kind == "wait":
            done[where] |= recorded.get(what, set())
        elif kind == "record":
            recorded[what] = set(done[where])
        elif kind == "copy":
            stream = f"load{arenas[what][1]}"
            assert uses.get(where, set()) <= done[stream], f"{position}: a load overwrites a slot in use"
            copied[where] = position, arenas[what]
            done[stream].add(position)
        else:
            if what is not None:
                load, content = copied[where]
                assert content == what, f"{position}: the slot holds {content}, not {what}"
                assert load in done["compute"], f"{position}: a kernel reads before the load is done"
            uses.setdefault(where, set()).add(position)
            done["compute"].add(position)


def test_cuda_order_check_sees_missing_waits():
    """The checker itself can fail: drop any one kind of wait and it objects."""
    for dropped in ("compute", "load0", "load1"):
        cuda = Recorder()
        with filled(place("host", 4, 2)) as store:
            streamer = Logged(store, 2, cuda=cuda)
            for layer in (0, 1, 2, 3):
                with streamer.layer(layer) as page:
                    for d in (0, 1):
                        page.wait(d)
                        cuda.log.append(("use", page.table.blocks[0][d].data_ptr(), (layer, d)))
            arenas = arenas_of(store)
        check_order(cuda.log, arenas)
        with pytest.raises(AssertionError, match="overwrites" if dropped != "compute" else "before the load"):
            check_order([entry for entry in cuda.log if entry[:2] != ("wait", dropped)], arenas)


def test_a_slower_link_makes_loads_as_long_as_it_would():
    store, link = filled(place("host", 2, 3)), 1e5
    with_link = ThreadStreamer(store, 2, link_bandwidth=link)
    for layer in range(2):
        with with_link.layer(layer) as page:
            page.wait(0)
            page.wait(1)
    counters = with_link.counters()
    with_link.close()
    assert counters.transfer_ns / 1e9 >= counters.host_bytes / link
