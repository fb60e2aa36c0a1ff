"""vLLM's own method for experts over tensors that are streamed: its tokens, bit for bit."""

from __future__ import annotations

import pytest

from .conftest import prompts
from .engines import ask

QUESTION = {"prompts": prompts(5, 37), "new_tokens": 24}


def streamed(**settings) -> dict:
    """Arguments of vllm.LLM."""
    return {"additional_config": {"fluxmoe": {"vllm_kernels": True} | settings}}


@pytest.mark.parametrize("arch", ["qwen3_moe", "mixtral"])
def test_tokens_are_those_of_vllm_without_us(checkpoint, arch):
    model = {"model": checkpoint(arch), "enforce_eager": True}
    settings = [{}, streamed(poison=True), streamed(slots=3, poison=True), streamed(slots=4)]
    first, *others = ask(QUESTION | {"llm": model | each} for each in settings)
    assert len(first["tokens"][0]) == QUESTION["new_tokens"]
    assert others == [first] * len(others)


def test_a_compiled_model_too(checkpoint):
    model = {"model": checkpoint("qwen3_moe", layers=3)}
    first, second = ask(QUESTION | {"llm": model | each} for each in ({}, streamed(poison=True)))
    assert len(first["tokens"][0]) == QUESTION["new_tokens"]
    assert second == first


def test_settings_that_would_do_nothing_are_refused(checkpoint):
    model = {"model": checkpoint("qwen3_moe"), "enforce_eager": True}
    alone, beside = ask(
        [
            QUESTION | {"llm": model | {"additional_config": {"fluxmoe": {"placement": "host"}}}},
            QUESTION | {"llm": model | streamed() | {"quantization": "fluxmoe"}},
        ]
    )
    assert "give --quantization fluxmoe, or vllm_kernels" in alone["refused"]
    assert "leave out --quantization fluxmoe" in beside["refused"]
