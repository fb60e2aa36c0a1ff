"""Next tokens from logits: greedy, temperature, top-k, top-p, with randomness that depends on the request alone.

The uniform number behind the n-th token of a request is Philox(key = seed, counter = n): a pure function, without
state that a preemption, another batch or another placement of experts could disturb. A sampled row is worked on
by itself in float64, so that its token depends on its own logits only. Filters and their order are those of
Hugging Face and vLLM: temperature, then top-k (ties with the k-th stay), then top-p over what is left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from .request import SamplingParams


def sample(logits: Tensor, params: Sequence[SamplingParams], steps: Sequence[int]) -> list[int]:
    """One token id for each row of `logits` fp32 [B, vocab] (any device), waiting for the device.

    `params[b]` and `steps[b]` (tokens that row b's request has generated so far) belong to row b. Among equal
    logits greedy rows take the lowest id. AssertionError on a row whose largest logit is no finite number: the
    forward pass read a poisoned slot, memory never written, or overflowed.
    """
    assert logits.ndim == 2, f"logits must be [B, vocab], got {tuple(logits.shape)}"
    assert len(params) == len(steps) == len(logits), f"{len(logits)} rows, {len(params)} params, {len(steps)} steps"
    if not params:
        return []
    # Both pass NaN on, so the check costs B numbers and not a second pass over B · vocab.
    if logits.is_cpu:
        # One thread of numpy's is done with a row before torch has called its own.
        rows = logits.numpy()
        chosen = rows.argmax(axis=-1).tolist()
        largest = [float(row[token]) for row, token in zip(rows, chosen, strict=True)]
    else:
        largest, chosen = (each.tolist() for each in logits.max(dim=-1))
    broken = {row: value for row, value in enumerate(largest) if not math.isfinite(value)}
    assert not broken, (
        f"logits of rows {list(broken)} have the largest value {list(broken.values())}: "
        "NaN or inf in the forward pass, e.g. a weight slot read before it was loaded"
    )
    for row, (p, step) in enumerate(zip(params, steps, strict=True)):
        if not p.greedy:
            chosen[row] = _sample_row(logits[row], p, uniform(p.seed, step))
    return chosen


def uniform(seed: int, step: int) -> float:
    """The number in [0, 1) that decides token `step` (0, 1, …) of a request with `seed`."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=step)).random())


def _sample_row(row: Tensor, params: SamplingParams, u: float) -> int:
    """Inverse transform over the tokens that pass the filters, in ascending order of their ids."""
    if 0 < params.top_k < len(row):
        kth = row.topk(params.top_k).values[-1]
        kept = (row >= kth).nonzero().flatten()
        values, ids = row[kept].cpu().numpy(), kept.cpu().numpy()
    else:
        values, ids = row.cpu().numpy(), np.arange(len(row))
    values = values.astype(np.float64)
    with np.errstate(over="ignore"):
        weights = np.exp((values - values.max()) / params.temperature)
    if params.top_p < 1:
        nucleus = _nucleus(weights, params.top_p)
        weights, ids = weights[nucleus], ids[nucleus]
    cumulative = np.cumsum(weights)
    # Rounding may lift u · total to total itself, behind which no token lies.
    point = min(u * cumulative[-1], np.nextafter(cumulative[-1], 0.0))
    return int(ids[np.searchsorted(cumulative, point, side="right")])


def _nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """Ascending indices of the fewest largest weights whose sum reaches `top_p` of the total, lowest index first
    among equals (nucleus sampling, arXiv 1904.09751).
    """
    total = weights.sum()
    # All weights below this floor sum to less than (1 - top_p) / 2 of the total, so none of them can be in the
    # nucleus; without them the sort is over hundreds of tokens, not the vocabulary.
    candidates = np.flatnonzero(weights >= (1 - top_p) * total / (2 * len(weights)))
    order = candidates[np.argsort(-weights[candidates], kind="stable")]
    before = np.concatenate(([0.0], np.cumsum(weights[order])[:-1]))
    return np.sort(order[before < top_p * total])
