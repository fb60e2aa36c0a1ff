"""ExpertPager without an engine: the same results wherever experts live, and ledgers and counters that are true."""

from __future__ import annotations

import random
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from fluxmoe.kernels.ops import ExpertDims
from fluxmoe.kernels.reference.experts import TorchExperts
from fluxmoe.runtime.experts.config import PagingConfig, SettingError
from fluxmoe.runtime.experts.pager import ExpertPager, PagerError
from fluxmoe.runtime.experts.placement import Tier
from fluxmoe.runtime.experts.planner import Move
from fluxmoe.runtime.timeline import Timeline

# Odd layers and sizes that fill no panel; large enough for every format to save something.
LAYERS = 3
DIMS = ExpertDims(hidden=128, intermediate=120, experts=6, top_k=2, dtype=torch.bfloat16)
TOKENS = 9
FORMATS: dict[str, dict[str, Any]] = {
    "dense": dict(),
    "planar12": dict(expert_format="planar12"),
    "host planar12": dict(host_format="planar12"),
    "slots decoded": dict(expert_format="planar12", slot_format="decoded"),
    "tiered": dict(expert_format="tiered"),
    "huffman": dict(expert_format="huffman"),
    "on demand": dict(expert_format="planar12", transfer="on_demand"),
}
PLACEMENTS: dict[str, dict[str, Any]] = {
    "resident": dict(placement="resident"),
    "packed": dict(placement="packed"),
    "packed and dense": dict(placement="packed", dense_share=0.4),
    "offload": dict(placement="offload", alpha=0.5),
    "hybrid": dict(placement="hybrid", alpha=0.5),
    "balanced": dict(placement="balanced", alpha=0.4),
    "host": dict(placement="host"),
    "disk": dict(placement="disk", alpha=0.3),
    "three tiers": dict(placement="three_tiers", alpha=0.4, disk_share=0.4),
}


pytestmark = pytest.mark.usefixtures("exact_bf16")


def settings_of(**settings) -> PagingConfig | None:
    """None where a placement and a format make no sense together."""
    try:
        return PagingConfig(poison=True, threads=1, **settings)
    except SettingError:
        return None


CASES = {
    f"{where}, {how}": config
    for where, placement in PLACEMENTS.items()
    for how, formats in FORMATS.items()
    if (config := settings_of(**placement, **formats)) is not None
}


def weights_of(layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cpu").manual_seed(100 * layer + expert)
    gate_up, down = (
        (torch.randn(shape, dtype=torch.float32, device="cpu", generator=generator) / 16).to(DIMS.dtype)
        for shape in DIMS.shapes
    )
    return gate_up, down


def opened(config: PagingConfig, **more) -> ExpertPager:
    pager = ExpertPager(DIMS, LAYERS, config, "cpu", TOKENS, **more)
    pager.open()
    return pager


def fill(pager: ExpertPager) -> None:
    for layer in range(LAYERS):
        for expert in range(DIMS.experts):
            pager.put(layer, expert, *weights_of(layer, expert))
    pager.seal()


def filled(config: PagingConfig, **more) -> ExpertPager:
    with ExitStack() as undo:
        pager = undo.enter_context(opened(config, **more))
        fill(pager)
        undo.pop_all()
    return pager


class Inputs:
    """What layers get in a pass: x, logits, residual; the same as chosen experts and weights."""

    def __init__(self, seed: int, tokens: int = TOKENS, layers: int = LAYERS) -> None:
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, dtype=torch.float32, generator=generator)  # noqa: E731
        self.x = [draw(tokens, DIMS.hidden) for _ in range(layers)]
        self.logits = [draw(tokens, DIMS.experts) for _ in range(layers)]
        self.residual = [draw(tokens, DIMS.hidden) for _ in range(layers)]
        self.ids = [logits.topk(DIMS.top_k, dim=-1).indices for logits in self.logits]
        chances = [logits.softmax(-1).gather(1, ids) for logits, ids in zip(self.logits, self.ids, strict=True)]
        self.weights = [each / each.sum(-1, keepdim=True) for each in chances]

    def add(self, pager, layers=range(LAYERS)) -> list[torch.Tensor]:
        return [pager.add(i, self.x[i], self.logits[i], self.residual[i].clone()) for i in layers]

    def experts(self, pager, dtype=torch.float32) -> list[torch.Tensor]:
        return [pager.experts(i, x.to(dtype), self.ids[i], self.weights[i]) for i, x in enumerate(self.x)]

    def used(self, layer: int) -> set[int]:
        return set(self.ids[layer].flatten().tolist())


def reference(inputs: Inputs) -> list[torch.Tensor]:
    """The layers' output by a loop over tokens in float64, from the weights as they were drawn."""
    outputs = []
    for layer, (x, ids, chances) in enumerate(zip(inputs.x, inputs.ids, inputs.weights, strict=True)):
        out = torch.zeros_like(x, dtype=torch.float64)
        for token, choice in ((t, c) for t in range(len(x)) for c in range(DIMS.top_k)):
            gate_up, down = (weight.double() for weight in weights_of(layer, int(ids[token, choice])))
            gate, up = (gate_up @ x[token].double()).chunk(2)
            out[token] += chances[token, choice].double() * (down @ (gate * gate.sigmoid() * up))
        outputs.append(out)
    return outputs


@pytest.fixture(scope="module")
def expected():
    """(inputs, what `add` and `experts` give with every expert resident and dense), of several passes."""
    with filled(PagingConfig(threads=1)) as pager:
        return [(inputs, inputs.add(pager), inputs.experts(pager)) for inputs in map(Inputs, range(3))]


def equal(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_experts_that_are_all_resident_are_right(expected):
    for inputs, added, given in expected:
        for i, right in enumerate(reference(inputs)):
            torch.testing.assert_close(given[i].double(), right, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close((added[i] - inputs.residual[i]).double(), right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("slots", [2, 3])
@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_results_are_the_same_bit_for_bit_wherever_experts_live(config, slots, expected, tmp_path):
    config = replace(config, slots=slots, disk_dir=tmp_path)
    with filled(config) as pager:
        assert pager.held_bytes() == pager.lines()
        assert pager.store.tier_bytes(Tier.HOST) == pager.host_lines().get("host_experts", 0)
        for inputs, added, given in expected:
            assert equal(inputs.add(pager), added)
            assert equal(inputs.experts(pager), given)
        assert pager.held_bytes() == pager.lines()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("config", [PagingConfig(kernels="torch"), PagingConfig(kernels="torch", placement="host")])
def test_the_reference_kernels_can_be_paged_too(config, expected):
    with filled(config) as pager:
        assert isinstance(pager.ops, TorchExperts)
        for inputs, added, given in expected:
            for got, wanted in zip(inputs.add(pager) + inputs.experts(pager), added + given, strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [PagingConfig(threads=1), PagingConfig(placement="host", threads=1)])
def test_experts_of_other_ranks_add_nothing(config, expected):
    """Two halves, each with what is not an id for the other's, make the whole; nobody's experts make nothing."""
    inputs = expected[0][0]
    with filled(config) as pager:
        for layer, (x, ids, chances) in enumerate(zip(inputs.x, inputs.ids, inputs.weights, strict=True)):
            halves = [torch.where(mine, ids, other) for mine, other in ((ids < 3, -1), (ids >= 3, DIMS.experts))]
            parts = []
            for half in (*halves, torch.full_like(ids, -1)):
                for before in range(layer):  # layers are visited in order
                    pager.experts(before, x, ids, chances)
                parts.append(pager.experts(layer, x, half.to(torch.int32), chances))
            torch.testing.assert_close(parts[0] + parts[1], expected[0][2][layer], rtol=1e-5, atol=1e-5)
            assert not parts[2].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_result_has_the_dtype_of_x(dtype):
    inputs = Inputs(7)
    inputs.x = [x.to(dtype).float() for x in inputs.x]
    with filled(PagingConfig(placement="host", threads=1)) as pager:
        for got, right in zip(inputs.experts(pager, dtype), reference(inputs), strict=True):
            assert got.dtype == dtype
            torch.testing.assert_close(got, right.to(dtype), rtol=2e-2, atol=1e-3)


def test_a_view_with_strides_and_no_tokens_are_tokens_too(expected):
    inputs = expected[0][0]
    with filled(PagingConfig(threads=1)) as pager:
        wide = torch.zeros(TOKENS, 2 * DIMS.hidden, dtype=torch.float32)
        wide[:, ::2] = inputs.x[0]
        ids = inputs.ids[0].T.contiguous().T
        assert torch.equal(pager.experts(0, wide[:, ::2], ids, inputs.weights[0]), expected[0][2][0])
        nothing = torch.empty(0, DIMS.top_k, dtype=torch.int64)
        assert pager.experts(1, wide[:0, ::2], nothing, nothing.float()).shape == (0, DIMS.hidden)


def test_more_tokens_than_a_pass_may_have():
    with (
        filled(PagingConfig(threads=1)) as pager,
        pytest.raises(PagerError, match="a pass of 10 tokens; this pager was made for at most 9"),
    ):
        Inputs(0, tokens=TOKENS + 1).add(pager)


@pytest.mark.parametrize("tokens", [TOKENS + 1, 2 * TOKENS, 3 * TOKENS - 1])
@pytest.mark.parametrize("config", [dict(placement="host"), dict(placement="host", transfer="on_demand")], ids=str)
def test_chosen_experts_take_more_tokens_part_by_part(config, tokens):
    inputs = Inputs(3, tokens)
    with filled(PagingConfig(threads=1, poison=True, **config)) as pager:
        whole = inputs.experts(pager)
        for out in whole:
            assert out.shape == (tokens, DIMS.hidden)
        loads = pager.counters().loads
        parts = []
        for begin in range(0, tokens, TOKENS):
            rows = slice(begin, begin + TOKENS)
            parts.append(
                [
                    pager.experts(i, inputs.x[i][rows], inputs.ids[i][rows], inputs.weights[i][rows])
                    for i in range(LAYERS)
                ]
            )
        assert equal(whole, [torch.cat(each) for each in zip(*parts, strict=True)])
        assert loads <= 2 * (LAYERS + 2)  # a layer is loaded once for all of its parts


def test_buffers_keep_their_dtype_and_device_whatever_the_defaults_are(expected):
    """Hosts such as vLLM set a default dtype of bf16."""
    config = PagingConfig(placement="host", expert_format="planar12", adaptive=True, threads=1)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        torch.set_default_device("meta")
        pager = filled(config)
        inputs, added, given = expected[0]
        assert equal(inputs.add(pager), added)
        assert equal(inputs.experts(pager), given)
        pager.request([Move(0, 0, Tier.HOST, Tier.PACKED)])
        pager.apply_moves()
        pager.close()
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)


# What crosses.


@pytest.mark.parametrize("where", ["host", "disk"])
def test_counters_are_what_loads_bring(where, expected):
    """Each slot has its own layer, so each is loaded once: counted by what the stores' experts take."""
    config = PagingConfig(placement=where, expert_format="planar12", transfer="whole", slots=LAYERS, threads=1)
    with filled(config) as pager:
        before = pager.counters()
        for inputs, added, _ in expected:
            assert equal(inputs.add(pager), added)
        counters = pager.counters()
        sizes = pager.ops.expert_bytes("planar12")
        size = sum(sizes) if where == "disk" else sum(-(-part // 64) * 64 for part in sizes)
    crossed = LAYERS * DIMS.experts * size
    assert before.on_demand_bytes == counters.on_demand_bytes == counters.moved_bytes == 0
    assert (counters.host_bytes, counters.disk_bytes) == ((crossed, 0) if where == "host" else (0, crossed))
    assert counters.streamed_bytes == crossed
    assert counters.loads == 2 * LAYERS
    assert counters.transfer_ns > 0


def test_reads_on_demand_are_counted_by_the_experts_that_were_used(expected):
    config = PagingConfig(placement="balanced", alpha=0.5, transfer="on_demand", threads=1)
    with filled(config) as pager:
        reads = 0
        for inputs, added, given in expected:
            assert equal(inputs.add(pager), added)
            assert equal(inputs.experts(pager), given)
            for layer in range(LAYERS):
                reads += 2 * len(inputs.used(layer) & set(pager.placement.members(layer, Tier.HOST)))
            counters = pager.counters()
            assert counters.on_demand_bytes == reads * pager.footprint.layout.expert_bytes("dense")
        assert reads
        assert counters.streamed_bytes == counters.loads == counters.stall_ns == 0


def test_a_planner_is_told_how_often_experts_are_used(expected):
    with filled(PagingConfig(placement="packed", adaptive=True, threads=1)) as pager:
        inputs, added, _ = expected[0]
        assert equal(inputs.add(pager), added)
        for layer in range(LAYERS):
            assert pager.popularity is not None
            assert pager.popularity[layer].tolist() == torch.bincount(inputs.ids[layer].flatten(), minlength=6).tolist()
    with filled(PagingConfig(placement="packed", adaptive=True, planning=False, threads=1)) as pager:
        assert pager.popularity is None


def test_loads_and_compute_are_on_the_timeline(expected):
    timeline = Timeline()
    with filled(PagingConfig(placement="host", threads=1), timeline=timeline) as pager:
        expected[0][0].add(pager)
    names = {(span.track, span.name) for span in timeline.spans}
    assert {("compute", f"experts {i}") for i in range(LAYERS)} <= names
    assert ("copy", "gate_up 0") in names


# Moves.


@pytest.mark.parametrize("slots", [2, 3])
@pytest.mark.parametrize("expert_format", ["dense", "planar12"])
def test_results_are_the_same_while_experts_move(expert_format, slots, expected):
    rng = random.Random(slots)
    placement = "resident" if expert_format == "dense" else "packed"
    config = PagingConfig(
        poison=True, threads=1, placement=placement, expert_format=expert_format, adaptive=True, slots=slots,
        least_alpha=0.0, load_delay=lambda layer, d: rng.choice([0.0, 0.0, 0.001]),
    )  # fmt: skip
    with filled(config) as pager:
        store: Any = pager.store  # one whose experts move
        targets = (Tier.HOST, *pager.store.layout.moving_tiers)
        unit = sum(pager.ops.expert_bytes(expert_format))
        step, brings = 0, f"to {targets[-1].name}"
        # A busy machine may take all steps for the first few copies.
        while step < 60 or (pager.mover.applied[brings] <= 5 and step < 2000):
            step += 1
            where = rng.randrange(LAYERS), rng.randrange(DIMS.experts)
            source = pager.store.tier_of(*where)
            pager.request([Move(*where, source, rng.choice([tier for tier in targets if tier != source]))])
            if step % 10 == 9:
                pager.set_transfer(rng.choice(["whole", "on_demand"]))
            pager.apply_moves()
            inputs, added, given = expected[step % 3]
            assert equal(inputs.add(pager), added)
            assert equal(inputs.experts(pager), given)
            store.check_integrity()
        while pager.mover.busy:
            pager.apply_moves()
        came = pager.mover.applied[brings]
        assert pager.counters().moved_bytes == came * unit
        assert pager.mover.applied["to HOST"] > 5
        assert came > 5


def test_experts_that_do_not_move_refuse_to():
    with filled(PagingConfig(threads=1)) as pager, pytest.raises(PagerError, match="adaptive=True"):
        pager.request([Move(0, 0, Tier.RESIDENT, Tier.HOST)])
