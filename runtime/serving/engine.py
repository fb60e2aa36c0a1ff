"""The engine: one budget, one checkpoint, requests in, tokens and per-iteration metrics out.

    Checkpoint ─► ExpertPager ─► Decoder ─► sampling
    Scheduler ◄─► PagedKVCache      ▲ batch

Construction charges every device byte to a MemoryBudget, and what the host holds beside it to another (see
`deployment`). Nothing is loaded before the budget is known to suffice, and both to fit the memory that is free.
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
from fluxmoe.kernels.ops import AttentionMetadata
from fluxmoe.kernels.packing.expert_file import ExpertFile
from fluxmoe.models.checkpoint import Checkpoint
from fluxmoe.models.decoder import Decoder, expert_dims, layer_dims
from torch import Tensor
from tqdm import tqdm

from ..devices import device_of, resolve_device
from ..experts.footprint import Footprint, lay_out
from ..experts.pager import ExpertPager
from ..experts.placement import IN_FILES, Tier
from ..experts.planner import Links
from ..experts.streamer import Counters
from ..experts.streamer_cuda import CudaStreamer
from ..hardware import measure_bandwidths, measure_links
from ..memory import machine
from ..memory.budget import explained
from ..memory.check import FreeMemory, MemoryCheck
from ..memory.slabs import FREE
from ..timeline import COMPUTE, Timeline
from .advice import advice
from .batch import build_batch
from .config import EngineConfig
from .deployment import Deployment, least_budget, limits_of, require_workspace
from .graphs import DecodeGraphs
from .kv_cache import KV_LINE, PagedKVCache
from .loop import Executed, ServingLoop
from .request import Request
from .residency import ComputeProfile, Lending, PlannerDriver, Residency, Seen, Sharing
from .sampling import sample
from .scheduler import Scheduler, Step
from .state_cache import StateCache


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
        kind = device_of(self.device)
        free, self._taken_before, self._mapped_before = FreeMemory.now(kind), kind.taken_bytes(), machine.mapped_bytes()
        total = kind.available_bytes() if config.budget_bytes is None else config.budget_bytes
        with explained(config.named):
            free.check_budget(total)
        checkpoint = Checkpoint(model_dir)
        self.model = model = checkpoint.config
        limits = limits_of(model, config)
        with explained(config.named):
            require_workspace(model, limits, max(total, free.device_bytes or 0))
        self.ops = kind.make_ops(layer_dims(model), limits, config, config.delta_net)
        self.timeline = Timeline(config.timeline, kind.clock())
        self.pager = ExpertPager(
            expert_dims(model), len(model.moe_layers), config, self.device, limits.tokens, timeline=self.timeline,
            measure=partial(measure_bandwidths, files=self._files_on_disk(checkpoint)),
        )  # fmt: skip
        # Only where nothing waits for the device in mid-pass, as the plain torch path does, and no layer is timed or
        # recorded.
        watched = config.timeline or config.record_routing
        graphs = config.cuda_graphs and kind.graphs and config.kernels != "torch" and not watched
        per_graph = (config.max_batch, -(-limits.context // config.block_size), config.block_size)
        buffers = DecodeGraphs.buffer_bytes(*per_graph) if graphs else 0
        # An estimate: see `pool_bytes`.
        pool_bytes = DecodeGraphs.pool_bytes(config.max_batch, model.hidden_size, self.ops.act_dtype.itemsize)
        self._graph_bytes = buffers + pool_bytes if graphs else 0
        self.residency: Residency | None = None
        self._links: Links | None = None
        self._compute = ComputeProfile()
        in_host = self.pager.host_lines(checkpoint.packed.header if checkpoint.packed else None)
        in_host["staging"] += buffers
        shared = free.shared and config.budget_bytes is None
        parts = model, config, self.ops, self.pager.footprint
        deploy = partial(Deployment, *parts, graph_bytes=self._graph_bytes, swap_inside=shared)
        beside = sum(in_host.values()) if free.shared else 0
        instead = partial(self._instead, checkpoint, free, total)
        with explained(config.named, beside, together=shared, least=partial(least_budget, deploy), instead=instead):
            if shared:
                total = free.beside(total, in_host)
            self.deployment = deploy(total)
            self.placement, self.budget = self.deployment.placement, self.deployment.budget
            num_blocks = self.deployment.reserve_kv()
            most_blocks = self.deployment.most_blocks
            in_host |= self.deployment.swap_lines(most_blocks)
            self.host_budget = free.host_budget(self.budget.used, in_host)
        self.pool = kind.make_slabs(*self.deployment.pool_shape, poison=config.poison)
        resources.callback(self.pager.close)
        files = self._files_of_blocks(checkpoint, resources)
        folder, content = self._disk_folder(checkpoint)
        self.pager.open(self.pool if self.deployment.slab_bytes else None, folder, content, files)
        packs = any(self.pager.wants(*where) for where in np.argwhere(self.tiers == Tier.DISK).tolist())
        # Where this start packs experts of the disk tier for the next; None where they are there, or nowhere kept.
        self.packs_into = folder if packs else None
        host_blocks = most_blocks if config.preemption == "swap" else 0
        self.kv = PagedKVCache(
            self.deployment.kv_layout, self.pool, host_blocks, pin=host_blocks > 0 and kind.asynchronous
        )
        resources.callback(self.kv.close)
        while self.kv.num_blocks < num_blocks:
            self.kv.grow()
        if config.touch_kv:
            for slab in self.pool.held(KV_LINE):
                self.pool.memory[slab].zero_()
        self.lending: Lending | None = None
        if self.deployment.lends:
            kv_slabs, cache = self.deployment.kv_slabs(self.kv.num_slabs), self.pager.store.cache
            assert cache is not None, "who lends has a cache"
            self.lending = Lending(self.kv, cache, self.budget, kv_slabs, self.pager.footprint.layout.cached)
        self.scheduler = Scheduler(
            self.kv.blocks, config.block_size, self.deployment.max_sequences, limits.tokens, config.preemption,
            limits.context, eos_token_ids=model.eos_token_ids, host_blocks=host_blocks,
        )  # fmt: skip
        self.decoder = self._load(checkpoint, files, limits.context)
        self.states: StateCache | None = None
        if model.delta is not None:
            self.states = StateCache(model.delta, *self.deployment.state_sizes, self.device)
        self.graphs: DecodeGraphs | None = None
        if graphs:
            spare, streamer = self.deployment.max_sequences, self.pager.streamer
            assert isinstance(streamer, CudaStreamer), "passes are captured on CUDA only"
            self.graphs = DecodeGraphs(self._forward, streamer, *per_graph, self.device, spare)
        if config.adaptive:
            self.residency = self._make_residency()
        self._counted = Counters()

    def _instead(self, checkpoint: Checkpoint, free: FreeMemory, total: int) -> str:
        """What would do where `total` bytes, and what is free, do not."""
        model, config, ops = self.model, self.config, self.pager.ops
        header = checkpoint.packed.header if checkpoint.packed else None
        inside = free.shared and config.budget_bytes is None

        def place(other: EngineConfig) -> Footprint:
            return Footprint(lay_out(len(model.moe_layers), other, ops, dict), other, ops)

        def deploy(other: EngineConfig, footprint: Footprint, budget: int) -> Deployment:
            return Deployment(model, other, self.ops, footprint, budget, self._graph_bytes, swap_inside=inside)

        def fits(budget: int, host: int) -> bool:
            room = total if inside else sys.maxsize if free.host_bytes is None else free.host_bytes
            return budget <= total and (budget if free.shared else 0) + host <= room

        files = device_of(self.device).reads_disk and ops.backend != "triton"
        return advice(config, place, deploy, lambda footprint: sum(footprint.host_lines(header).values()), fits, files)

    def _make_residency(self) -> Residency:
        config, planner = self.config, self.deployment.make_planner() if self.config.planning else None
        if planner is not None and (config.transfer == "auto" or device_of(self.device).asynchronous):
            self._links = measure_links(self.device) if config.profile is None else config.profile.links
        kv_slabs = self.deployment.kv_slabs(self.kv.num_slabs)
        return Residency(
            self.pager,
            Sharing(self.kv, self.scheduler, self.budget, kv_slabs),
            None if planner is None else PlannerDriver(planner, config.plan_every),
            self._links if config.transfer == "auto" else None,
        )

    def _files_on_disk(self, checkpoint: Checkpoint) -> list[Path]:
        """Files on the disk where experts of the disk tier will be; none where it holds nothing yet."""
        if self.config.placement not in IN_FILES:
            return []
        directory = self.config.disk_dir or checkpoint.directory
        found = sorted(directory.rglob("*.flux")) if directory.is_dir() else []
        return found or ([] if self.config.disk_dir else sorted(directory.glob("*.safetensors")))

    def _disk_folder(self, checkpoint: Checkpoint) -> tuple[Path | None, str]:
        """Where the disk tier's experts are kept for the next start, and the digest of the model: the packed checkpoint
        itself where its blocks are those that are stored, else a folder beside it or in `disk_dir`."""
        layout = self.pager.footprint.layout
        if not (layout.placement.tiers == Tier.DISK).any():
            return None, ""
        packed, content, backend = checkpoint.packed, checkpoint.content, self.pager.ops.backend
        expert_format = layout.stored(Tier.DISK)
        if packed is not None and (packed.header.backend, packed.header.format) == (backend, expert_format):
            return packed.directory, content
        name = f"fluxmoe-{backend}-{expert_format}-{content[:12]}"
        return (self.config.disk_dir or checkpoint.directory) / name, content

    def _files_of_blocks(self, checkpoint: Checkpoint, resources: ExitStack) -> dict[int, ExpertFile] | None:
        """By layer, of a checkpoint whose experts are blocks of these kernels."""
        packed = checkpoint.packed
        if packed is None or packed.header.backend != self.pager.ops.backend:
            return None
        return {i: resources.enter_context(packed.file(layer)) for i, layer in enumerate(self.model.moe_layers)}

    def _load(self, checkpoint: Checkpoint, files: dict[int, ExpertFile] | None, context: int) -> Decoder:
        """Stream the checkpoint into decoder and pager."""
        decoder = Decoder(self.model, self.ops, context)
        pager, rank = self.pager, {layer: i for i, layer in enumerate(self.model.moe_layers)}
        wanted = [(i, e) for i in range(len(rank)) for e in range(self.model.num_experts) if pager.wants(i, e)]
        what = f"experts, into {self.packs_into}" if self.packs_into else "experts"
        progress = tqdm(total=len(wanted), desc=what, disable=not self.config.progress, leave=False, unit="expert")
        with ExitStack() as loading:
            loading.enter_context(progress)
            if files is not None:
                loading.enter_context(pager.put_from(files, progress.update))
            # Meanwhile.
            for role, layer, weight in checkpoint.dense_tensors():
                decoder.load(role, layer, weight)
            if files is None:
                for layer, expert, *weights in checkpoint.experts(lambda i, expert: pager.wants(rank[i], expert)):
                    pager.put(rank[layer], expert, *weights)
                    progress.update()
        pager.seal()
        return decoder

    # Serving: what the loop asks for.

    def _clock_s(self) -> float:
        return time.perf_counter()

    def _wait(self, seconds: float) -> None:
        time.sleep(seconds)

    @property
    def tiers(self) -> np.ndarray:
        return self.pager.tiers

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
        if self.pager.recorder is not None:
            self.pager.recorder.label(*_labels(step))
        if self.graphs is not None and all(chunk.length == 1 and chunk.sample for chunk in step.chunks):
            logits = self.graphs.run(batch)
        else:
            batch = batch.to(self.device)
            logits = self._forward(batch.token_ids, batch.metadata, batch.logit_rows)
        sampling = [chunk.sequence for chunk in step.chunks if chunk.sample]
        with self.timeline.span(COMPUTE, "sample"):
            tokens = sample(logits, [s.request.params for s in sampling], [s.num_generated for s in sampling])
        before, after = self._counted, self.pager.counters()
        self._counted = after
        return Executed(
            tokens,
            (after.stall_ns - before.stall_ns) / 1e9,
            (after.transfer_ns - before.transfer_ns) / 1e9,
            after.streamed_bytes - before.streamed_bytes,
        )

    def _adapt(self, step: Step, executed: Executed, elapsed_s: float) -> None:
        if self.lending is not None:
            self.lending.take_back()
        if self.residency is None:
            return
        load, compute = executed.transfer_s, elapsed_s - executed.stall_s
        if device_of(self.device).asynchronous and self._links is not None:
            # Copies and waits happen on the device, untimed: loads are modelled, compute is profiled.
            load = executed.streamed_bytes / self._links.copy
            compute = self._compute.compute_s(len(step.chunks), compute)
        self.residency.between_iterations(Seen(compute, load, step.num_tokens, not step.prefill_tokens))

    def _dropped(self) -> None:
        if self.states is not None:
            self.states.keep_swapped(self.scheduler.swapped_orders)

    def _forward(self, token_ids: Tensor, metadata: AttentionMetadata, logit_rows: Tensor) -> Tensor:
        return self.decoder.forward(token_ids, metadata, self.kv, self.pager, logit_rows, self.timeline, self.states)

    def held_bytes(self) -> dict[str, int]:
        """What the parts really hold on the device, line by line, to be compared with the ledger."""
        optional = {} if self.states is None else {"states": self.states.nbytes}
        optional |= {"graphs": self._graph_bytes} if self._graph_bytes else {}
        held = self.pager.held_bytes()
        held["workspace"] += self.ops.workspace_bytes
        held |= {FREE: self.pool.bytes_of(FREE)} if self.deployment.slab_bytes else {}
        return optional | held | {"non_expert_weights": self.decoder.nbytes, KV_LINE: self.kv.nbytes}

    def memory_check(self) -> MemoryCheck:
        """The ledgers beside what is really held, to be asked after warm-up.

        On CUDA: the device's ledger, and by how much more is taken on the GPU than before the engine was made, kernels'
        code and what other processes do included. More than 2 % above the ledger is a warning.

        On a CPU: both ledgers, and by how much more memory this process has touched, or maps of files where experts are
        mapped: `mapped_bytes`. Less is usual: a workspace is touched as far as it was needed, malloc may have kept what
        others gave back, and the system may have dropped what is mapped. Compiled kernels, libraries, threads and what
        malloc keeps are in no ledger: only above 2 % and 256 MiB it is a warning.
        """
        ledger = self.budget.used
        kind = device_of(self.device)
        if kind.is_host:
            ledger += self.host_budget.used
        held, mapped = _grown(kind.taken_bytes(), self._taken_before), 0
        if self.pager.store.mapped_bytes:
            mapped = _grown(machine.mapped_bytes(), self._mapped_before) or 0
        return MemoryCheck.of(kind, ledger, held, mapped)

    def close(self) -> None:
        """Stop copies, give files and locked memory back; the engine cannot be used any more. Idempotent."""
        self._resources.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _grown(now: int | None, before: int | None) -> int | None:
    return None if now is None or before is None else now - before


def _labels(step: Step) -> tuple[np.ndarray, np.ndarray]:
    """Of each token of a step: its sequence's rank of arrival, and its position after the prompt."""
    chunks = step.chunks
    sequences = np.repeat([chunk.sequence.order for chunk in chunks], [chunk.length for chunk in chunks])
    first = [chunk.start - chunk.sequence.prompt_len for chunk in chunks]
    positions = [np.arange(start, start + chunk.length) for start, chunk in zip(first, chunks, strict=True)]
    return sequences, np.concatenate(positions)
