"""Compile what the GPU suite will launch, on all cores, into Triton's cache on disk, before anything is timed.

    fluxmoe bench compile --out results/measured/<gpu>/compile [--tuned FILE]

Worker processes drive the launches of the steps that follow on the meta device (`kernels.launches.compile_only`): the
points of the benchmarks, whole forward passes of the engine's models, decoders, the tiles that will be tried. A row is
one such job: kernels compiled, seconds, or what the compiler said. Jobs come in the order of the steps that need them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from fluxmoe.kernels.expert_table import ExpertTable
from fluxmoe.kernels.formats import DEFAULT_COMPRESSED, DENSE, codec_of, compressed_formats
from fluxmoe.kernels.launches import compile_only
from fluxmoe.kernels.ops import AttentionMetadata, ExpertOps, Limits, MoeBlock
from fluxmoe.kernels.triton.experts import TritonExperts
from fluxmoe.kernels.triton.ops import TritonOps
from fluxmoe.kernels.triton.tiles import Tiles, capability_of, num_sms_of, read_tuned
from fluxmoe.models import ARCHITECTURES
from fluxmoe.models.decoder import Decoder, expert_dims, layer_dims
from fluxmoe.runtime.memory.slabs import SlabPool
from fluxmoe.runtime.serving.kv_cache import KVLayout, PagedKVCache
from fluxmoe.runtime.timeline import Timeline
from torch import Tensor

from ..lib.args import group, option
from ..lib.models import preset_config
from ..lib.results import code_digest, load_json, write_json
from ..lib.sweep import Sweep, say
from . import attention, delta_net, moe, tune
from .experts import page_of
from .shapes import SHAPES, Shape
from .timing import GpuBench

META = torch.device("meta")
# (sequences that decode, (sequences, tokens) of prefills) of bench engine, a job each.
ENGINE_PASSES = {"one": ((1,), ((1, 256),)), "many": ((16, 32), ()), "odd": ((24,), ()), "prefill": ((), ((8, 2048),))}
_ENGINE, _CONTEXT, _BLOCK_SIZE = "gpu-short", 1024, 32
# Of the steps that time a layer or attention.
_SHAPE = "qwen3_30b"


class Job(NamedTuple):
    """A call that can be sent to another process."""

    name: str
    work: Callable[[], None]


class Target(NamedTuple):
    """What is compiled for."""

    capability: int
    num_sms: int


def jobs(tuned: Path | None, rehearse: bool) -> Iterator[Job]:
    """All jobs, those of the first steps first. tuned: tiles for dense experts."""
    if rehearse:
        yield Job("delta net 1 1", partial(delta_point, 1, 1))
        return
    for tokens in (8192, 1024, 2048, 4096, 512):
        for provider in ("fluxmoe", "fluxmoe planar12 decoded first", "fluxmoe planar12 in place"):
            yield Job(f"prefill {tokens} {provider}", partial(layer_point, _SHAPE, tokens, provider, None))
    for provider in ("fluxmoe", "fluxmoe planar12", "fluxmoe planar8"):
        for tokens in (32, 1, 8, 128, 2, 4, 16, 64, 256, 1024, 8192):
            yield Job(f"layer {tokens} {provider}", partial(layer_point, _SHAPE, tokens, provider, tuned))
    for bound, part in product(tune.BOUNDS, range(4)):
        yield Job(f"tiles {bound} {part}", partial(candidate_tiles, _SHAPE, bound, part))
    for packed, stage in product((True, False), ENGINE_PASSES):
        yield Job(f"engine {stage}{' packed' * packed}", partial(engine_passes, packed, *ENGINE_PASSES[stage]))
    for sequences, tokens in ((1, 1), (32, 1), (128, 1), (1, 512), (1, 2048)):
        yield Job(f"delta net {sequences} {tokens}", partial(delta_point, sequences, tokens))
    for sizes in ((1, 1, 4096), (32, 1, 4096), (128, 1, 4096), (1, 1, 32768), (1, 2048, 2048), (1, 8192, 8192)):
        yield Job(f"attention {' '.join(map(str, sizes))}", partial(attention_point, _SHAPE, *sizes))
    for name in compressed_formats():
        yield Job(f"decode {name}", partial(decode, name))


# What the jobs do; all inside `compile_only`, on tensors without memory.


def layer_point(name: str, tokens: int, provider: str, tuned: Path | None) -> None:
    shape = SHAPES[name]
    ours = moe.Ours.of(provider, shape, tokens, META, read_tuned(tuned) if tuned else {})
    ours.run(moe.Layer(shape, META), *_layer_inputs(shape, tokens))


def _layer_inputs(shape: Shape, tokens: int) -> tuple[Tensor, Tensor]:
    x = torch.empty(tokens, shape.hidden, dtype=torch.bfloat16, device=META)
    return x, torch.empty(tokens, shape.experts, device=META)


def candidate_tiles(name: str, bound: int, part: int) -> None:
    """A quarter of the candidates, so that cores share them."""
    shape, layer = SHAPES[name], moe.Layer(SHAPES[name], META)
    tokens = tune.tokens_for(shape, bound)
    for tile in tune.candidates(bound, capability_of(META))[part::4]:
        moe.Ours(shape, tokens, META, tiles=Tiles(tile, tile)).run(layer, *_layer_inputs(shape, tokens))


def attention_point(name: str, sequences: int, queries: int, context: int) -> None:
    case = attention.make_case(attention.SHAPES[name], sequences, queries, context, META)
    for invariant in (False, True):
        case.ours(invariant)


def delta_point(sequences: int, tokens: int) -> None:
    case = delta_net.Case(delta_net.DIMS, sequences, tokens, META)
    for token_by_token in (False, True) if tokens > 1 else (False,):
        case.ours(token_by_token)


def decode(name: str) -> None:
    codec = codec_of(name)
    packed = codec.encode(codec.fitting((0.02 * torch.randn(256, 512)).bfloat16()))
    codec.decode_triton(packed.to("meta"), torch.empty(256, 512, dtype=torch.bfloat16, device=META))


def engine_passes(packed: bool, decode: Iterable[int], prefill: Iterable[tuple[int, int]]) -> None:
    """An engine's launches: decode steps of so many sequences, as graphs pad them and without; prefills of (sequences,
    tokens in all)."""
    config, expert_format = preset_config(_ENGINE), DEFAULT_COMPRESSED if packed else DENSE
    passes = [(n, n, graph) for n in decode for graph in (True, False)] + [(n, t, False) for n, t in prefill]
    limits = Limits(max(tokens for _, tokens, _ in passes), max(n for n, _, _ in passes), _CONTEXT, _BLOCK_SIZE)
    ops, blocks = TritonOps(layer_dims(config), limits, META), _CONTEXT // _BLOCK_SIZE
    experts = TritonExperts(expert_dims(config), limits.tokens, META, formats=(expert_format,))
    decoder, roles = Decoder(config, ops, _CONTEXT), ARCHITECTURES[config.arch].tensor_roles(config)
    for role in (*roles.required.values(), *(r for ways in roles.expert_schemes for r in ways[0].values())):
        if not role.is_expert:  # arranged on the host, and then on no device
            decoder.load(role.kind, role.layer, torch.zeros(role.shape, dtype=config.dtype))
    heads = (_BLOCK_SIZE, config.num_kv_heads, config.head_dim, config.dtype)
    layout = KVLayout.of(ops, len(config.attention_layers), *heads)
    slab = torch.empty(1, blocks * layout.block_bytes, dtype=torch.uint8, device=META)
    cache = PagedKVCache(layout, SlabPool(slab))
    block = torch.zeros(16, dtype=torch.uint8)
    pager = _Resident(experts, ExpertTable.from_blocks([(block, block)] * config.num_experts, "cpu", expert_format))
    for sequences, tokens, graph in passes:
        metadata = _metadata(sequences, tokens, blocks, graph)
        token_ids, rows = (torch.empty(n, dtype=torch.int64, device=META) for n in (tokens, sequences))
        decoder.forward(token_ids, metadata, cache, pager, rows, Timeline(False), None)


class _Resident:
    """Every layer's experts are there, and the same."""

    def __init__(self, ops: ExpertOps, table: ExpertTable) -> None:
        self._ops, self._page = ops, page_of(table)

    def mixture(
        self, layer: int, hidden: Tensor, block: MoeBlock, num_tokens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._ops.mix(self._ops.gate(hidden, block, num_tokens), block, self._page)


def _metadata(sequences: int, tokens: int, blocks: int, graph: bool) -> AttentionMetadata:
    def ints(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=META)

    return AttentionMetadata(
        query_start=ints(sequences + 1), context_lens=ints(sequences), block_table=ints(sequences, blocks),
        positions=ints(tokens), slot_mapping=ints(tokens, dtype=torch.int64), block_size=_BLOCK_SIZE,
        num_tokens=ints(1) if graph else None,
    )  # fmt: skip


def run_job(job: Job, target: Target) -> dict[str, object]:
    """In a worker: columns of the job's row."""
    torch.set_num_threads(1)
    begin = time.perf_counter()
    with compile_only(*target) as launches:
        job.work()
    kernels = {(launch.kernel.__name__, launch.compiled.hash) for launch in launches}
    return {"kernels": len(kernels), "launches": len(launches), "seconds": time.perf_counter() - begin}


def compile_all(wanted: list[Job], target: Target, workers: int, results: Sweep) -> None:
    """A row for each job, as it is done."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures: dict[Future, Job] = {pool.submit(run_job, job, target): job for job in wanted}
        for future in as_completed(futures):
            if isinstance(error := future.exception(), BrokenProcessPool):
                raise error
            say(results.measure(future.result, job=futures[future].name))


def forget_other_caches(out: Path) -> None:
    """Remove the rows of jobs whose kernels are not in this machine's cache, or were compiled from other code."""
    marker = Path(triton.knobs.cache.dir) / "fluxmoe.json"
    if not marker.exists() or load_json(marker) != {"code": code_digest()}:
        for name in ("rows.csv", "attempt.json"):
            (out / name).unlink(missing_ok=True)
        write_json(marker, {"code": code_digest()})


@dataclass(frozen=True, kw_only=True)
class Arguments:
    tuned: Path | None = option("tiles that bench tune found, if it is there", None, metavar="FILE")
    workers: int = option("processes", len(os.sched_getaffinity(0)), least=1)
    where: GpuBench = group()


def run(args: Arguments) -> None:
    device, rehearse = args.where.device, args.where.rehearse
    tuned = next((path for path in (args.tuned, tune.own_table(device)) if path and path.exists()), None)
    forget_other_caches(args.where.out)
    with args.where.rows("bench compile") as results:
        wanted = [job for job in jobs(tuned, rehearse) if not results.has(job=job.name)]
        begin = time.perf_counter()
        if rehearse:
            for job in wanted:
                say(results.measure(partial(run_job, job, Target(90, 132)), job=job.name))
        else:
            compile_all(wanted, Target(capability_of(device), num_sms_of(device)), args.workers, results)
        print(json.dumps({"jobs": len(wanted), "seconds": round(time.perf_counter() - begin, 1)}))
        results.finish()
