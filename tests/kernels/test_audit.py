"""The audit of machine code: every kernel compiles without a GPU and keeps the rules; and the audit can fail."""

from __future__ import annotations

import json

import pytest

from ..compiling import run_audit, run_script

pytest.importorskip("triton.backends.nvidia")


# The grouped GEMM on Hopper, whose wgmma is the most dangerous, and on Ampere; the rest is as `make audit` compiles it.
HOPPER = ("grouped_gemm gate_up", "grouped_gemm down, planar12, 16 rows")


@pytest.mark.parametrize(
    ("arch", "only"),
    [
        pytest.param("sm_80", ("planar12, 16 rows",), id="sm_80-planar12, 16 rows"),
        pytest.param("sm_90", HOPPER, id="sm_90-gate_up and a down"),
        pytest.param("sm_90", ("",), marks=pytest.mark.thorough, id="sm_90-all"),
        pytest.param("sm_80", ("down, planar12",), marks=pytest.mark.thorough, id="sm_80-down, planar12"),
        pytest.param("sm_89", ("planar12",), marks=pytest.mark.thorough, id="sm_89-planar12"),
        pytest.param("sm_100", ("planar12",), marks=pytest.mark.thorough, id="sm_100-planar12"),
    ],
)
def test_every_kernel_keeps_the_rules(arch, only, tmp_path):
    files = ["--json", str(tmp_path / "audit.json"), "--dump", str(tmp_path / "d")]
    done = run_audit("--arch", arch, "--only", *only, *files, folder=tmp_path)
    assert done.status == 0, done.out + done.err
    rows = json.loads((tmp_path / "audit.json").read_text())
    assert {row["arch"] for row in rows} == {arch}
    assert {path.suffix for path in (tmp_path / "d").iterdir()} == {".ttgir", ".ptx", ".sass"}
    assert len(list((tmp_path / "d").iterdir())) == 3 * len(rows)
    assert all(row["spills"] == 0 and row["hazards"] == [] and not row["serialized_wgmma"] for row in rows)
    gemms = [row for row in rows if row["kernel"] == "_grouped_gemm_kernel"]
    assert len(gemms) >= (32 if only == ("",) else 17 if only == HOPPER else 2)
    for row in gemms:
        kind = {"sm_80": "mma", "sm_89": "mma"}.get(arch)
        assert kind is None or row["matrix"][kind] > 0
    if arch == "sm_90":
        decode = next(row for row in gemms if row["name"] == "grouped_gemm gate_up, 16 rows")
        assert "wgmma" in decode["matrix"], "swap AB is there to feed wgmma at 16 tokens"
        assert decode["async_copies"] > 0, "weights are not pipelined"
        packed = [row for row in gemms if row["constexprs"]["COMPRESSED"]]
        assert len(packed) == (7 if only == HOPPER else 12)
        for row in packed:
            assert 1 < row["integer_per_weight"] <= 6
            dense, decoding = row["loops"]
            assert decoding["loads"] > 0
            # A wait for each half of a format's tile, and one in all where nothing is decoded.
            assert [(loop["arrives"], loop["waits"]) for loop in (dense, decoding)] == [(1, 1), (2, 2)]
            # A step of the dense loop is half as wide.
            assert (dense["matrix"], decoding["matrix"]) == (4, 8)
            if row["constexprs"]["TILE"]["block_m"] == 16:
                assert max(row["registers"] / 128, row["shared_bytes"] / 57088) <= 1, "four programs fit an SM"
        # A byte in the place of a byte and a nibble is less work, tile by tile.
        work = {row["name"]: row["integer_per_weight"] for row in packed}
        pairs = [(work[name], work[name.replace("planar8", "planar12")]) for name in work if "planar8" in name]
        assert all(one <= two for one, two in pairs)
        assert sum(one for one, _ in pairs) < sum(two for _, two in pairs)
        assert {row["scratch_bytes"] > 0 for row in gemms if row["constexprs"]["TILE"]["tma"]} == {True}


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        pytest.param((), {"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET is set", id="interpreted"),
        pytest.param(("--arch", "sm_90", "--only", "no such kernel"), {}, "no case's name contains", id="no case"),
        pytest.param(("--arch", "sm_999"), {}, "argument --arch: invalid choice: 'sm_999'", id="no such GPU"),
        pytest.param(("--json", "/no/such/place"), {}, "/no/such/place cannot be written", id="nowhere to write"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, environment, message, tmp_path):
    done = run_audit(*arguments, folder=tmp_path, **environment)
    assert done.status == 2
    assert done.err.startswith("error: ")
    assert message in done.err
    assert done.err.count("\n") == 1


def test_broken_rules_are_reported(tmp_path):
    script = """
from functools import partial
import torch, triton, triton.language as tl
from fluxmoe.kernels.audit import audit
from fluxmoe.kernels.launches import Case
from fluxmoe.kernels.work import declares, every_tensor_once

@triton.jit(launch_metadata=declares(every_tensor_once))
def narrow(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK) * 3
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < N))

@triton.jit(launch_metadata=declares(every_tensor_once))
def spilling(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, x * tl.sum(x))

@triton.jit
def silent(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    tl.store(y_ptr, tl.load(x_ptr))

@triton.jit(launch_metadata=declares(every_tensor_once))
def scratching(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    rows = tl.make_tensor_descriptor(x_ptr, shape=[N, 64], strides=[64, 1], block_shape=[BLOCK, 64])
    i = tl.arange(0, BLOCK)[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(y_ptr + i, rows.load([0, 0]))

x = torch.empty(1 << 20, device="meta")
def launch(kernel, size, warps, **options):
    kernel[(1,)](x, x, 77, BLOCK=size, num_warps=warps, **options)

for kernel, size, warps in ((narrow, 128, 4), (spilling, 16384, 1), (scratching, 16, 4), (silent, 16, 4)):
    case = Case(kernel.__name__, partial(launch, kernel, size, warps), wide=(narrow,))
    print(audit(case, "sm_90")[0].problems)
hasty = Case("hasty", partial(launch, spilling, 128, 4, launch_pdl=True))
print(audit(hasty, "sm_90")[0].problems)
accepting = Case("accepting", partial(launch, spilling, 16384, 1), accepts={"spills": "it is a test"})
print(audit(accepting, "sm_90")[0].problems)
"""
    narrow, spilling, scratching, silent, hasty, accepting = run_script(script, tmp_path)
    assert "4 bytes wide" in narrow
    assert "spilled" in spilling
    assert silent == "['the kernel does not declare its bytes and flops']"
    assert "of global scratch a program, and the launch sets no allocator" in scratching
    assert "it may start before the kernel before it has ended" in hasty
    assert accepting == "[]"


def test_kernels_of_a_layer_overlap_their_launches_where_the_gpu_can(tmp_path):
    script = """
from fluxmoe.kernels.audit import cases_of
from fluxmoe.kernels.launches import compile_only

names = ("gate/128 experts, 1 tokens", "grouped_gemm down, 16 rows", "combine_and_norm", "scale/qwen3-next",
         "rope_and_cache/mixtral-8x7b", "attention_split/mixtral-8x7b", "delta_net_decode/qwen3-next")
for arch in (80, 90):
    for case in cases_of(f"sm_{arch}"):
        if case.name in names:
            with compile_only(arch) as launches:
                case.launch()
            for compiled in (launch.compiled for launch in launches):
                print(arch, compiled.metadata.launch_pdl, compiled.asm["ptx"].count("griddepcontrol"))
"""
    assert sorted(run_script(script, tmp_path)) == ["80 False 0"] * 9 + ["90 True 2"] * 9


def test_without_its_fence_the_tile_loop_of_planar12_is_found_out(tmp_path):
    script = """
import triton
from fluxmoe.kernels.triton import planar_gemm
from fluxmoe.kernels.audit import audit, cases_of

@triton.jit
def nothing(acc):
    return acc

planar_gemm._fence = nothing
case = next(case for case in cases_of("sm_90") if case.name == "grouped_gemm down, planar12, 16 rows")
report, = audit(case, "sm_90")
print(report.serialized_wgmma, bool(report.ptxas_warnings), report.problems)
"""
    (line,) = run_script(script, tmp_path)
    assert line.startswith("True True ['ptxas lets every wgmma wait")


def test_tma_tiles_are_launched_with_an_allocator(tmp_path):
    script = """
from fluxmoe.kernels.audit import cases_of
from fluxmoe.kernels.launches import compile_only

cases = {case.name: case for case in cases_of("sm_90")}
with compile_only(90) as launches:
    cases["grouped_gemm down, inf rows"].launch()
    cases["grouped_gemm down, tma"].launch()
print(*(launch.may_allocate for launch in launches))
"""
    assert run_script(script, tmp_path) == ["False True"]


def test_the_convolutions_state_is_overwritten_only_once_all_threads_have_read_it(tmp_path):
    script = """
from fluxmoe.kernels.audit import cases_of
from fluxmoe.kernels.launches import compile_only

for case in cases_of("sm_90"):
    if case.name.startswith("delta_net"):
        with compile_only(90) as launches:
            case.launch()
        code = launches[-1].compiled.asm["ttir"]
        print(code.rindex("tt.load") < code.rindex("barrier") < code.rindex("tt.store"), code.count("barrier"))
"""
    assert run_script(script, tmp_path) == ["True 1", "True 1"]
