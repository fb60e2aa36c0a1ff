"""What cannot be served is refused inside vLLM before any weight is read, with a sentence."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from .conftest import fluxmoe, prompts
from .engines import ask

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a dense model": ({"model": "dense", "skip_tokenizer_init": True}, "this model has no experts: serve it without"),
    "another dtype": ({"dtype": "float16"}, "float16 is not supported for quantization method fluxmoe"),
    "LoRA": ({"enable_lora": True}, "--enable-lora is not served"),
    "cpu_offload_gb": ({"cpu_offload_gb": 1}, "choose a placement of fluxmoe"),
    "prefetch": ({"offload_group_size": 2}, "choose a placement of fluxmoe"),
    "an unknown key": (fluxmoe(place="host"), "fluxmoe.place in --additional-config: there is no such setting"),
    "no value of a key": (fluxmoe(slots="two"), "fluxmoe.slots in --additional-config: "),
}


@pytest.fixture(scope="module")
def answers(checkpoint, tmp_path_factory) -> dict[str, dict]:
    dense = tmp_path_factory.mktemp("dense") / "model"
    sizes: dict[str, Any] = dict(
        hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=1024, max_position_embeddings=512,
    )  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**sizes)).bfloat16().save_pretrained(dense)
    alike = {"model": checkpoint("qwen3_moe"), "enforce_eager": True} | fluxmoe()
    llms = [alike | llm | ({"model": str(dense)} if "model" in llm else {}) for llm, _ in REFUSED.values()]
    answers = ask({"llm": llm, "prompts": prompts(1, 8), "new_tokens": 1} for llm in llms)
    return dict(zip(REFUSED, answers, strict=True))


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_served_is_refused(answers, what):
    assert REFUSED[what][1] in answers[what].get("refused", answers[what])
