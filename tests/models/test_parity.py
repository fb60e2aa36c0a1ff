"""Logits and greedy tokens against transformers, on random small models of each architecture."""

from __future__ import annotations

from contextlib import ExitStack
from unittest.mock import patch

import numpy as np
import pytest
import torch
from fluxmoe.kernels.cpu import tile
from fluxmoe.runtime.serving.engine import Engine, EngineConfig
from fluxmoe.runtime.serving.request import Request, SamplingParams
from fluxmoe.runtime.serving.scheduler import Step

from .hf import save_random_model

NEW_TOKENS = 6
# Of the largest logit. transformers computes the gated delta rule in chunks of 64 tokens, we token by token.
FP32 = {"mixtral": 2e-5, "qwen3_moe": 2e-5, "olmoe": 2e-5, "qwen3_next": 1e-4}


def serve_with_logits(directory, prompts, **settings):
    """Greedy tokens of each prompt, and the logits row behind each token."""
    config = EngineConfig(**{"max_batch": 8, "max_batched_tokens": 24, "device": "cpu", **settings})
    requests = [Request(tuple(p), SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)) for p in prompts]
    rows: dict[int, list[torch.Tensor]] = {i: [] for i in range(len(prompts))}
    with Engine(directory, config) as engine, ExitStack() as watched:
        schedule, steps = engine.scheduler.schedule, list[Step]()

        def scheduling() -> Step:
            steps.append(schedule())
            return steps[-1]

        def recording(run):
            def call(*arguments):
                logits = run(*arguments)
                sampled = [chunk.sequence.order for chunk in steps[-1].chunks if chunk.sample]
                for order, row in zip(sampled, logits[: len(sampled)], strict=True):  # graphs pad
                    rows[order].append(row.cpu().clone())
                return logits

            return call

        watched.enter_context(patch.object(engine.scheduler, "schedule", scheduling))
        watched.enter_context(patch.object(engine, "_forward", recording(engine._forward)))
        if engine.graphs is not None:
            # A graph has captured the plain forward pass; what it gives is recorded after the launch.
            watched.enter_context(patch.object(engine.graphs, "run", recording(engine.graphs.run)))
        outputs = engine.generate(requests)
    return [list(o.token_ids) for o in outputs], [torch.stack(rows[i]) for i in range(len(prompts))]


def check_parity(model, directory, rtol, seed=0, exact=True, lengths=(1, 37, 5, 16), far=0.0, **settings):
    """far: share of the rows of logits that may be further off, where a router near a tie chooses otherwise."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, 96, n).tolist() for n in lengths]
    tokens, logits = serve_with_logits(directory, prompts, **settings)
    errors = []
    for prompt, generated, ours in zip(prompts, tokens, logits, strict=True):
        with torch.no_grad():
            theirs = model(torch.tensor([prompt + generated])).logits[0, len(prompt) - 1 : -1]
        errors.append((ours - theirs).abs().amax(-1) / theirs.abs().max())
        if exact:
            # Along our own tokens each is the argmax of theirs: by induction, their greedy continuation.
            assert theirs.argmax(-1).tolist() == generated
    found = torch.cat(errors)
    assert (~(found <= rtol)).float().mean() <= far, f"rows of logits differ by up to {found.max():.2g} of the largest"


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("arch", ["mixtral", "qwen3_moe", "olmoe", "qwen3_next"])
def test_fp32_parity(arch, seed, kernels, tmp_path):
    model = save_random_model(arch, tmp_path, seed)
    check_parity(model, tmp_path, FP32[arch], seed, kernels=kernels)


@pytest.mark.parametrize(
    ("arch", "overrides"),
    [
        ("mixtral", dict(num_local_experts=1, num_experts_per_tok=1)),
        ("mixtral", dict(num_local_experts=3, num_experts_per_tok=3, num_key_value_heads=4)),
        ("mixtral", dict(sliding_window=9)),
        ("mixtral", dict(tie_word_embeddings=True)),
        ("qwen3_moe", dict(num_experts=11, num_experts_per_tok=8, norm_topk_prob=False)),
        ("qwen3_moe", dict(num_experts=13, num_experts_per_tok=1, attention_bias=True)),
        ("qwen3_moe", dict(tie_word_embeddings=True, num_key_value_heads=1)),
        ("qwen3_moe", dict(use_sliding_window=True, sliding_window=17, max_window_layers=0)),
        ("qwen3_moe", dict(mlp_only_layers=[0, 2])),
        ("qwen3_moe", dict(decoder_sparse_step=2, intermediate_size=20)),
        ("qwen3_next", dict(layer_types=["full_attention", "linear_attention", "linear_attention", "full_attention"])),
        # The MLP wider than the shared expert, and narrower; after linear and after full attention.
        ("qwen3_next", dict(mlp_only_layers=[0, 3])),
        ("qwen3_next", dict(decoder_sparse_step=2, intermediate_size=12)),
        ("qwen3_next", dict(linear_num_value_heads=2, linear_conv_kernel_dim=2, tie_word_embeddings=True)),
        ("qwen3_next", dict(num_experts=11, num_experts_per_tok=8, norm_topk_prob=False, num_key_value_heads=4)),
        ("olmoe", dict(num_experts=9, num_experts_per_tok=5, norm_topk_prob=True)),
        ("olmoe", dict(clip_qkv=0.4)),
        ("olmoe", dict(num_experts=64, num_experts_per_tok=8, attention_bias=True)),
        ("olmoe", dict(hidden_size=40, intermediate_size=20)),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(f"{k}={v}" for k, v in value.items()),
)
def test_config_variants(arch, overrides, tmp_path):
    model = save_random_model(arch, tmp_path, 3, **overrides)
    check_parity(model, tmp_path, FP32[arch], 3)


@pytest.mark.parametrize(
    "rope",
    [
        dict(rope_type="linear", factor=4.0),
        dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32),
        dict(
            rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_rope_scaling(rope, tmp_path):
    model = save_random_model("qwen3_moe", tmp_path, 4, rope_parameters={"rope_theta": 10000.0, **rope})
    check_parity(model, tmp_path, 2e-5, 4)


@pytest.mark.parametrize("arch", ["mixtral", "qwen3_moe", "olmoe", "qwen3_next"])
def test_bf16_parity(arch, tmp_path, monkeypatch):
    """bf16 weights and KV against fp32 arithmetic on the same weights: what differs is the rounding of K and V."""
    monkeypatch.setattr(tile, "BF16_KIND", tile.BF16)
    model = save_random_model(arch, tmp_path, 5, dtype=torch.bfloat16)
    check_parity(model, tmp_path, 3e-2, 5, exact=False)


@pytest.mark.parametrize("arch", ["mixtral", "qwen3_moe", "olmoe", "qwen3_next"])
def test_bf16_is_no_further_from_fp32_than_transformers_bf16(arch, tmp_path):
    """Our logits and those of transformers in bf16, each against fp32 on the same weights and prefixes."""
    model = save_random_model(arch, tmp_path, 5, dtype=torch.bfloat16)
    prompts = [np.random.default_rng(5).integers(0, 96, 48).tolist() for _ in range(8)]
    tokens, ours = serve_with_logits(tmp_path, prompts)
    prefixes = torch.tensor([prompt + generated for prompt, generated in zip(prompts, tokens, strict=True)])
    with torch.no_grad():
        theirs = model.bfloat16()(prefixes).logits[:, 47:-1].float()
        exact = model.float()(prefixes).logits[:, 47:-1]
    ours = torch.stack(ours)
    errors = [(logits - exact).square().mean().item() for logits in (ours, theirs)]
    assert errors[0] <= errors[1]


@pytest.mark.parametrize("chunk", [3, 7, 64])
def test_qwen3_next_in_chunks_of_any_size(chunk, tmp_path):
    """Prompts of several lengths together, cut at odd places: states and KV go on where they were."""
    model = save_random_model("qwen3_next", tmp_path, 7)
    check_parity(model, tmp_path, FP32["qwen3_next"], 7, max_batched_tokens=chunk, max_batch=3)


def test_many_shards(tmp_path):
    model = save_random_model("qwen3_moe", tmp_path, 6, max_shard="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    check_parity(model, tmp_path, 2e-5, 6)
