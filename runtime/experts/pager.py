"""ExpertPager: the experts of a model, wherever their bytes lie. The one door of this folder.

    put ─► store (tiers) ─► streamer (slots) ─► table ─► kernels        x, logits or chosen experts ─► y

    pager = ExpertPager(dims, num_layers, PagingConfig(placement="host"), "cuda", max_tokens=256)
    pager.lines()                                      # what it will take; nothing is allocated but kernels' workspace
    pager.open()
    for …: pager.put(layer, expert, gate_up, down)     # one at a time: experts are never whole anywhere
    pager.seal()
    for layer in …: x = pager.add(layer, x, logits, residual)           # passes: layers in order, pass after pass

A host is a serving engine, or a test. The pager knows no scheduler, no attention, no checkpoint format and no model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from fluxmoe.kernels.expert_table import DOWN, GATE_UP
from fluxmoe.kernels.ops import ExpertDims, ExpertOps, MoeBlock
from fluxmoe.kernels.packing.expert_file import ExpertFile, ExpertFileHeader
from torch import Tensor

from ..devices import device_of
from ..hardware import measure_bandwidths
from ..memory.slabs import FREE, SlabPool
from ..timeline import COMPUTE, Timeline
from .cache import CACHE_LINE, ExpertCache
from .cache_policies import POLICIES, Policy, static
from .config import PagingConfig
from .disk import DiskTier, StoreError
from .footprint import EXPERT_LINES, Footprint, lay_out
from .loading import loading
from .mover import MakeRoom, Mover
from .moving_store import MovingStore
from .placement import Placement, Tier
from .planner import Move
from .recording import Recording, RecordingError, RoutingRecorder
from .static_store import StaticStore
from .store import ExpertStore
from .streamer import Counters, Streamer


class PagerError(ValueError):
    """What a host asked of a pager cannot be."""


class ExpertPager:
    """Experts of `num_layers` layers of `dims`; kernels take up to `max_tokens` tokens at a time. Not thread-safe; use
    as a context manager, or call `close`.

    ops: kernels; None: those that config and device ask for. measure: bandwidths of the tiers, asked for only where
    they decide. Raises PlacementError, LayoutError, StoreError, KernelError and DeviceError for settings that cannot
    be, RecordingError for a cache_recording of another model.
    """

    def __init__(
        self,
        dims: ExpertDims,
        num_layers: int,
        config: PagingConfig,
        device: torch.device | str,
        max_tokens: int,
        *,
        ops: ExpertOps | None = None,
        timeline: Timeline | None = None,
        measure: Callable[[torch.device], Mapping[Tier, float]] = measure_bandwidths,
    ) -> None:
        self.config, self.device, self.max_tokens = config, device_of(device), max_tokens
        self.timeline = timeline or Timeline(enabled=False)
        self.ops = ops or self.device.make_expert_ops(dims, max_tokens, config)
        layout = lay_out(num_layers, config, self.ops, lambda: measure(self.device.torch))
        self.footprint = Footprint(layout, config, self.ops)
        self._cache_policy = _policy(config, num_layers, dims.experts)
        self._resources = ExitStack()
        self._store: ExpertStore | None = None
        self._streamer: Streamer | None = None
        self._mover: Mover | None = None
        self._own_pool: SlabPool | None = None
        # fp32 on the device: [L, E] how many tokens each expert was routed; of those in host memory that kernels read
        # there, in how many passes; [E] scratch.
        self.popularity: Tensor | None = None
        self._reads: Tensor | None = None
        self._on_demand_bytes = 0
        self.recorder = RoutingRecorder(num_layers, dims.experts) if config.record_routing else None

    # Parts, once they are there.

    @property
    def store(self) -> ExpertStore:
        assert self._store is not None, "a pager is opened before its experts are used"
        return self._store

    @property
    def streamer(self) -> Streamer:
        assert self._streamer is not None, "a pager is sealed before passes"
        return self._streamer

    @property
    def mover(self) -> Mover:
        assert self._mover is not None, "experts move once an adaptive pager is sealed"
        return self._mover

    # What it takes.

    def lines(self, slab_bytes: int = 0) -> dict[str, int]:
        """Device bytes by line of the ledger; before anything is allocated, too. See `Footprint.lines`."""
        return self.footprint.lines(slab_bytes)

    def host_lines(self, source: ExpertFileHeader | None = None) -> dict[str, int]:
        """Host bytes by line of the ledger; before anything is allocated, too. See `Footprint.host_lines`."""
        return self.footprint.host_lines(source)

    def held_bytes(self) -> dict[str, int]:
        """What is really held on the device, by the same lines."""
        counts = (self.popularity, self._reads, self._scratch) if self._reads is not None else (self.popularity,)
        cache = self.store.cache
        return {
            **({CACHE_LINE: cache.nbytes} if cache is not None else {}),
            **{line: self.store.tier_bytes(tier) for tier, line in EXPERT_LINES.items()},
            **({} if self._own_pool is None else {FREE: self._own_pool.bytes_of(FREE)}),
            "slots": self.streamer.slot_bytes,
            "workspace": self.ops.workspace_bytes + sum(count.nbytes for count in counts if count is not None),
        }

    # Filling.

    def open(
        self,
        pool: SlabPool | None = None,
        folder: Path | None = None,
        content: str = "",
        files: Mapping[int, ExpertFile] | None = None,
    ) -> None:
        """Allocate the tiers. pool: where experts that move lie on the device, or those of a cache, which begins with
        `Footprint.cache_places`; None: one of the pager's own, which holds all of them. folder: where experts of the
        disk tier are kept, those of a model with digest `content`, and found again; None: in nameless files of
        `config.disk_dir`. files: those of `put_from`, where kernels in the host may read experts that stay, without a
        copy. StoreError, HostMemoryError or SlabError, which leave nothing behind."""
        assert self._store is None, "a pager is opened once"
        layout, config, decode = self.footprint.layout, self.config, self.ops.decode_expert
        with ExitStack() as undo:
            if config.adaptive:
                if pool is None:
                    size = layout.slab_bytes
                    pool = self._own_pool = self.device.make_slabs(self.footprint.most_slabs(size), size, config.poison)
                self._store = MovingStore(layout, self.device, pool, self.footprint.most_streamed, decode)
            else:
                disk = self._open_disk(folder, content)
                self._store = StaticStore(layout, self.device, decode, disk, files=files)
            undo.callback(self.store.close)
            if layout.cached:
                self._store.cache = self._make_cache(pool)
            self._resources = undo.pop_all()
        # One expert at a time passes through here, arranged and compressed.
        self._staging = {
            name: (_host_bytes(gate_up), _host_bytes(down)) for name, (gate_up, down) in layout.sizes.items()
        }

    def _make_cache(self, pool: SlabPool | None) -> ExpertCache:
        config, places = self.config, self.footprint.cache_places()
        if self.ops.backend == "triton":
            raise StoreError("the Triton kernels do not tell which experts they need; use --transfer whole")
        pool = pool or self.device.make_slabs(places, self.footprint.place_bytes, config.poison)
        return ExpertCache(
            self.footprint.layout, self.store.on_disk, pool, places, self._cache_policy,
            config.link_bandwidth, config.load_delay, self.timeline,
        )  # fmt: skip

    def _open_disk(self, folder: Path | None, content: str) -> DiskTier | None:
        layout, dims = self.footprint.layout, self.ops.dims
        members = {i: layout.placement.members(i, Tier.DISK) for i in range(layout.num_layers)}
        members = {layer: experts for layer, experts in members.items() if experts}
        if not members:
            return None
        if not self.device.reads_disk:
            raise StoreError("the disk tier needs --device cpu for now; use placement host or balanced on CUDA")
        expert_format = layout.stored(Tier.DISK)
        sizes, dtype = layout.sizes[expert_format], str(dims.dtype).removeprefix("torch.")
        header = ExpertFileHeader(
            self.ops.backend, expert_format, dtype, dims.hidden, dims.intermediate, dims.experts, sizes, content
        )
        spill_dir = Path(self.config.disk_dir or tempfile.gettempdir())
        return DiskTier(header, members, folder, spill_dir, self.ops.check_expert)

    def put(self, layer: int, expert: int, gate_up: Tensor, down: Tensor) -> None:
        """Arrange, compress and store one expert: gate_up [2I, H], down [H, I] in the dtype of `dims`, copied.

        Each expert once, in any order. StoreError for one that is here already, does not exist, or is of another shape.
        """
        dims = self.ops.dims
        for name, weight, shape in zip(("gate_up", "down"), (gate_up, down), dims.shapes, strict=True):
            if tuple(weight.shape) != shape or weight.dtype != dims.dtype:
                raise StoreError(
                    f"{name} of an expert must be {list(shape)} {dims.dtype}, got {list(weight.shape)} {weight.dtype}"
                )
        if not (0 <= layer < self.footprint.layout.num_layers and 0 <= expert < dims.experts):
            raise StoreError(f"expert {expert} of layer {layer} does not exist")
        stored = self.store.stored(layer, expert)
        recipes = self.ops.encode_expert(gate_up, down, self._staging[stored], stored)
        self.store.put(layer, expert, self._staging[stored], recipes)

    def wants(self, layer: int, expert: int) -> bool:
        """Whether an expert is still to be put: those that a folder has are here already."""
        return self.store.wants(layer, expert)

    @contextmanager
    def put_from(self, files: Mapping[int, ExpertFile], done: Callable[[], object] = lambda: None) -> Iterator[None]:
        """As `put` for all experts that are wanted of the layers in `files`, of blocks that these kernels read. They
        come in threads while the context's body runs, which may do anything but use the pager; at its end they are
        here. done: called after each expert, in any thread. StoreError also where a file is damaged."""
        assert all(file.header.backend == self.ops.backend for file in files.values()), "blocks are of these kernels"
        with loading(self.store, files, self.ops.check_expert, self._put_through, done):
            yield

    def _put_through(self, layer: int, expert: int, file: ExpertFile) -> None:
        """`put` of one expert that a file has in another format, or that host code cannot read to where it will lie.
        PackingError."""
        name = file.header.format
        blocks = self._staging.get(name) or tuple(map(_host_bytes, file.header.sizes))
        for d in (GATE_UP, DOWN):
            file.read(expert, d, blocks[d], self.ops.check_expert, cached=True)
        if self.store.stored(layer, expert) == name:
            self.store.put(layer, expert, blocks, file.recipes(expert))
        else:
            self.put(layer, expert, *self.ops.weights_of(name, (blocks[0], blocks[1]), file.recipes(expert)))

    def seal(self) -> None:
        """All experts are here; loads begin. StoreError where one is missing."""
        self.store.seal()
        self._staging = {}
        layout, config = self.footprint.layout, self.config
        zeros = partial(torch.zeros, dtype=torch.float32, device=self.device.torch)
        if config.counts_routing:
            self.popularity = zeros((layout.num_layers, layout.num_experts))
        if self.footprint.counts_reads:
            self._reads = zeros((layout.num_layers, layout.num_experts))
            self._scratch = zeros(layout.num_experts)
        self._streamer = self.device.make_streamer(self.store, config, self.timeline)
        self._resources.callback(self.streamer.close)
        if isinstance(self.store, MovingStore):
            self._mover = Mover(self.store, self.device.make_courier(), timeline=self.timeline)
            self._resources.callback(self.mover.close)

    # Passes.

    def add(self, layer: int, x: Tensor, logits: Tensor, residual: Tensor, num_tokens: Tensor | None = None) -> Tensor:
        """residual + experts(x), routed by logits; may write to `residual`, and returns it.

        x, residual [T, H] in `ops.act_dtype`; logits fp32 [T, E]; num_tokens int32 [1] on the device: later rows are
        padding of a captured graph. A pass calls it for each layer, in order, and may be given up at any.
        """
        self._check(x)
        with self.streamer.layer(layer) as page, self._computes("experts", layer):
            routing = self.ops.route(logits, num_tokens)
            out = self.ops.moe_add(x, routing, page, residual)
            self._count(layer, routing)
        return out

    def mixture(
        self, layer: int, hidden: Tensor, block: MoeBlock, num_tokens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """A layer from attention to the next one's norm: hidden [T, H] with the experts' outputs added, and its norm.

        May write to `hidden`. As `add`, from the residual stream in place of x and logits.
        """
        self._check(hidden)
        with self._computes("router", layer):
            gated = self.ops.gate(hidden, block, num_tokens)
        with self.streamer.layer(layer) as page, self._computes("experts", layer):
            out = self.ops.mix(gated, block, page)
            self._count(layer, gated.routing)
        return out

    def _computes(self, what: str, layer: int) -> AbstractContextManager[None]:
        return self.timeline.span(COMPUTE, f"{what} {layer}", layer=layer)

    def _check(self, x: Tensor) -> None:
        if len(x) > self.max_tokens:
            raise PagerError(f"a pass of {len(x)} tokens; this pager was made for at most {self.max_tokens}")

    @torch.no_grad()
    def experts(self, layer: int, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """y [T, H] = Σ topk_weights · expert(x), for a host that routes itself; in the dtype of x, any float.

        topk_ids int32 or int64 [T, top_k], a token's all different, those outside 0 … E - 1 another rank's;
        topk_weights [T, top_k]. More than `max_tokens` go through the layer one part after the other. A pass calls it
        for each layer, in order, and may be given up at any.
        """
        given = x.to(self.ops.act_dtype).contiguous(), topk_ids.contiguous(), topk_weights.contiguous()
        most, out = self.max_tokens, []
        parts = [given] if x.shape[0] <= most else zip(*(tensor.split(most) for tensor in given), strict=True)
        with self.streamer.layer(layer) as page, self._computes("experts", layer):
            for i, (part, ids, weights) in enumerate(parts):
                routing = self.ops.route_to(ids, weights)
                out.append(self.ops.moe_add(part, routing, page, torch.zeros_like(part)))
                self._count(layer, routing, i)
        return (out[0] if len(out) == 1 else torch.cat(out)).to(x.dtype)

    def _count(self, layer: int, routing: object, part: int = 0) -> None:
        if self.popularity is not None:
            self.ops.count_routed(routing, self.popularity[layer])
        if self._reads is not None and self.store.on_demand:
            self.ops.count_routed(routing, self._scratch.zero_())
            self._reads[layer] += self._scratch > 0
        if self.recorder is not None:
            self.recorder.note(layer, self.ops.chosen(routing), part)

    def counters(self) -> Counters:
        """Totals so far. On CUDA, with reads in host memory, waits for the device."""
        self._settle_reads()
        moved = self._mover.copied_bytes if self._mover else 0
        counted = self.streamer.counters()._replace(on_demand_bytes=self._on_demand_bytes, moved_bytes=moved)
        if (cache := self.store.cache) is None:
            return counted
        return counted._replace(
            disk_bytes=counted.disk_bytes + cache.read_bytes,
            stall_ns=counted.stall_ns + cache.stall_ns,
            transfer_ns=counted.transfer_ns + self.store.on_disk.read_so_far()[1],
            cache_hits=cache.hits,
            cache_misses=cache.misses,
        )

    def _settle_reads(self) -> None:
        """Turn counted reads into bytes, before any expert changes tier."""
        if self._reads is None:
            return
        layout = self.store.layout
        read = self._reads.cpu().numpy()[layout.placement.tiers == Tier.HOST].sum(dtype=np.float64)
        if read:
            self._on_demand_bytes += int(read) * layout.expert_bytes(layout.stored(Tier.HOST))
        self._reads.zero_()

    # Experts that move.

    @property
    def placement(self) -> Placement:
        """Where every expert is now."""
        return (self._store or self.footprint).layout.placement

    @property
    def tiers(self) -> np.ndarray:
        """int8 [L, E]: the Tier of every expert now."""
        return self.placement.tiers

    def request(self, moves: Iterable[Move]) -> None:
        """Moves to be made from the next `apply_moves` on. PagerError unless the pager is adaptive."""
        if self._mover is None:
            raise PagerError("experts stay where they are; make the pager with adaptive=True")
        self._mover.request(moves)

    def apply_moves(self, make_room: MakeRoom | None = None) -> None:
        """Between passes; see `Mover.apply`."""
        if self.mover.busy:
            self._settle_reads()
            self.mover.apply(make_room)

    @property
    def transfer(self) -> str:
        """How HOST experts reach kernels: whole | on_demand."""
        return self.store.layout.formats.transfer

    def set_transfer(self, transfer: str) -> None:
        """Change it, between passes, where experts may move."""
        assert isinstance(self.store, MovingStore), "experts of an adaptive pager move"
        self._settle_reads()
        self.store.set_transfer(transfer)

    def close(self) -> None:
        """Stop loads, give files, pinned memory and the pager's own pool back. Idempotent."""
        self._resources.close()

    def __enter__(self) -> ExpertPager:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _host_bytes(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu")


def _policy(config: PagingConfig, num_layers: int, num_experts: int) -> Policy:
    if config.cache_recording is None:
        return POLICIES[config.cache_policy]
    recording = Recording.load(config.cache_recording)
    if recording.shape != (num_layers, num_experts):
        layers, experts = recording.shape
        raise RecordingError(
            f"{config.cache_recording} is of {layers} layers of {experts} experts, this model has {num_layers} of "
            f"{num_experts}: record its own (generate --record-routing)"
        )
    return static(recording.popularity())
