"""Two ranks: experts cut in two (tensor parallelism), or shared out (expert parallelism)."""

from __future__ import annotations

import pytest

from .conftest import fluxmoe, prompts
from .engines import ask

QUESTION = {"prompts": prompts(8, 64), "new_tokens": 8}
TWO = {"distributed_executor_backend": "mp", "tensor_parallel_size": 2}
LLMS = {
    "one rank": fluxmoe(),
    "tensor parallel": TWO | fluxmoe(),
    "tensor parallel, host": TWO | fluxmoe(placement="host"),
    "expert parallel, host": TWO | {"enable_expert_parallel": True} | fluxmoe(placement="host"),
}


@pytest.fixture(scope="module")
def answers(checkpoint) -> dict[str, dict]:
    model = {"model": checkpoint("qwen3_moe"), "enforce_eager": True}
    return dict(zip(LLMS, ask(QUESTION | {"llm": model | llm} for llm in LLMS.values()), strict=True))


def test_tokens_are_the_same_wherever_experts_lie(answers):
    assert len(answers["tensor parallel"]["tokens"][0]) == QUESTION["new_tokens"]
    assert answers["tensor parallel, host"] == answers["tensor parallel"]


@pytest.mark.parametrize("ranks", ["tensor parallel", "expert parallel, host"])
def test_two_ranks_say_what_one_says(answers, ranks):
    """All but always: they add bf16 in another order."""
    one, two = (answers[which]["likeliest"] for which in ("one rank", ranks))
    same = [a == b for x, y in zip(one, two, strict=True) for a, b in zip(x, y, strict=True)]
    assert sum(same) > 0.9 * len(same)
