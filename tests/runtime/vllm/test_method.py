"""A layer's experts as vLLM makes, loads and calls them, against SwiGLU experts in plain torch."""

from __future__ import annotations

import gc
import json
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fluxmoe.experiments.commands.main import call
from fluxmoe.models.checkpoint import Checkpoint
from fluxmoe.runtime.experts.config import SettingError
from fluxmoe.runtime.experts.disk import StoreError
from fluxmoe.runtime.memory.budget import BudgetError
from fluxmoe.runtime.memory.check import FreeMemory
from fluxmoe.runtime.vllm.features import FeatureError

from .conftest import LinearBase, RoutedExperts, UnquantizedLinearMethod, moe_config, vllm_config

pytestmark = pytest.mark.usefixtures("exact_bf16")
LAYERS, TOKENS = 3, 7
MOE = moe_config()
HIDDEN, WIDE, EXPERTS, TOP_K = MOE.hidden_dim, MOE.intermediate_size_per_partition, 4, 2


def matrices(layer: int, expert: int, dtype=torch.bfloat16) -> dict[str, torch.Tensor]:
    """w1 and w3 [I, H], w2 [H, I] of an expert, whole."""
    generator = torch.Generator("cpu").manual_seed(10 * layer + expert)
    shapes = {"w1": (WIDE, HIDDEN), "w2": (HIDDEN, WIDE), "w3": (WIDE, HIDDEN)}
    return {
        name: (torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") / 8).to(dtype)
        for name, shape in shapes.items()
    }


def inputs(seed: int = 0, tokens: int = TOKENS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(tokens, EXPERTS, generator=generator).softmax(-1)
    weights, ids = scores.topk(TOP_K)
    return torch.randn(tokens, HIDDEN, generator=generator), weights, ids.to(torch.int32)


def reference(layer: int, x, weights, ids) -> torch.Tensor:
    out = torch.zeros(len(x), HIDDEN, dtype=torch.float64)
    for token in range(len(x)):
        for weight, expert in zip(weights[token], ids[token].tolist(), strict=True):
            w = {name: each.double() for name, each in matrices(layer, expert).items()}
            x64 = x[token].double()
            out[token] += weight * (F.silu(x64 @ w["w1"].T) * (x64 @ w["w3"].T)) @ w["w2"].T
    return out


class Model:
    """Layers as vLLM makes and loads them."""

    def __init__(self, vllm, moe=MOE, expert_map=None, **changes) -> None:
        from fluxmoe.runtime.vllm.config import FluxMoEConfig

        vllm.config = vllm_config(**changes)
        self.quant_config = FluxMoEConfig.from_config({})
        self.layers = [
            RoutedExperts(self.quant_config, f"model.layers.{i}.mlp.experts", moe, expert_map) for i in range(LAYERS)
        ]

    @property
    def paged(self):
        return self.layers[0].quant_method.model

    def bring(self, order, shuffle: int | None = None) -> None:
        """order: (layer, expert, matrix) of every matrix that the checkpoint has."""
        order = list(order)
        if shuffle is not None:
            random.Random(shuffle).shuffle(order)
        for layer, expert, name in order:
            parameter = self.layers[layer].w2_weight if name == "w2" else self.layers[layer].w13_weight
            parameter.weight_loader(
                parameter, matrices(layer, expert)[name], f"experts.{name}_weight", shard_id=name, expert_id=expert,
                return_success=True,
            )  # fmt: skip

    def finish(self) -> Model:
        for layer in self.layers:
            layer.quant_method.process_weights_after_loading(layer)
        return self

    def run(self, x, weights, ids) -> list[torch.Tensor]:
        return [layer.quant_method.apply(layer, x, weights, ids, None, None) for layer in self.layers]


ALL = [(layer, expert, name) for layer in range(LAYERS) for expert in range(EXPERTS) for name in ("w1", "w2", "w3")]


def loaded(vllm, shuffle: int | None = 0, **changes) -> Model:
    model = Model(vllm, **changes)
    model.bring(ALL, shuffle)
    return model.finish()


SETTINGS = {
    "resident": dict(placement="resident"),
    "packed": {},
    "packed, huffman": dict(expert_format="huffman"),
    "balanced": dict(placement="balanced", alpha=0.5),
    "host, planar12, 3 slots": dict(placement="host", host_format="planar12", slots=3),
    "host, in place": dict(placement="host", transfer="on_demand"),
    "disk, tiered": dict(placement="disk", host_format="tiered"),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_same_bits_wherever_experts_lie_and_the_right_ones(vllm, settings):
    expected = loaded(vllm, fluxmoe=dict(placement="resident")).run(*inputs())
    model = loaded(vllm, fluxmoe=dict(settings, poison=True))
    for _ in range(2):
        for layer, (got, same) in enumerate(zip(model.run(*inputs()), expected, strict=True)):
            assert torch.equal(got, same)
            torch.testing.assert_close(got.double(), reference(layer, *inputs()), rtol=1e-4, atol=1e-4)


def test_an_expert_is_put_away_as_soon_as_it_is_whole(vllm):
    model = Model(vllm)
    assert model.layers[0].w13_weight.device.type == model.layers[0].w2_weight.device.type == "meta"
    waiting = model.layers[1].quant_method._assembly._waiting
    for name in ("w3", "w1"):
        model.bring([(1, 2, name)])
        assert list(waiting) == [2]
        assert not model.paged.opened
    model.bring([(1, 2, "w2")])
    assert not waiting
    assert model.paged.opened


def test_no_more_than_an_expert_is_held_whole(vllm):
    """In a checkpoint's order, beside what is in its tier."""
    model = Model(vllm)
    most = 0
    for each in ALL:
        model.bring([each])
        waiting = [parts for layer in model.layers for parts in layer.quant_method._assembly._waiting.values()]
        most = max(most, sum(parts.gate_up.nbytes + parts.down.nbytes for parts in waiting))
    assert most == 3 * HIDDEN * WIDE * 2


def test_more_tokens_than_a_pass_holds(vllm):
    """With data parallelism or padding, vLLM brings more than it schedules."""
    model, (x, weights, ids) = loaded(vllm), inputs(1, tokens=75)
    for layer, got in enumerate(model.run(x, weights, ids)):
        torch.testing.assert_close(got.double(), reference(layer, x, weights, ids), rtol=1e-4, atol=1e-4)


def test_ranks_of_tensor_parallelism_add_up(vllm):
    total = [torch.zeros(TOKENS, HIDDEN) for _ in range(LAYERS)]
    for rank in range(2):
        model = loaded(vllm, moe=moe_config(intermediate_size_per_partition=WIDE // 2, tp_rank=rank, tp_size=2))
        total = [a + b for a, b in zip(total, model.run(*inputs()), strict=True)]
    for layer, got in enumerate(total):
        torch.testing.assert_close(got.double(), reference(layer, *inputs()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("settings", [{}, dict(placement="host", poison=True)], ids=str)
def test_ranks_of_expert_parallelism_add_up(vllm, settings, ids_dtype):
    x, weights, ids = inputs()
    total = [torch.zeros(TOKENS, HIDDEN) for _ in range(LAYERS)]
    for mine in ([1, 2], [3, 0]):
        expert_map = torch.full((EXPERTS,), -1, dtype=torch.int32)
        expert_map[mine] = torch.arange(2, dtype=torch.int32)
        model = loaded(vllm, moe=moe_config(num_local_experts=2), expert_map=expert_map, fluxmoe=settings)
        total = [a + b for a, b in zip(total, model.run(x, weights, ids.to(ids_dtype)), strict=True)]
    for layer, got in enumerate(total):
        torch.testing.assert_close(got.double(), reference(layer, x, weights, ids), rtol=1e-4, atol=1e-4)


def test_the_loader_says_whose_an_expert_is(vllm):
    expert_map = torch.tensor([-1, 0, -1, 1])
    parameter: Any = Model(vllm, moe=moe_config(num_local_experts=2), expert_map=expert_map).layers[0].w2_weight
    weight = matrices(0, 0)["w2"]
    assert parameter.weight_loader(parameter, weight, "w2", "w2", 0, return_success=True) is False
    assert parameter.weight_loader(parameter, weight, "w2", "w2", 3, return_success=True) is True
    assert parameter.weight_loader(parameter, weight, "w2", "w2", 1) is None


def test_a_router_weight_on_the_input_scales_the_input(vllm):
    """Llama 4's way, with one expert a token."""
    model = loaded(vllm, moe=moe_config(experts_per_token=1))
    x, weights, ids = inputs()
    weights, ids = weights[:, :1], ids[:, :1]
    for layer in model.layers:
        layer.apply_router_weight_on_input = True
    for number, got in enumerate(model.run(x, weights, ids)):
        right = reference(number, x * weights, torch.ones_like(weights), ids)
        torch.testing.assert_close(got.double(), right, rtol=1e-4, atol=1e-4)


def test_a_compiled_model_holds_a_layer_as_one_operation(vllm):
    model = loaded(vllm, fluxmoe=dict(placement="balanced", alpha=0.5))
    total: Callable[..., Any] = lambda *args: sum(model.run(*args))  # noqa: E731
    expected = [total(*inputs(seed, tokens)) for seed, tokens in ((0, 7), (1, 20))]
    torch._dynamo.reset()
    compiled = torch.compile(total, backend="eager", fullgraph=True, dynamic=True)
    for (seed, tokens), right in zip(((0, 7), (1, 20)), expected, strict=True):
        assert torch.equal(compiled(*inputs(seed, tokens)), right)


def test_layers_compile_to_the_same_code(vllm):
    """So that vLLM compiles one of them, and what it keeps on disk is right in the next process."""
    codes = []

    def backend(graph, example_inputs):
        codes.append(graph.code)
        return graph.forward

    for layer in loaded(vllm).layers:
        torch._dynamo.reset()
        torch.compile(layer.quant_method.apply, backend=backend, fullgraph=True)(layer, *inputs(), None, None)
    assert len(codes) == LAYERS
    assert "fluxmoe.experts" in codes[0]
    assert len(set(codes)) == 1


def test_defaults_of_torch_that_vllm_sets(vllm):
    """vLLM makes and loads a model with the model's dtype and device as defaults."""
    expected = loaded(vllm).run(*inputs())
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = loaded(vllm, fluxmoe=dict(placement="host"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(model.run(*inputs()), expected, strict=True))


def test_a_draft_model_has_a_pager_of_its_own(vllm):
    model = loaded(vllm)
    draft = RoutedExperts(model.quant_config, "mtp.layers.3.mlp.experts", MOE).quant_method
    assert draft.model is not model.paged
    assert draft.layer == 0


def test_a_model_that_is_gone_gives_its_memory_back(vllm, caplog):
    model = loaded(vllm)
    vllm.config.quant_config = model.quant_config
    caplog.set_level("INFO", logger="vllm.fluxmoe")
    del model
    vllm.config = None
    gc.collect()
    assert "FluxMoE: 0 loads brought 0 B from host memory" in caplog.text


def test_layers_that_are_not_ours_keep_vllms_method(vllm):
    model = Model(vllm)
    assert isinstance(model.quant_config.get_quant_method(LinearBase(), "gate"), UnquantizedLinearMethod)
    assert model.quant_config.get_quant_method(torch.nn.Embedding(1, 1), "lm_head") is None


# Refused.


@pytest.mark.parametrize(
    ("moe", "sentence"),
    [
        (dict(has_bias=True), "experts.* has experts with silu and biases"),
        (dict(activation=SimpleNamespace(value="gelu")), "with gelu; only SwiGLU"),
        (dict(swiglu_limit=7.0), "a clamp"),
        (dict(in_dtype=torch.float16), "bf16 or fp32 experts, got torch.float16; give --dtype"),
    ],
    ids=str,
)
def test_experts_of_another_kind(vllm, moe, sentence):
    with pytest.raises(SettingError, match=sentence):
        Model(vllm, moe=moe_config(**moe))


def test_what_vllm_was_asked_for_is_checked_before_any_layer_is_made(vllm):
    with pytest.raises(FeatureError, match="--enable-eplb"):
        Model(vllm, enable_eplb=True)
    with pytest.raises(SettingError, match="no such setting"):
        Model(vllm, fluxmoe=dict(kv=1))


def test_layers_of_two_shapes(vllm):
    model = Model(vllm)
    with pytest.raises(SettingError, match="experts of one size"):
        RoutedExperts(model.quant_config, "model.layers.9.experts", moe_config(intermediate_size_per_partition=32))


@pytest.mark.parametrize(
    ("name", "weight", "sentence"),
    [
        ("w2", torch.zeros(HIDDEN, WIDE + 1), r"w2 of expert 1 has shape \[128, 129\], not \[128, 128\]"),
        ("w1", torch.zeros(EXPERTS, WIDE, HIDDEN), r"has shape \[4, 128, 128\], not \[128, 128\]"),
        ("w1", torch.zeros(WIDE, HIDDEN, dtype=torch.float8_e4m3fn), "float8_e4m3fn; fluxmoe takes bf16 or fp32"),
        ("w4", torch.zeros(1), "expert 1 has a w4"),
    ],
)
def test_matrices_of_another_kind(vllm, name, weight, sentence):
    parameter: Any = Model(vllm).layers[0].w2_weight
    with pytest.raises(StoreError, match=rf"model.layers.0.mlp.experts: .*{sentence}"):
        parameter.weight_loader(parameter, weight, name, name, 1)


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        ({(1, 2, "w3")}, "model.layers.1.mlp.experts: the checkpoint lacks w3 of expert 2"),
        ({(2, 3, name) for name in ("w1", "w2", "w3")}, "lacks expert 3 of layer 2"),
        (set(ALL), r"lacks expert 0 of layer 0 \(12 in all\)"),
    ],
    ids=["a matrix", "an expert", "all"],
)
def test_a_checkpoint_that_lacks_something(vllm, missing, sentence):
    model = Model(vllm)
    model.bring(each for each in ALL if each not in missing)
    with pytest.raises(StoreError, match=sentence):
        model.finish()


@pytest.mark.parametrize("settings", [{}, dict(placement="host")], ids=str)
def test_experts_that_do_not_fit(vllm, monkeypatch, settings):
    monkeypatch.setattr(FreeMemory, "now", classmethod(lambda cls, device: cls(device, 1000, 1000)))
    model = Model(vllm, fluxmoe=settings)
    with pytest.raises(BudgetError, match=r"experts take .* of device memory .*and only 1000 B are free; choose"):
        model.bring(ALL)
    assert not model.paged.opened


# A GPU's kernels, interpreted; its slots and graphs are in test_gpu.py.


GPU_SETTINGS = {
    "packed": {},
    "resident": dict(placement="resident"),
    "half, in place": dict(placement="balanced", alpha=0.5, expert_format="planar12", transfer="on_demand"),
}


@pytest.mark.parametrize(
    ("settings", "here"),
    [*((settings, [1, -1, 0, -1]) for settings in GPU_SETTINGS.values()), ({}, [-1, -1, 0, -1])],
    ids=[*GPU_SETTINGS, "fewer experts than a token has"],
)
def test_triton_kernels_start_from_given_experts(vllm, settings, here):
    expert_map = torch.tensor(here)
    x, weights, ids = inputs()
    mine = torch.where(expert_map[ids.long()] >= 0, weights, 0.0)
    model = loaded(
        vllm, moe=moe_config(num_local_experts=max(here) + 1), expert_map=expert_map,
        fluxmoe=dict(settings, kernels="triton"),
    )  # fmt: skip
    for layer, got in enumerate(model.run(x.bfloat16(), weights, ids)):
        right = reference(layer, x.bfloat16(), mine, ids)
        torch.testing.assert_close(got.double(), right, rtol=4e-2, atol=4e-2)


# Packed checkpoints.


@pytest.mark.parametrize("settings", [{}, dict(placement="host", host_format="huffman")], ids=str)
def test_a_packed_checkpoint_brings_its_experts_itself(vllm, tmp_path, settings):
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    call(["make-checkpoint",
        "--arch", "qwen3_moe", "--out", str(plain), "--layers", str(LAYERS), "--experts", str(EXPERTS), "--top-k",
        str(TOP_K), "--hidden", str(HIDDEN), "--moe-intermediate", str(WIDE), "--heads", "2", "--kv-heads", "1",
        "--vocab", "512",
    ])  # fmt: skip
    call(["pack-checkpoint", "--model", str(plain), "--format", "planar12", "--out", str(packed)])
    config = json.loads((packed / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "fluxmoe"}
    first, second = Model(vllm, model=str(plain), fluxmoe=settings), Model(vllm, model=str(packed), fluxmoe=settings)
    for layer, expert, gate_up, down in Checkpoint(plain).experts():
        gate, up = gate_up.chunk(2)
        parameter: Any = first.layers[layer].w2_weight
        for name, weight in (("w1", gate), ("w3", up), ("w2", down)):
            parameter.weight_loader(parameter, weight, name, name, expert)
    expected = first.finish().run(*inputs())
    assert all(torch.equal(a, b) for a, b in zip(second.finish().run(*inputs()), expected, strict=True))
