"""The engine: one budget, one checkpoint, requests in, tokens and per-iteration metrics out.

    Checkpoint ─► ExpertStore (tiers) ─► streamer (slots) ─► Decoder ─► sampling
    Scheduler ◄─► PagedKVCache            ▲ tables            ▲ batch

Construction charges every device byte to a MemoryBudget, and what the host holds beside it to another (see
`deployment`). Nothing is loaded before the budget is known to suffice, and both to fit the memory that is free.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from fluxmoe.kernels.cpu.experts import CpuExperts
from fluxmoe.kernels.cpu.ops import CpuOps
from fluxmoe.kernels.ops import AttentionMetadata, ExpertOps, Limits, Ops
from fluxmoe.kernels.torch_experts import TorchExperts
from fluxmoe.kernels.torch_ops import TorchOps
from fluxmoe.models.checkpoint import Checkpoint
from fluxmoe.models.config import ModelConfig
from fluxmoe.models.decoder import Decoder, expert_dims, layer_dims
from torch import Tensor
from tqdm import tqdm

from .batch import build_batch
from .budget import BudgetError, available_bytes, format_bytes, lies_in_memory, taken_bytes
from .config import EngineConfig
from .deployment import EXPERT_LINES, Deployment, host_lines, lay_out, limits_of, make_planner
from .graphs import DecodeGraphs
from .hardware import measure_bandwidths, measure_links
from .kv_cache import GrowableKVCache, PagedKVCache
from .layout import ExpertLayout
from .loop import Executed, ServingLoop
from .memory import FreeMemory, MemoryCheck
from .moving_store import MovingStore
from .placement import Tier
from .planner import Links
from .region import BlockPool, make_pool
from .request import Request
from .residency import ComputeProfile, Residency, Seen
from .sampling import sample
from .scheduler import Scheduler, Step
from .state_cache import StateCache
from .store import ExpertStore
from .streamer import Counters, make_streamer
from .timeline import Timeline


class DeviceError(ValueError):
    """A device was asked for that this machine lacks."""


def resolve_device(name: str) -> torch.device:
    """auto | cpu | cuda → a device that exists here."""
    if name not in ("auto", "cpu", "cuda"):
        raise DeviceError(f"unknown device {name!r}; choose auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError("no CUDA device can be used here; run with --device cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _make_ops(model: ModelConfig, config: EngineConfig, limits: Limits, device: torch.device) -> tuple[Ops, ExpertOps]:
    """The kernels that settings and device ask for."""
    dims, experts = layer_dims(model), expert_dims(model)
    if config.kernels not in ("auto", "torch", "triton"):
        raise DeviceError(f"unknown kernels {config.kernels!r}; choose auto, torch or triton")
    if config.kernels == "torch":
        return TorchOps(dims, limits, device), TorchExperts(experts, limits.tokens, device)
    if device.type == "cpu" and config.kernels == "auto":
        return CpuOps(dims, limits, config.threads), CpuExperts(experts, limits.tokens, config.threads)
    # Imported where it is used: triton exists on few platforms, and the CPU kernels on all.
    from fluxmoe.kernels.triton_experts import TritonExperts
    from fluxmoe.kernels.triton_ops import TritonOps

    formats = config.formats
    met = {config.device_format} | ({formats.host} if formats.slot == "packed" else set())
    invariant = config.batch_invariant
    return (
        TritonOps(dims, limits, device, batch_invariant=invariant),
        TritonExperts(experts, limits.tokens, device, batch_invariant=invariant, formats=met),
    )


class Engine(ServingLoop):
    """Serves one checkpoint under one budget. Not thread-safe; use as a context manager, or call `close`.

    Raises ConfigError or CheckpointError for a bad checkpoint, BudgetError if the budget cannot hold the model
    and one KV block, DeviceError, PlacementError.
    """

    def __init__(self, model_dir: Path | str, config: EngineConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or EngineConfig()
        with ExitStack() as undo:
            self._build(Path(model_dir), config, undo)
            self._resources = undo.pop_all()

    def _build(self, model_dir: Path, config: EngineConfig, resources: ExitStack) -> None:
        """Make all parts; those that hold threads, files or locked memory are closed by `resources`, in any case."""
        self.device = resolve_device(config.device)
        # Before the kernels make their workspace, which the budget is charged with.
        free, self._taken_before = FreeMemory.now(self.device), taken_bytes(self.device)
        total = available_bytes(self.device) if config.budget_bytes is None else config.budget_bytes
        free.check_budget(total)
        checkpoint = Checkpoint(model_dir)
        self.model = model = checkpoint.config
        limits = limits_of(model, config)
        self.ops, self.expert_ops = _make_ops(model, config, limits, self.device)
        layout = lay_out(model, config, self.expert_ops, lambda: measure_bandwidths(self.device))
        self.timeline = Timeline(config.timeline)
        # Only where nothing waits for the device in mid-pass, as the plain torch path does.
        graphs = config.cuda_graphs and self.device.type == "cuda" and config.kernels != "torch"
        per_graph = (config.max_batch, -(-limits.context // config.block_size), config.block_size)
        buffers = DecodeGraphs.buffer_bytes(*per_graph) if graphs else 0
        # An estimate: see `pool_bytes`.
        pool_bytes = DecodeGraphs.pool_bytes(config.max_batch, model.hidden_size, self.ops.act_dtype.itemsize)
        self._graph_bytes = buffers + pool_bytes if graphs else 0
        self.pool: BlockPool | None = None
        self.residency: Residency | None = None
        self._links: Links | None = None
        self._compute = ComputeProfile()
        in_host = host_lines(config, layout, lies_in_memory(config.spill_dir), buffers)
        shared = free.shared and config.budget_bytes is None
        if shared:
            total = free.beside(total, in_host)
        self.deployment = Deployment(
            model, config, self.ops, self.expert_ops, layout, self.device, total, self._graph_bytes, swap_inside=shared
        )
        self.placement, self.budget = self.deployment.placement, self.deployment.budget
        if config.adaptive:
            self.pool = self._open_pool()
            resources.callback(self.pool.close)
        num_blocks = self.deployment.reserve_kv()
        in_host |= self.deployment.swap_lines(num_blocks)
        self.host_budget = free.host_budget(self._most_bytes, in_host)
        self.store = self._make_store(layout)
        resources.callback(self.store.close)
        self.kv = self._make_cache(num_blocks)
        resources.callback(self.kv.close)
        self.scheduler = self._make_scheduler(limits)
        self.decoder = self._load(checkpoint, limits.context)
        has_states = model.delta is not None
        self.states = StateCache(*self.deployment.state_sizes, self.device) if has_states else None
        self.streamer = make_streamer(
            self.store, config.slots, self.device, poison=config.poison, timeline=self.timeline,
            delay=config.load_delay, link_bandwidth=config.link_bandwidth,
        )  # fmt: skip
        resources.callback(self.streamer.close)
        self.graphs: DecodeGraphs | None = None
        if graphs:
            spare = self.deployment.max_sequences
            self.graphs = DecodeGraphs(self._forward, self.streamer, *per_graph, self.device, spare)
        if self.pool is not None:
            self.residency = self._make_residency(self.pool)
            resources.callback(self.residency.close)
        self._counted = Counters(0, 0, 0, 0)

    @property
    def _most_bytes(self) -> int:
        """Device bytes that the engine may ever hold."""
        if self.pool is None:
            return self.budget.used
        lines = self.budget.lines()
        pooled = sum(lines[line] for line in (*EXPERT_LINES.values(), "kv_cache"))
        return self.budget.used - pooled + self.pool.max_blocks * self.pool.block_bytes

    def _make_cache(self, num_blocks: int) -> PagedKVCache:
        config, model = self.config, self.model
        host_blocks = num_blocks if config.preemption == "swap" else 0
        kv_layers = len(model.attention_layers)
        sizes = (config.block_size, model.num_kv_heads, model.head_dim, model.dtype, self.device)
        pin = host_blocks > 0 and self.device.type == "cuda"
        if self.pool is None:
            return PagedKVCache(self.ops, kv_layers, num_blocks, *sizes, host_blocks=host_blocks, pin=pin)
        most = self.deployment.useful_blocks
        cache = GrowableKVCache(self.ops, kv_layers, most, *sizes, pool=self.pool, host_blocks=host_blocks, pin=pin)
        try:
            # The pool has no more beside the experts, whose lines are rounded up to its blocks by now.
            lines = self.budget.lines()
            room = self.pool.max_blocks * self.pool.block_bytes - sum(lines[line] for line in EXPERT_LINES.values())
            num_blocks = min(num_blocks, room // self.deployment.block_bytes) // cache.quantum * cache.quantum
            if not num_blocks:
                raise BudgetError(
                    f"a budget of {format_bytes(self.budget.total)} leaves less than "
                    f"{format_bytes(cache.quantum_bytes)} for KV, the least that can be mapped at a time; give more"
                )
            cache.resize(num_blocks)
        except BaseException:
            cache.close()
            raise
        self.budget.release("kv_cache", self.budget.lines()["kv_cache"] - cache.nbytes)
        return cache

    def _make_scheduler(self, limits: Limits) -> Scheduler:
        config, sequences = self.config, self.deployment.max_sequences
        return Scheduler(
            self.kv.num_blocks, config.block_size, sequences, limits.tokens, config.preemption, limits.context,
            eos_token_ids=self.model.eos_token_ids, host_blocks=self.kv.host_blocks,
        )  # fmt: skip

    # Experts that move.

    def _open_pool(self) -> BlockPool:
        """One pool of physical blocks for experts and KV; what its rounding costs experts is charged to them."""
        deployment, lines = self.deployment, self.budget.lines()
        largest = max(deployment.layout.expert_bytes(name) for name in deployment.layout.sizes)
        # All experts and all KV that can be used, and whole blocks of both: more would only make blocks larger.
        useful = self.placement.tiers.size * largest + deployment.useful_blocks * deployment.block_bytes
        held = sum(lines[line] for line in EXPERT_LINES.values())
        pool = make_pool(self.device, min(deployment.kv_room + held, useful + useful // 64 + (16 << 20)))
        for line in EXPERT_LINES.values():
            self.budget.reserve(line, pool.pages(lines[line]) * pool.block_bytes - lines[line])
        return pool

    def _make_store(self, layout: ExpertLayout) -> ExpertStore:
        if self.pool is None:
            return ExpertStore(
                layout, self.device, decode=self.expert_ops.decode_expert, disk_dir=self.config.spill_dir
            )
        return MovingStore(layout, self.device, self.pool, self.deployment.most_streamed, self.expert_ops.decode_expert)

    def _make_residency(self, pool: BlockPool) -> Residency:
        config, store = self.config, self.store
        planner = popularity = None
        if config.planning:
            each = {tier: heap.unit_bytes for tier, heap in store.heaps.items()}
            planner = make_planner(config, each, pool.max_blocks * pool.block_bytes, self.kv.quantum_bytes)
            popularity = torch.zeros(*self.placement.tiers.shape, device=self.device)
            self.decoder.popularity = popularity
            if config.transfer == "auto" or self.device.type == "cuda":
                self._links = measure_links(self.device) if config.profile is None else config.profile.links
        return Residency(
            store,
            self.kv,
            self.scheduler,
            self.budget,
            pool,
            planner=planner,
            every=config.plan_every,
            grow_kv=config.grow_kv,
            links=self._links if config.transfer == "auto" else None,
            popularity=popularity,
        )

    def _load(self, checkpoint: Checkpoint, context: int) -> Decoder:
        """Stream the checkpoint into decoder and store, one tensor at a time through one staging block."""
        decoder = Decoder(self.model, self.ops, self.expert_ops, context)
        for role, layer, weight in checkpoint.dense_tensors():
            decoder.load(role, layer, weight)
        layout, ops = self.deployment.layout, self.expert_ops
        staging = {name: tuple(torch.empty(n, dtype=torch.uint8) for n in layout.sizes[name]) for name in layout.sizes}
        moe_layers = self.model.moe_layers
        total = len(moe_layers) * self.model.num_experts
        experts = tqdm(
            checkpoint.experts(), "experts", total, disable=not self.config.progress, leave=False, unit="expert"
        )
        for decoder_layer, expert, gate_up, down in experts:
            layer = moe_layers.index(decoder_layer)
            stored = self.store.stored(layer, expert)
            recipes = ops.encode_expert(gate_up, down, staging[stored], stored)
            self.store.put(layer, expert, staging[stored], recipes)
        self.store.seal()
        return decoder

    # Serving: what the loop asks for.

    def _clock_s(self) -> float:
        return time.perf_counter()

    def _wait(self, seconds: float) -> None:
        time.sleep(seconds)

    @property
    def tiers(self) -> np.ndarray:
        return self.store.layout.placement.tiers

    def _refusal(self, request: Request) -> str | None:
        outside = max(request.prompt_ids, default=0)
        if outside >= self.model.vocab_size:
            return f"token id {outside} is outside the vocabulary of {self.model.vocab_size}"
        return None

    def _execute(self, step: Step) -> Executed:
        self.kv.swap_out(step.swap_out)
        self.kv.swap_in(step.swap_in)
        if self.states is not None:
            self.states.swap_out(step.state_out)
            self.states.swap_in(step.state_in)
        batch = build_batch(step, self.config.block_size)
        if self.graphs is not None and all(chunk.length == 1 and chunk.sample for chunk in step.chunks):
            logits = self.graphs.run(batch)
        else:
            batch = batch.to(self.device)
            logits = self._forward(batch.token_ids, batch.metadata, batch.logit_rows)
        sampling = [chunk.sequence for chunk in step.chunks if chunk.sample]
        tokens = sample(logits, [s.request.params for s in sampling], [s.num_generated for s in sampling])
        before, after = self._counted, self.streamer.counters()
        self._counted = after
        return Executed(
            tokens,
            (after.stall_ns - before.stall_ns) / 1e9,
            (after.transfer_ns - before.transfer_ns) / 1e9,
            after.streamed_bytes - before.streamed_bytes,
        )

    def _adapt(self, step: Step, executed: Executed, elapsed_s: float) -> None:
        if self.residency is None:
            return
        load, compute = executed.transfer_s, elapsed_s - executed.stall_s
        if self.device.type == "cuda" and self._links is not None:
            # Copies and waits happen on the device, untimed: loads are modelled, compute is profiled.
            load = executed.streamed_bytes / self._links.copy
            compute = self._compute.compute_s(len(step.chunks), compute)
        self.residency.between_iterations(Seen(compute, load, step.num_tokens, not step.prefill_tokens))

    def _dropped(self) -> None:
        if self.states is not None:
            self.states.keep_swapped(self.scheduler.swapped_orders)

    def _forward(self, token_ids: Tensor, metadata: AttentionMetadata, logit_rows: Tensor) -> Tensor:
        return self.decoder.forward(token_ids, metadata, self.kv, self.streamer, logit_rows, self.timeline, self.states)

    def held_bytes(self) -> dict[str, int]:
        """What the parts really hold on the device, line by line, to be compared with the ledger."""
        optional = {} if self.states is None else {"states": self.states.nbytes}
        optional |= {"graphs": self._graph_bytes} if self._graph_bytes else {}
        return optional | {
            "non_expert_weights": self.decoder.nbytes,
            "resident_experts": self.store.tier_bytes(Tier.RESIDENT),
            "packed_experts": self.store.tier_bytes(Tier.PACKED),
            "slots": self.streamer.slot_bytes,
            "workspace": sum(ops.workspace_bytes for ops in (self.ops, self.expert_ops))
            + self.deployment.popularity_bytes,
            "kv_cache": self.kv.nbytes,
        }

    def memory_check(self) -> MemoryCheck:
        """The ledgers beside what is really held, to be asked after warm-up.

        On CUDA: the device's ledger, and by how much more is taken on the GPU than before the engine was made, kernels'
        code and what other processes do included. More than 2 % above the ledger is a warning.

        On a CPU: both ledgers, but for a spill file, and by how much more memory this process has touched. Less is
        usual: a workspace is touched as far as it was needed, and malloc may have kept what others gave back. Compiled
        kernels, threads and what malloc keeps are in no ledger: only above 2 % and 256 MiB it is a warning.
        """
        ledger = self.budget.used
        if self.device.type == "cpu":
            ledger += self.host_budget.used - self.host_budget.lines().get("spill", 0)
        now = taken_bytes(self.device)
        held = None if now is None or self._taken_before is None else now - self._taken_before
        return MemoryCheck.of(self.device, ledger, held)

    def close(self) -> None:
        """Stop copies, give files and locked memory back; the engine cannot be used any more. Idempotent."""
        self._resources.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
