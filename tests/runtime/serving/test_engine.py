"""The engine's invariants: same tokens wherever experts live, no byte outside the ledger, every request ends."""

from __future__ import annotations

import os
import random
import re
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fluxmoe.experiments.lib.checkpoints import make_checkpoint
from fluxmoe.runtime.devices import DeviceError
from fluxmoe.runtime.experts.pager import ExpertPager
from fluxmoe.runtime.experts.placement import PlacementError, Tier
from fluxmoe.runtime.hardware import HardwareProfile
from fluxmoe.runtime.memory.budget import BudgetError
from fluxmoe.runtime.serving import engine as engine_module
from fluxmoe.runtime.serving.engine import Engine, EngineConfig
from fluxmoe.runtime.serving.request import Request, SamplingParams


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    out = tmp_path_factory.mktemp("models") / "moe"
    make_checkpoint(
        arch="qwen3_moe", out=out, layers=5, experts=6, top_k=2, hidden=64, moe_intermediate=48, heads=4,
        kv_heads=2, head_dim=16, vocab=512, dtype="bfloat16", seed=0, max_positions=256,
    )  # fmt: skip
    return out


# Rates at which all three tiers have a share.
PROFILE = replace(HardwareProfile.load("laptop"), host_bandwidth=30e9, disk_bandwidth=30e9)


def requests(count=10, sampled=True) -> list[Request]:
    rng = np.random.default_rng(1)
    return [
        Request(
            tuple(rng.integers(0, 512, rng.integers(1, 60)).tolist()),
            SamplingParams(
                max_new_tokens=int(rng.integers(1, 50)),
                temperature=0.8 if sampled and i % 3 == 0 else 0.0,
                top_p=0.9,
                seed=i,
                ignore_eos=True,
            ),
        )
        for i in range(count)
    ]


def serve(model_dir, work=None, **settings):
    config = EngineConfig(**{"device": "cpu", "max_batch": 6, "max_batched_tokens": 48, "max_context": 160, **settings})
    with Engine(model_dir, config) as engine:
        handles = [engine.add(request) for request in work or requests()]
        steps = list(engine.steps())
        engine.scheduler.check_integrity()
        assert engine.scheduler.blocks_used == 0
        return [handle.output.token_ids for handle in handles], steps, engine


@pytest.fixture(scope="module")
def expected(model_dir):
    return serve(model_dir)[0]


def test_generates(expected):
    assert [len(tokens) for tokens in expected] == [r.params.max_new_tokens for r in requests()]


@pytest.mark.parametrize("slots", [2, 3, 4])
@pytest.mark.parametrize(
    ("placement", "alpha"),
    [("offload", None), ("offload", 0.4), ("balanced", 0.5), ("balanced", None), ("host", None), ("disk", None)],
)
def test_tokens_do_not_depend_on_placement(model_dir, expected, placement, alpha, slots):
    tokens, steps, _ = serve(model_dir, placement=placement, alpha=alpha, slots=slots, poison=True)
    assert tokens == expected
    assert sum(step.streamed_bytes for step in steps) > 0


@pytest.mark.parametrize("slots", [2, 4])
def test_tokens_survive_random_delays(model_dir, expected, slots):
    rng = random.Random(0)
    delay = lambda layer, tensor_type: rng.choice([0.0, 0.0, 0.002])  # noqa: E731
    tokens, steps, _ = serve(model_dir, placement="host", slots=slots, poison=True, load_delay=delay)
    assert tokens == expected
    assert sum(step.stall_s for step in steps) > 0


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(dict(alpha=0.34, disk_share=0.34), id="shares"),
        pytest.param(dict(disk_share=0.5, transfer="whole", profile=PROFILE), id="whole"),
        pytest.param(dict(alpha=0.5, expert_format="planar12", profile=PROFILE), id="packed"),
        pytest.param(dict(profile=PROFILE, cache_bytes=1, cache_policy="lirs"), id="by bandwidth"),
    ],
)
def test_tokens_do_not_depend_on_three_tiers_at_once(model_dir, expected, settings):
    tokens, _, engine = serve(model_dir, placement="three_tiers", poison=True, **settings)
    assert tokens == expected
    device = Tier.RESIDENT if engine.config.expert_format is None else Tier.PACKED
    counts = {tier: (engine.tiers == tier).sum(axis=1) for tier in (device, Tier.HOST, Tier.DISK)}
    assert all(count.min() >= 1 for count in counts.values()), "every layer has experts in every tier"


def test_three_tiers_measure_the_disk_that_they_share_layers_with(model_dir, expected, tmp_path):
    """Without shares and a profile; a disk of which nothing can be read yet is asked for."""
    with pytest.raises(PlacementError, match="bandwidth of tier DISK"):
        serve(model_dir, placement="three_tiers", disk_dir=tmp_path / "empty")
    tokens, _, engine = serve(model_dir, placement="three_tiers", alpha=0.34)
    assert tokens == expected
    assert engine.placement.counts()["host"] > 0


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("placement", ["resident", "host"])
def test_tokens_survive_preemption(model_dir, expected, preemption, placement):
    """A budget whose KV holds about two requests: sequences are evicted and come back."""
    roomy = serve(model_dir, placement=placement)[2]
    block = roomy.kv.nbytes // roomy.kv.num_blocks
    budget = sum(v for k, v in roomy.budget.lines().items() if k != "kv_cache") + 8 * block
    tokens, steps, engine = serve(model_dir, placement=placement, preemption=preemption, budget_bytes=budget)
    assert engine.kv.num_blocks == 8
    assert sum(step.preemptions for step in steps) > 0
    assert (sum(step.swapped_blocks for step in steps) > 0) == (preemption == "swap")
    assert tokens == expected


@pytest.mark.parametrize(
    "settings", [dict(max_batch=1), dict(max_batched_tokens=7), dict(block_size=16), dict(threads=1)]
)
def test_tokens_do_not_depend_on_batching(model_dir, expected, settings):
    assert serve(model_dir, **settings)[0] == expected


@pytest.mark.parametrize("placement", ["resident", "packed", "offload", "balanced", "host", "disk", "three_tiers"])
def test_ledger_is_what_is_held(model_dir, placement):
    budget = 3_000_000
    _, _, engine = serve(model_dir, placement=placement, budget_bytes=budget, profile=PROFILE)
    held = engine.held_bytes()
    assert held == engine.budget.lines()
    assert sum(held.values()) <= budget


def test_too_small_a_budget_names_the_least(model_dir):
    with pytest.raises(BudgetError) as info:
        Engine(model_dir, EngineConfig(device="cpu", budget_bytes=100_000, max_context=160))
    assert "resident_experts" in str(info.value)
    roomy = serve(model_dir)[2]
    block = roomy.kv.nbytes // roomy.kv.num_blocks
    least = sum(v for k, v in roomy.budget.lines().items() if k != "kv_cache") + block
    common = dict[str, Any](device="cpu", max_batch=6, max_batched_tokens=48, max_context=160)
    with pytest.raises(BudgetError):
        Engine(model_dir, EngineConfig(budget_bytes=least - 1, **common))
    Engine(model_dir, EngineConfig(budget_bytes=least, **common)).close()


@pytest.mark.parametrize(
    "settings",
    [{"planning": False}, {"placement": "packed"}, {"placement": "host"}, {"placement": "balanced", "alpha": 0.5}],
    ids=lambda settings: settings.get("placement", "resident"),
)
def test_an_adaptive_run_starts_with_the_least_that_its_refusal_names(model_dir, settings):
    """Pages and quanta of KV, which it is rounded up to, included."""
    common = dict[str, Any](
        device="cpu", max_batch=6, max_batched_tokens=48, max_context=160, adaptive=True, **settings
    )
    with pytest.raises(BudgetError) as info:
        Engine(model_dir, EngineConfig(budget_bytes=1 << 16, **common))
    least = info.value.least
    assert least is not None
    with pytest.raises(BudgetError):
        Engine(model_dir, EngineConfig(budget_bytes=least - 1, **common))
    with Engine(model_dir, EngineConfig(budget_bytes=least, **common)) as engine:
        assert engine.held_bytes() == engine.budget.lines()
        assert len(engine.generate([Request((1, 2, 3), SamplingParams(4, ignore_eos=True))])[0].token_ids) == 4


@pytest.mark.parametrize("settings", [{"max_batch": 10**9}, {"max_batched_tokens": 10**9}], ids=str)
def test_a_batch_that_would_fill_the_machine_is_refused_before_it_does(model_dir, settings):
    with pytest.raises(BudgetError, match=r"workspace at least .*lower --max-batch"):
        Engine(model_dir, EngineConfig(device="cpu", **settings))


def test_impossible_requests_are_refused_alone(model_dir, expected):
    good = requests()
    work = [
        Request((), SamplingParams(max_new_tokens=3)),
        Request(tuple([1] * 300), SamplingParams(max_new_tokens=3)),
        Request((512,), SamplingParams(max_new_tokens=3)),
        *good,
    ]
    config = EngineConfig(device="cpu", max_batch=6, max_batched_tokens=48, max_context=160)
    with Engine(model_dir, config) as engine:
        outputs = engine.generate(work)
    assert [o.finish_reason for o in outputs[:3]] == ["refused"] * 3
    for output, said in zip(outputs, ("empty", "160", "vocabulary of 512"), strict=False):
        assert said in (output.error or "")
    assert [o.token_ids for o in outputs[3:]] == expected


def test_a_recording_says_what_each_token_chose_whatever_the_batch(model_dir):
    """Preempted and alone: the same experts for the same token of the same request, prompts included."""
    chosen = []
    for settings in ({}, {"max_batch": 1}, {"placement": "host", "budget_bytes": 700_000, "max_batched_tokens": 7}):
        tokens, steps, engine = serve(model_dir, record_routing=True, **settings)
        recording = engine.pager.recorder.recording()
        keys = zip(recording.sequence.tolist(), recording.position.tolist(), strict=True)
        chosen.append(dict(zip(keys, recording.experts.tolist(), strict=True)))
        generated = [sum(s == i and p >= 0 for s, p in chosen[-1]) for i in range(len(tokens))]
        assert generated == [len(ids) - 1 for ids in tokens]  # the last is never computed
    assert sum(step.preemptions for step in steps)
    assert chosen[0] == chosen[1] == chosen[2]


def test_stop_tokens_end_a_request(model_dir, expected):
    first = requests()[1]
    stop = expected[1][5]
    params = SamplingParams(max_new_tokens=first.params.max_new_tokens, ignore_eos=True, stop_token_ids=(stop,))
    tokens, _, _ = serve(model_dir, [Request(first.prompt_ids, params)])
    assert tokens[0] == expected[1][: expected[1].index(stop) + 1]


def test_streaming_moves_each_layer_once_an_iteration(model_dir):
    _, steps, engine = serve(model_dir, placement="host")
    layer_bytes = engine.pager.streamer.slot_bytes // 2
    total = sum(step.streamed_bytes for step in steps)
    # Prefetch runs at most S layers ahead of the last iteration.
    assert 5 * len(steps) <= total / layer_bytes <= 5 * len(steps) + 2


def test_arrivals_are_honoured(model_dir):
    work = [Request((5, 6, 7), SamplingParams(max_new_tokens=2), arrival_s=0.05 * i) for i in range(3)]
    config = EngineConfig(device="cpu", max_context=160)
    with Engine(model_dir, config) as engine:
        outputs = engine.generate(work)
    assert all((o.first_token_s or -1) >= r.arrival_s for o, r in zip(outputs, work, strict=True))


def test_engine_serves_again_after_it_was_drained(model_dir, expected):
    with Engine(
        model_dir, EngineConfig(device="cpu", max_batch=6, max_batched_tokens=48, max_context=160, placement="host")
    ) as engine:
        for _ in range(2):
            assert [o.token_ids for o in engine.generate(requests())] == expected


def test_no_cuda_is_one_sentence(model_dir):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(DeviceError, match="--device cpu"):
        Engine(model_dir, EngineConfig(device="cuda"))


FORMAT_CASES = {
    "packed": dict(placement="packed"),
    "packed, not fused": dict(placement="packed", expert_format="huffman"),
    "tri-state": dict(placement="balanced", alpha=0.7, dense_share=0.3, expert_format="planar12"),
    "hybrid": dict(placement="hybrid", alpha=0.6),
    "hybrid, dense in host": dict(placement="hybrid", alpha=0.6, host_format="dense"),
    "host": dict(placement="host", expert_format="planar12"),
    "host, decoded": dict(placement="host", expert_format="planar12", slot_format="decoded"),
    "host, not fused": dict(placement="host", expert_format="tiered"),
    "offload": dict(placement="offload", alpha=0.6, host_format="tiered"),
    "on demand": dict(placement="host", expert_format="planar12", transfer="on_demand"),
    "on demand, dense": dict(placement="balanced", alpha=0.4, transfer="on_demand"),
    "disk": dict(placement="disk", expert_format="planar12"),
    "disk, whole": dict(placement="disk", alpha=0.4, expert_format="planar12", transfer="whole"),
    "disk, not fused": dict(placement="disk", alpha=0.4, expert_format="huffman"),
}


@pytest.fixture(scope="module")
def wide_model_dir(tmp_path_factory):
    """Experts large enough that every format saves something."""
    out = tmp_path_factory.mktemp("models") / "wide"
    make_checkpoint(
        arch="olmoe", out=out, layers=4, experts=4, top_k=2, hidden=128, moe_intermediate=120, heads=4, vocab=512,
        dtype="bfloat16", seed=0, max_positions=256,
    )  # fmt: skip
    return out


@pytest.mark.parametrize("settings", FORMAT_CASES.values(), ids=FORMAT_CASES)
def test_compressed_experts_give_the_same_tokens_from_fewer_bytes(wide_model_dir, settings):
    model_dir, work = wide_model_dir, requests(3)
    tokens, steps, engine = serve(model_dir, work, poison=True, **settings)
    assert tokens == serve(model_dir, work)[0]
    assert engine.held_bytes() == engine.budget.lines()
    plain = {key: settings[key] for key in ("placement", "alpha") if key in settings}
    plain["placement"] = {"packed": "resident", "hybrid": "offload"}.get(plain["placement"], plain["placement"])
    _, dense_steps, dense = serve(model_dir, work, transfer="whole", **plain)
    moved = sum(s.streamed_bytes for s in steps)
    if settings.get("host_format") == "dense":
        assert moved > 0
    elif settings.get("transfer") == "on_demand":
        assert moved == 0
    elif plain["placement"] != "resident":
        assert 0 < moved < sum(s.streamed_bytes for s in dense_steps)
    layout = engine.deployment.layout
    if layout.formats.packed in layout.fused and settings.get("slot_format") != "decoded":
        lines, dense_lines = engine.budget.lines(), dense.budget.lines()
        experts = ("resident_experts", "packed_experts", "slots")
        assert sum(lines[e] for e in experts) <= sum(dense_lines[e] for e in experts)


@pytest.fixture(scope="module")
def dense_layers_dir(tmp_path_factory):
    """Layers without experts at the beginning, in the middle and at the end."""
    out = tmp_path_factory.mktemp("models") / "dense-layers"
    make_checkpoint(
        arch="qwen3_moe", out=out, layers=7, experts=4, top_k=2, hidden=128, moe_intermediate=64, heads=4, vocab=512,
        dtype="bfloat16", seed=0, max_positions=256, dense_layers=(0, 3, 4, 6),
    )  # fmt: skip
    return out


DENSE_LAYERS_CASES = {
    "host": dict(placement="host"),
    "host, a slot each": dict(placement="host", slots=3),
    "offload": dict(placement="offload", alpha=0.4),
    "balanced": dict(placement="balanced", alpha=0.5, dense_share=0.25, expert_format="planar12"),
    "packed": dict(placement="packed"),
    "packed, not fused": dict(placement="packed", expert_format="tiered"),
    "disk": dict(placement="disk"),
    "adaptive": dict(placement="packed", adaptive=True, plan_every=2, budget_bytes=4_100_000),
}


@pytest.mark.parametrize("settings", DENSE_LAYERS_CASES.values(), ids=DENSE_LAYERS_CASES)
def test_layers_without_experts_are_not_the_pagers(dense_layers_dir, settings):
    tokens, steps, engine = serve(dense_layers_dir, poison=True, **settings)
    assert tokens == serve(dense_layers_dir)[0]
    assert engine.placement.tiers.shape == (3, 4)
    assert engine.held_bytes() == engine.budget.lines()
    if "adaptive" in settings:
        assert min(step.device_experts for step in steps) < steps[0].device_experts == 12
    elif "packed" not in settings["placement"]:
        assert sum(step.streamed_bytes for step in steps) > 0


@pytest.mark.parametrize("expert_format", ["planar12", "huffman"])
def test_the_reference_kernels_read_compressed_experts_from_decoded_slots(wide_model_dir, expert_format):
    work = [Request(tuple(range(20)), SamplingParams(max_new_tokens=4, ignore_eos=True))]
    plain = serve(wide_model_dir, work, kernels="torch")[0]
    packed = dict[str, Any](kernels="torch", placement="packed", expert_format=expert_format, poison=True)
    tokens, _, engine = serve(wide_model_dir, work, **packed)
    assert tokens == plain
    assert engine.held_bytes() == engine.budget.lines()
    assert engine.budget.lines()["slots"] > 0


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (dict(expert_format="zip"), "expert_format must be one of dense, planar12"),
        (dict(host_format="zip"), "host_format must be one of dense, planar12"),
        (dict(transfer="zip"), "transfer must be one of whole, on_demand, auto"),
        (dict(transfer="auto"), "auto needs adaptive"),
        (dict(slot_format="zip"), "slot_format must be one of packed, decoded"),
        (dict(expert_format="planar12"), "placement packed holds them in planar12"),
        (dict(placement="packed", expert_format="dense"), "choose planar12, planar8, tiered"),
    ],
)
def test_formats_that_cannot_be_meant(settings, match):
    with pytest.raises(ValueError, match=match):
        EngineConfig(**settings)


def test_kernels_that_cannot_read_a_format_do_not_read_it_on_demand(wide_model_dir):
    settings = dict[str, Any](
        device="cpu", placement="host", expert_format="huffman", transfer="on_demand", max_context=64
    )
    with pytest.raises(ValueError, match="cannot read format huffman as it is"):
        Engine(wide_model_dir, EngineConfig(**settings))


def held_by_process() -> tuple:
    """Open files by what they are, and running threads."""
    names = []
    for handle in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            names.append(os.readlink(handle))
    return sorted(names), threading.active_count()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc to see open files")
@pytest.mark.parametrize(
    ("part", "settings"),
    [
        ("_load", dict(placement="disk")),
        ("_load", dict(placement="packed", adaptive=True)),
        ("Scheduler", dict(placement="disk")),
        ("seal", dict(placement="packed", adaptive=True)),
        ("Counters", dict(placement="disk")),
        ("Residency", dict(placement="packed", adaptive=True)),
    ],
)
def test_a_refused_start_leaves_nothing_open(wide_model_dir, monkeypatch, part, settings):
    def refuse(*arguments, **more):
        raise BudgetError("refused")

    owner = engine_module.Engine if part.startswith("_") else ExpertPager if part == "seal" else engine_module
    monkeypatch.setattr(owner, part, refuse)
    before = held_by_process()
    with pytest.raises(BudgetError, match="refused"):
        Engine(wide_model_dir, EngineConfig(device="cpu", max_context=64, **settings))
    assert held_by_process() == before


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc to see open files")
def test_a_budget_without_a_slab_for_kv_leaves_nothing_open(wide_model_dir):
    settings = dict[str, Any](device="cpu", max_context=64, placement="packed", adaptive=True)
    with pytest.raises(BudgetError) as info:
        Engine(wide_model_dir, EngineConfig(budget_bytes=1 << 20, **settings))
    before = held_by_process()
    with pytest.raises(BudgetError, match="the least that works"):
        Engine(wide_model_dir, EngineConfig(budget_bytes=(info.value.least or 0) - 1, **settings))
    assert held_by_process() == before


@pytest.mark.parametrize("settings", [{}, {"placement": "host"}, {"placement": "three_tiers", "alpha": 0.5}], ids=str)
def test_a_refusal_names_a_placement_a_format_and_a_budget_that_would_do(wide_model_dir, settings):
    common = dict[str, Any](device="cpu", max_context=64, max_batch=2, max_batched_tokens=16)
    with pytest.raises(BudgetError) as info:
        Engine(wide_model_dir, EngineConfig(budget_bytes=1 << 20, profile=PROFILE, **settings, **common))
    said = re.search(r"--placement (\w+) --expert-format (\w+) works with (\d+) bytes", str(info.value))
    assert said is not None, info.value
    placement, expert_format, budget = said[1], said[2], int(said[3])
    assert info.value.least is None or budget < info.value.least
    other = EngineConfig(placement=placement, expert_format=expert_format, budget_bytes=budget, **common)
    with Engine(wide_model_dir, other) as engine:
        assert engine.generate([Request((1, 2, 3), SamplingParams(4, ignore_eos=True))])[0].token_ids
