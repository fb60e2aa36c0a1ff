"""The likeliest token after each of many prefixes, against transformers in fp32: right as often as vLLM without us.

With us inside vLLM most of what is wrong is the same: attention, norms and the router round to bf16 in both. Our own
engine keeps fp32 between products.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
import torch
from fluxmoe.runtime.serving.engine import Engine, EngineConfig
from fluxmoe.runtime.serving.request import Request, SamplingParams
from transformers import AutoModelForCausalLM, Glm4MoeConfig, Glm4MoeForCausalLM

from .conftest import fluxmoe, prompts
from .engines import ask

QUESTION: dict[str, Any] = {"prompts": prompts(16, 128), "new_tokens": 1}
ARCHITECTURES = ("mixtral", "qwen3_moe", "olmoe", "glm4_moe")


@pytest.fixture(scope="module")
def models(checkpoint, tmp_path_factory) -> dict[str, str]:
    """By architecture; the last is one that our own engine does not know."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(
        hidden_size=256, intermediate_size=512, moe_intermediate_size=192, num_hidden_layers=4, first_k_dense_replace=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, n_routed_experts=8, num_experts_per_tok=2,
        n_shared_experts=1, n_group=1, topk_group=1, vocab_size=1024, max_position_embeddings=512,
        initializer_range=0.1, num_nextn_predict_layers=0, tie_word_embeddings=False,
    )  # fmt: skip
    glm = tmp_path_factory.mktemp("glm4_moe") / "model"
    Glm4MoeForCausalLM(Glm4MoeConfig(**sizes)).bfloat16().save_pretrained(glm)
    return {**{arch: checkpoint(arch) for arch in ARCHITECTURES[:-1]}, "glm4_moe": str(glm)}


@pytest.fixture(scope="module")
def answers(models) -> dict[tuple[str, bool], list[list[int]]]:
    """By architecture, with us and without."""
    cases = [(arch, ours) for arch in ARCHITECTURES for ours in (False, True)]
    llms = [
        {"model": models[arch], "enforce_eager": True, "skip_tokenizer_init": True, **(fluxmoe() if ours else {})}
        for arch, ours in cases
    ]
    results = ask(QUESTION | {"llm": llm} for llm in llms)
    return {case: result["likeliest"] for case, result in zip(cases, results, strict=True)}


@pytest.fixture(scope="module")
def exact(models) -> Callable[[str], torch.Tensor]:
    """arch → int64 [prompts, prefixes], by transformers in fp32."""

    @cache
    def ask(arch: str) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(models[arch], dtype=torch.float32).eval()
        with torch.inference_mode():
            return model(torch.tensor(QUESTION["prompts"])).logits.argmax(-1)[:, :-1]

    return ask


def of_our_engine(directory: str) -> list[list[int]]:
    """One pass a prompt, of which all rows become logits instead of the last."""
    prompts = QUESTION["prompts"]
    found: list[list[int]] = []
    config = EngineConfig(device="cpu", budget_bytes=1 << 30, max_batch=len(prompts[0]), max_context=256)
    with Engine(directory, config) as engine:
        forward = engine.decoder.forward

        def all_rows(tokens, metadata, kv, experts, logit_rows, *rest):
            logits = forward(tokens, metadata, kv, experts, torch.arange(len(tokens)), *rest)
            found.append(logits.argmax(-1)[:-1].tolist())
            return logits[logit_rows]

        with patch.object(engine.decoder, "forward", all_rows):
            for prompt in prompts:
                engine.generate([Request(tuple(prompt), SamplingParams(max_new_tokens=1, ignore_eos=True))])
    return found


def check(name: str, exact: torch.Tensor, theirs: list[list[int]], ours: list[list[int]]) -> None:
    """Ours is right as often as theirs, vLLM's alone."""
    right = [torch.tensor(answer) == exact for answer in (theirs, ours)]
    total, lost, won = exact.numel(), int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    print(f"{name}: of {total} tokens {int(right[0].sum())} right by vLLM alone, {int(right[1].sum())} by us")
    assert right[0].sum() > 0.8 * total
    # Where only one is right, it is a coin that says which: no more against us than two of its standard deviations.
    assert lost - won <= 2 * math.sqrt(lost + won)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_as_often_right_as_without_us(exact, answers, arch):
    check(f"{arch} inside vLLM", exact(arch), answers[arch, False], answers[arch, True])


@pytest.mark.parametrize("arch", ARCHITECTURES[:-1])
def test_our_engine_is_as_often_right(exact, models, answers, arch):
    check(f"{arch}, our engine", exact(arch), answers[arch, False], of_our_engine(models[arch]))
