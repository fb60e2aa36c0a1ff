"""Uneven routing: how often experts are chosen, by rank, and routers whose choices come out so.

The chance that a token chooses the expert of rank r is c · r^-skew, at most 0.4, where c makes the chances add up to
top_k. What that covers, beside what is published of real routers (skew fitted here, `covered`):

    source                                                        published                         skew, and its figure
    Qwen3-30B-A3B (E 128, top 8)                                  45 to 51 % of experts take 90 %   1.4: 50 %
    Gemma-4 (E 128, top 8), a cache of 50 / 25 / 12.5 %           hits 89 / 67 / 45 %               1.0: 84 / 67 / 51 %
    Qwen3.8-Flash-Next (E 512, top 10), static, llama.cpp 27861   top 32 experts take 10 %          0.2: 11 %
    a checkpoint as make-checkpoint writes it                     –                                 0: all alike

Random routers choose all experts alike, so no cache can hit more often than the share of experts that it holds, but by
what consecutive tokens have in common; rates measured with them are a floor for real models. Real routers have reuse
beyond popularity, too: of the same Qwen3.8 an LRU of 64 of 512 experts a layer hits 67 %, of 128 81 %. `correlation`
stands for that: hidden states of consecutive tokens as an autoregression (0.86 with skew 0.2: LRU 67 and
72 %).
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

# A row of a router has logits around zero, which lead less than half of the time whatever the row's length.
_MOST = 0.4
# Steeper curves than any that was published.
MOST_SKEW = 3.0
_SAMPLES, _ROUNDS = 1 << 13, 16


def popularity(experts: int, top_k: int, skew: float) -> np.ndarray:
    """float64 [E], descending, adding up to top_k: the chance that a token chooses the expert of each rank."""
    if top_k >= _MOST * experts:
        return np.full(experts, top_k / experts)
    weights = np.arange(1, experts + 1) ** -float(skew)
    low, high = 0.0, top_k / weights[-1]
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(_MOST, middle * weights).sum() < top_k else (low, middle)
    return np.minimum(_MOST, high * weights)


def covered(chances: np.ndarray, count: int) -> float:
    """Share of all choices that the `count` most popular experts take."""
    return float(chances[:count].sum() / chances.sum())


@cache
def row_scales(experts: int, top_k: int, skew: float) -> torch.Tensor:
    """fp32 [E], of mean square 1, by rank: lengths of a router's rows at which normal hidden states choose experts as
    `popularity` says.

    An expert is chosen where its logit, normal with its row's length, is among the top k: longer rows reach there more
    often. Found by repeated sampling, whose last error is below 1 % of the choices.
    """
    if skew == 0 or top_k >= _MOST * experts:
        return torch.ones(experts)
    wanted = torch.from_numpy(popularity(experts, top_k, skew))
    noise = torch.randn(_SAMPLES, experts, generator=torch.Generator().manual_seed(0))
    target = -torch.special.ndtri(wanted)
    scales = 1 / target
    for _ in range(_ROUNDS):
        chosen = (noise * scales.float()).topk(top_k, dim=1).indices
        found = torch.bincount(chosen.ravel(), minlength=experts).double() / _SAMPLES
        scales *= -torch.special.ndtri(found.clamp(1 / _SAMPLES, 0.499)) / target
    return (scales / scales.square().mean().sqrt()).float()


def synthetic_routing(
    layers: int, experts: int, top_k: int, lanes: int, passes: int, skew: float, correlation: float, seed: int
) -> np.ndarray:
    """Experts int16 [passes, lanes, L, k] of decode: `lanes` sequences whose hidden states are independent of one
    another, each after itself with `correlation`, through routers of `skew`, whose ranks are dealt anew in every
    layer."""
    generator = torch.Generator().manual_seed(seed)
    scales = row_scales(experts, top_k, skew)
    ranks = torch.stack([torch.randperm(experts, generator=generator) for _ in range(layers)])
    state, chosen = torch.randn(lanes, layers, experts, generator=generator), []
    for _ in range(passes):
        chosen.append((state * scales[ranks]).topk(top_k, dim=-1).indices.to(torch.int16))
        noise = torch.randn(state.shape, generator=generator)
        state = correlation * state + (1 - correlation**2) ** 0.5 * noise
    return torch.stack(chosen).numpy()
