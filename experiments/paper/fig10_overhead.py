"""What paging costs when nothing is paged out: every expert resident and dense (the paper's Exp#4, Fig. 10).

    fluxmoe paper fig10 --out results/measured/<hardware>/fig10_overhead

The experts of a row of layers lie in ordinary memory, or under the addresses of a PagedTensor whose pages are all
mapped; two kernels read them:

    table   ours: a table of addresses, one an expert        stacked: one tensor a layer; apart: one tensor an expert
    torch   one matmul an expert, which knows of no table    paged: PagedTensor's views, mapped page by page

Variants of a kernel are timed in turns, on the same layer and tokens, order shuffled; overhead is the median over
turns of time / time of `stacked` in the same turn, minus one. The paper reports at most 3.0 % for remapping. What one
map and one unmap of a block cost is timed beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from fluxmoe.kernels.expert_table import ExpertTable
from fluxmoe.kernels.ops import ExpertDims, ExpertOps
from fluxmoe.runtime.devices import device_of, resolve_device
from fluxmoe.runtime.experts.config import PagingConfig
from fluxmoe.runtime.experts.streamer import LayerPage
from fluxmoe.runtime.memory.paged_tensor import PagedTensor
from torch import Tensor
from tqdm import tqdm

from ..bench.experts import encoded, page_of, random_expert
from ..bench.timing import host_seconds, seconds_of, times_in_turns
from ..lib.args import option
from ..lib.results import UsageError, write_result
from ..lib.sweep import say
from ..plots.serving import plot_overhead

MEMORIES = ("stacked", "apart", "paged")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    device: str = option("what computes", "auto", choices=("auto", "cpu", "cuda"))
    layers: int = option("of experts", 4, least=1)
    experts: int = option("of a layer", 32, least=1)
    top_k: int = option("experts of a token", 4, least=1)
    hidden: int = option("width", 512, least=1)
    moe_intermediate: int = option("width of an expert", 512, least=1)
    batches: tuple[int, ...] = option("tokens", (1, 8, 32, 64), least=1)
    repeats: int = option("turns of each variant", 300, least=1)
    out: Path = option("folder of the results", metavar="DIR")

    def __post_init__(self) -> None:
        if self.top_k > self.experts:
            raise UsageError(f"--top-k {self.top_k} is more than the {self.experts} --experts")


class Experts:
    """The same experts in each kind of memory: blocks for our kernels, [E, n, k] for torch, by layer."""

    def __init__(self, args: Arguments, device: torch.device) -> None:
        self.dims = ExpertDims(args.hidden, args.moe_intermediate, args.experts, args.top_k, torch.bfloat16)
        self.device, self.layers = device, args.layers
        self.ops: ExpertOps = device_of(device).make_expert_ops(self.dims, max(args.batches), PagingConfig())
        sizes = self.ops.expert_bytes()
        self.paged = [
            PagedTensor(args.layers, args.experts, (n,), torch.uint8, device, slots=max(2, args.layers)) for n in sizes
        ]
        self.pages: dict[str, list[LayerPage]] = {name: [] for name in MEMORIES}
        for layer in tqdm(range(args.layers), "layers", leave=False):
            self._make_layer(layer, sizes)

    def _make_layer(self, layer: int, sizes: tuple[int, int]) -> None:
        d = self.dims
        stacked = [torch.empty(d.experts, n, dtype=torch.uint8, device=self.device) for n in sizes]
        for expert in range(d.experts):
            blocks, _ = encoded(self.ops, random_expert(d))
            for target, block in zip(stacked, blocks, strict=True):
                target[expert].copy_(block)
        for tensor, source in zip(self.paged, stacked, strict=True):
            if not tensor.states[layer].any():
                tensor.begin_load(layer)
                tensor.view(layer).copy_(source)
                tensor.end_load(layer)
            tensor.check(layer)
        memories: dict[str, Sequence[Iterable[Tensor]]] = {
            "stacked": stacked,
            "apart": [[block.clone() for block in tensor] for tensor in stacked],
            "paged": [tensor.view(layer) for tensor in self.paged],
        }
        for name, (gate_ups, downs) in memories.items():
            table = ExpertTable.from_blocks(list(zip(gate_ups, downs, strict=True)), self.device)
            self.pages[name].append(page_of(table))

    def table_kernel(self, x: Tensor, logits: Tensor, out: Tensor, layer: int, memory: str) -> None:
        self.ops.moe_add(x, self.ops.route(logits), self.pages[memory][layer], out)

    def torch_kernel(self, x: Tensor, expert_of_row: Tensor, layer: int, memory: str) -> None:
        """Every expert's gate/up product, a matmul a block: reads the bytes as bf16 [2I, H], whatever their order."""
        shape = (2 * self.dims.intermediate, self.dims.hidden)
        for expert, (gate_up, _) in enumerate(self.pages[memory][layer].table.blocks):
            rows = x[expert_of_row == expert]
            F.linear(rows, gate_up[: 2 * shape[0] * shape[1]].view(torch.bfloat16).view(shape))

    def close(self) -> None:
        for tensor in self.paged:
            tensor.close()


def measure(experts: Experts, kernel: str, batch: int, repeats: int) -> list[dict]:
    """One row a memory: times, and overhead over `stacked` turn by turn."""
    device, ops = experts.device, experts.ops
    x = torch.randn(batch, experts.dims.hidden, device=device)
    act, half = x.to(ops.act_dtype), x.bfloat16()
    logits = torch.randn(batch, experts.dims.experts, device=device)
    out, expert_of_row = torch.zeros_like(act), torch.randint(experts.dims.experts, (batch,), device=device)
    memories = MEMORIES if kernel == "table" else ("stacked", "paged")

    def run(memory: str, layer: int) -> None:
        if kernel == "table":
            experts.table_kernel(act, logits, out, layer, memory)
        else:
            experts.torch_kernel(half, expert_of_row, layer, memory)

    for memory in memories:
        run(memory, 0)
    times = times_in_turns(lambda memory, turn: seconds_of(lambda: run(memory, turn % experts.layers), device),
                           memories, repeats)  # fmt: skip
    rows = []
    for memory in memories:
        ratios = 100 * (times[memory] / times["stacked"] - 1)
        # The median's own spread: from resampled turns, since single turns are noisier than the effect.
        resampled = np.random.default_rng(0).choice(ratios, (400, len(ratios)))
        low, high = np.percentile(np.median(resampled, axis=1), [5, 95])
        rows.append(
            {
                "kernel": kernel, "memory": memory, "batch": batch, "turns": repeats,
                "time_us": float(np.median(times[memory])) * 1e6, "overhead_percent": float(np.median(ratios)),
                "overhead_p5": float(low), "overhead_p95": float(high),
            }
        )  # fmt: skip
    return rows


def map_costs(device: torch.device, count: int = 200) -> list[dict]:
    """µs of one map of a new block, of a remap of a kept one, and of an unmap."""
    times: dict[str, list[float]] = {"map": [], "unmap": [], "remap": []}
    with device_of(device).make_pool((count + 1) * (2 << 20)) as pool:
        region = pool.reserve(2 * count * pool.block_bytes)
        for page in range(count):
            times["map"].append(host_seconds(lambda: region.map(page)))  # noqa: B023
        for page in range(count):
            times["remap"].append(
                host_seconds(lambda: region.map(count + page, region.unmap(page, keep=True)))  # noqa: B023
            )
        for page in range(count, 2 * count):
            times["unmap"].append(host_seconds(lambda: region.unmap(page)))  # noqa: B023
        region.close()
        size = pool.block_bytes
    rows = []
    for what, values in times.items():
        low, middle, high = np.percentile(np.array(values) * 1e6, [20, 50, 80])
        rows.append({"call": what, "block_bytes": size, "time_us": middle, "p20_us": low, "p80_us": high})
    return rows


def run(args: Arguments) -> None:
    torch.manual_seed(0)
    device, out = resolve_device(args.device), args.out
    costs = map_costs(device)
    for cost in costs:
        say(cost)
    experts, rows = Experts(args, device), list[dict]()
    padding = [tensor.padding_bytes for tensor in experts.paged]
    for kernel in ("table", "torch"):
        for batch in args.batches:
            rows += measure(experts, kernel, batch, args.repeats)
            for row in rows[-3 if kernel == "table" else -2 :]:
                say(row)
    experts.close()
    settings = {name: getattr(args, name) for name in ("layers", "experts", "top_k", "hidden", "moe_intermediate")}
    tables = {"rows.csv": rows, "map_costs.csv": costs}
    write_result(out, "paper fig10", tables, {"device": device.type, **settings, "padding_bytes": padding}, 0)
    print(f"figure: {plot_overhead(out)}")
