"""Experts on demand from files: the same results as resident ones, few bytes, and policies that deserve their names."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from fluxmoe.kernels.ops import ExpertDims
from fluxmoe.runtime.experts.cache import ExpertCache
from fluxmoe.runtime.experts.cache_policies import (
    POLICIES,
    Uses,
    belady,
    least_stale,
    lirs,
    lru,
    next_use,
    replay,
    resident,
    static,
)
from fluxmoe.runtime.experts.config import PagingConfig, SettingError
from fluxmoe.runtime.experts.disk import StoreError
from fluxmoe.runtime.experts.pager import ExpertPager
from fluxmoe.runtime.experts.read_ahead import ReadAhead
from fluxmoe.runtime.experts.recording import Recording, RecordingError
from hypothesis import given
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("exact_bf16")
LAYERS, DIMS = 4, ExpertDims(hidden=128, intermediate=128, experts=8, top_k=2, dtype=torch.bfloat16)
TOKENS = 12


def opened(cache_bytes=None, **settings) -> ExpertPager:
    config = PagingConfig(**{"threads": 1, "placement": "disk", **settings}, cache_bytes=cache_bytes)
    pager = ExpertPager(DIMS, LAYERS, config, "cpu", TOKENS)
    pager.open()
    generator = torch.Generator().manual_seed(0)
    for layer in range(LAYERS):
        for expert in range(DIMS.experts):
            weights = (torch.randn(shape, generator=generator).bfloat16() * 0.05 for shape in DIMS.shapes)
            pager.put(layer, expert, *weights)
    pager.seal()
    return pager


def cache_of(pager: ExpertPager) -> ExpertCache:
    assert pager.store.cache is not None
    return pager.store.cache


def passes(pager, counts=(1, 1, 5, 12, 1, 12, 12, 12, 2), seed=0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    out = []
    for tokens in counts:
        x = torch.randn(tokens, DIMS.hidden, generator=generator).to(pager.ops.act_dtype)
        for layer in range(LAYERS):
            logits = torch.randn(tokens, DIMS.experts, generator=generator)
            x = pager.add(layer, x, logits, x.clone())
        out.append(x)
    return out


@pytest.fixture(scope="module")
def expected():
    with opened(placement="resident") as pager:
        return passes(pager)


UNIT = sum(n * k * 2 for n, k in DIMS.shapes)
SETTINGS = {
    "as few places as work": dict(),
    "two more": dict(cache_bytes=18 * UNIT),
    "all of them": dict(cache_bytes=1 << 30),
    "compressed": dict(expert_format="planar12"),
    "half on the device": dict(alpha=0.5),
    "three tiers": dict(placement="three_tiers", alpha=0.25, disk_share=0.5),
    "three tiers, compressed, some dense": dict(
        placement="three_tiers", alpha=0.5, disk_share=0.25, dense_share=0.25, expert_format="planar12"
    ),
    "learned": dict(cache_policy="learned"),
    "lru": dict(cache_policy="lru"),
    "lfu": dict(cache_policy="lfu"),
    "least stale": dict(cache_policy="least_stale"),
    "lirs": dict(cache_policy="lirs"),
    "slow": dict(load_delay=lambda layer, d: 0.002 * ((layer + d) % 2)),
    "a slow link": dict(link_bandwidth=50e6),
    "the reference kernels": dict(kernels="torch"),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_results_do_not_depend_on_where_experts_come_from(settings, expected):
    with opened(**settings) as pager:
        got = passes(pager)
        if settings.get("kernels") == "torch":
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        else:
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        lines, counters = pager.lines(), pager.counters()
        assert pager.held_bytes()["expert_cache"] >= lines["expert_cache"]
        assert counters.cache_misses > 0
        assert counters.disk_bytes >= counters.cache_misses * UNIT * 0.7
        if settings.get("cache_bytes") == 1 << 30:
            cache_of(pager)._settle()
            assert pager.counters().disk_bytes == UNIT * LAYERS * DIMS.experts
            assert counters.cache_misses <= LAYERS * DIMS.experts


def test_one_token_reads_what_it_was_routed_to_alone(expected):
    with opened() as pager:
        passes(pager, counts=(1,))
        cache_of(pager)._settle()
        counters = pager.counters()
        assert counters.cache_misses == LAYERS * DIMS.top_k
        assert counters.disk_bytes == LAYERS * DIMS.top_k * UNIT


def test_what_layers_are_sure_to_lack_is_read_ahead_in_the_time_that_there_is(monkeypatch, expected):
    """Two layers of four have room, and every pass uses nearly everything: with auto the next layer's experts come
    while kernels run, on demand none does. Then batches become small."""
    need, choose, chosen = ExpertCache.need, ReadAhead.choose, list[int]()

    def slow(*given):
        time.sleep(0.002)  # kernels of tiny experts take no time
        return need(*given)

    def noted(*given):
        found = choose(*given)
        chosen.append(len(found))
        return found

    monkeypatch.setattr(ExpertCache, "need", slow)
    monkeypatch.setattr(ReadAhead, "choose", noted)
    results = {}
    for transfer in ("auto", "on_demand"):
        with opened(transfer=transfer) as pager:
            results[transfer] = passes(pager, (12,) * 30 + (1,) * 30)
            cache = cache_of(pager)
            while any(not read.done() for pair in cache._reads.values() for read in pair):
                time.sleep(0.001)
            cache._settle()
            counters, in_vain = pager.counters(), cache.ahead.unused_bytes
            assert counters.disk_bytes == counters.cache_misses * UNIT + in_vain
            assert in_vain <= 0.05 * counters.cache_misses * UNIT
    assert all(torch.equal(a, b) for a, b in zip(*results.values(), strict=True))
    assert in_vain == 0
    # On demand nobody asks; the layer before small batches begin does not know of them yet.
    assert len(chosen) == 60 * LAYERS
    assert sum(chosen[: 30 * LAYERS]) > 20
    assert sum(chosen[30 * LAYERS :]) == 0


def test_a_failed_read_is_an_error_once_and_is_tried_again(monkeypatch, expected):
    with opened() as pager:
        disk, fail = pager.store.on_disk, [0]
        real = disk._read

        def failing(*arguments):
            if fail[0]:
                fail[0] -= 1
                raise StoreError("injected")
            return real(*arguments)

        monkeypatch.setattr(disk, "_read", failing)
        for _ in range(2):
            fail[0] = 1
            with pytest.raises(StoreError, match="injected"):
                passes(pager, counts=(12,))
            while any(not read.done() for pair in cache_of(pager)._reads.values() for read in pair):
                time.sleep(0.001)
        assert all(torch.equal(a, b) for a, b in zip(passes(pager), expected, strict=True))


def test_closing_gives_up_what_was_not_read():
    threads = threading.active_count()
    pager = opened(load_delay=lambda layer, d: 60.0)
    cache_of(pager).need(0, np.arange(8), pager.streamer._table(pager.store.load_plans[0]))
    begin = time.monotonic()
    pager.close()
    assert time.monotonic() - begin < 30
    assert threading.active_count() == threads


@pytest.mark.parametrize("transfer", [None, "auto", "on_demand", "whole"])
@pytest.mark.parametrize("expert_format", [None, "planar12", "huffman"])
def test_from_files_experts_come_on_demand_where_kernels_read_them_so(transfer, expert_format):
    config = PagingConfig(placement="disk", transfer=transfer, expert_format=expert_format)
    readable = expert_format != "huffman"
    expected = transfer if transfer in ("on_demand", "whole") else "on_demand" if readable else "whole"
    assert config.formats.transfer == expected


def test_settings_that_make_no_cache_are_refused():
    with pytest.raises(SettingError, match="it needs placement three_tiers or disk"):
        PagingConfig(placement="host", cache_bytes=1 << 20)
    with pytest.raises(SettingError, match="it needs placement three_tiers or disk"):
        PagingConfig(placement="disk", transfer="whole", cache_bytes=1 << 20)
    with pytest.raises(SettingError, match="disk_share is for placement three_tiers"):
        PagingConfig(placement="disk", disk_share=0.5)
    with pytest.raises(
        SettingError,
        match="cache_policy must be one of next_use, learned, lru, lfu, least_stale, lirs, static, got 'mru'",
    ):
        PagingConfig(cache_policy="mru")
    for half in (dict(cache_policy="static"), dict(cache_recording=Path("routing.npz"))):
        with pytest.raises(SettingError, match="cache_policy static and cache_recording go together"):
            PagingConfig(placement="disk", **half)


def recording_of(experts: np.ndarray, path: Path) -> Path:
    """A file that says that one token a pass chose `experts` int16 [R, L, k]."""
    zeros = np.zeros(len(experts), np.int32)
    with path.open("wb") as file:
        Recording(experts.astype(np.int16), np.arange(len(experts), dtype=np.int32), zeros, zeros, 8, {}).save(file)
    return path


def test_static_keeps_what_a_recording_uses_most(tmp_path, expected):
    """Experts 5 and 2 of each layer: they are read once, whatever comes between."""
    chosen = np.array([[5, 2]] * 3 + [[5, 0]] * 2)[:, None].repeat(LAYERS, axis=1)
    path = recording_of(chosen, tmp_path / "routing.npz")
    # Not auto: what is still being read ahead cannot leave, and then others must.
    with opened(cache_policy="static", cache_recording=path, transfer="on_demand") as pager:
        assert all(torch.equal(a, b) for a, b in zip(passes(pager), expected, strict=True))
        cache = cache_of(pager)
        here = lambda: {(i, e) for i in range(LAYERS) for e in (5, 2)} <= cache._place_of.keys()  # noqa: E731
        assert here()
        misses = cache.misses
        passes(pager, counts=(1, 1, 5, 12, 1))
        assert here()
        assert misses < cache.misses


@pytest.mark.parametrize(("layers", "says"), [(LAYERS + 1, "is of 5 layers of 8 experts, this model has 4 of 8")])
def test_a_recording_of_another_model_is_refused_before_anything_is_read(tmp_path, layers, says):
    path = recording_of(np.zeros((1, layers, 2)), tmp_path / "routing.npz")
    config = PagingConfig(placement="disk", cache_policy="static", cache_recording=path)
    with pytest.raises(RecordingError, match=says):
        ExpertPager(DIMS, LAYERS, config, "cpu", TOKENS)


# Policies.


def routing(rng, passes: int, layers: int, experts: int, each: int, skew: float) -> list[tuple[int, np.ndarray]]:
    weights = np.arange(1, experts + 1) ** -skew
    order = [rng.permutation(experts) for _ in range(layers)]
    visits = []
    for _ in range(passes):
        for layer in range(layers):
            used = rng.choice(experts, each, replace=False, p=weights / weights.sum())
            visits.append((layer, np.sort(order[layer][used])))
    return visits


def by_hand(visits, places) -> tuple[int, int]:
    """LRU with lists, visit by visit."""
    held: list = []
    hits = misses = 0
    for layer, experts in visits:
        for expert in experts.tolist():
            if (layer, expert) in held:
                hits += 1
                held.remove((layer, expert))
            else:
                misses += 1
        held += [(layer, expert) for expert in experts.tolist()]
        del held[: max(0, len(held) - places)]
    return hits, misses


@given(st.integers(0, 99), st.integers(2, 5), st.integers(4, 9), st.integers(1, 4), st.floats(0, 1.5))
def test_replays_against_a_cache_by_hand_and_the_bound(seed, layers, experts, each, skew):
    rng = np.random.default_rng(seed)
    visits = routing(rng, 12, layers, experts, each, skew)
    places = each + int(rng.integers(0, layers * experts))
    replayed = replay(visits, (layers, experts), places, lru)
    total = sum(len(used) for _, used in visits)
    assert replayed.hits + replayed.misses == total
    # Within a visit all experts are as new as one another, so the two may break ties differently.
    assert abs(replayed.hits - by_hand(visits, places)[0]) <= 0.1 * total + 2
    best = belady(visits, (layers, experts), places)
    for policy in POLICIES.values():
        assert replay(visits, (layers, experts), places, policy).hits <= best.hits
    if places >= layers * experts:
        assert best.misses == len({(layer, expert) for layer, used in visits for expert in used.tolist()})


def test_a_scan_is_kept_in_part_where_lru_keeps_nothing():
    """Every pass uses everything: LRU throws out what comes next, the policies of rates keep a share."""
    visits = [(layer, np.arange(8)) for _ in range(30) for layer in range(16)]
    rates = {name: replay(visits, (16, 8), 64, policy).hit_rate for name, policy in POLICIES.items()}
    best = belady(visits, (16, 8), 64).hit_rate
    assert rates["lru"] == 0
    for name in ("next_use", "least_stale", "lirs"):
        assert rates[name] > 0.8 * best > 0.3, name


def test_uses_by_hand():
    """Layers 0 and 1 in turns: layer 0 uses expert 0, then 1, then 0 again; layer 1 always 2."""
    uses = Uses(2, 3)
    for expert in (0, 1, 0):
        uses.note(0, np.array([expert]))
        uses.note(1, np.array([2]))
    assert uses.since[0, :2].tolist() == [0, 1]
    assert uses.gap[0, 0] == 2
    assert (uses.since[1, 2], uses.gap[1, 2]) == (0, 1)
    assert uses.gap[0, 1] == uses.gap[1, 0] > 1 << 30
    assert uses.last[0].tolist() == [4, 2, -1]


def test_least_stale_lets_leftovers_go_before_what_the_pass_has_used():
    """arXiv 2602.03921's case: what LRU would throw out, a later layer's experts, comes next."""
    uses = Uses(3, 2)
    for layer, expert in ((0, 0), (1, 0), (2, 0), (0, 1)):
        uses.note(layer, np.array([expert]))
    scores = least_stale(uses)
    order = sorted([(0, 0), (1, 0), (2, 0), (0, 1)], key=lambda where: scores[where])
    assert order == [(0, 0), (0, 1), (2, 0), (1, 0)]
    assert min([(0, 0), (1, 0), (2, 0)], key=lambda where: lru(uses)[where]) == (0, 0)


def test_lirs_keeps_what_comes_often_over_what_came_last():
    uses = Uses(1, 3)
    for expert in (0, 0, 0, 1, 2):
        uses.note(0, np.array([expert]))
    assert np.argsort(lirs(uses)[0]).tolist()[-1] == 0
    assert np.argsort(lru(uses)[0]).tolist()[0] == 0


def test_what_is_resident_hits_and_nothing_else():
    visits, stay = [(0, np.array([0, 1])), (1, np.array([1])), (0, np.array([2]))], np.zeros((2, 3), bool)
    stay[0, :2] = True
    assert resident(visits, stay) == (2, 2)
    assert resident(visits, stay, warm=1) == (0, 2)


def test_visits_of_the_warm_up_are_not_counted():
    visits = [(0, np.array([0, 1]))] * 5
    assert replay(visits, (1, 4), 2, lru, warm=1) == (8, 0)
    assert belady(visits, (1, 4), 2, warm=3) == (4, 0)


def test_skewed_routing_at_batch_one():
    visits = routing(np.random.default_rng(1), 200, 8, 32, 4, 1.2)
    shape, places = (8, 32), 64
    counts = np.zeros(shape)
    for layer, used in visits:
        counts[layer, used] += 1
    fixed = replay(visits, shape, places, static(counts)).hit_rate
    rates = {name: replay(visits, shape, places, policy).hit_rate for name, policy in POLICIES.items()}
    assert rates["next_use"] > rates["lru"]
    assert rates["next_use"] > 0.9 * fixed
    assert belady(visits, shape, places).hit_rate > rates["next_use"]


def bursts(rng, passes: int, layers: int, experts: int, stay: float) -> list[tuple[int, np.ndarray]]:
    """Each layer uses one expert of all, which stays in use from pass to pass with probability `stay`."""
    now, visits = rng.integers(0, experts, layers), []
    for _ in range(passes):
        for layer in range(layers):
            if rng.random() > stay:
                now[layer] = rng.integers(0, experts)
            visits.append((layer, now[[layer]].copy()))
    return visits


@pytest.mark.parametrize("stay", [0.0, 0.8])
def test_learned_finds_out_whether_experts_come_again(stay):
    """Chances as they are: of an expert in use, of one that was used lately, of one that is not."""
    layers, experts = 3, 12
    uses = Uses(layers, experts)
    for layer, used in bursts(np.random.default_rng(0), 3000, layers, experts, stay):
        uses.note(layer, used)
    chance = uses.chance()
    in_use, gone = uses.since == 0, (uses.since > 3) & (uses.since < 32)
    assert chance[in_use].mean() == pytest.approx(stay + (1 - stay) / experts, abs=0.06)
    assert chance[gone].mean() == pytest.approx((1 - stay) / experts, abs=0.04)


def test_turns_are_counted_from_the_layer_that_runs():
    uses = Uses(4, 2)
    uses.note(2, np.array([1]))
    assert uses.until_turn().tolist() == [2, 3, 4, 1]
    assert next_use(uses)[2, 1] > next_use(uses)[2, 0]
