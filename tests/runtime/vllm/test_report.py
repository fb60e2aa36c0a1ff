"""What users see inside vLLM: the table at start, lines of what was served, counters at /metrics."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from fluxmoe.runtime.devices import CpuDevice
from fluxmoe.runtime.experts.placement import Tier
from fluxmoe.runtime.memory.budget import format_bytes
from fluxmoe.runtime.vllm import metrics
from fluxmoe.runtime.vllm.report import served

from .conftest import LinearBase
from .test_method import ALL, LAYERS, TOP_K, Model, inputs, loaded


def test_a_table_says_where_experts_lie_and_what_that_frees(vllm, caplog):
    caplog.set_level("INFO", logger="vllm.fluxmoe")
    loaded(vllm, fluxmoe=dict(placement="balanced", alpha=0.5))
    lines = caplog.messages[0].splitlines()
    assert lines[0] == "FluxMoE"
    rows = [line.split() for line in lines[2:]]
    assert rows[0] == ["6", "device", "dense", "576", "KiB"]
    assert rows[1] == ["6", "host", "memory", "dense", "576", "KiB"]
    assert rows[2][:2] == ["streaming", "slots"]
    assert rows[3][0] == "workspace"
    # On a CPU a host tier frees nothing.
    assert lines[-1].startswith("dense, the experts would take 1.125 MiB of the device's memory; now, with slots")
    assert lines[-1].endswith("no more is free than then")


def test_a_table_says_what_a_file_frees(vllm, caplog):
    caplog.set_level("INFO", logger="vllm.fluxmoe")
    model = loaded(vllm, fluxmoe=dict(placement="disk", host_format="planar12"), max_num_batched_tokens=1)
    taken = sum(model.paged.pager.held_bytes().values())
    assert taken < 1.125 * 2**20
    free = int(1.125 * 2**20) - taken
    said = f"{format_bytes(taken)} are taken: {format_bytes(free)} are free for KV cache"
    assert caplog.messages[0].endswith(said)


# KV cache with and without us.

# Of dense experts; of a block of 16 tokens.
DENSE_BYTES, BLOCK_BYTES = 1179648, 2048


def make_cache(vllm, blocks: int) -> None:
    """vLLM's worker makes its KV cache, of three layers."""
    tensors = [SimpleNamespace(size=blocks * BLOCK_BYTES // 2), SimpleNamespace(size=blocks * BLOCK_BYTES // 2)]
    worker = vllm.worker(vllm.config)
    worker.initialize_from_config(SimpleNamespace(num_blocks=blocks, kv_cache_tensors=tensors))
    assert worker.made == blocks


def said(caplog) -> list[str]:
    return [message for message in caplog.messages if "KV cache of" in message]


@pytest.fixture
def resident(monkeypatch) -> SimpleNamespace:
    """rss: this process's memory, as vLLM and we ask for it."""
    memory = SimpleNamespace(rss=10**9)
    monkeypatch.setitem(
        sys.modules, "psutil", SimpleNamespace(Process=lambda: SimpleNamespace(memory_info=lambda: memory))
    )
    return memory


@pytest.mark.parametrize(
    ("grown", "without"),
    [
        (DENSE_BYTES - 100 * BLOCK_BYTES, "about 14,400 in the same memory"),
        (DENSE_BYTES + 100 * BLOCK_BYTES, "about 17,600 in the same memory"),
        (DENSE_BYTES - 1001 * BLOCK_BYTES, "none: weights would take about 2 KiB more than there is"),
    ],
)
def test_kv_with_and_without_us_by_what_loading_has_taken(vllm, caplog, resident, grown, without):
    """Of the memory that vLLM on a CPU counts, but for other layers' weights, which are there without us too."""
    caplog.set_level("INFO", logger="vllm.fluxmoe")
    model = Model(vllm)
    linear = LinearBase()
    linear.weight = torch.nn.Parameter(torch.zeros(300))
    model.quant_config.get_quant_method(linear, "gate")
    model.bring(ALL)
    resident.rss += grown + linear.weight.nbytes
    model.finish()
    make_cache(vllm, 1000)
    make_cache(vllm, 1000)
    assert said(caplog) == [f"FluxMoE: KV cache of 16,000 tokens; without fluxmoe {without}"]


def test_kv_with_and_without_us_on_a_gpu_by_what_we_have_allocated(vllm, caplog, resident, monkeypatch):
    monkeypatch.setattr(CpuDevice, "is_host", False)
    caplog.set_level("INFO", logger="vllm.fluxmoe")
    model = loaded(vllm)
    resident.rss += 10**9
    make_cache(vllm, 1000)
    freed = DENSE_BYTES - sum(model.paged.pager.held_bytes().values())
    without = 16000 * (1000 * BLOCK_BYTES - freed) // (1000 * BLOCK_BYTES)
    assert said(caplog) == [f"FluxMoE: KV cache of 16,000 tokens; without fluxmoe about {without:,} in the same memory"]


@pytest.mark.parametrize("given", [dict(kv_cache_memory_bytes=1 << 20), dict(num_gpu_blocks_override=1000)], ids=str)
def test_kv_that_was_given_is_the_same_without_us(vllm, caplog, given):
    caplog.set_level("INFO", logger="vllm.fluxmoe")
    model = loaded(vllm, **given)
    make_cache(vllm, 1000)
    assert said(caplog) == ["FluxMoE: KV cache of 16,000 tokens, with and without fluxmoe: its size was given"]
    del model


def test_a_draft_model_frees_too_and_a_model_that_is_gone_or_not_loaded_does_not(vllm, caplog, resident):
    caplog.set_level("INFO", logger="vllm.fluxmoe")
    gone, waiting = loaded(vllm), Model(vllm)
    del gone
    gc.collect()
    make_cache(vllm, 1000)
    assert not said(caplog)
    resident.rss += DENSE_BYTES
    model = loaded(vllm)
    waiting.bring(ALL)
    waiting.finish()  # the process has grown by DENSE_BYTES since it began
    make_cache(vllm, 1000)
    without = 16000 - 16000 * DENSE_BYTES // (1000 * BLOCK_BYTES)
    assert said(caplog) == [f"FluxMoE: KV cache of 16,000 tokens; without fluxmoe about {without:,} in the same memory"]
    del model


def test_what_was_served_is_said_once_in_a_while(vllm, caplog, monkeypatch):
    model = loaded(vllm, fluxmoe=dict(placement="host"))
    caplog.set_level("INFO", logger="vllm.fluxmoe")
    model.run(*inputs())
    assert not caplog.messages
    monkeypatch.setattr("fluxmoe.runtime.vllm.paged_model._REPORT_EVERY_S", 0)
    for _ in range(2):
        model.run(*inputs())
    assert len(caplog.messages) == 2
    assert all("MiB from host memory" in message for message in caplog.messages)


@pytest.fixture
def counted(monkeypatch) -> Iterator[dict[str, float]]:
    """What prometheus counts, by name."""
    counted: dict[str, float] = {}

    class Counter:
        def __init__(self, name: str, text: str) -> None:
            assert name not in counted, "a registry has a name once"
            self.name, counted[name] = name, 0.0

        def inc(self, amount: float) -> None:
            counted[self.name] += amount

    monkeypatch.setitem(sys.modules, "prometheus_client", SimpleNamespace(Counter=Counter))
    metrics._counters.cache_clear()
    yield counted
    metrics._counters.cache_clear()


@pytest.mark.parametrize("shared", [True, False])
def test_counters_are_at_metrics_where_processes_share_them(vllm, counted, monkeypatch, tmp_path, shared):
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path) if shared else "")
    models = [loaded(vllm, fluxmoe=dict(placement="host")) for _ in range(2)]
    for model in models:
        for _ in range(3):
            model.run(*inputs())
    # Loads of the pass after next may have come meanwhile.
    layer_bytes = models[0].paged.pager.footprint.layout.tier_bytes(Tier.HOST) / LAYERS
    passes = 2 * (1 + 3)
    if shared:
        assert passes * LAYERS * layer_bytes <= counted["fluxmoe_host_bytes"] <= (passes * LAYERS + 8) * layer_bytes
        assert counted["fluxmoe_disk_bytes"] == 0
    else:
        assert not counted


def test_what_comes_on_demand_is_counted_where_users_look(vllm, counted, monkeypatch, tmp_path, caplog):
    """At /metrics and in the line at the end: hits, misses and bytes of experts that are read from files by need."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    caplog.set_level("INFO", logger="vllm.fluxmoe")
    model = loaded(vllm, fluxmoe=dict(placement="disk"))
    assert "cache of 8 experts" in caplog.text
    before = dict(counted)
    x, weights, ids = inputs(tokens=1)
    model.run(x, weights, ids)
    model.run(x, weights, ids)
    now = {name: value - before[name] for name, value in counted.items()}
    assert now["fluxmoe_cache_hits"] + now["fluxmoe_cache_misses"] == 2 * LAYERS * TOP_K
    assert now["fluxmoe_cache_hits"] > 0  # two passes touch 6 experts, and 8 have a place
    layout = model.paged.pager.footprint.layout
    assert counted["fluxmoe_disk_bytes"] >= counted["fluxmoe_cache_misses"] * layout.expert_bytes("dense")
    asked = int(counted["fluxmoe_cache_hits"] + counted["fluxmoe_cache_misses"])
    said = served(model.paged.pager.counters())
    assert f"of {asked} routed experts of files, {counted['fluxmoe_cache_hits']:.0f} were" in said
