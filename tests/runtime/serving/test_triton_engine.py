"""The engine on the Triton kernels, interpreted without a GPU: transformers' tokens, wherever the experts are."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from fluxmoe.kernels.ops import KernelError, LayerDims, Limits
from fluxmoe.kernels.triton.ops import TritonOps
from fluxmoe.runtime.serving.engine import Engine, EngineConfig
from fluxmoe.runtime.serving.request import Request, SamplingParams

from ...models.hf import save_random_model
from ...models.test_parity import FP32, check_parity

ARCHS = tuple(FP32)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu
TRITON = dict[str, Any](kernels="triton", device=DEVICE)
ON_GPU = DEVICE == "cuda"


def layers_of(arch: str, count: int) -> dict[str, Any]:
    kinds = ["linear_attention", "full_attention"] * count
    return {"num_hidden_layers": count} | ({"layer_types": kinds[:count]} if arch == "qwen3_next" else {})


@pytest.mark.parametrize(
    "arch", ["mixtral", "qwen3_moe", pytest.param("olmoe", marks=pytest.mark.thorough), "qwen3_next"]
)
def test_fp32_parity(arch, tmp_path):
    model = save_random_model(arch, tmp_path, 0, **layers_of(arch, 2))
    check_parity(model, tmp_path, FP32[arch], lengths=(1, 19), **TRITON)


@pytest.mark.parametrize("arch", ["qwen3_moe", "qwen3_next"])
def test_layers_without_experts(arch, tmp_path):
    """The MLP is wider than the shared expert of Qwen3-Next, whose buffers it shares."""
    model = save_random_model(arch, tmp_path, 0, mlp_only_layers=[0], **layers_of(arch, 2))
    check_parity(model, tmp_path, FP32[arch], lengths=(1, 7), placement="host", poison=True, **TRITON)


PACKED = dict[str, Any](placement="packed")
# Of one order of summation each, whose first the others are compared with.
EAGER, INVARIANT, HALF = {"cuda_graphs": False}, {"batch_invariant": True}, {"alpha": 0.5}
HOST, ON_DEMAND = {"placement": "host", "poison": True}, {"placement": "host", "transfer": "on_demand"}
BALANCED, DISK, FUSED = {"placement": "balanced"} | HALF, {"placement": "disk"}, {"expert_format": "planar12"}
COMPRESSED_GROUPS: list[list[dict[str, Any]]] = [
    [PACKED, HOST | FUSED, BALANCED | FUSED, {"placement": "hybrid"} | HALF, PACKED | {"dense_share": 0.5},
     ON_DEMAND | FUSED, HOST | FUSED | {"slot_format": "decoded"}, DISK | FUSED],
    [PACKED | EAGER, HOST | FUSED | EAGER],
    [PACKED | INVARIANT, PACKED | INVARIANT | EAGER, HOST | FUSED | INVARIANT],
    [{}, PACKED | {"expert_format": "huffman", "poison": True}, PACKED | {"expert_format": "tiered"},
     HOST | {"expert_format": "huffman"}],
]  # fmt: skip
DENSE_GROUPS: list[list[dict[str, Any]]] = [
    [{}, HOST | {"slots": 2}, HOST | {"slots": 3}, BALANCED | {"poison": True}, {"placement": "offload"} | HALF,
     ON_DEMAND, DISK],
    [EAGER, HOST | EAGER],
    [INVARIANT, INVARIANT | EAGER, HOST | INVARIANT],
]  # fmt: skip
GROUPS = {torch.bfloat16: COMPRESSED_GROUPS + DENSE_GROUPS, torch.float32: DENSE_GROUPS}
# Interpreted, graphs change nothing, and of the rest some will do but for a thorough run.
QUICK = (HOST | FUSED, COMPRESSED_GROUPS[-1][1], HOST | {"slots": 2}, BALANCED | {"poison": True})


def variants() -> Iterator[Any]:
    """(architecture, dtype, the first of a group, another of it)."""
    for arch, dtype in product(ARCHS if ON_GPU else ("qwen3_moe",), GROUPS):
        for first, *others in GROUPS[dtype]:
            for other in others:
                # On a GPU the engine refuses experts from files; elsewhere graphs change nothing.
                if other.get("placement") == "disk" if ON_GPU else "cuda_graphs" in first:
                    continue
                quick = other in QUICK and (dtype == torch.float32) == (first == {} and "expert_format" not in other)
                name = " ".join(map(str, (arch, dtype, *other.items())))
                yield pytest.param(arch, dtype, first, other, id=name, marks=() if quick else pytest.mark.thorough)


def save_model(arch: str, directory: Path, dtype: torch.dtype, layers: int, seed: int, **others: int):
    """Of sizes that every format takes."""
    inner = "intermediate_size" if arch in ("mixtral", "olmoe") else "moe_intermediate_size"
    sizes = {"hidden_size": 128, inner: 128} | others
    return save_random_model(arch, directory, seed, dtype, **sizes, **layers_of(arch, layers))


@pytest.mark.parametrize("settings", [{}, PACKED, PACKED | INVARIANT], ids=["resident", "packed", "batch-invariant"])
@pytest.mark.parametrize(
    "arch", ["qwen3_moe", *(pytest.param(a, marks=pytest.mark.thorough) for a in ARCHS if a != "qwen3_moe")]
)
def test_bf16_logits_agree_within_its_precision(arch, settings, tmp_path):
    """Along tokens of our own; with graphs on a GPU."""
    model = save_model(arch, tmp_path, torch.bfloat16, 4 if ON_GPU else 2, 1)
    check_parity(model, tmp_path, 0.05, lengths=(9, 1), exact=False, far=0.1, **settings, **TRITON)


def tokens_of(directory, **settings) -> list:
    requests = [Request(tuple(range(3, 3 + n)), SamplingParams(max_new_tokens=2, ignore_eos=True)) for n in (3, 9, 1)]
    with Engine(directory, EngineConfig(max_batch=4, max_batched_tokens=8, **settings, **TRITON)) as engine:
        assert engine.held_bytes() == engine.budget.lines()
        return [output.token_ids for output in engine.generate(requests)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Of an architecture and a dtype, the folder of its model; one at a time. And what `first` generates from it."""
    tokens: dict[str, list] = {}

    @lru_cache(maxsize=1)
    def folder_of(arch: str, dtype: torch.dtype) -> Path:
        tokens.clear()
        folder = tmp_path_factory.mktemp("model")
        # Interpreted, each expert is some programs more.
        few = {} if ON_GPU else {"num_experts": 5, "num_experts_per_tok": 2}
        save_model(arch, folder, dtype, 5 if ON_GPU else 2, 2, **few)
        return folder

    def tokens_by(folder: Path, settings: dict[str, Any]) -> list:
        if str(settings) not in tokens:
            tokens[str(settings)] = tokens_of(folder, **settings)
        return tokens[str(settings)]

    return folder_of, tokens_by


@pytest.mark.parametrize(("arch", "dtype", "first", "other"), list(variants()))
def test_same_tokens_wherever_experts_live(arch, dtype, first, other, saved):
    """In whatever format, in place, in slots, decoded into slots; with graphs, which pad the batch, and without."""
    folder_of, tokens_by = saved
    folder = folder_of(arch, dtype)
    assert tokens_of(folder, **other) == tokens_by(folder, first)


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
