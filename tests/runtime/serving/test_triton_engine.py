"""The engine on the Triton kernels, interpreted without a GPU: transformers' tokens, wherever the experts are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fluxmoe.kernels.ops import KernelError, LayerDims, Limits
from fluxmoe.kernels.triton.ops import TritonOps
from fluxmoe.runtime.serving.engine import Engine, EngineConfig
from fluxmoe.runtime.serving.request import Request, SamplingParams

from ...models.hf import save_random_model
from ...models.test_parity import FP32, check_parity

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu
# Logits are recorded where the host calls the decoder, which it does not when a graph is replayed.
EAGER = {"kernels": "triton", "device": DEVICE, "cuda_graphs": False}


@pytest.mark.parametrize(
    "arch", ["mixtral", "qwen3_moe", pytest.param("olmoe", marks=pytest.mark.thorough), "qwen3_next"]
)
def test_fp32_parity(arch, tmp_path):
    kinds = {"layer_types": ["linear_attention", "full_attention"]} if arch == "qwen3_next" else {}
    model = save_random_model(arch, tmp_path, 0, num_hidden_layers=2, **kinds)
    check_parity(model, tmp_path, FP32[arch], lengths=(1, 19), **EAGER)


@pytest.mark.parametrize("arch", ["qwen3_moe", "qwen3_next"])
def test_layers_without_experts(arch, tmp_path):
    """The MLP is wider than the shared expert of Qwen3-Next, whose buffers it shares."""
    kinds = {"layer_types": ["linear_attention", "full_attention"]} if arch == "qwen3_next" else {}
    model = save_random_model(arch, tmp_path, 0, num_hidden_layers=2, mlp_only_layers=[0], **kinds)
    settings = dict[str, Any](kernels="triton", device=DEVICE, placement="host", poison=True)
    check_parity(model, tmp_path, FP32[arch], lengths=(1, 7), **settings)


def test_bf16_logits_agree_within_its_precision(tmp_path):
    model = save_random_model("qwen3_moe", tmp_path, 1, dtype=torch.bfloat16)
    check_parity(model.float(), tmp_path, 0.04, lengths=(9,), exact=False, **EAGER)


def tokens_of(directory, **settings) -> list:
    requests = [Request(tuple(range(3, 3 + n)), SamplingParams(max_new_tokens=2, ignore_eos=True)) for n in (3, 9, 1)]
    config = EngineConfig(device=DEVICE, kernels="triton", max_batch=4, max_batched_tokens=8, **settings)
    with Engine(directory, config) as engine:
        assert engine.held_bytes() == engine.budget.lines()
        return [output.token_ids for output in engine.generate(requests)]


def test_same_tokens_wherever_experts_live(tmp_path):
    save_random_model("qwen3_moe", tmp_path, 2)
    resident = tokens_of(tmp_path)
    assert tokens_of(tmp_path, placement="host", slots=2, poison=True) == resident
    assert tokens_of(tmp_path, placement="balanced", alpha=0.5, poison=True) == resident


def test_same_tokens_from_compressed_experts(tmp_path):
    """In place, in slots, decoded into slots; all with the tiles of planar12, so with the same order of summation."""
    sizes = dict[str, Any](hidden_size=128, moe_intermediate_size=128, num_hidden_layers=2)
    save_random_model("qwen3_moe", tmp_path, 2, dtype=torch.bfloat16, **sizes)
    packed = tokens_of(tmp_path, placement="packed")
    assert tokens_of(tmp_path, placement="host", expert_format="planar12", poison=True) == packed
    decoded = dict[str, Any](placement="packed", expert_format="huffman", poison=True)
    assert tokens_of(tmp_path, **decoded) == tokens_of(tmp_path)


def test_batch_invariant_engine_gives_the_same_tokens_alone(tmp_path):
    save_random_model("qwen3_moe", tmp_path, 3, dtype=torch.bfloat16, num_hidden_layers=1)
    request = Request((5, 6, 7), SamplingParams(max_new_tokens=4, ignore_eos=True))
    others = [Request(tuple(range(i, i + 6)), SamplingParams(max_new_tokens=4, ignore_eos=True)) for i in (1, 2)]
    settings = dict[str, Any](device=DEVICE, kernels="triton", batch_invariant=True, max_batch=4, max_batched_tokens=8)
    with Engine(tmp_path, EngineConfig(**settings)) as engine:
        alone = engine.generate([request])[0].token_ids
    with Engine(tmp_path, EngineConfig(**settings)) as engine:
        assert engine.generate([request, *others])[0].token_ids == alone


DIMS = LayerDims(
    hidden=32, heads=2, kv_heads=1, head_dim=16, experts=4, vocab=64, dtype=torch.bfloat16
)  # fmt: skip


def test_what_the_kernels_cannot_take_is_refused():
    with pytest.raises(KernelError, match="multiple of 16"):
        TritonOps(DIMS, Limits(8, 4, 64, 24), DEVICE)
    with pytest.raises(KernelError, match="bfloat16, float16 or float32"):
        TritonOps(LayerDims(**{**DIMS.__dict__, "dtype": torch.float64}), Limits(8, 4, 64, 16), DEVICE)
