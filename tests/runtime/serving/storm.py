"""What storms are made of: a small model, and requests by number."""

from __future__ import annotations

import random
from pathlib import Path

from fluxmoe.experiments.lib.checkpoints import make_checkpoint
from fluxmoe.runtime.serving.request import Request, SamplingParams


def storm_model(out: Path, layers: int, experts: int) -> Path:
    return make_checkpoint(
        arch="olmoe", out=out, layers=layers, experts=experts, top_k=2, hidden=128, moe_intermediate=120, heads=4,
        vocab=512, dtype="bfloat16", seed=0, max_positions=512,
    )  # fmt: skip


def storm_request(number: int, longest_prompt: int, longest_output: int) -> Request:
    rng = random.Random(number)
    prompt = tuple(rng.randrange(3, 500) for _ in range(rng.randint(1, longest_prompt)))
    return Request(prompt, SamplingParams(max_new_tokens=rng.randint(1, longest_output), ignore_eos=True))
