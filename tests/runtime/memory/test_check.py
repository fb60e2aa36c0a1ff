"""Nothing is loaded that does not fit the memory that is free; what is held is compared with the ledgers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fluxmoe.experiments.commands.main import call, main
from fluxmoe.experiments.lib.checkpoints import make_checkpoint
from fluxmoe.runtime.devices import HOST, CpuDevice, CudaDevice, device_of
from fluxmoe.runtime.experts.pager import ExpertPager
from fluxmoe.runtime.experts.placement import Tier
from fluxmoe.runtime.memory import machine
from fluxmoe.runtime.memory.budget import BudgetError
from fluxmoe.runtime.memory.check import FreeMemory, MemoryCheck
from fluxmoe.runtime.memory.machine import lies_in_memory
from fluxmoe.runtime.serving.deployment import Deployment
from fluxmoe.runtime.serving.engine import Engine, EngineConfig
from fluxmoe.runtime.serving.graphs import DecodeGraphs
from fluxmoe.runtime.serving.request import Request, SamplingParams

CPU, CUDA = HOST, device_of("cuda:0")
GIB, MIB = 1 << 30, 1 << 20
COMMON = dict[str, Any](device="cpu", max_batch=8, max_batched_tokens=16, max_context=256)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_checkpoint(
        arch="olmoe", out=tmp_path_factory.mktemp("models") / "moe", layers=3, experts=4, top_k=2, hidden=64,
        moe_intermediate=48, heads=4, vocab=512, dtype="bfloat16", seed=0, max_positions=512,
    )  # fmt: skip


@pytest.fixture
def free(monkeypatch):
    """A machine in whose container so many bytes are free; set by the test."""

    def has(nbytes):
        monkeypatch.setattr(machine, "_cgroups", lambda root=None: [(2 * nbytes, nbytes)])

    return has


def lines_of(model_dir, **settings):
    with Engine(model_dir, EngineConfig(**COMMON, **settings)) as engine:
        return engine.budget.lines(), engine.host_budget.lines(), engine.budget.total


# What fits.


@pytest.mark.parametrize(
    ("device", "device_bytes", "lines", "match"),
    [
        (CPU, 9 * GIB, {}, "takes 9 GiB, and only 8 GiB of memory are free; lower the budget"),
        (CPU, 5 * GIB, {"host_experts": 4 * GIB}, r"takes 5 GiB and 4 GiB beside it \(host_experts 4 GiB\), and only"),
        (CPU, 5 * GIB, {"swapped_kv": 4 * GIB}, "--preemption recompute needs no swap space"),
        (CUDA, 81 * GIB, {}, "takes 81 GiB, and only 80 GiB of the GPU's memory are free"),
        (CUDA, GIB, {"host_experts": 9 * GIB}, r"host memory takes 9 GiB \(host_experts 9 GiB\), and only 8 GiB"),
        (CUDA, 80 * GIB, {"host_experts": 8 * GIB}, None),
        (CPU, 5 * GIB, {"host_experts": 3 * GIB}, None),
    ],
)
def test_what_is_held_must_be_free(device, device_bytes, lines, match):
    free = FreeMemory(device, 8 * GIB if device == CPU else 80 * GIB, 8 * GIB)
    if match is None:
        free.check(device_bytes, lines)
    else:
        with pytest.raises(BudgetError, match=match) as info:
            free.check(device_bytes, lines)
        assert "\n" not in str(info.value)


def test_a_gpu_and_its_host_are_asked_apart(monkeypatch):
    monkeypatch.setattr(CudaDevice, "free_bytes", lambda device: 70 * GIB)
    monkeypatch.setattr(CudaDevice, "total_bytes", lambda device: 80 * GIB)
    monkeypatch.setattr(CpuDevice, "free_bytes", lambda device: 30 * GIB)
    free = FreeMemory.now(CUDA)
    assert tuple(free) == (CUDA, 70 * GIB, 30 * GIB)
    free.check_budget(80 * GIB)
    with pytest.raises(BudgetError, match="81 GiB is more than the 80 GiB of memory that this GPU has"):
        free.check_budget(81 * GIB)
    assert FreeMemory.now(CPU) == (CPU, 30 * GIB, 30 * GIB)


def test_a_system_that_does_not_say_what_is_free_needs_a_budget(model_dir, monkeypatch):
    def unknown(entry):
        raise BudgetError("cannot tell how much memory is free here; give a budget in bytes")

    monkeypatch.setattr(machine, "_meminfo", unknown)
    assert FreeMemory.now(CPU) == (CPU, None, None)
    with Engine(model_dir, EngineConfig(**COMMON, placement="host", budget_bytes=64 * MIB)) as engine:
        assert engine.host_budget.lines()["host_experts"] > 0
    with pytest.raises(BudgetError, match="give a budget in bytes"):
        Engine(model_dir, EngineConfig(**COMMON))


def test_a_budget_beyond_the_machine_is_refused(model_dir, free):
    free(GIB)
    with pytest.raises(BudgetError, match="3 GiB is more than the 2 GiB of memory that this machine or its container"):
        Engine(model_dir, EngineConfig(**COMMON, budget_bytes=3 * GIB))
    assert CPU.total_bytes() == 2 * GIB
    assert CPU.free_bytes() == GIB


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (dict(placement="host"), "host_experts"),
        (dict(placement="packed", adaptive=True, planning=False), "host_experts"),
        (dict(preemption="swap"), "swapped_kv"),
    ],
)
def test_host_and_device_together_are_refused_before_anything_is_loaded(model_dir, free, monkeypatch, settings, line):
    with Engine(model_dir, EngineConfig(**COMMON, **settings)) as engine:
        device, host = engine.budget.used, engine.host_budget.lines()
        budget = engine.budget.used
    assert host[line] > 0
    if "adaptive" not in settings:
        # With all of the budget in use and one byte less than is needed.
        free(device + sum(host.values()))
        Engine(model_dir, EngineConfig(**COMMON, **settings, budget_bytes=budget)).close()
    with Engine(model_dir, EngineConfig(**COMMON, **settings, budget_bytes=device)) as engine:
        needed = engine.budget.used + sum(engine.host_budget.lines().values())
    free(needed - 1)
    monkeypatch.setattr(ExpertPager, "open", lambda *arguments: pytest.fail("experts are stored"))
    monkeypatch.setattr(Engine, "_load", lambda *arguments: pytest.fail("a checkpoint is loaded"))
    says = (
        rf"^placement {settings.get('placement', 'resident')} \(.*{line} .*of memory are free.*; the least that works"
    )
    with pytest.raises(BudgetError, match=says) as info:
        Engine(model_dir, EngineConfig(**COMMON, **settings, budget_bytes=device))
    monkeypatch.undo()
    least = info.value.least
    assert least is not None
    with pytest.raises(BudgetError, match="is too small"):
        Engine(model_dir, EngineConfig(**COMMON, **settings, budget_bytes=least - 1))
    Engine(model_dir, EngineConfig(**COMMON, **settings, budget_bytes=least)).close()


@pytest.mark.parametrize(
    "settings",
    [
        dict(placement="host"),
        dict(placement="host", preemption="swap"),
        dict(placement="packed", adaptive=True, planning=False),
        dict(placement="packed", adaptive=True, planning=False, preemption="swap"),
    ],
)
def test_all_leaves_room_for_what_the_host_holds(model_dir, free, settings):
    """KV takes what is left, so that all together are the share of the free memory that can be given away."""
    roomy, host, _ = lines_of(model_dir, **settings)
    share = sum(roomy.values()) - roomy["kv_cache"] // 2 + sum(host.values()) - host.get("swapped_kv", 0) // 2
    free(HOST.free_for(share + 1))
    available = share + 1
    with Engine(model_dir, EngineConfig(**COMMON, **settings)) as engine:
        together = engine.budget.used + engine.host_budget.used
        assert together <= available
        assert engine.kv.nbytes < roomy["kv_cache"]
        if "adaptive" not in settings:  # whose memory comes in larger parts
            assert together > available - 3 * engine.deployment.block_bytes


def test_all_where_the_host_alone_is_too_much(model_dir, free):
    _, host, _ = lines_of(model_dir, placement="host")
    free(sum(host.values()))
    says = r"^placement host \(dense\): host memory takes .*host_experts .*; the least that works is .*; of other"
    with pytest.raises(BudgetError, match=says) as info:
        Engine(model_dir, EngineConfig(**COMMON, placement="host"))
    # As much as `all` must be.
    least = info.value.least
    assert least is not None
    free(HOST.free_for(least))
    Engine(model_dir, EngineConfig(**COMMON, placement="host")).close()
    free(HOST.free_for(least - 1))
    with pytest.raises(BudgetError, match="is too small"):
        Engine(model_dir, EngineConfig(**COMMON, placement="host"))


def test_the_host_ledger_is_what_is_held(model_dir):
    for settings in (
        dict[str, Any](placement="offload", alpha=0.5, preemption="swap"),
        dict[str, Any](placement="packed", adaptive=True, planning=False),
    ):
        with Engine(model_dir, EngineConfig(**COMMON, **settings)) as engine:
            lines = engine.host_budget.lines()
            assert lines.get("host_experts", 0) == engine.pager.store.tier_bytes(Tier.HOST)
            assert lines.get("swapped_kv", 0) == engine.kv.host.nbytes


def test_workspace_is_not_charged_twice(model_dir, monkeypatch):
    """What is free is asked before the kernels make their buffers, which the budget is charged with."""
    order: list[str] = []

    def noted(name: str) -> Callable[..., Any]:
        real = getattr(CpuDevice, name)

        def call(*arguments: Any) -> Any:
            order.append(name)
            return real(*arguments)

        return call

    for name in ("make_ops", "make_expert_ops", "available_bytes", "taken_bytes"):
        monkeypatch.setattr(CpuDevice, name, noted(name))
    Engine(model_dir, EngineConfig(**COMMON)).close()
    assert order[:2] == ["taken_bytes", "available_bytes"]
    assert sorted(order[2:4]) == ["make_expert_ops", "make_ops"]


def test_graphs_have_a_line_of_their_own(model_dir):
    with Engine(model_dir, EngineConfig(**COMMON)) as engine:
        model, config = engine.model, engine.config
        arguments = (model, config, engine.ops, engine.pager.footprint, GIB)
        plain, graphs = Deployment(*arguments).budget.lines(), Deployment(*arguments, graph_bytes=12345).budget.lines()
    assert "graphs" not in plain
    assert graphs == plain | {"graphs": 12345}
    # 32 MiB for cuBLAS on the stream that captures, and the rows in segments of 2 MiB.
    assert DecodeGraphs.pool_bytes(64, 4096, 2) == 34 * MIB
    assert DecodeGraphs.pool_bytes(1024, 4096, 2) == 40 * MIB


@pytest.mark.parametrize(("kind", "expected"), [("tmpfs", True), ("ramfs", True), ("ext4", False), ("overlay", False)])
def test_files_that_lie_in_memory(tmp_path, kind, expected):
    number = tmp_path.stat().st_dev
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "22 1 0:999 / /proc rw,nosuid shared:5 - tmpfs proc rw\n"
        f"23 1 {os.major(number)}:{os.minor(number)} / /x rw,relatime shared:1 master:2 - {kind} source rw\n"
    )
    assert lies_in_memory(tmp_path, mounts) == expected
    assert not lies_in_memory(tmp_path / "nowhere", mounts)
    assert not lies_in_memory(tmp_path, tmp_path / "no mounts")


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a tmpfs")
def test_shared_memory_is_memory():
    assert lies_in_memory(Path("/dev/shm"))


# What is held.


def test_more_than_the_tolerance_is_a_warning():
    assert MemoryCheck.of(CUDA, 100 * MIB, 102 * MIB) == (100 * MIB, 102 * MIB, 0, 1.02, None)
    warning = MemoryCheck.of(CUDA, 100 * MIB, 103 * MIB).warning
    assert warning == "103 MiB of memory are held, 3.0 % more than the 100 MiB of the ledger"
    assert MemoryCheck.of(CPU, 100 * MIB, 102 * MIB + CPU.slack_bytes).warning is None
    assert MemoryCheck.of(CPU, 100 * MIB, 103 * MIB + CPU.slack_bytes).warning is not None
    assert MemoryCheck.of(CUDA, 100 * MIB, 10 * MIB).warning is None
    assert MemoryCheck.of(CPU, 100 * MIB, None) == (100 * MIB, None, 0, None, None)
    check = MemoryCheck.of(CPU, 100 * MIB, 60 * MIB, mapped=50 * MIB)
    assert check == (100 * MIB, 110 * MIB, 50 * MIB, 1.1, None)


def test_memory_counts_as_taken_once_it_is_touched():
    if (before := CPU.taken_bytes()) is None:
        pytest.skip("needs Linux's /proc to see resident memory")
    memory = torch.empty(128 * MIB, dtype=torch.uint8)
    assert (CPU.taken_bytes() or 0) - before < 64 * MIB
    memory.fill_(1)
    assert 120 * MIB < (CPU.taken_bytes() or 0) - before < 192 * MIB


REQUEST = Request((1, 2, 3), SamplingParams(max_new_tokens=4))


@pytest.fixture
def compiled(model_dir):
    """Kernels are there: what numba holds while it compiles is in no ledger, and may be more than the slack."""
    with Engine(model_dir, EngineConfig(**COMMON)) as engine:
        engine.generate([REQUEST])


def test_the_engine_compares_ledgers_with_what_it_holds(model_dir, compiled, monkeypatch):
    with Engine(model_dir, EngineConfig(**COMMON, placement="host")) as engine:
        engine.generate([REQUEST])
        check = engine.memory_check()
        assert check.ledger_bytes == engine.budget.used + engine.host_budget.used
        assert check.warning is None
        before = engine._taken_before
        assert before is not None
        monkeypatch.setattr(CpuDevice, "taken_bytes", lambda device: before + check.ledger_bytes + GIB)
        assert engine.memory_check().held_bytes == check.ledger_bytes + GIB
        assert "more than the" in (engine.memory_check().warning or "")


def arguments_of(model_dir, *more) -> list[str]:
    prompts = model_dir.parent / "prompts.json"
    prompts.write_text("[[1, 2, 3]]")
    shape = ["--max-batch", "4", "--max-batched-tokens", "16", "--device", "cpu", "--max-new-tokens", "3"]
    return ["generate", "--model", str(model_dir), "--prompts", str(prompts), *shape, *more]


def test_the_command_says_what_is_held(model_dir, compiled, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.json"
    call(arguments_of(model_dir, "--json", str(out)))
    result = json.loads(out.read_text())
    assert result["memory_check"].keys() == {"ledger_bytes", "held_bytes", "mapped_bytes", "ratio", "warning"}
    assert result["host_memory"].keys() == {"staging"}
    assert "warning" not in capsys.readouterr().err
    taken = iter((0, GIB))
    monkeypatch.setattr(CpuDevice, "taken_bytes", lambda device: next(taken))
    call(arguments_of(model_dir))
    assert "warning: 1 GiB of memory are held" in capsys.readouterr().err


def test_the_command_refuses_what_does_not_fit(model_dir, free, capsys):
    free(GIB)
    with pytest.raises(SystemExit) as info:
        main(arguments_of(model_dir, "--budget", "3GiB"))
    assert info.value.code == 2
    assert capsys.readouterr().err.startswith(
        "error: placement resident (dense): a budget of 3 GiB is more than the 2 GiB of memory"
    )
