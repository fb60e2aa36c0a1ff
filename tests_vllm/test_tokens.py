"""vLLM's tokens do not depend on where experts lie, and are no further from exact arithmetic than without us."""

from __future__ import annotations

from typing import Any

import pytest

from .conftest import fluxmoe, prompts
from .engines import ask

PLACES: dict[str, dict[str, Any]] = {
    "packed": {},
    "resident": dict(placement="resident"),
    "packed, huffman": dict(expert_format="huffman"),
    "packed, tiered": dict(expert_format="tiered"),
    "hybrid": dict(placement="hybrid", alpha=0.5),
    "balanced": dict(placement="balanced", alpha=0.5),
    "balanced, huffman": dict(placement="balanced", alpha=0.25, expert_format="huffman", poison=True),
    "host": dict(placement="host"),
    "host, planar12, 3 slots": dict(placement="host", host_format="planar12", slots=3, poison=True),
    "host, in place": dict(placement="host", transfer="on_demand"),
    "disk": dict(placement="disk"),
    "disk, tiered": dict(placement="disk", host_format="tiered"),
}
QUESTION = {"prompts": prompts(5, 37), "new_tokens": 24}


@pytest.fixture(scope="module")
def answers(checkpoint) -> dict[str, dict]:
    model = {"model": checkpoint("qwen3_moe"), "enforce_eager": True}
    answers = ask(QUESTION | {"llm": model | fluxmoe(**settings)} for settings in PLACES.values())
    return dict(zip(PLACES, answers, strict=True))


@pytest.mark.parametrize("place", [place for place in PLACES if place != "packed"])
def test_tokens_are_the_same_wherever_experts_lie(answers, place):
    assert len(answers[place]["tokens"][0]) == QUESTION["new_tokens"]
    assert answers[place] == answers["packed"]


def test_a_compiled_model_too(checkpoint):
    model = {"model": checkpoint("qwen3_moe", layers=2)}
    first, *others = ask(QUESTION | {"llm": model | fluxmoe(**PLACES[place])} for place in ("packed", "host"))
    assert len(first["tokens"][0]) == QUESTION["new_tokens"]
    assert others == [first] * len(others)


def test_kv_tokens_are_there_where_they_were_asked_for(checkpoint, answers):
    """What a refusal names as the most can be had, but for what the process itself has taken since."""
    model = {"model": checkpoint("qwen3_moe"), "enforce_eager": True}
    task = QUESTION | {"room_bytes": 1 << 30}
    (refusal,) = ask([task | {"llm": model | fluxmoe(kv_tokens=10**9)}])
    most = int(0.9 * int(refusal["refused"].split("at most ")[1].split()[0]))
    fixed = {"llm": model | {"kv_cache_memory_bytes": 1 << 26} | fluxmoe(kv_tokens=1)}
    served, refused = ask([task | {"llm": model | fluxmoe(kv_tokens=most)}, QUESTION | fixed])
    assert served.get("kv_tokens", 0) >= most, served
    assert served["tokens"] == answers["packed"]["tokens"]
    assert "--kv-cache-memory-bytes" in refused["refused"]
