"""Recurrent states beside the KV cache: in the ledger, through preemption, under every placement, tokens unchanged."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from fluxmoe.experiments.lib.checkpoints import make_checkpoint
from fluxmoe.kernels.ops import DeltaNetDims
from fluxmoe.runtime.devices import DeviceError
from fluxmoe.runtime.experts.config import SettingError
from fluxmoe.runtime.memory.budget import BudgetError
from fluxmoe.runtime.serving.engine import Engine, EngineConfig
from fluxmoe.runtime.serving.request import Request, SamplingParams
from fluxmoe.runtime.serving.state_cache import StateCache

COMMON = dict[str, Any](device="cpu", max_batch=6, max_batched_tokens=40, max_context=160, poison=True)
DIMS = DeltaNetDims(key_heads=2, value_heads=4, key_dim=6, value_dim=8, taps=4)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    out = tmp_path_factory.mktemp("models") / "next"
    return make_checkpoint(
        arch="qwen3_next", out=out, layers=5, experts=6, top_k=2, hidden=128, moe_intermediate=64, heads=4, kv_heads=2,
        head_dim=32, vocab=512, dtype="bfloat16", seed=0, max_positions=512,
    )  # fmt: skip


def requests(count=10) -> list[Request]:
    rng = np.random.default_rng(3)
    return [
        Request(
            tuple(rng.integers(0, 512, 1 if i == 0 else rng.integers(40, 90)).tolist()),
            SamplingParams(max_new_tokens=int(rng.integers(40, 60)), ignore_eos=True),
        )
        for i in range(count)
    ]


def serve(model_dir, **settings):
    with Engine(model_dir, EngineConfig(**{**COMMON, **settings})) as engine:
        handles = [engine.add(request) for request in requests()]
        steps = list(engine.steps())
        assert engine.held_bytes() == engine.budget.lines()
        assert engine.states is not None
        assert engine.states.num_swapped == 0
        engine.scheduler.check_integrity()
        lines = engine.budget.lines()
    return [handle.output.token_ids for handle in handles], steps, lines


@pytest.fixture(scope="module")
def expected(model_dir):
    return serve(model_dir)[0]


def room_for(model_dir, sequences: int) -> int:
    """A budget that leaves states for so many sequences, and KV for half of the context of each."""
    with Engine(model_dir, EngineConfig(**COMMON)) as engine:
        lines, block = engine.budget.lines(), engine.deployment.block_bytes
        each = lines["states"] // engine.deployment.max_sequences
    fixed = sum(nbytes for line, nbytes in lines.items() if line not in ("kv_cache", "states"))
    return fixed + sequences * (each + -(-COMMON["max_context"] // 64) * block)


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_preempted_requests_go_on_where_they_were(model_dir, expected, preemption):
    tokens, steps, lines = serve(model_dir, budget_bytes=room_for(model_dir, 4), preemption=preemption)
    assert max(step.batch for step in steps) == 4
    assert sum(step.preemptions for step in steps) >= 2
    assert sum(step.swapped_blocks for step in steps) > 0 or preemption == "recompute"
    assert tokens == expected
    assert lines["states"] > 0


@pytest.mark.parametrize(
    "settings",
    [
        dict(placement="host"),
        dict(placement="balanced", alpha=0.5),
        dict(placement="offload"),
        dict(placement="disk"),
        dict(placement="packed"),
        dict(placement="packed", expert_format="huffman"),
        dict(placement="balanced", alpha=0.5, expert_format="planar12"),
        dict(placement="host", expert_format="planar12", transfer="on_demand"),
        dict(placement="packed", adaptive=True, plan_every=2, least_alpha=0.0),
        dict(block_size=16, max_batched_tokens=7),
    ],
    ids=lambda settings: "-".join(str(value) for value in settings.values()),
)
def test_same_tokens_under_every_placement(model_dir, expected, settings):
    tokens, _, _ = serve(model_dir, **settings)
    assert tokens == expected


def test_the_reference_kernels_agree(model_dir, exact_bf16):
    """They round otherwise all the same: near ties may fall the other way."""
    tokens, expected = (serve(model_dir, kernels=kernels, max_batch=3)[0] for kernels in ("torch", "auto"))
    agree = np.mean([a == b for x, y in zip(tokens, expected, strict=True) for a, b in zip(x, y, strict=True)])
    assert agree > 0.9


def test_states_take_their_share_of_the_budget(model_dir):
    with Engine(model_dir, EngineConfig(**COMMON)) as engine:
        config, lines = engine.model, engine.budget.lines()
        assert len(config.delta_layers) == 4
        # fp32 activations on the CPU: the convolution's inputs, too.
        delta = config.delta
        assert delta is not None
        conv = 4 * len(config.delta_layers) * (delta.taps - 1) * delta.channels
        matrices = 4 * len(config.delta_layers) * delta.value_heads * delta.key_dim * delta.value_dim
        assert lines["states"] == 6 * (conv + matrices)
        # KV exists in one layer of five.
        assert config.kv_bytes_per_token == 2 * 2 * 32 * 2
    with Engine(model_dir, EngineConfig(**COMMON, budget_bytes=room_for(model_dir, 2))) as engine:
        assert engine.deployment.max_sequences == 2
        assert engine.held_bytes() == engine.budget.lines()
        assert engine.budget.lines()["states"] == lines["states"] // 3
    with pytest.raises(BudgetError, match="states"):
        Engine(model_dir, EngineConfig(**COMMON, budget_bytes=room_for(model_dir, 0) + lines["states"] // 6))


def test_swapped_states_come_back_to_other_slots():
    cache = StateCache(DIMS, 3, 4, torch.float32, torch.device("cpu"))
    assert cache.nbytes == StateCache.bytes_of(DIMS, 3, 4, torch.float32)
    cache.conv.normal_()
    cache.recurrent.normal_()
    conv, recurrent = cache.conv.clone(), cache.recurrent.clone()
    cache.swap_out([(1, 70), (3, 71)])
    cache.conv.fill_(torch.nan)
    cache.recurrent.fill_(torch.nan)
    cache.swap_in([(71, 0), (70, 3)])
    assert torch.equal(cache.conv[:, 0], conv[:, 3])
    assert torch.equal(cache.recurrent[:, 3], recurrent[:, 1])
    assert cache.num_swapped == 0


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_another_rule_for_gated_delta_net_is_for_a_gpu(model_dir, kernels):
    with pytest.raises(DeviceError, match="--delta-net fla is for Triton's kernels on a CUDA device: leave it out"):
        Engine(model_dir, EngineConfig(device="cpu", kernels=kernels, delta_net="fla"))
    with pytest.raises(SettingError, match="delta_net fla is for chunks"):
        EngineConfig(delta_net="fla", batch_invariant=True)
