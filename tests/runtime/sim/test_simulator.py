"""The simulator: the runtime's own decisions on a virtual clock, repeatable, and times that follow the rules."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from fluxmoe.models.config import ConfigError
from fluxmoe.models.decoder import expert_dims
from fluxmoe.models.published import PUBLISHED, published_config
from fluxmoe.runtime.experts.placement import Tier
from fluxmoe.runtime.experts.planner import Move
from fluxmoe.runtime.hardware import HardwareProfile, ProfileError
from fluxmoe.runtime.memory.budget import BudgetError
from fluxmoe.runtime.serving.config import EngineConfig
from fluxmoe.runtime.serving.request import Request, SamplingParams
from fluxmoe.runtime.sim.cost_model import CostParameters, SimExperts
from fluxmoe.runtime.sim.simulator import SimEngine

MODEL = published_config("qwen3-30b-a3b")
PROFILE = HardwareProfile.load("H100-SXM")


def requests(count=16, prompt=100, output=20) -> list[Request]:
    params = SamplingParams(max_new_tokens=output, ignore_eos=True)
    return [Request(tuple([1] * prompt), params) for _ in range(count)]


def engine(model=MODEL, profile=PROFILE, parameters=None, devices=None, **settings) -> SimEngine:
    common = dict[str, Any](device="cpu", max_batch=16, max_batched_tokens=512, max_context=128)
    return SimEngine(model, profile, EngineConfig(**{**common, **settings}), parameters, devices)


def serve(sim: SimEngine, work: list[Request]):
    for request in work:
        sim.add(request)
    return sim.steps()


def run(work=None, **settings):
    sim = engine(**settings)
    handles = [sim.add(request) for request in work or requests()]
    steps = list(sim.steps())
    assert sum(sim.budget.lines().values()) <= sim.budget.total
    sim.scheduler.check_integrity()
    return steps, [handle.output for handle in handles], sim


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_sizes(name):
    billions = {"mixtral-8x7b": 46.7, "qwen3-30b-a3b": 30.5, "qwen3-next-80b-a3b": 79.7, "olmoe-1b-7b": 6.92}
    config = published_config(name)
    assert (config.expert_bytes_total + config.non_expert_bytes) / 2e9 == pytest.approx(billions[name], rel=0.01)
    with pytest.raises(ConfigError, match="known by name are mixtral-8x7b"):
        published_config("gpt-9")


def test_all_tokens_are_made_and_runs_repeat():
    first, outputs, _ = run()
    assert all(len(output.token_ids) == 20 for output in outputs)
    assert [step.time_s for step in run()[0]] == [step.time_s for step in first]
    assert all(a.time_s < b.time_s for a, b in pairwise(first))
    assert sum(step.decode_tokens for step in first) == 16 * 19


def test_a_decode_step_takes_what_its_bytes_take():
    """One sequence: the weights that a token needs over the bandwidth of memory, and little else."""
    parameters = CostParameters(attention_share=1.0, expert_share=1.0)
    profile = replace(PROFILE, launch_s=0.0, iteration_s=0.0)
    steps, _, _ = run(requests(1), profile=profile, parameters=parameters)
    experts = MODEL.expert_bytes_total * MODEL.top_k / MODEL.num_experts
    embedding = MODEL.vocab_size * MODEL.hidden_size * 2  # one row of it is read
    least = (experts + MODEL.non_expert_bytes - embedding) / profile.memory_bandwidth
    assert steps[-1].duration_s == pytest.approx(least, rel=0.02)


# The first layer and every other one without experts; the last has none either.
DENSE_LAYERS = replace(MODEL, dense_layers=(0, *range(1, 48, 2)), mlp_intermediate_size=6144)


def test_layers_without_experts_take_what_their_bytes_take():
    parameters = CostParameters(attention_share=1.0, expert_share=1.0)
    profile = replace(PROFILE, launch_s=0.0, iteration_s=0.0)
    steps, _, sim = run(requests(1), model=DENSE_LAYERS, profile=profile, parameters=parameters)
    assert sim.placement.tiers.shape == (23, 128)
    assert sim.budget.lines()["resident_experts"] == DENSE_LAYERS.expert_bytes_total
    mlps = 25 * 3 * 6144 * 2048 * 2
    routers, experts = 25 * 128 * 2048 * 2, 25 * 128 * MODEL.expert_params * 2
    assert DENSE_LAYERS.non_expert_bytes == MODEL.non_expert_bytes + mlps - routers
    assert DENSE_LAYERS.expert_bytes_total == MODEL.expert_bytes_total - experts
    embedding = MODEL.vocab_size * MODEL.hidden_size * 2
    read = DENSE_LAYERS.non_expert_bytes - embedding + DENSE_LAYERS.expert_bytes_total * 8 / 128
    assert steps[-1].duration_s == pytest.approx(read / profile.memory_bandwidth, rel=0.02)


def test_loads_hide_under_layers_without_experts():
    """As many experts over the same link: the more work lies between them, the less a pass waits."""
    fewer = replace(MODEL, num_layers=23)
    between, bare = (run(model=model, placement="balanced", alpha=0.9)[0][-1] for model in (DENSE_LAYERS, fewer))
    assert between.streamed_bytes == bare.streamed_bytes > 0
    assert between.transfer_s == bare.transfer_s
    assert between.stall_s < bare.stall_s


def test_tiers_that_share_a_layer_deliver_at_the_same_time():
    """Three tiers by bandwidth: a load takes as long as one tier's share, not as both shares one after the other."""
    profile = replace(PROFILE, host_latency_s=0.0, disk_bandwidth=PROFILE.host_bandwidth / 2)
    common = dict[str, Any](profile=profile, alpha=0.4, transfer="whole")
    host, three = (run(placement=name, **common)[0][-1] for name in ("balanced", "three_tiers"))
    assert three.streamed_bytes == pytest.approx(host.streamed_bytes, rel=0.02)
    assert three.transfer_s == pytest.approx(host.transfer_s / 1.5, rel=0.02)


def test_streaming_takes_the_longer_of_link_and_compute():
    steps, _, _ = run(placement="host", slots=2)
    least = MODEL.expert_bytes_total / PROFILE.host_bandwidth
    assert steps[-1].duration_s == pytest.approx(least, rel=0.02)
    assert steps[-1].stall_s > 0.9 * least
    assert steps[-1].streamed_bytes == pytest.approx(MODEL.expert_bytes_total, rel=0.01)
    # A link so fast that nothing waits: as if resident, but for the traffic that loads make.
    fast = replace(PROFILE, host_bandwidth=1e15, host_latency_s=0.0)
    quick, _, _ = run(placement="host", profile=fast)
    resident, _, _ = run(placement="resident")
    assert quick[-1].stall_s < 1e-4
    assert resident[-1].duration_s <= quick[-1].duration_s


def test_the_same_share_of_each_layer_hides_better_than_whole_layers():
    # A link that would just do if all layers shared it.
    settings = dict[str, Any](alpha=0.9, expert_format="planar12", profile=replace(PROFILE, host_bandwidth=1e12))
    balanced, _, _ = run(placement="balanced", **settings)
    hybrid, _, _ = run(placement="hybrid", **settings)
    assert balanced[-1].time_s < hybrid[-1].time_s
    assert sum(s.stall_s for s in balanced) < 0.5 * sum(s.stall_s for s in hybrid)


def test_slots_are_bounded_loads_ahead():
    """More slots let loads run further ahead; they never make a run slower."""
    times = [run(placement="offload", alpha=0.9, slots=slots)[0][-1].time_s for slots in (2, 3, 4)]
    assert all(later <= 1.01 * sooner for sooner, later in pairwise(times))


def test_a_short_budget_preempts_and_swaps():
    need = sum(engine().budget.lines().values()) - engine().budget.lines()["kv_cache"]
    for preemption in ("swap", "recompute"):
        tight = dict[str, Any](
            budget_bytes=need + 12 * engine().deployment.block_bytes, block_size=32, preemption=preemption
        )
        steps, outputs, _ = run(requests(16, 60, 60), **tight)
        assert sum(step.preemptions for step in steps) > 0
        assert (sum(step.swapped_blocks for step in steps) > 0) == (preemption == "swap")
        assert all(len(output.token_ids) == 60 for output in outputs)
    with pytest.raises(BudgetError, match=r"the least that works is .*; --placement packed --expert-format planar12"):
        run(budget_bytes=need)


def test_devices_share_the_model():
    four = HardwareProfile.load("4xL40")
    one, two = (run(profile=four, devices=devices, placement="host")[2] for devices in (1, 2))
    assert two.budget.lines()["slots"] == pytest.approx(one.budget.lines()["slots"] / 2, rel=0.01)
    with pytest.raises(ProfileError, match="has 4 devices"):
        engine(profile=four, devices=5)


def test_profiles_that_lack_a_rate_are_one_sentence():
    with pytest.raises(ProfileError, match="no link_bandwidth"):
        engine(profile=replace(HardwareProfile.load("4xL40"), link_bandwidth=0.0))
    with pytest.raises(ProfileError, match="no decode_bandwidth of huffman"):
        engine(profile=replace(PROFILE, decode_bandwidth={}), placement="packed", expert_format="huffman")


def test_layers_that_have_a_slot_each_are_loaded_once():
    steps, _, _ = run(placement="offload", alpha=1 - 2 / MODEL.num_layers)
    assert steps[0].streamed_bytes > 0
    assert all(step.streamed_bytes == 0 for step in steps[1:])


def test_states_of_qwen3_next_bound_the_batch():
    model, four = published_config("qwen3-next-80b-a3b"), HardwareProfile.load("4xL40")
    _, _, sim = run(model=model, profile=four, max_batch=512, max_context=4096)
    assert 1 < sim.deployment.max_sequences < 512
    share = model.state_bytes_per_sequence / 4
    assert sim.budget.lines()["states"] == pytest.approx(sim.deployment.max_sequences * share, rel=0.01)


def test_moves_free_memory_for_kv():
    sim = engine(placement="packed", adaptive=True, planning=False, budget_bytes=45 << 30, max_batch=256)
    steps = serve(sim, requests(256))
    before = sim.scheduler.num_blocks
    next(steps)
    sim.request([Move(layer, 127, Tier.PACKED, Tier.HOST) for layer in range(MODEL.num_layers)])
    for _ in range(3):
        last = next(steps)
    assert sim.scheduler.num_blocks > before
    assert last.device_experts == MODEL.num_layers * 127
    assert sum(sim.budget.lines().values()) <= sim.budget.total


def test_steps_that_are_not_spread_over_the_layers_show():
    """As many experts leave one layer, or one each: loads run only a slot ahead, so one layer's do not hide."""
    durations = {}
    for spread in (True, False):
        sim = engine(placement="packed", adaptive=True, planning=False, least_alpha=0.0, max_batch=256)
        steps = serve(sim, requests(256, 20, 100))
        for _ in range(30):
            before = next(steps)
        count = MODEL.num_layers
        where = [(layer, 127) for layer in range(count)] if spread else [(47, expert) for expert in range(count)]
        sim.request([Move(*at, Tier.PACKED, Tier.HOST) for at in where])
        for _ in range(5):
            after = next(steps)
        durations[spread] = after.duration_s / before.duration_s
    assert durations[True] < 1.05
    assert durations[False] > 1.2


def test_the_planner_lowers_alpha_while_requests_wait():
    sim = engine(
        placement="packed", adaptive=True, least_alpha=0.8, budget_bytes=45 << 30, max_batch=256, plan_every=4,
        max_context=1024,
    )  # fmt: skip
    alphas = [step.device_experts for step in serve(sim, requests(300, 900, 100))]
    assert min(alphas) < alphas[0]
    assert min(alphas) >= int(np.floor(0.8 * MODEL.num_experts)) * MODEL.num_layers


def test_states_for_a_full_batch_if_asked():
    """As vLLM reserves them: as many states as the batch has sequences, and less KV than where the batch is fitted."""
    model, four = published_config("qwen3-next-80b-a3b"), HardwareProfile.load("4xL40")
    tight = dict[str, Any](model=model, profile=four, max_batch=256, max_context=4096)
    fitted, full = (run(fit_batch=fit, **tight)[2] for fit in (True, False))
    assert fitted.deployment.max_sequences < full.deployment.max_sequences == 256
    assert fitted.scheduler.num_blocks > full.scheduler.num_blocks
    with pytest.raises(BudgetError, match="states"):
        engine(fit_batch=False, **{**tight, "max_batch": 4096})


def test_copies_that_take_compute_make_layers_longer():
    """Compute and copies of about one length: side by side with a copy engine, one after the other without."""
    link = MODEL.expert_bytes_total / run(placement="resident")[0][-1].duration_s
    times = {}
    for overlap in (1.0, 0.5, 0.0):
        profile = replace(PROFILE, host_bandwidth=link, host_latency_s=0.0, copy_overlap=overlap)
        steps, _, _ = run(placement="host", profile=profile)
        times[overlap] = steps[-1].duration_s
    assert times[0.5] == pytest.approx((times[0.0] + times[1.0]) / 2, rel=0.1)
    assert 1.2 < times[0.0] / times[1.0] < 2
    resident = [run(profile=replace(PROFILE, copy_overlap=overlap))[0][-1].time_s for overlap in (1.0, 0.0)]
    assert resident[0] == resident[1]


def test_every_decoded_tensor_costs_its_latency():
    slow = replace(PROFILE, decode_latency_s=1e-4)
    packed = dict[str, Any](placement="packed", expert_format="huffman")
    with_latency, without = run(profile=slow, **packed)[0], run(**packed)[0]
    added = sum(a.transfer_s - b.transfer_s for a, b in zip(with_latency, without, strict=True))
    assert added == pytest.approx(len(without) * 2 * MODEL.num_layers * MODEL.num_experts * 1e-4, rel=1e-3)


def test_a_link_may_be_held_to_a_rate():
    slow = replace(PROFILE, host_bandwidth=PROFILE.host_bandwidth / 4)
    held = run(placement="host", link_bandwidth=slow.host_bandwidth)[0]
    as_slow = run(placement="host", profile=slow)[0]
    assert held[-1].time_s == as_slow[-1].time_s
    assert run(placement="host", link_bandwidth=1e15)[0][-1].time_s == run(placement="host")[0][-1].time_s


def test_a_run_of_full_size():
    """256 requests of 4,096 tokens on Qwen3-Next over 4 devices: seconds here, where the real machine takes minutes."""
    model, four = published_config("qwen3-next-80b-a3b"), HardwareProfile.load("4xL40")
    settings = dict[str, Any](max_batch=256, max_batched_tokens=2048, max_context=4096, placement="packed")
    sim = engine(model, four, **settings)
    steps = list(serve(sim, requests(256, 3072, 1024)))
    assert sum(step.finished for step in steps) == 256
    assert sum(step.prefill_tokens for step in steps) >= 256 * 3072


def test_simulated_experts_and_kv_take_slabs_like_real_ones():
    """Whatever moves, forth and back: slabs are conserved, and the ledger is what is held."""
    sim = engine(placement="packed", adaptive=True, planning=False, budget_bytes=45 << 30, max_batch=256)
    rng, pool = random.Random(3), sim.kv.pool
    total = sim.budget.used
    for count, _ in enumerate(serve(sim, requests(256, 60, 60))):
        layer, expert = rng.randrange(MODEL.num_layers), rng.randrange(MODEL.num_experts)
        source = Tier(sim.tiers[layer, expert])
        sim.request([Move(layer, expert, source, Tier.HOST if source == Tier.PACKED else Tier.PACKED)])
        pool.check_integrity()
        assert sim.budget.used == total
        held = {line: pool.bytes_of(line) for line in ("packed_experts", "kv_cache", "free_slabs")}
        assert held.items() <= sim.budget.lines().items()
        assert len(pool.held("packed_experts")) == (sim.tiers == Tier.PACKED).sum()
        assert sim.kv.num_blocks == sim.scheduler.num_blocks
        if count > 60:
            break
    assert len(pool.held("packed_experts")) < sim.tiers.size


def test_packed_experts_take_what_a_gpu_measured():
    """In place a share of memory's and of the products' rate; of many rows decoded first, at dense experts' rates."""
    parameters = CostParameters(expert_share=1.0, packed_share=0.5, moe_flops_share=1.0, packed_flops_share=0.25)
    costs = engine(placement="packed", parameters=parameters).costs
    reads, bandwidth = costs._reads[0], costs.profile.memory_bandwidth
    packed, dense = reads.packed / bandwidth, reads.unpacked / bandwidth
    assert reads.near == reads.packed
    assert packed == pytest.approx(0.75 * dense, rel=0.01)
    for share, work_s, decodes_first, expected in (
        (1.0, 0.0, False, packed / 0.5), (0.5, 0.0, False, packed), (1.0, 1.0, False, 4.0),
        (1.0, 1.0, True, packed + dense + 1.0), (1.0, 0.0, True, packed + 2 * dense),
    ):  # fmt: skip
        assert costs._experts_s(reads, share, work_s, decodes_first)[0] == pytest.approx(expected)


@pytest.mark.parametrize(("batched", "more"), [(2048, 0), (2049, 256 << 20)], ids=["few rows", "many rows"])
def test_a_batch_with_many_rows_an_expert_needs_a_buffer_for_decoded_ones(batched, more):
    sizes = [SimExperts(expert_dims(MODEL), batched, 1, CostParameters(), names) for names in ((), ("planar12",))]
    assert sizes[1].workspace_bytes - sizes[0].workspace_bytes == pytest.approx(more, rel=0.05)


def test_what_a_disk_reads_ahead_is_not_waited_for():
    """Files on demand: with many sequences auto hides reads in compute, with one it has nothing to hide."""
    model, profile = published_config("olmoe-1b-7b"), replace(PROFILE, disk_bandwidth=400e9)
    common = dict[str, Any](model=model, profile=profile, placement="disk", kernels="torch", max_batch=64)
    times = {}
    for transfer in ("auto", "on_demand"):
        for count in (1, 64):
            steps, _, _ = run(requests(count), transfer=transfer, budget_bytes=5 << 30, **common)
            fullest = max(steps, key=lambda step: step.decode_tokens)
            assert fullest.decode_tokens == count
            times[transfer, count] = fullest.duration_s
    assert times["auto", 64] < 0.97 * times["on_demand", 64]
    assert times["auto", 1] == pytest.approx(times["on_demand", 1])
