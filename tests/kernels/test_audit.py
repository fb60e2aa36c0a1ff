"""The audit of machine code: every kernel compiles without a GPU and keeps the rules; and the audit can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton.backends.nvidia")


def audit(*arguments: str) -> subprocess.CompletedProcess:
    """In a process of its own: this one interprets kernels."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fluxmoe.kernels.audit", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)


# All kernels where tiles differ most, the GEMMs everywhere: compiling takes a second a kernel.
@pytest.mark.parametrize(("arch", "only"), [("sm_80", "grouped"), ("sm_89", "grouped"), ("sm_90", ""), ("sm_100", "")])
def test_every_kernel_keeps_the_rules(arch, only, tmp_path):
    done = audit("--arch", arch, "--only", only, "--json", str(tmp_path / "audit.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    reports = json.loads((tmp_path / "audit.json").read_text())
    assert {report["arch"] for report in reports} == {arch}
    gemms = [report for report in reports if report["name"].startswith("grouped_gemm")]
    assert len(gemms) > 10
    for report in gemms:
        kind = {"sm_80": "mma", "sm_89": "mma"}.get(arch)
        assert kind is None or report["matrix"][kind] > 0
    if arch == "sm_90":
        decode = next(report for report in gemms if report["name"] == "grouped_gemm gate_up, 16 rows")
        assert "wgmma" in decode["matrix"], "swap AB is there to feed wgmma at 16 tokens"
        assert decode["async_copies"] > 0, "weights are not pipelined"
        packed = [report for report in gemms if "planar12" in report["name"]]
        assert len(packed) == 6
        for report in packed:
            assert 1 < report["integer_per_weight"] <= 6
            assert report["decode_loop"]["loads"] > 0


def test_an_interpreted_audit_is_refused():
    done = subprocess.run(
        [sys.executable, "-m", "fluxmoe.kernels.audit"], capture_output=True, text=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: TRITON_INTERPRET is set")


def test_unknown_names_are_refused():
    done = audit("--arch", "sm_90", "--only", "no such kernel")
    assert done.returncode == 2
    assert "no case's name contains" in done.stderr


def test_broken_rules_are_reported():
    code = """
import triton, triton.language as tl
from fluxmoe.kernels.audit import Case, audit

@triton.jit
def narrow(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK) * 3
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < N))

@triton.jit
def spilling(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, x * tl.sum(x))

signature = {"x_ptr": "*fp32", "y_ptr": "*fp32", "N": "i32"}
print(audit(Case("narrow", narrow, signature, {"BLOCK": 128}, 4, 1, True, True), "sm_90").problems)
print(audit(Case("spilling", spilling, signature, {"BLOCK": 16384}, 1, 1), "sm_90").problems)
"""
    path = "import runpy, sys, tempfile, pathlib\n"
    path += f"p = pathlib.Path(tempfile.mkdtemp()) / 'case.py'; p.write_text({code!r}); runpy.run_path(str(p))"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", path], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    narrow, spilling = done.stdout.splitlines()
    assert "no matrix instructions" in narrow
    assert "4 bytes wide" in narrow
    assert "spilled" in spilling
