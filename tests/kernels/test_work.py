"""What kernels declare of their launches: bytes and flops, experts without tokens left out."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
from functools import partial

import fluxmoe.kernels.packing
import fluxmoe.kernels.triton
import pytest
import torch
from fluxmoe.kernels.expert_table import ExpertTable
from fluxmoe.kernels.formats import FORMATS
from fluxmoe.kernels.launches import recorded_work, work_of
from fluxmoe.kernels.ops import ExpertDims
from fluxmoe.kernels.triton._grouped_gemm import TableArrays, work_of_gemm
from fluxmoe.kernels.triton._paged_attention import AttentionDims, PagedKV, _attention_work
from fluxmoe.kernels.triton.decoded import DecodedExperts
from fluxmoe.kernels.triton.gates import scale
from fluxmoe.kernels.triton.grouped_gemm import gate_up
from fluxmoe.kernels.triton.host_read import sum_in_place
from fluxmoe.kernels.triton.norm import normed_row, rms_norm
from fluxmoe.kernels.triton.routing import Router
from fluxmoe.kernels.triton.tiles import Tile
from fluxmoe.kernels.work import touched_experts

from ..compiling import run_script

N, K, EXPERTS = 64, 128, 4


def gemm_arguments(formats, tensor, shared=None) -> dict:
    """Of a launch in which two tokens choose experts 1 and 3."""
    logits = torch.tensor([[0.0, 9.0, -9.0, -9.0], [-9.0, -9.0, 0.0, 9.0]])
    routing = Router(2, EXPERTS, 1, True, "cpu")(logits, 16)
    block = torch.zeros(16, dtype=torch.uint8)
    table = ExpertTable.from_blocks([(block, block)] * EXPERTS, "cpu", formats)
    arrays = TableArrays(table.addresses, table.formats, shared)
    x = torch.zeros(2, K, dtype=torch.bfloat16)
    return {"N": N, "K": K, "TENSOR": tensor, "table": arrays, "routing": routing.arrays, "x_ptr": x}


@pytest.mark.parametrize(
    ("formats", "bits"),
    [
        pytest.param("dense", 2 * 16, id="dense"),
        pytest.param(["planar12", "dense", "planar12", "dense"], 2 * 16, id="compressed experts without tokens"),
        pytest.param(["dense", "planar12", "dense", "dense"], 16 + 12.006, id="one of two compressed"),
        pytest.param("planar8", 2 * 8.006, id="all compressed"),
    ],
)
@pytest.mark.parametrize(("tensor", "written"), [(0, N // 2), (1, N)], ids=["gate_up", "down"])
def test_a_grouped_gemm_reads_the_experts_that_have_tokens(formats, bits, tensor, written):
    nbytes, flops = work_of_gemm(gemm_arguments(formats, tensor))
    assert nbytes == pytest.approx(bits / 8 * N * K + 2 * (2 * K + 2 * written))
    assert flops == 2 * 2 * N * K


@pytest.mark.parametrize("experts_at_once", [1, 3, EXPERTS])
def test_groups_that_are_decoded_first_add_up_to_a_launch(experts_at_once):
    """Each expert with tokens is read packed and written; the GEMMs then declare what one on dense experts does."""
    logits = torch.tensor([[0.0, 9.0, -9.0, -9.0], [-9.0, -9.0, 0.0, 9.0], [-9.0, -9.0, 0.0, 9.0]])
    routing = Router(3, EXPERTS, 1, True, "cpu")(logits, 16)
    dims = ExpertDims(K, N, EXPERTS, 1, torch.bfloat16)
    weight, blocks = torch.randn(2 * N, K).bfloat16(), FORMATS["planar12"].blocks("triton")
    block = torch.zeros(blocks.nbytes(2 * N, K), dtype=torch.uint8)
    blocks.encode(weight, block)
    x, h, tile = torch.zeros(3, K).bfloat16(), torch.zeros(3, N).bfloat16(), Tile(16, 32, 32, 4, 2)

    def work(block, name, decoded):
        table = ExpertTable.from_blocks([(block, block)] * EXPERTS, "cpu", name)
        return work_of(lambda: gate_up(x, table, routing, h, torch.bfloat16, tile, 1, decoded))

    packed = work(block, "planar12", DecodedExperts(dims, "cpu", experts_at_once * 4 * N * K))
    dense = work(weight.view(torch.uint8).flatten(), "dense", None)
    assert packed.flops == dense.flops
    assert packed.nbytes == pytest.approx(dense.nbytes + 2 * (12.006 / 8 + 2) * 2 * N * K, rel=1e-3)


MODULES = [
    f"{package.__name__}.{found.name}"
    for package in (fluxmoe.kernels.triton, fluxmoe.kernels.packing)
    for found in pkgutil.iter_modules(package.__path__)
]


def launched_kernels() -> set[str]:
    """Names of all kernels that the host launches, as opposed to functions that kernels call."""
    found = {name: each for module in MODULES for name, each in vars(importlib.import_module(module)).items()}
    return {name for name, each in found.items() if isinstance(each, type(normed_row)) and name.endswith("_kernel")}


@pytest.mark.parametrize("module", MODULES)
def test_no_kernel_has_more_arguments_than_a_reader_holds(module):
    found = vars(importlib.import_module(module))
    kernels = {name: each.fn for name, each in found.items() if isinstance(each, type(normed_row))}
    assert {name: count for name, fn in kernels.items() if (count := len(inspect.signature(fn).parameters)) > 14} == {}


def test_uniform_routing_touches_so_many_where_nobody_knows():
    start = torch.empty(129, device="meta")
    assert touched_experts(start, 1, 8) == pytest.approx(8)
    assert touched_experts(start, 8, 8) == pytest.approx(51.6, abs=0.1)
    assert touched_experts(torch.tensor([0, 2, 2, 3]), 3, 1) == 2


WALK = """
import json
from dataclasses import is_dataclass

from fluxmoe.kernels.audit import cases_of
from fluxmoe.kernels.launches import record_only


rows = []
for case in cases_of("sm_90"):
    with record_only(90) as launches:
        case.launch()
    for each in launches:
        parts = [v for v in each.constexprs.values() if is_dataclass(v)]
        frozen = all(part.__dataclass_params__.frozen for part in parts)
        loose = [name for name in each.constexprs if name.startswith("BLOCK") or name.endswith("_P2")]
        dependent = each.compiled.metadata.launch_pdl
        rows.append([case.name, each.kernel.__name__, len(each.kernel.params), each.work, frozen, loose, dependent])
print(json.dumps(rows))
"""
# Bytes and flops of launches of the audit, by what they compute: sizes as `audit_cases` of their modules have them.
_ROW, _LOGITS = 2 * 2048, 4 * 32 * 128  # a token of bf16; 32 tokens' logits
_TOUCHED = 128 * (1 - (1 - 8 / 128) ** 64)  # experts that 64 tokens of top 8 reach
_KV = 2 * 2 * 4 * 128  # K and V of a position: 4 heads of 128
DECODERS = {"_planar_kernel", "_tiered_kernel", "_huffman_kernel"}
DECLARED = {
    ("rms_norm/qwen3-30b-a3b", "_rms_norm_kernel"): (64 * 2 * _ROW, 0),
    ("combine", "_combine_kernel"): (64 * (8 + 2) * _ROW, 0),
    ("combine_and_norm", "_combine_and_norm_kernel"): (64 * (8 + 3) * _ROW, 0),
    ("grouped_gemm gate_up, 16 rows", "_grouped_gemm_kernel"): (
        _TOUCHED * 2 * 1536 * 2048 + 64 * _ROW + 512 * 2 * 768, 2 * 512 * 1536 * 2048,
    ),
    ("grouped_gemm down, planar12, 16 rows", "_grouped_gemm_kernel"): (
        _TOUCHED * 12.006 / 8 * 768 * 2048 + 512 * (2 * 768 + _ROW), 2 * 512 * 768 * 2048,
    ),
    # Read at 12 bits and written at 16; then read by the dense kernel.
    ("grouped_gemm down, planar12, decoded first", "_decode_experts_kernel"): (
        _TOUCHED * (12.006 / 8 + 2) * 768 * 2048, 0,
    ),
    ("grouped_gemm down, planar12, decoded first", "_grouped_gemm_kernel"): (
        _TOUCHED * 2 * 768 * 2048 + 512 * (2 * 768 + _ROW), 2 * 512 * 768 * 2048,
    ),
    # Logits in; of every row its expert, weight and place in the order out.
    ("routing/128 experts, 32 tokens", "_route_kernel"): (_LOGITS + 32 * 8 * 12, 0),
    ("routing/128 experts, 256 tokens", "_scan_kernel"): (2 * 8 * 4 * 128 + 16 * (256 * 8 // 16 + 128), 0),
    ("gate/128 experts, 32 tokens", "_gate_kernel"): (
        32 * 2 * _ROW + 128 * _ROW + _LOGITS + 32 * 8 * 12, 2 * 32 * 128 * 2048,
    ),
    ("swiglu/qwen3-next", "_swiglu_kernel"): (64 * (2 * 3 * 512 + _ROW), 0),
    ("scale/qwen3-next", "_scale_kernel"): (3 * 64 * 2 * 4096, 0),
    ("rope_and_cache/qwen3-30b-a3b", "_rope_and_cache_kernel"): (64 * 2 * 2 * (32 + 4 + 4) * 128, 0),
    ("attention_decode/qwen3-30b-a3b", "_decode_kernel"): (
        128 * (4096 * _KV + 2 * 2 * 32 * 128), 128 * 4 * 4096 * 32 * 128,
    ),
    ("attention_split/qwen3-30b-a3b", "_merge_kernel"): (32 * (64 * 4 * (128 + 2) + 2 * 128), 0),
    # Of 512 queries the first sees 3585 keys, the last 4096.
    ("attention_prefill/qwen3-30b-a3b", "_prefill_kernel"): (
        2 * 4096 * _KV + 2 * 1024 * 2 * 32 * 128, 2 * 4 * sum(range(3585, 4097)) * 32 * 128,
    ),
    ("delta_net_decode/qwen3-next", "_recurrent_kernel"): (
        64 * (2 * 4 * 32 * 128 * 128 + 2 * (8192 + 64 + 4096 + 3 * 8192)), 0,
    ),
    # 256 tokens each: 4 chunks. The inverse takes four products of 64 by 64 in three parts.
    ("delta_net_prefill/qwen3-next", "_chunk_kernel"): (
        512 * (2 * (2 * 2048 + 2 * 32) + 32 * (2 * 2 * 64 + 8)), 8 * 32 * 2 * 64 * 64 * (128 + 128 + 12 * 64),
    ),
    ("delta_net_prefill/qwen3-next", "_recurrent_kernel"): (0, 0),
}  # fmt: skip


def test_every_launch_declares_its_work_and_has_a_short_signature(tmp_path):
    """At most 14 arguments; sizes in one frozen dataclass, a `Tile` or the like, but for the two of a row's kernel."""
    pytest.importorskip("triton.backends.nvidia")
    rows = json.loads("".join(run_script(WALK, tmp_path)))
    assert [row for row in rows if row[2] > 14] == []
    assert [row for row in rows if row[3] is None] == []
    assert [row for row in rows if not row[4] or len(row[5]) > 2] == []
    # Decoders fill slots beside the kernels of a layer.
    assert {row[1] for row in rows if not row[6]} == DECODERS
    declared = {(name, kernel): work for name, kernel, _, work, *_ in rows}
    # All there are, but for the one that only `profile` launches.
    assert {kernel for _, kernel in declared} == launched_kernels() - {"_sum_kernel"}
    for launch, expected in DECLARED.items():
        assert declared[launch] == pytest.approx(expected, rel=1e-6), launch


def attention_arguments(contexts, queries, window=0) -> dict:
    """Of a launch over two sequences of 2 KV heads of 16, groups of 2."""
    tokens = sum(queries)
    ids = partial(torch.tensor, dtype=torch.int32)
    cache = torch.zeros(8, 2, 16, 16, dtype=torch.bfloat16)
    starts = [0, queries[0], tokens]
    kv = PagedKV(cache, cache, ids([[0, 1, 2], [3, 4, 5]]), ids(contexts), ids(starts))
    q = torch.zeros(tokens, 4, 16, dtype=torch.bfloat16)
    return {"q_ptr": q, "kv": kv, "out_ptr": q, "DIMS": AttentionDims(2, 2, 16, 16, window)}


@pytest.mark.parametrize("window", [0, 1, 5, 100])
@pytest.mark.parametrize(
    ("contexts", "queries"), [([40, 3], [1, 1]), ([40, 7], [33, 7]), ([9, 20], [0, 4])],
    ids=["decode", "prompts", "a sequence without queries"],
)  # fmt: skip
def test_attention_counts_what_is_seen(contexts, queries, window):
    nbytes, flops = _attention_work(attention_arguments(contexts, queries, window))
    keys, pairs = set(), 0
    for s, (context, count) in enumerate(zip(contexts, queries, strict=True)):
        for position in range(context - count, context):
            seen = range(max(0, position - window + 1) if window else 0, position + 1)
            keys |= {(s, key) for key in seen}
            pairs += len(seen)
    assert nbytes == len(keys) * 2 * 2 * 2 * 16 + 2 * sum(queries) * 2 * 4 * 16
    assert flops == 4 * pairs * 4 * 16


def test_work_is_recorded_of_launches_that_run():
    x, gate = torch.randn(3, 8), torch.randn(3, 8)
    work = work_of(lambda: scale(rms_norm(x, torch.ones(8), 1e-6), gate))
    assert work == (2 * x.nbytes + 3 * x.nbytes, 0)
    with recorded_work() as works:
        sum_in_place(torch.ones(5, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), 1)
    assert works == [(4 * 5 + 4, 0)]
