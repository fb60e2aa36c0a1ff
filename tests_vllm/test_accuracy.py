"""The likeliest token after each of many prefixes, against transformers in fp32: right as often as without us.

Most of what is wrong is the same with us and without: attention, norms and the router round to bf16 in both.
"""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, Glm4MoeConfig, Glm4MoeForCausalLM

from .conftest import fluxmoe, prompts

QUESTION = {"prompts": prompts(16, 128), "new_tokens": 1}
ARCHITECTURES = ("mixtral", "qwen3_moe", "olmoe", "glm4_moe")


@pytest.fixture(scope="module")
def models(checkpoint, tmp_path_factory) -> dict[str, str]:
    """By architecture; the last is one that our own engine does not know."""
    torch.manual_seed(0)
    config = Glm4MoeConfig(
        hidden_size=256, intermediate_size=512, moe_intermediate_size=192, num_hidden_layers=4, first_k_dense_replace=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, n_routed_experts=8, num_experts_per_tok=2,
        n_shared_experts=1, n_group=1, topk_group=1, vocab_size=1024, max_position_embeddings=512,
        initializer_range=0.1, num_nextn_predict_layers=0, tie_word_embeddings=False,
    )  # fmt: skip
    glm = tmp_path_factory.mktemp("glm4_moe") / "model"
    Glm4MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(glm)
    return {**{arch: checkpoint(arch) for arch in ARCHITECTURES[:-1]}, "glm4_moe": str(glm)}


@pytest.fixture(scope="module")
def answers(models, engines) -> dict[tuple[str, bool], list[list[int]]]:
    """By architecture, with us and without."""
    cases = [(arch, ours) for arch in ARCHITECTURES for ours in (False, True)]
    llms = [
        {"model": models[arch], "enforce_eager": True, "skip_tokenizer_init": True, **(fluxmoe() if ours else {})}
        for arch, ours in cases
    ]
    results = engines([QUESTION | {"llm": llm} for llm in llms])
    return {case: result["likeliest"] for case, result in zip(cases, results, strict=True)}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_as_often_right_as_without_us(models, answers, arch):
    model = AutoModelForCausalLM.from_pretrained(models[arch], dtype=torch.float32).eval()
    with torch.inference_mode():
        exact = model(torch.tensor(QUESTION["prompts"])).logits.argmax(-1)[:, :-1]
    theirs, ours = (torch.tensor(answers[arch, which]) == exact for which in (False, True))
    total, lost, won = exact.numel(), int((theirs & ~ours).sum()), int((ours & ~theirs).sum())
    print(f"{arch}: of {total} tokens {int(theirs.sum())} right without us, {int(ours.sum())} with us")
    assert theirs.sum() > 0.8 * total
    # Where only one is right, it is a coin that says which: no more against us than two of its standard deviations.
    assert lost - won <= 2 * math.sqrt(lost + won)
