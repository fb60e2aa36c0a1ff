"""What kernels declare of their launches: bytes and flops, experts without tokens left out."""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys

import pytest
import torch
from fluxmoe.kernels.expert_table import ExpertTable
from fluxmoe.kernels.triton._grouped_gemm import TableArrays, work_of_gemm
from fluxmoe.kernels.triton.norm import normed_row
from fluxmoe.kernels.triton.routing import Router
from fluxmoe.kernels.work import touched_experts

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
    ],
)
@pytest.mark.parametrize(("tensor", "written"), [(0, N // 2), (1, N)], ids=["gate_up", "down"])
def test_a_grouped_gemm_reads_the_experts_that_have_tokens(formats, bits, tensor, written):
    nbytes, flops = work_of_gemm(gemm_arguments(formats, tensor))
    assert nbytes == pytest.approx(bits / 8 * N * K + 2 * (2 * K + 2 * written))
    assert flops == 2 * 2 * N * K


@pytest.mark.parametrize("module", ["_routing", "gate", "gates", "_grouped_gemm", "planar12_gemm", "norm"])
def test_no_kernel_has_more_arguments_than_a_reader_holds(module):
    found = vars(importlib.import_module(f"fluxmoe.kernels.triton.{module}"))
    kernels = {name: each.fn for name, each in found.items() if isinstance(each, type(normed_row))}
    assert kernels
    assert {name: count for name, fn in kernels.items() if (count := len(inspect.signature(fn).parameters)) > 14} == {}


def test_uniform_routing_touches_so_many_where_nobody_knows():
    start = torch.empty(129, device="meta")
    assert touched_experts(start, 1, 8) == pytest.approx(8)
    assert touched_experts(start, 8, 8) == pytest.approx(51.6, abs=0.1)
    assert touched_experts(torch.tensor([0, 2, 2, 3]), 3, 1) == 2


def test_recorded_launches_have_their_work(tmp_path):
    pytest.importorskip("triton.backends.nvidia")
    path = tmp_path / "work.py"
    path.write_text("""
from fluxmoe.kernels.audit import cases_of
from fluxmoe.kernels.launches import compile_only

cases = {case.name: case for case in cases_of("sm_90")}
with compile_only(90) as launches:
    for name in ("combine", "combine_and_norm", "rms_norm/qwen3-30b-a3b", "gate/128 experts, 1 tokens"):
        cases[name].launch()
for launch in launches:
    print(launch.work and launch.work.nbytes)
""")
    compiling = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, env=compiling, timeout=120)
    assert done.returncode == 0, done.stderr
    row = 64 * 2048 * 2
    assert done.stdout.split() == [str((8 + 2) * row), str((8 + 3) * row), str(2 * row), "None"]
