"""Sampling against probabilities worked out here in plain Python; independence of the batch; validation."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from fluxmoe.runtime.serving.request import Request, RequestError, SamplingParams
from fluxmoe.runtime.serving.sampling import sample, uniform


def params(**kwargs):
    return SamplingParams(1, **({"temperature": 1.0} | kwargs))


def probabilities(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The filters by their definitions: sort, cut, renormalise; slow and independent of the implementation."""
    scaled = [value / temperature for value in logits]
    kept = set(range(len(scaled)))
    if top_k:
        kth = sorted(scaled, reverse=True)[min(top_k, len(scaled)) - 1]
        kept = {i for i in kept if scaled[i] >= kth}
    peak = max(scaled)
    weight = {i: math.exp(scaled[i] - peak) for i in kept}
    total = sum(weight.values())
    nucleus, mass = [], 0.0
    for i in sorted(kept, key=lambda i: (-weight[i], i)):
        if mass >= top_p * total:
            break
        nucleus.append(i)
        mass += weight[i]
    return np.array([weight[i] / mass if i in nucleus else 0.0 for i in range(len(logits))])


def draws(logits, p, count):
    """`count` draws: the same row at steps 0 … count - 1."""
    return np.array(sample(torch.tensor(logits).expand(count, -1), [p] * count, range(count)))


LOGITS = [1.0, -0.5, 2.0, 0.0, 1.5, -3.0, 2.0, 0.5]

FILTERS = {
    "plain": {},
    "cold": {"temperature": 0.4},
    "hot": {"temperature": 3.0},
    "top_k": {"top_k": 3},
    "top_k ties stay": {"top_k": 1},
    "top_k above the vocabulary": {"top_k": 99},
    "top_p": {"top_p": 0.7},
    "top_p keeps one at least": {"top_p": 1e-9},
    "top_p almost all": {"top_p": 0.999999},
    "top_k then top_p": {"top_k": 4, "top_p": 0.8},
    "temperature before top_p": {"temperature": 0.5, "top_p": 0.8},
}


@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS.keys())
def test_distribution(filters):
    expected = probabilities(LOGITS, **filters)
    count = 3000
    observed = np.bincount(draws(LOGITS, params(seed=11, **filters), count), minlength=len(LOGITS))
    assert set(np.flatnonzero(observed)) <= set(np.flatnonzero(expected))
    # Six standard deviations of a binomial: with a fixed seed this is a fixed outcome, not a flaky one.
    spread = 6 * np.sqrt(count * expected * (1 - expected)) + 1e-9
    assert np.all(np.abs(observed - count * expected) <= spread)
    assert np.all(observed[expected > 0.01] > 0)


def test_top_p_on_the_edge_takes_the_lowest_of_equals():
    # 64 weights of exactly 1: sixteen of them are exactly a quarter.
    assert set(draws([0.5] * 64, params(top_p=0.25), 400)) == set(range(16))


def test_support_on_many_random_rows():
    rng = np.random.default_rng(0)
    for case in range(40):
        logits = (rng.normal(size=200) * rng.choice([0.1, 1.0, 4.0])).astype(np.float32)
        filters = {
            "temperature": float(rng.uniform(0.3, 2)),
            "top_k": int(rng.choice([0, 1, 7, 60])),
            "top_p": float(rng.choice([0.1, 0.5, 0.9, 0.99, 1.0])),
        }
        expected = probabilities(logits.tolist(), **filters)
        chosen = draws(logits, params(seed=case, **filters), 100)
        assert np.all(expected[chosen] > 0)


def test_every_draw_inverts_the_cumulative_distribution():
    expected = np.cumsum(probabilities(LOGITS))
    tokens = draws(LOGITS, params(seed=5), 500)
    assert tokens.tolist() == [int(np.searchsorted(expected, uniform(5, n), side="right")) for n in range(500)]


def test_rows_do_not_depend_on_the_batch():
    torch.manual_seed(3)
    logits = torch.randn(12, 333)
    ps = [
        SamplingParams(1, temperature=[0.0, 0.7, 1.3][b % 3], top_k=[0, 5][b % 2], top_p=[1.0, 0.8][b // 6], seed=b)
        for b in range(12)
    ]
    steps = [b * 7 % 5 for b in range(12)]
    together = sample(logits, ps, steps)
    assert together == [sample(logits[b : b + 1], [ps[b]], [steps[b]])[0] for b in range(12)]
    order = [5, 0, 11, 3]
    assert [together[b] for b in order] == sample(logits[order], [ps[b] for b in order], [steps[b] for b in order])


def test_seed_and_step_both_matter():
    logits = [0.0] * 1000
    assert draws(logits, params(seed=1), 20).tolist() == draws(logits, params(seed=1), 20).tolist()
    assert draws(logits, params(seed=1), 20).tolist() != draws(logits, params(seed=2), 20).tolist()
    assert len(set(draws(logits, params(seed=1), 20))) > 15


def test_uniform_is_uniform_over_seeds_and_steps():
    for numbers in ([uniform(0, n) for n in range(4000)], [uniform(n, 0) for n in range(4000)]):
        assert 0 <= min(numbers) <= max(numbers) < 1
        counts = np.histogram(numbers, bins=10, range=(0, 1))[0]
        assert np.all(np.abs(counts - 400) < 6 * math.sqrt(400))
        assert abs(np.corrcoef([a for a, _ in pairwise(numbers)], [b for _, b in pairwise(numbers)])[0, 1]) < 0.1


def test_greedy_takes_the_lowest_of_equals():
    logits = torch.full((3, 70000), -1.0)
    logits[0, [17, 65000]] = 2.0
    logits[1, [69999]] = 2.0
    assert sample(logits, [SamplingParams(1)] * 3, [0, 1, 2]) == [17, 69999, 0]


def test_greedy_ignores_seed_and_filters():
    logits = torch.randn(1, 50)
    best = int(logits.argmax())
    assert sample(logits, [SamplingParams(1, top_k=40, top_p=0.5, seed=9)], [4]) == [best]


def test_masked_tokens_are_never_drawn():
    logits = [-math.inf, 0.0, -math.inf, 0.0, -math.inf]
    assert set(draws(logits, params(), 300)) == {1, 3}
    assert set(draws(logits, params(top_k=4, top_p=0.99), 300)) == {1, 3}


def test_a_vanishing_temperature_is_greedy():
    assert set(draws([1.0, 3.0, 2.0], params(temperature=1e-300), 50)) == {1}


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_poison_is_reported_with_its_row(bad, temperature):
    logits = torch.zeros(3, 40)
    logits[1, 33] = bad
    with pytest.raises(AssertionError, match=rf"rows \[1\].*{bad}"):
        sample(logits, [params(temperature=temperature)] * 3, [0] * 3)


def test_empty_batch():
    assert sample(torch.zeros(0, 10), [], []) == []


def test_mismatched_lengths():
    with pytest.raises(AssertionError, match="2 rows, 1 params, 2 steps"):
        sample(torch.zeros(2, 10), [params()], [0, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be an integer, got 2.5"),
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.1}, "top_p must be above 0"),
        ({"seed": -1}, "seed must be between 0 and"),
        ({"seed": 2**64}, "seed must be between 0 and"),
        ({"stop_token_ids": [1]}, "stop_token_ids must be a tuple of token ids, got list"),
        ({"stop_token_ids": ("x",)}, "a stop token id must be an integer"),
    ],
)
def test_sampling_params_are_validated(change, message):
    with pytest.raises(RequestError, match=message):
        SamplingParams(**({"max_new_tokens": 4} | change))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([1, 2], "must be a tuple"), ((1, -2), "must be ≥ 0, got -2"), ((1.0,), "must be an integer, got 1.0")],
)
def test_prompts_are_validated(prompt, message):
    with pytest.raises(RequestError, match=message):
        Request(prompt, SamplingParams(1))
