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
from dataclasses import dataclass, replace
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
from fluxmoe.kernels.triton.tiles import capability_of, choose_tiles, num_sms_of, read_tuned, tuned_tiles
from fluxmoe.models import ARCHITECTURES
from fluxmoe.models.config import ModelConfig
from fluxmoe.models.decoder import Decoder, expert_dims, layer_dims
from fluxmoe.runtime.memory.slabs import SlabPool
from fluxmoe.runtime.serving.kv_cache import KVLayout, PagedKVCache
from fluxmoe.runtime.serving.state_cache import StateCache
from fluxmoe.runtime.timeline import Timeline
from torch import Tensor

from ..lib.args import group, option
from ..lib.checkpoints import hf_config
from ..lib.models import preset_config
from ..lib.results import code_digest, load_json, write_json
from ..lib.sweep import Sweep, say
from . import attention as bench_attention
from . import bit_equality, check_engine
from . import delta_net as bench_delta_net
from . import moe as bench_grouped_gemm
from . import tune as tune_grouped_gemm
from .experts import page_of
from .shapes import SHAPES
from .timing import GpuBench

META = torch.device("meta")
# (sequences that decode, (sequences, tokens) of prefills) of bench_engine, a job each.
ENGINE_PASSES = {"one": ((1,), ((1, 256),)), "many": ((16, 32), ()), "odd": ((24,), ()), "prefill": ((), ((8, 2048),))}
_BLOCK_SIZE = 32


class Job(NamedTuple):
    """A call that can be sent to another process."""

    name: str
    work: Callable[[], None]


class Target(NamedTuple):
    """What is compiled for."""

    capability: int
    num_sms: int


def jobs(tuned: Path | None, gpu: str | None, rehearse: bool) -> Iterator[Job]:
    """All jobs, those of the first steps first. gpu: the name under which its tuned tiles are found."""
    if rehearse:
        yield Job("delta net 1 1", partial(delta_point, 1, 1))
        return
    for tokens in (8192, 1024, 2048, 4096, 512):
        for provider in ("fluxmoe", "fluxmoe planar12 decoded first", "fluxmoe planar12 in place"):
            point = partial(layer_point, "qwen3_30b", tokens, provider, None, gpu)
            yield Job(f"prefill {tokens} {provider}", point)
    for rows in bit_equality.ROWS:
        yield Job(f"bits {rows}", partial(bit_tiles, rows))
    for name in check_engine.MODELS:
        for dtype in check_engine.TOLERANCES:
            for packed in (True, False) if dtype == "bfloat16" else (False,):
                for invariant in (False, True):
                    where = f"{name} {dtype}{' packed' * packed}{' invariant' * invariant}"
                    yield Job(where, partial(small_model, name, dtype, packed, invariant))
    shapes = ("qwen3_30b", "mixtral")
    providers = ("fluxmoe", "fluxmoe invariant", "fluxmoe planar12", "fluxmoe planar8")
    for provider, shape in product(providers, shapes):
        for tokens in (1, 2, 8, 32, 128, 512, 1024, 2048, 8192):
            point = partial(layer_point, shape, tokens, provider, tuned, gpu)
            yield Job(f"layer {shape} {tokens} {provider}", point)
    for packed, stage in product((True, False), ENGINE_PASSES):
        yield Job(f"engine {stage}{' packed' * packed}", partial(preset_model, "gpu-short", packed, stage))
    for bound, shape, part in product(tune_grouped_gemm.BOUNDS, shapes, range(4)):
        yield Job(f"tiles {shape} {bound} {part}", partial(candidate_tiles, shape, bound, part))
    for shape, sizes in product(shapes, ((1, 1, 4096), (32, 1, 4096), (128, 1, 4096), (1, 2048, 2048))):
        yield Job(f"attention {shape} {sizes[0]} {sizes[1]}", partial(attention_point, shape, *sizes))
    for sequences, tokens in ((1, 1), (32, 1), (128, 1), (1, 512), (1, 2048)):
        yield Job(f"delta net {sequences} {tokens}", partial(delta_point, sequences, tokens))
    for name in compressed_formats():
        yield Job(f"decode {name}", partial(decode, name))


# What the jobs do; all inside `compile_only`, on tensors without memory.


def layer_point(name: str, tokens: int, provider: str, tuned: Path | None, gpu: str | None) -> None:
    shape = SHAPES[name]
    layer, expert_format = bench_grouped_gemm.Layer(shape, META), bench_grouped_gemm.format_of(provider)
    tiles = None
    if provider == "fluxmoe":
        rows = bench_grouped_gemm.rows_per_expert(shape, tokens)
        sizes = (shape.hidden, shape.intermediate, rows)
        tiles = tuned_tiles(read_tuned(tuned), *sizes) if tuned else None
        tiles = tiles or choose_tiles(*sizes, capability_of(META), 2, gpu)
    elif provider == "fluxmoe invariant":
        tiles = bench_grouped_gemm.invariant_tiles(META)
    how = tiles, expert_format, bench_grouped_gemm.decode_first(provider)
    ours = bench_grouped_gemm.Ours(shape, tokens, META, *how)
    ours.run(layer, *_layer_inputs(name, tokens))


def _layer_inputs(name: str, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = SHAPES[name]
    x = torch.empty(tokens, shape.hidden, dtype=torch.bfloat16, device=META)
    return x, torch.empty(tokens, shape.experts, device=META)


def candidate_tiles(name: str, bound: int, part: int) -> None:
    """A quarter of the candidates, so that cores share them."""
    shape = SHAPES[name]
    tokens, layer = tune_grouped_gemm.tokens_for(shape, bound), bench_grouped_gemm.Layer(shape, META)
    x, logits = _layer_inputs(name, tokens)
    for tile in tune_grouped_gemm.candidates(bound, capability_of(META))[part::4]:
        bench_grouped_gemm.Ours(shape, tokens, META, bench_grouped_gemm.Tiles(tile, tile)).run(layer, x, logits)


def bit_tiles(rows: int) -> None:
    twins = bit_equality.Twins(*bit_equality.SIZES, META)
    for tensor in bit_equality.TENSORS:
        for run in twins.outputs(tensor, rows):
            run()


def attention_point(name: str, sequences: int, queries: int, context: int) -> None:
    case = bench_attention.make_case(bench_attention.SHAPES[name], sequences, queries, context, META)
    for invariant in (False, True):
        case.ours(invariant)


def delta_point(sequences: int, tokens: int) -> None:
    case = bench_delta_net.Case(bench_delta_net.DIMS, sequences, tokens, META)
    for token_by_token in (False, True) if tokens > 1 else (False,):
        case.ours(token_by_token)


def decode(name: str) -> None:
    codec = codec_of(name)
    packed = codec.encode(codec.fitting((0.02 * torch.randn(256, 512)).bfloat16()))
    codec.decode_triton(packed.to("meta"), torch.empty(256, 512, dtype=torch.bfloat16, device=META))


def small_model(name: str, dtype: str, packed: bool, invariant: bool) -> None:
    shape = replace(check_engine.MODELS[name], dtype=dtype)
    config = ARCHITECTURES[shape.arch].config_from_hf(hf_config(shape))
    forward_passes(config, packed, invariant, decode=(1, 2, 4), prefill=((1, 24), (3, 22)), context=128)


def preset_model(preset: str, packed: bool, stage: str) -> None:
    forward_passes(preset_config(preset), packed, False, *ENGINE_PASSES[stage], context=1024)


def forward_passes(
    config: ModelConfig, packed: bool, invariant: bool, decode: Iterable[int], prefill: Iterable[tuple[int, int]],
    context: int,
) -> None:  # fmt: skip
    """The launches of a model's passes: decode steps of so many sequences, as graphs pad them and without; prefills of
    (sequences, tokens in all)."""
    from fluxmoe.kernels.triton.experts import TritonExperts
    from fluxmoe.kernels.triton.ops import TritonOps

    passes = [(n, n, graph) for n in decode for graph in (True, False)] + [(n, t, False) for n, t in prefill]
    most = max(sequences for sequences, _, _ in passes), max(tokens for _, tokens, _ in passes)
    limits = Limits(most[1], most[0], context, _BLOCK_SIZE)
    ops = TritonOps(layer_dims(config), limits, META, batch_invariant=invariant)
    dims, expert_format = expert_dims(config), DEFAULT_COMPRESSED if packed else DENSE
    expert_ops = TritonExperts(dims, limits.tokens, META, batch_invariant=invariant, formats=(expert_format,))
    blocks = -(-context // _BLOCK_SIZE)
    with torch.device("meta"):
        decoder = Decoder(config, ops, context)
        for role in _dense_roles(config):
            decoder.load(role.kind, role.layer, torch.empty(role.shape, dtype=config.dtype))
        heads = (_BLOCK_SIZE, config.num_kv_heads, config.head_dim, config.dtype)
        layout = KVLayout.of(ops, len(config.attention_layers), *heads)
        cache = PagedKVCache(layout, SlabPool(torch.empty(1, blocks * layout.block_bytes, dtype=torch.uint8)))
        states = (
            StateCache(config.delta, len(config.delta_layers), most[0], config.dtype, META) if config.delta else None
        )
    block = torch.zeros(16, dtype=torch.uint8)
    table = ExpertTable.from_blocks([(block, block)] * config.num_experts, "cpu", expert_format)
    for sequences, tokens, graph in passes:
        metadata = _metadata(sequences, tokens, blocks, graph)
        token_ids, rows = (torch.empty(n, dtype=torch.int64, device=META) for n in (tokens, sequences))
        decoder.forward(token_ids, metadata, cache, _Resident(expert_ops, table), rows, Timeline(False), states)


class _Resident:
    """Every layer's experts are there, and the same."""

    def __init__(self, ops: ExpertOps, table: ExpertTable) -> None:
        self._ops, self._page = ops, page_of(table)

    def mixture(
        self, layer: int, hidden: Tensor, block: MoeBlock, num_tokens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._ops.mix(self._ops.gate(hidden, block, num_tokens), block, self._page)


def _dense_roles(config: ModelConfig) -> Iterator:
    """Roles of all non-expert tensors, as a decoder is given them."""
    arch = ARCHITECTURES[config.arch]
    roles = arch.tensor_roles(config)
    every = [*roles.required.values(), *(role for ways in roles.expert_schemes for role in ways[0].values())]
    place = getattr(arch, "place", lambda config, kind, tensor: [(kind, tensor)])
    for role in every:
        if not role.is_expert:
            for kind, tensor in place(config, role.kind, torch.empty(role.shape)):
                yield type(role)(kind, role.layer, None, tuple(tensor.shape))


def _metadata(sequences: int, tokens: int, blocks: int, graph: bool) -> AttentionMetadata:
    def ints(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=META)

    return AttentionMetadata(
        query_start=ints(sequences + 1), context_lens=ints(sequences), block_table=ints(sequences, blocks),
        positions=ints(tokens), slot_mapping=ints(tokens, dtype=torch.int64), block_size=_BLOCK_SIZE,
        num_tokens=ints(1) if graph else None, state_slots=ints(sequences),
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
    tuned = args.tuned if args.tuned and args.tuned.exists() else None
    forget_other_caches(args.where.out)
    with args.where.rows("bench compile") as results:
        gpu = None if rehearse else torch.cuda.get_device_name()
        wanted = [job for job in jobs(tuned, gpu, rehearse) if not results.has(job=job.name)]
        begin = time.perf_counter()
        if rehearse:
            for job in wanted:
                say(results.measure(partial(run_job, job, Target(90, 132)), job=job.name))
        else:
            compile_all(wanted, Target(capability_of(device), num_sms_of(device)), args.workers, results)
        print(json.dumps({"jobs": len(wanted), "seconds": round(time.perf_counter() - begin, 1)}))
        results.finish()
