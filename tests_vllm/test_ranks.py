"""Two ranks: experts cut in two (tensor parallelism), or shared out (expert parallelism)."""

from __future__ import annotations

import pytest

from .conftest import fluxmoe, prompts

QUESTION = {"prompts": prompts(8, 64), "new_tokens": 8}
TWO = {"distributed_executor_backend": "mp", "tensor_parallel_size": 2}
RANKS = {"one rank": {}, "tensor parallel": TWO, "expert parallel": TWO | {"enable_expert_parallel": True}}


@pytest.fixture(scope="module")
def answers(checkpoint, engines) -> dict[tuple[str, str], dict]:
    model = {"model": checkpoint("qwen3_moe"), "enforce_eager": True}
    cases = [(ranks, placement) for ranks in RANKS for placement in ("packed", "host")]
    tasks = [QUESTION | {"llm": model | RANKS[ranks] | fluxmoe(placement=placement)} for ranks, placement in cases]
    return dict(zip(cases, engines(tasks, OMP_NUM_THREADS="1"), strict=True))


@pytest.mark.parametrize("ranks", RANKS)
def test_tokens_are_the_same_wherever_experts_lie(answers, ranks):
    assert len(answers[ranks, "packed"]["tokens"][0]) == QUESTION["new_tokens"]
    assert answers[ranks, "host"] == answers[ranks, "packed"]


@pytest.mark.parametrize("ranks", [ranks for ranks in RANKS if ranks != "one rank"])
def test_two_ranks_say_what_one_says(answers, ranks):
    """All but always: they add bf16 in another order."""
    one, two = (answers[which, "packed"]["likeliest"] for which in ("one rank", ranks))
    same = [a == b for x, y in zip(one, two, strict=True) for a, b in zip(x, y, strict=True)]
    assert sum(same) > 0.9 * len(same)
