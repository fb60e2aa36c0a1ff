"""Traces as they are written: of a CPU run, of a simulated one, and of CUDA streams that are played.

Everything is checked on the JSON alone, beside counters and metrics that were counted elsewhere.
"""

from __future__ import annotations

import json
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
from fluxmoe.experiments.lib.checkpoints import make_checkpoint
from fluxmoe.models.published import published_config
from fluxmoe.runtime.experts.config import PagingConfig
from fluxmoe.runtime.experts.placement import Tier, place
from fluxmoe.runtime.experts.planner import Move
from fluxmoe.runtime.experts.streamer_cuda import CudaStreamer
from fluxmoe.runtime.hardware import HardwareProfile
from fluxmoe.runtime.serving.config import EngineConfig
from fluxmoe.runtime.serving.engine import Engine
from fluxmoe.runtime.serving.request import Request, SamplingParams
from fluxmoe.runtime.sim.simulator import SimEngine
from fluxmoe.runtime.timeline import CudaClock, Timeline

from .experts.test_pager import filled as filled_pager
from .experts.test_streamer import filled

LAYERS = 4
# Of times in µs that were floats.
SLACK = 0.01
REQUESTS = [Request((1,) * 20, SamplingParams(max_new_tokens=4, ignore_eos=True)) for _ in range(3)]


class Trace:
    """Spans by track, each with `begin` and `end` in µs; counters as lists of (time, values)."""

    def __init__(self, path):
        events = json.loads(path.read_text())["traceEvents"]
        names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
        self.title = next(e["args"]["name"] for e in events if e["name"] == "process_name")
        self.tracks, self.counters = defaultdict(list), defaultdict(list)
        for e in events:
            if e["ph"] == "X":
                end = e["ts"] + e["dur"]
                span = SimpleNamespace(name=e["name"], kind=e["cat"], begin=e["ts"], end=end, args=e["args"])
                self.tracks[names[e["tid"]]].append(span)
            elif e["ph"] == "C":
                self.counters[e["name"]].append((e["ts"], e["args"]))

    def of_kind(self, kind):
        return [span for spans in self.tracks.values() for span in spans if span.kind == kind]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    out = tmp_path_factory.mktemp("models") / "moe"
    return make_checkpoint(
        arch="qwen3_moe", out=out, layers=LAYERS, experts=6, top_k=2, hidden=64, moe_intermediate=64, heads=4,
        vocab=300, dtype="bfloat16", seed=0, max_positions=256,
    )  # fmt: skip


def run_cpu(model_dir, path, warm_up=False, **settings):
    """(trace, metrics of steps, counters) of a run whose loads take milliseconds."""
    config = EngineConfig(
        device="cpu", threads=1, max_batch=4, max_batched_tokens=64, max_context=64, timeline=True, **settings
    )
    with Engine(model_dir, config) as engine:
        if warm_up:
            engine.start_trace(REQUESTS[0])
        for request in REQUESTS:
            engine.add(request)
        steps = list(engine.steps())
    if (cache := engine.pager.store.cache) is not None:
        cache._settle()
    engine.timeline.save(path)
    return Trace(path), steps, engine.pager.counters()


@pytest.fixture(scope="module")
def cpu(model_dir, tmp_path_factory):
    return run_cpu(model_dir, tmp_path_factory.mktemp("cpu") / "trace.json", placement="host", link_bandwidth=2e7)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    return simulate(HardwareProfile.load("H100-SXM"), tmp_path_factory.mktemp("sim") / "trace.json")


def simulate(profile, path):
    config = EngineConfig(placement="balanced", alpha=0.8, max_batch=4, max_context=64, timeline=True)
    engine = SimEngine(published_config("qwen3-30b-a3b"), profile, config)
    for request in REQUESTS:
        engine.add(request)
    steps = list(engine.steps())
    engine.timeline.save(path)
    return Trace(path), steps


@pytest.fixture(params=["cpu", "simulated"])
def run(request):
    """(trace, metrics of its steps)."""
    return request.getfixturevalue(request.param)[:2]


def check_tracks(trace):
    for spans in trace.tracks.values():
        ordered = sorted(spans, key=lambda span: span.begin)
        assert all(before.end <= after.begin + SLACK for before, after in pairwise(ordered))
    for load in trace.of_kind("load"):
        assert set(load.args) >= {"layer", "experts", "bytes", "step"}
        assert load.args["experts"] > 0
    flight = [values["bytes"] for _, values in trace.counters["bytes in flight"]]
    assert min(flight) >= 0
    assert max(flight) >= max(load.args["bytes"] for load in trace.of_kind("load")) > 0
    assert flight[-1] == 0


def test_spans_of_a_track_never_overlap_and_loads_say_what_they_bring(run):
    check_tracks(run[0])


def test_a_step_is_compute_and_waits_and_the_rest(run):
    trace, steps = run
    marks = trace.tracks["steps"]
    assert [mark.name for mark in marks] == [f"step {step.iteration}" for step in steps]
    for mark, step in zip(marks, steps, strict=True):
        inside = [span for span in trace.tracks["compute"] if span.args["step"] == step.iteration]
        assert all(mark.begin - SLACK <= span.begin and span.end <= mark.end + SLACK for span in inside)
        taken = {kind: sum(s.end - s.begin for s in inside if s.kind == kind) for kind in ("compute", "wait")}
        assert taken["wait"] == pytest.approx(step.stall_s * 1e6, abs=SLACK * len(inside))
        rest = mark.end - mark.begin - sum(taken.values())
        assert rest >= -SLACK * len(inside)
        if trace.title.startswith("simulated"):
            assert rest == pytest.approx(0, abs=SLACK * len(inside))
        assert (mark.args["batch"], mark.args["decode_tokens"]) == (step.batch, step.decode_tokens)
        assert {s.args["layer"] for s in inside if s.name.startswith("experts")} >= set(range(LAYERS))
    shown = [(values["used"], sum(values.values())) for _, values in trace.counters["KV blocks"]]
    assert shown == [(step.kv_blocks_used, step.kv_blocks) for step in steps]


def test_loads_of_the_next_layer_run_under_this_one(run):
    """From the second layer of a pass on, whose slot is free once the layer before is computed."""
    trace, steps = run
    computed, loads = defaultdict(list), defaultdict(list)
    for span in trace.tracks["compute"]:
        if span.name.startswith("experts") and span.kind == "compute":
            computed[span.args["step"], span.args["layer"]].append(span)
    for load in trace.of_kind("load"):
        loads[load.args["layer"]].append(load)
    for step in steps[1:]:
        for layer in range(1, LAYERS - 1):
            assert any(
                load.begin < span.end and span.begin < load.end
                for span in computed[step.iteration, layer]
                for load in loads[layer + 1]
            )


def test_bytes_of_loads_are_those_that_were_counted(cpu):
    trace, steps, counters = cpu
    loads = trace.of_kind("load")
    assert sum(load.args["bytes"] for load in loads) == counters.streamed_bytes >= sum(s.streamed_bytes for s in steps)
    assert len(loads) == counters.loads
    assert set(trace.tracks) == {"steps", "compute", "copy"}


def test_bytes_of_simulated_loads_are_those_that_were_counted(simulated):
    trace, steps = simulated
    loads = [load.args["bytes"] for load in trace.of_kind("load")]
    # What runs ahead of the last pass was counted by no step.
    whole = len(loads) // len(steps) * len(steps)
    assert sum(loads[:whole]) == sum(step.streamed_bytes for step in steps)
    assert set(trace.tracks) == {"steps", "compute", "copy"}
    assert trace.title == "simulated on H100-SXM"


def test_a_copy_worker_that_waits_for_a_slot_says_so(cpu, tmp_path):
    """On a link that is faster than the kernels it waits before every load but those of the first slots."""
    profile = replace(HardwareProfile.load("H100-SXM"), host_bandwidth=1e13, host_latency_s=0.0)
    fast = simulate(profile, tmp_path / "trace.json")[0]
    for trace in (cpu[0], fast):
        assert any(span.name.startswith("wait slot") for span in trace.tracks["copy"] if span.kind == "wait")
    loads = fast.of_kind("load")
    assert sum(span.kind == "wait" for span in fast.tracks["copy"]) == len(loads) - 2


def test_experts_on_demand_have_a_track_a_reader(model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("fluxmoe.runtime.experts.disk.lies_in_memory", lambda directory: False)
    trace, _, counters = run_cpu(
        model_dir, tmp_path / "trace.json", placement="disk", expert_format="planar12", cache_bytes=1 << 20,
        disk_dir=tmp_path,
    )  # fmt: skip
    readers = {track for track in trace.tracks if track.startswith("disk")}
    assert readers
    assert set(trace.tracks) == {"steps", "compute"} | readers
    check_tracks(trace)
    assert sum(load.args["bytes"] for load in trace.of_kind("load")) == counters.disk_bytes > 0


def test_a_warm_up_is_not_in_the_trace(model_dir, tmp_path):
    trace, steps, _ = run_cpu(model_dir, tmp_path / "trace.json", warm_up=True, placement="host")
    assert [step.iteration for step in steps] == list(range(len(steps)))
    assert len(trace.tracks["steps"]) == len(steps)
    assert {span.args["step"] for span in trace.tracks["compute"]} == set(range(len(steps)))
    assert min(span.begin for spans in trace.tracks.values() for span in spans) >= 0


def test_experts_that_move_say_what_they_bring(tmp_path):
    timeline = Timeline()
    config = PagingConfig(placement="packed", expert_format="planar12", adaptive=True, planning=False, threads=1)
    with filled_pager(config, timeline=timeline) as pager:
        for source, target in [(Tier.PACKED, Tier.HOST), (Tier.HOST, Tier.PACKED)]:
            pager.request(Move(1, expert, source, target) for expert in (0, 2))
            pager.apply_moves()
            while pager.mover.busy:
                pager.apply_moves()
        moved = pager.counters().moved_bytes
    timeline.save(tmp_path / "trace.json")
    moves = Trace(tmp_path / "trace.json").tracks["moves"]
    assert [(span.args["layer"], span.args["expert"]) for span in moves] == [(1, 0), (1, 2)]
    assert sum(span.args["bytes"] for span in moves) == moved > 0


class PlayedCuda:
    """torch.cuda with streams that run on clocks of their own (ns) and wait for events as real ones do."""

    def __init__(self):
        self.active = self.compute = self.Stream()

    def Stream(self):
        stream = SimpleNamespace(now=0, synchronize=lambda: None)
        stream.wait_event = lambda event: setattr(stream, "now", max(stream.now, event.at))
        return stream

    def Event(self, enable_timing=False):
        event = SimpleNamespace(at=0, synchronize=lambda: None)
        event.record = lambda stream: setattr(event, "at", stream.now)
        event.elapsed_time = lambda other: (other.at - event.at) / 1e6
        return event

    def current_stream(self):
        return self.active

    def synchronize(self):
        pass

    @contextmanager
    def stream(self, stream):
        before, self.active = self.active, stream
        yield
        self.active = before


class PlayedStreamer(CudaStreamer):
    def _copy(self, target, source, cancelled):
        self._cuda.active.now += source.numel()
        return source.numel()


def test_on_cuda_spans_are_those_of_the_streams(tmp_path):
    cuda = PlayedCuda()
    timeline = Timeline(clock=CudaClock(cuda))
    with filled(place("host", LAYERS, 2)) as store:
        streamer = PlayedStreamer(store, 2, timeline=timeline, cuda=cuda)
        for step in range(2):
            timeline.step = step
            for layer in range(LAYERS):
                with streamer.layer(layer) as page, timeline.span("compute", f"experts {layer}", layer=layer):
                    for tensor_type in (0, 1):
                        page.wait(tensor_type)
                        cuda.compute.now += 300
        counters, load_plan = streamer.counters(), store.load_plans[0]
        timeline.save(tmp_path / "trace.json")
    trace = Trace(tmp_path / "trace.json")
    check_tracks(trace)
    assert set(trace.tracks) == {"compute", "copy gate_up", "copy down"}
    loads = trace.of_kind("load")
    assert (sum(load.args["bytes"] for load in loads), len(loads)) == (counters.host_bytes, counters.loads)
    # The first load is waited for from the beginning on; then the pass is computed where loads do not hold it up.
    first = trace.tracks["compute"][0]
    assert (first.name, first.begin) == ("wait gate_up 0", 0)
    assert first.end == pytest.approx(load_plan.host_bytes(0) / 1e3)
    computed = sum(s.end - s.begin for s in trace.tracks["compute"] if s.kind == "compute")
    assert computed == pytest.approx(2 * LAYERS * 2 * 0.3)
    last = max(trace.tracks["compute"], key=lambda span: span.end)
    waited = sum(s.end - s.begin for s in trace.tracks["compute"] if s.kind == "wait")
    assert computed + waited == pytest.approx(last.end)
