"""What a forward pass costs on a machine that is not there: bytes, flops and launches against a HardwareProfile.

A layer's time is the sum of its parts, each the longer of its bytes over memory bandwidth and its flops over peak:

    projections     every weight once, MLPs that all tokens use included; 2 flops a weight and token
    attention       K and V of every sequence's context once; 4·heads·D flops a query and key
    states          Gated DeltaNet: every sequence's state read and written
    experts         the expected number of distinct experts, E·(1 - (1 - k/E)^T), each in the format in which the GEMM
                    reads it; 6·H·I flops a token and chosen expert
    files           of experts that come on demand, those that are used and not cached, but for what the disk reads
                    ahead during the compute of a layer
    traffic         what loads write, and decoders read and write: a layer takes no less than all its bytes do
    all-reduce      two a layer where there are several devices: latency, and activations over the link
    launches        kernels of a layer, one after the other

Loads: bytes from the host over the link (each device fetches its share, all at once, over what they share), then
decoding to a buffer for formats that the GEMM does not read. Both are what Algorithm 1 overlaps with compute; the
simulator does that, not this file. All sizes are those of one device of `devices`, which share every matrix evenly.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from fluxmoe.kernels.formats import DECODE_ROWS, DENSE, FORMATS, decoded_at_once, fused_formats
from fluxmoe.kernels.ops import ExpertDims, Limits
from fluxmoe.models.config import ModelConfig
from fluxmoe.models.decoder import expert_dims, layer_dims

from ..experts.layout import ExpertLayout
from ..experts.placement import DEVICE_TIERS, Tier
from ..experts.read_ahead import likeliest
from ..hardware import HardwareProfile, ProfileError
from ..serving.scheduler import Step

_KERNELS_A_LAYER = 14


@dataclass(frozen=True)
class CostParameters:
    """What a profile does not say. bits: of each format; fused: formats that the GEMM reads in place.

    attention_share, expert_share: of memory bandwidth that paged attention and grouped GEMM reach; moe_flops_share: of
    peak, of a grouped GEMM; packed_share, packed_flops_share: of one that decodes on its way. An H200 measured that it
    reads at 0.74 of the rate of dense experts (LOG.md, 2026-11-29: planar12 at 8 to 128 tokens, 0.67 for 0.90 of what
    copies get), and its share of peak at 1,024. decode_rows: mean rows of an expert beyond which it is decoded to
    memory first instead; workspace_bytes: of a device, None to estimate a GPU's; eager: kernels are launched one by
    one by the host, which needs `eager_launch_s` for each with all that it does around it, instead of as graphs.
    """

    bits: Mapping[str, float] = field(default_factory=lambda: {name: each.bits for name, each in FORMATS.items()})
    fused: frozenset[str] = field(default_factory=lambda: fused_formats("triton"))
    attention_share: float = 0.75
    expert_share: float = 0.85
    moe_flops_share: float = 0.7
    packed_share: float = 0.63
    packed_flops_share: float = 0.13
    decode_rows: float = DECODE_ROWS
    workspace_bytes: int | None = None
    eager: bool = False
    eager_launch_s: float = 8e-6


def _rows_per_expert(dims: ExpertDims, tokens: int) -> float:
    """Mean, as the kernels reckon it."""
    rows = tokens * dims.top_k
    return rows / max(1, min(rows, dims.experts))


class SimExperts:
    """The sizes that `ExpertOps` on a GPU would have, of one of `devices` equal shares. Computes nothing. formats:
    those that its kernels may meet."""

    device = torch.device("cuda")

    def __init__(
        self, dims: ExpertDims, max_tokens: int, devices: int, parameters: CostParameters,
        formats: Collection[str] = (),
    ) -> None:  # fmt: skip
        self.dims, self.act_dtype, self.fused_formats = dims, dims.dtype, parameters.fused
        self._devices, self._bits = devices, parameters.bits
        width = dims.top_k * (dims.intermediate + dims.hidden) / devices
        self.workspace_bytes = int(max_tokens * width * dims.dtype.itemsize)
        if parameters.fused.intersection(formats) and _rows_per_expert(dims, max_tokens) > parameters.decode_rows:
            self.workspace_bytes += max(decoded_at_once(n, dims.experts) * n for n in self.expert_bytes())

    def expert_bytes(self, expert_format: str = DENSE) -> tuple[int, int]:
        bits = self._bits[expert_format] if self.dims.dtype.itemsize == 2 else 32.0
        gate_up, down = (int(n * k * bits / 8 / self._devices) for n, k in self.dims.shapes)
        return gate_up, down


class SimOps:
    """The sizes that `Ops` on a GPU would have, of one of `devices` equal shares of a model. Computes nothing."""

    device = torch.device("cuda")

    def __init__(
        self, model: ModelConfig, limits: Limits, devices: int, parameters: CostParameters,
        formats: Collection[str] = (),
    ) -> None:  # fmt: skip
        self.dims, self.act_dtype, self._devices = layer_dims(model), model.dtype, devices
        self.experts = SimExperts(expert_dims(model), limits.tokens, devices, parameters, formats)
        d, tokens = self.dims, limits.tokens
        width = 3 * d.hidden + (d.qkv_size + 2 * d.heads * d.head_dim + 2 * d.mlp) / devices
        width += (2 * d.delta.projected + d.delta.channels) / devices if d.delta is not None else 0
        logits = limits.sequences * d.vocab / devices * 4
        estimate = int(tokens * width * d.dtype.itemsize + logits + tokens * d.experts * 4) + (64 << 20)
        self.workspace_bytes = estimate
        if parameters.workspace_bytes is not None:
            self.workspace_bytes = parameters.workspace_bytes - self.experts.workspace_bytes

    def arranged_bytes(self, n: int, k: int) -> int:
        return n * k * self.dims.dtype.itemsize // self._devices

    def kv_block_shape(self, block_size: int, kv_heads: int, head_dim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        # Fewer heads than devices: each keeps a copy of one.
        shape = (max(1, kv_heads // self._devices), block_size, head_dim)
        return shape, shape


@dataclass(frozen=True)
class LayerCost:
    """Seconds of one layer with experts: `before` runs before they are needed, attention and any layers without experts
    in front of it; `experts` needs them."""

    before: float
    experts: float


class Load(NamedTuple):
    """What bringing a layer's experts takes: seconds on the link and of decoding, bytes that cross; how many. The tiers
    load at the same time (arXiv 2604.02715 §4.2), so a load takes the longer of the two."""

    link_s: float
    decode_s: float
    nbytes: int
    experts: int = 0


class _Reads(NamedTuple):
    """Bytes of a layer's experts as the GEMM reads them: in device memory, in the host's, of these in files on demand;
    and of device memory that its load reads and writes beside the kernels. packed: of those in device memory, what the
    GEMM decodes, and their bytes when they are; packed_experts: how many of all."""

    near: int
    far: int
    deep: int
    traffic: float
    packed: int
    unpacked: int
    packed_experts: int


class CostModel:
    """Times of layers and loads for one deployment. devices: how many share the model."""

    def __init__(
        self, model: ModelConfig, profile: HardwareProfile, devices: int, parameters: CostParameters,
    ) -> None:  # fmt: skip
        if devices > 1 and not profile.link_bandwidth:
            raise ProfileError(f"profile {profile.name} has no link_bandwidth; {devices} devices cannot share a model")
        self.model, self.profile, self.devices, self.parameters = model, profile, devices, parameters
        # Of every layer: whether it has Gated DeltaNet, and whether an MLP in the place of experts.
        self._kinds = [(i in model.delta_layers, i in model.dense_layers) for i in range(model.num_layers)]
        item, h = model.dtype.itemsize, model.hidden_size
        heads = model.head_dim * ((3 if model.attention_gate else 2) * model.num_heads + 2 * model.num_kv_heads)
        delta = 0 if model.delta is None else model.delta.projected + model.delta.value_size
        mixer = {False: heads, True: delta}
        mlp = {False: model.num_experts + 3 * model.shared_intermediate_size, True: 3 * model.mlp_intermediate_size}
        self._weights = {(d, m): (mixer[d] + mlp[m]) * h * item for d, m in self._kinds}
        layers = max(1, len(model.delta_layers))
        self._state_bytes = model.state_bytes_per_sequence / layers
        # A device that has no head of its own keeps a copy.
        kv_heads = max(1, model.num_kv_heads // devices)
        self._kv_bytes = 2 * kv_heads * model.head_dim * item
        self._launch_s = parameters.eager_launch_s if parameters.eager else profile.launch_s

    def bind(self, layout: ExpertLayout) -> list[Load]:
        """Take a layout; returns the loads of its layers."""
        self._cached, self._reads_ahead = layout.cached, layout.formats.ahead
        self._file_bytes = layout.expert_bytes(layout.stored(Tier.DISK)) if layout.cached else 0
        layers = [self._layer(layer, layout) for layer in range(layout.num_layers)]
        self._reads = [reads for reads, _ in layers]
        return [load for _, load in layers]

    def _layer(self, layer: int, layout: ExpertLayout) -> tuple[_Reads, Load]:
        """What the experts of a layer cost: read by the GEMM, and brought by its load, of one device."""
        near = far = deep = crossed = brought = packed = packed_near = 0
        traffic = decode = 0.0
        packed_bytes = 0
        # By tier: they deliver at the same time.
        ways = [0.0]
        for tier in Tier:
            count = int((layout.placement.tiers[layer] == tier).sum())
            if not count:
                continue
            name = layout.stored(tier)
            stored, read = count * layout.expert_bytes(name), count * layout.expert_bytes(layout.read(tier))
            in_gemm = layout.read(tier) != DENSE
            packed += in_gemm * count
            if tier is Tier.HOST and not layout.streams(tier):
                far += read
                continue
            near += read
            packed_near += in_gemm * count
            packed_bytes += in_gemm * read
            if tier is Tier.DISK and not layout.streams(tier):
                deep += read
            elif tier not in DEVICE_TIERS:
                rate = self.profile.disk_bandwidth / self.devices if tier is Tier.DISK else self._host_bandwidth
                ways.append(2 * self.profile.host_latency_s + stored / rate)
                crossed += stored
                brought += count
                traffic += stored
            if layout.decodes(tier):
                if not self.profile.decode_bandwidth.get(name):
                    raise ProfileError(f"profile {self.profile.name} has no decode_bandwidth of {name}; measure it")
                each = layout.expert_bytes(DENSE) / self.profile.decode_bandwidth[name]
                decode += count * (each + 2 * self.profile.decode_latency_s)
                traffic += stored + read
        unpacked = packed_near * layout.expert_bytes(DENSE)
        reads = _Reads(near, far, deep, traffic, packed_bytes, unpacked, packed)
        return reads, Load(max(ways), decode, crossed, brought)

    def pass_costs(self, step: Step, cache_places: int = 0) -> tuple[list[LayerCost], float]:
        """Costs of all layers with experts for a step's tokens, loads apart; and seconds outside them (embedding,
        layers without experts at the end, logits, scheduler, sampling). cache_places: for experts that come on demand
        from files."""
        # A cache that forgets has its share of all under uniform routing.
        missed = 1 - cache_places / self._cached if self._cached else 0.0
        model, profile, n = self.model, self.profile, self.devices
        bandwidth, flops = profile.memory_bandwidth, profile.matmul_flops
        tokens, sequences = step.num_tokens, len(step.chunks)
        keys = sum(chunk.start + chunk.length for chunk in step.chunks)
        pairs = sum(chunk.length * (chunk.start + (chunk.length + 1) / 2) for chunk in step.chunks)
        half_layer = 0.5 * _KERNELS_A_LAYER * self._launch_s + (self._all_reduce(tokens) if n > 1 else 0.0)
        common: dict[tuple[bool, bool], tuple[float, float]] = {}
        for (delta, dense), every in self._weights.items():
            weights = every / n
            seconds = max(weights / bandwidth, 2 * tokens * weights / model.dtype.itemsize / flops)
            moved = weights
            if delta:
                moved += 2 * sequences * self._state_bytes / n
                seconds += 2 * sequences * self._state_bytes / n / bandwidth
                d = model.delta
                assert d is not None, "layers of Gated DeltaNet have sizes"
                seconds += tokens * 6 * d.value_heads * d.key_dim * d.value_dim / n / flops
            else:
                moved += keys * self._kv_bytes
                read = keys * self._kv_bytes / (self.parameters.attention_share * bandwidth)
                seconds += max(read, 4 * pairs * model.num_heads * model.head_dim / n / (0.5 * flops))
            common[delta, dense] = seconds + (2 if dense else 1) * half_layer, moved
        distinct = model.num_experts * (1 - (1 - model.top_k / model.num_experts) ** tokens)
        work = 6 * tokens * model.top_k * model.hidden_size * model.moe_intermediate_size / n
        work_s = work / flops
        decodes_first = _rows_per_expert(expert_dims(model), tokens) > self.parameters.decode_rows
        costs: list[LayerCost] = []
        share = distinct / model.num_experts
        before = moved = 0.0
        for delta, dense in self._kinds:
            seconds, nbytes = common[delta, dense]
            before, moved = before + seconds, moved + nbytes
            if dense:
                continue
            reads = self._reads[len(costs)]
            gemm_s, decoded = self._experts_s(reads, share, work_s, decodes_first)
            seconds = gemm_s + half_layer
            seconds += share * reads.far / profile.kernel_host_bandwidth
            if reads.deep:
                # The layer before is like this one.
                idle_s = before + seconds if self._reads_ahead else 0.0
                seconds += self._waits_s(reads.deep * missed, share, idle_s)
            # Loads and decoders take what bandwidth the kernels leave; beyond it, they make the layer longer.
            busy = (moved + share * reads.near + decoded + reads.traffic) / bandwidth
            costs.append(LayerCost(before, max(seconds, busy - before)))
            before = moved = 0.0
        vocab = model.vocab_size * model.hidden_size * model.dtype.itemsize / n
        outside = max(vocab / bandwidth, 2 * sequences * vocab / model.dtype.itemsize / flops) + profile.iteration_s
        return costs, before + outside

    def _experts_s(self, reads: _Reads, share: float, work_s: float, decodes_first: bool) -> tuple[float, float]:
        """(seconds of a layer's experts in device memory, bytes that decoding them first adds). share: of the experts
        that have rows; work_s: of the products at peak."""
        p, bandwidth = self.parameters, self.profile.memory_bandwidth
        dense = reads.near - reads.packed
        if decodes_first:
            # Read packed and written; then read as dense ones are.
            decoding, gemm = share * (reads.packed + reads.unpacked), share * (dense + reads.unpacked)
            gemm_s = max(gemm / (p.expert_share * bandwidth), work_s / p.moe_flops_share)
            return decoding / (p.expert_share * bandwidth) + gemm_s, decoding + share * (reads.unpacked - reads.packed)
        read_s = share * (dense / p.expert_share + reads.packed / p.packed_share) / bandwidth
        slow = reads.packed_experts / self.model.num_experts
        return max(read_s, work_s * ((1 - slow) / p.moe_flops_share + slow / p.packed_flops_share)), 0.0

    def _waits_s(self, absent_bytes: float, chance: float, idle_s: float) -> float:
        """Of a layer, for those of its absent experts that are used, each with `chance`; what comes in the `idle_s` of
        its disk before is not waited for."""
        rate = self.profile.disk_bandwidth / self.devices
        absent = round(absent_bytes / self._file_bytes)
        ahead = len(likeliest(np.full(absent, chance), self._file_bytes, idle_s * rate))
        return chance * (absent_bytes - ahead * self._file_bytes) / rate

    def _all_reduce(self, tokens: int) -> float:
        payload = tokens * self.model.hidden_size * self.model.dtype.itemsize
        return self.profile.link_latency_s + payload / self.profile.link_bandwidth

    @property
    def _host_bandwidth(self) -> float:
        shared = self.profile.host_link_shared
        return min(self.profile.host_bandwidth, shared / self.devices) if shared else self.profile.host_bandwidth

    def link_seconds(self, nbytes: float) -> float:
        """What swapped KV and states take to cross the link, before a pass may begin; each device moves its own."""
        return nbytes / self._host_bandwidth
