"""The engine: one budget, one checkpoint, requests in, tokens and per-iteration metrics out.

    Checkpoint ─► ExpertStore (tiers) ─► streamer (slots) ─► Decoder ─► sampling
    Scheduler ◄─► PagedKVCache            ▲ tables            ▲ batch

Construction charges every device byte to a MemoryBudget (see `deployment`). Nothing big is loaded before the budget is
known to suffice.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from fluxmoe.kernels.cpu.ops import CpuOps
from fluxmoe.kernels.ops import AttentionMetadata, LayerDims, Limits, Ops
from fluxmoe.kernels.torch_ops import TorchOps
from fluxmoe.models.checkpoint import Checkpoint
from fluxmoe.models.decoder import Decoder, layer_dims
from torch import Tensor
from tqdm import tqdm

from .batch import build_batch
from .budget import BudgetError, available_bytes, format_bytes
from .config import EngineConfig
from .deployment import EXPERT_LINES, Deployment, lay_out, limits_of, make_planner
from .graphs import DecodeGraphs
from .hardware import measure_bandwidths, measure_links
from .kv_cache import GrowableKVCache, PagedKVCache
from .layout import ExpertLayout
from .metrics import StepMetrics
from .moving_store import MovingStore
from .placement import DEVICE_TIERS, Tier
from .planner import Links
from .region import BlockPool, make_pool
from .request import Request, RequestOutput, Sequence
from .residency import ComputeProfile, Residency, Seen
from .sampling import sample
from .scheduler import Scheduler
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


def _make_ops(config: EngineConfig, dims: LayerDims, limits: Limits, device: torch.device) -> Ops:
    if config.kernels not in ("auto", "torch", "triton"):
        raise DeviceError(f"unknown kernels {config.kernels!r}; choose auto, torch or triton")
    if config.kernels == "torch":
        return TorchOps(dims, limits, device)
    if device.type == "cpu" and config.kernels == "auto":
        return CpuOps(dims, limits, config.threads)
    # Imported where it is used: triton exists on few platforms, and the CPU kernels on all.
    from fluxmoe.kernels.triton_ops import TritonOps

    formats = config.formats
    planar12 = config.device_format == "planar12" or (formats.host == "planar12" and formats.slot == "packed")
    return TritonOps(dims, limits, device, batch_invariant=config.batch_invariant, planar12=planar12)


class Engine:
    """Serves one checkpoint under one budget. Not thread-safe; use as a context manager, or call `close`.

    Raises ConfigError or CheckpointError for a bad checkpoint, BudgetError if the budget cannot hold the model
    and one KV block, DeviceError, PlacementError.
    """

    def __init__(self, model_dir: Path | str, config: EngineConfig | None = None) -> None:
        self.config = config = config or EngineConfig()
        self.device = resolve_device(config.device)
        checkpoint = Checkpoint(model_dir)
        self.model = model = checkpoint.config
        limits = limits_of(model, config)
        self.ops = _make_ops(config, layer_dims(model), limits, self.device)
        layout = lay_out(model, config, self.ops, lambda: measure_bandwidths(self.device))
        self.timeline = Timeline(config.timeline)
        # Only where nothing waits for the device in mid-pass, as the plain torch path does.
        graphs = config.cuda_graphs and self.device.type == "cuda" and config.kernels != "torch"
        per_graph = (config.max_batch, -(-limits.context // config.block_size), config.block_size)
        self._graph_bytes = DecodeGraphs.buffer_bytes(*per_graph) if graphs else 0
        self.pool: BlockPool | None = None
        self.residency: Residency | None = None
        self._links: Links | None = None
        self._compute = ComputeProfile()
        total = available_bytes(self.device) if config.budget_bytes is None else config.budget_bytes
        self.deployment = Deployment(model, config, self.ops, layout, self.device, total, self._graph_bytes)
        self.placement, self.budget = self.deployment.placement, self.deployment.budget
        if config.adaptive:
            self.pool = self._open_pool()
        num_blocks = self.deployment.reserve_kv()
        self.store = self._make_store(layout)
        try:
            self.decoder = self._load(checkpoint, limits.context)
            self.kv, self.scheduler = self._cache_and_scheduler(num_blocks, limits)
            has_states = model.delta is not None
            self.states = StateCache(*self.deployment.state_sizes, self.device) if has_states else None
            self.streamer = make_streamer(
                self.store,
                config.slots,
                self.device,
                poison=config.poison,
                timeline=self.timeline,
                delay=config.load_delay,
                link_bandwidth=config.link_bandwidth,
            )
        except BaseException:
            self.store.close()
            raise
        self.graphs: DecodeGraphs | None = None
        if graphs:
            spare = self.deployment.max_sequences
            self.graphs = DecodeGraphs(self._forward, self.streamer, *per_graph, self.device, spare)
        if self.pool is not None:
            self.residency = self._make_residency(self.pool)
        self._iteration = 0
        self._counted = Counters(0, 0, 0, 0)

    def _cache_and_scheduler(self, num_blocks: int, limits: Limits) -> tuple[PagedKVCache, Scheduler]:
        config, model = self.config, self.model
        host_blocks = num_blocks if config.preemption == "swap" else 0
        kv_layers = len(model.attention_layers)
        sizes = (config.block_size, model.num_kv_heads, model.head_dim, model.dtype, self.device)
        pin = host_blocks > 0 and self.device.type == "cuda"
        if self.pool is None:
            cache = PagedKVCache(self.ops, kv_layers, num_blocks, *sizes, host_blocks=host_blocks, pin=pin)
        else:
            most = self.deployment.useful_blocks
            cache = GrowableKVCache(self.ops, kv_layers, most, *sizes, pool=self.pool, host_blocks=host_blocks, pin=pin)
            num_blocks = num_blocks // cache.quantum * cache.quantum
            if not num_blocks:
                cache.close()
                raise BudgetError(
                    f"a budget of {format_bytes(self.budget.total)} leaves less than "
                    f"{format_bytes(cache.quantum_bytes)} for KV, the least that can be mapped at a time; give more"
                )
            cache.resize(num_blocks)
            self.budget.release("kv_cache", self.budget.lines()["kv_cache"] - cache.nbytes)
        scheduler = Scheduler(
            num_blocks,
            config.block_size,
            self.deployment.max_sequences,
            limits.tokens,
            config.preemption,
            limits.context,
            eos_token_ids=model.eos_token_ids,
            host_blocks=host_blocks,
        )
        return cache, scheduler

    # Experts that move.

    def _open_pool(self) -> BlockPool:
        """One pool of physical blocks for experts and KV; what its rounding costs experts is charged to them."""
        deployment, lines = self.deployment, self.budget.lines()
        largest = max(deployment.layout.expert_bytes(name) for name in deployment.layout.sizes)
        # All experts and all KV that can be used, and whole blocks of both: more would only make blocks larger.
        useful = self.placement.tiers.size * largest + deployment.useful_blocks * deployment.block_bytes
        held = sum(lines[line] for line in EXPERT_LINES.values())
        pool = make_pool(self.device, min(self.budget.free + held, useful + useful // 64 + (16 << 20)))
        for line in EXPERT_LINES.values():
            self.budget.reserve(line, pool.pages(lines[line]) * pool.block_bytes - lines[line])
        return pool

    def _make_store(self, layout: ExpertLayout) -> ExpertStore:
        if self.pool is None:
            return ExpertStore(layout, self.device, decode=self.ops.decode_expert, disk_dir=self.config.disk_dir)
        return MovingStore(layout, self.device, self.pool, self.deployment.most_streamed, self.ops.decode_expert)

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
            on_change=self.graphs.forget if self.graphs is not None else lambda: None,
            planner=planner,
            every=config.plan_every,
            grow_kv=config.grow_kv,
            links=self._links if config.transfer == "auto" else None,
            popularity=popularity,
        )

    def _load(self, checkpoint: Checkpoint, context: int) -> Decoder:
        """Stream the checkpoint into decoder and store, one tensor at a time through one staging block."""
        decoder = Decoder(self.model, self.ops, context)
        for role, layer, weight in checkpoint.dense_tensors():
            decoder.load(role, layer, weight)
        layout, ops = self.deployment.layout, self.ops
        staging = {name: tuple(torch.empty(n, dtype=torch.uint8) for n in layout.sizes[name]) for name in layout.sizes}
        moe_layers = self.model.moe_layers
        total = len(moe_layers) * self.model.num_experts
        experts = tqdm(
            checkpoint.experts(), "experts", total, disable=not self.config.progress, leave=False, unit="expert"
        )
        for decoder_layer, expert, gate_up, down in experts:
            layer = moe_layers.index(decoder_layer)
            stored = self.store.stored(layer, expert)
            recipes = ops.pack_expert(gate_up, down, staging[stored], stored)
            self.store.put(layer, expert, staging[stored], recipes)
        self.store.seal()
        return decoder

    # Serving.

    def generate(self, requests: Iterable[Request]) -> list[RequestOutput]:
        """Serve all requests; outputs in the order given. Refused ones carry their reason and no tokens."""
        requests = list(requests)
        outputs: dict[int, RequestOutput] = {}
        for _ in self.steps(requests, outputs):
            pass
        return [outputs[request.request_id] for request in requests]

    def steps(
        self, requests: Iterable[Request], outputs: dict[int, RequestOutput] | None = None
    ) -> Iterator[StepMetrics]:
        """Serve `requests` iteration by iteration; finished ones are put into `outputs` by request id.

        A request joins once its `arrival_s` (seconds after the first step) has passed.
        """
        outputs = {} if outputs is None else outputs
        pending = sorted(requests, key=lambda r: r.arrival_s, reverse=True)
        begin = time.perf_counter()
        while pending or self.scheduler.has_work:
            now = time.perf_counter() - begin
            while pending and pending[-1].arrival_s <= now:
                request = pending.pop()
                refusal = self._admit(request)
                if refusal:
                    outputs[request.request_id] = RequestOutput.refused(request, refusal, now)
            if self.scheduler.has_work:
                yield self._step(begin, outputs)
            elif pending:
                time.sleep(max(0.0, pending[-1].arrival_s - now))

    def _admit(self, request: Request) -> str | None:
        """Queue a request, or say why it cannot be served."""
        outside = max(request.prompt_ids, default=0)
        if outside >= self.model.vocab_size:
            return f"token id {outside} is outside the vocabulary of {self.model.vocab_size}"
        admitted = self.scheduler.add(request)
        return None if isinstance(admitted, Sequence) else admitted

    def _step(self, begin: float, outputs: dict[int, RequestOutput]) -> StepMetrics:
        started = time.perf_counter()
        step = self.scheduler.schedule()
        self.kv.swap_out(step.swap_out)
        self.kv.swap_in(step.swap_in)
        if self.states is not None:
            self.states.swap_out(step.state_out)
            self.states.swap_in(step.state_in)
        blocks_used = self.scheduler.blocks_used
        batch = build_batch(step, self.config.block_size)
        if self.graphs is not None and all(chunk.length == 1 and chunk.sample for chunk in step.chunks):
            logits = self.graphs.run(batch)
        else:
            batch = batch.to(self.device)
            logits = self._forward(batch.token_ids, batch.metadata, batch.logit_rows)
        sampling = [chunk.sequence for chunk in step.chunks if chunk.sample]
        tokens = sample(logits, [s.request.params for s in sampling], [s.num_generated for s in sampling])
        now = time.perf_counter() - begin
        for sequence in sampling:
            if sequence.first_token_s is None:
                sequence.first_token_s = now
        finished = self.scheduler.commit(
            step, {s.request.request_id: token for s, token in zip(sampling, tokens, strict=True)}
        )
        for sequence in finished:
            sequence.finish_s = now
            outputs[sequence.request.request_id] = sequence.output()
        before, after = self._counted, self.streamer.counters()
        self._counted = after
        if self.residency is not None:
            stall, load = (after.stall_ns - before.stall_ns) / 1e9, (after.transfer_ns - before.transfer_ns) / 1e9
            compute = time.perf_counter() - started - stall
            if self.device.type == "cuda" and self._links is not None:
                # Copies and waits happen on the device, untimed: loads are modelled, compute is profiled.
                load = (after.streamed_bytes - before.streamed_bytes) / self._links.copy
                compute = self._compute.compute_s(len(step.chunks), compute)
            self.residency.between_iterations(Seen(compute, load, step.num_tokens, not step.prefill_tokens))
        self._iteration += 1
        return StepMetrics(
            iteration=self._iteration - 1,
            time_s=now,
            duration_s=time.perf_counter() - started,
            batch=len(step.chunks),
            prefill_tokens=step.prefill_tokens,
            decode_tokens=step.decode_tokens,
            kv_blocks_used=blocks_used,
            kv_blocks=self.kv.num_blocks,
            waiting=self.scheduler.num_waiting,
            streamed_bytes=after.streamed_bytes - before.streamed_bytes,
            stall_s=(after.stall_ns - before.stall_ns) / 1e9,
            transfer_s=(after.transfer_ns - before.transfer_ns) / 1e9,
            preemptions=step.num_preempted,
            swapped_blocks=len(step.swap_out) + len(step.swap_in),
            finished=len(finished),
            device_experts=int(np.isin(self.store.layout.placement.tiers, DEVICE_TIERS).sum()),
        )

    def _forward(self, token_ids: Tensor, metadata: AttentionMetadata, logit_rows: Tensor) -> Tensor:
        return self.decoder.forward(token_ids, metadata, self.kv, self.streamer, logit_rows, self.timeline, self.states)

    def held_bytes(self) -> dict[str, int]:
        """What the parts really hold on the device, line by line, to be compared with the ledger."""
        states = {} if self.states is None else {"states": self.states.nbytes}
        return states | {
            "non_expert_weights": self.decoder.nbytes,
            "resident_experts": self.store.tier_bytes(Tier.RESIDENT),
            "packed_experts": self.store.tier_bytes(Tier.PACKED),
            "slots": self.streamer.slot_bytes,
            "workspace": self.ops.workspace_bytes + self._graph_bytes + self.deployment.popularity_bytes,
            "kv_cache": self.kv.nbytes,
        }

    def close(self) -> None:
        """Stop the copy thread, remove the spill file. The engine cannot be used afterwards."""
        self.streamer.close()
        if self.residency is not None:
            self.residency.settle()
        self.store.close()
        if self.pool is not None:
            self.kv.close()
            self.pool.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
