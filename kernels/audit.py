"""What the compiler made of every kernel, read from its machine code; needs no GPU.

    python -m fluxmoe.kernels.audit [--arch sm_80 sm_89 sm_90 sm_100] [--only NAME …] [--json FILE] [--dump DIR]

Calls each operation at the sizes of real models (the `audit_cases` of its module) where launches are compiled and not
run, and reads from the machine code: registers, spilled bytes, shared memory, matrix instructions, width of the widest
global load, the innermost loops that feed the matrix units, and what ptxas warned of. Exits 1 when a kernel breaks a
rule: spills; a product without matrix instructions; matrix instructions that wait for each other one by one, or whose
registers are overwritten while they may be in flight (see `sass`); weights or KV loaded in less than 16 bytes a thread;
more shared memory than the GPU has; global scratch for which the launch sets no allocator; a dependent launch of which
some program does not wait first; a kernel that does not declare its work. `--dump` leaves ttgir, ptx and disassembly of
each kernel, `--json` a list of rows, one a kernel.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NoReturn

import torch
import triton
import triton.language as tl

from .formats import codec_of, compressed_formats
from .launches import Case, Launch, compile_only
from .ops import KernelError
from .packing import Codec
from .sass import (
    MATRIX,
    SERIALIZED,
    Instruction,
    Loop,
    instructions,
    integer_operations,
    load_bytes,
    matrix_loops,
    overwritten_in_flight,
    waits_first,
)
from .triton import delta_net, gate, gates, grouped_gemm, norm, paged_attention, rope_kv, routing
from .triton.tiles import shared_limit

ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100")
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_FULL_WIDTH = 16
# At the full rate of HBM an H100 has 6.6 integer operations for each 12-bit weight.
_MOST_INTEGER = 6.0
# Of decoders to a buffer whose code has no loop.
_DECODED_BY_A_THREAD = {"planar12": 64, "planar8": 64, "tiered": 32}


class AuditError(ValueError):
    """An argument that the audit cannot use."""


@dataclass
class Report:
    """What one launch compiled to on one architecture; a row of `--json`.

    programs: of its grid; nbytes, flops: as the kernel declares (`work`); spills: bytes; serialized_wgmma: whether
    matrix instructions wait for each other one by one; hazards: registers of wgmma in flight that are overwritten;
    loops: innermost ones with matrix instructions, the shortest first; integer_per_weight: integer operations for each
    weight decoded, of a step of the tile loop, or of all code of a decoder to a buffer.
    """

    name: str
    arch: str
    kernel: str = ""
    constexprs: dict[str, object] = field(default_factory=dict)
    num_warps: int = 0
    programs: int = 0
    nbytes: float = 0.0
    flops: float = 0.0
    registers: int = 0
    spills: int = 0
    shared_bytes: int = 0
    scratch_bytes: int = 0
    load_bytes: int = 0
    tma_loads: int = 0
    async_copies: int = 0
    instructions: int = 0
    matrix: dict[str, int] = field(default_factory=dict)
    loops: list[Loop] = field(default_factory=list)
    integer_per_weight: float | None = None
    ptxas_warnings: list[str] = field(default_factory=list)
    hazards: list[str] = field(default_factory=list)
    serialized_wgmma: bool = False
    accepted: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def sizes(self) -> dict[str, int]:
        """Those of its constexprs that are whole numbers; of dataclasses among them their fields."""
        parts = [vars(value) for value in self.constexprs.values() if is_dataclass(value)]
        return {name: v for part in (self.constexprs, *parts) for name, v in part.items() if isinstance(v, int)}

    @property
    def loop(self) -> Loop:
        """The loop on weights or KV as they are."""
        return self.loops[0]

    @property
    def decode_loop(self) -> Loop:
        """The loop that decodes weights on its way."""
        return self.loops[-1]


def _cases() -> Iterator[Case]:
    """Of all modules; inside `compile_only`, whose target decides tiles."""
    for module in (routing, gate, grouped_gemm, norm, gates, rope_kv, paged_attention, delta_net):
        yield from module.audit_cases()
    for name in compressed_formats():
        by_thread = _DECODED_BY_A_THREAD.get(name, 0)
        yield Case(f"packing/{name}", partial(_decode, codec_of(name)), weights_per_thread=by_thread)


def _decode(codec: Codec) -> None:
    """A Gaussian weight's decoder to a buffer, of one seed; what is compiled does not depend on the weight's size."""
    weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    codec.decode(codec.encode(codec.fitting(weight)).to("meta"))


def audit(case: Case, arch: str, dump: Path | None = None) -> list[Report]:
    """Compile what a case launches, each kernel once, and read its machine code."""
    knobs = triton.knobs
    with knobs.compilation.scope(), knobs.nvidia.scope(), compile_only(_capability(arch)) as launches:
        # Warnings are printed by ptxas alone, so nothing may come from the cache.
        knobs.compilation.always_compile = knobs.nvidia.dump_ptxas_log = True
        case.launch()
    compiled: dict[int, Launch] = {}
    for launch in launches:
        compiled.setdefault(id(launch.compiled), launch)
    names = {
        key: case.name if len(compiled) == 1 else f"{case.name}: {launch.kernel.__name__.strip('_')}"
        for key, launch in compiled.items()
    }
    return [_read(names[key], case, launch, arch, dump) for key, launch in compiled.items()]


def _capability(arch: str) -> int:
    return int(arch.removeprefix("sm_"))


def _read(name: str, case: Case, launch: Launch, arch: str, dump: Path | None) -> Report:
    compiled, log = launch.compiled, launch.printed
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        sass = subprocess.run([_TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    if dump is not None:
        stem = dump / re.sub(r"[^\w.]+", "_", f"{name}.{arch}")
        for suffix, text in (("ttgir", compiled.asm["ttgir"]), ("ptx", compiled.asm["ptx"]), ("sass", sass)):
            stem.with_name(f"{stem.name}.{suffix}").write_text(text)
    code = instructions(sass)
    opcodes = [line.opcode for line in code if line.opcode != "label"]
    used = re.search(r"Used (\d+) registers", log)
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if used is None or spilled is None:
        raise AssertionError(f"{name}: ptxas does not say what registers it used: {log}")
    constexprs = {key: str(v) if isinstance(v, tl.dtype) else v for key, v in launch.constexprs.items()}
    report = Report(
        name, arch, launch.kernel.__name__, constexprs, launch.num_warps,
        programs=math.prod(launch.grid),
        nbytes=launch.work.nbytes if launch.work else 0.0,
        flops=launch.work.flops if launch.work else 0.0,
        registers=int(used[1]),
        spills=int(spilled[1]) + int(spilled[2]),
        shared_bytes=compiled.metadata.shared,
        scratch_bytes=launch.scratch_bytes,
        load_bytes=max((load_bytes(op) for op in opcodes if op.startswith(("LDG.", "LDGSTS."))), default=0),
        tma_loads=sum(op.startswith("UTMALDG") for op in opcodes),
        async_copies=sum(op.startswith("LDGSTS.") for op in opcodes),
        instructions=len(opcodes),
        matrix=dict(Counter(MATRIX[op.split(".")[0]] for op in opcodes if op.split(".")[0] in MATRIX)),
        loops=matrix_loops(code),
        ptxas_warnings=[line for line in log.splitlines() if "warning" in line.lower() or SERIALIZED in line],
        hazards=overwritten_in_flight(code),
        accepted=case.accepts,
    )  # fmt: skip
    report.serialized_wgmma = any(SERIALIZED in line for line in report.ptxas_warnings)
    decodes = case.weights_per_step and len(report.loops) > 1
    if decodes:
        report.integer_per_weight = round(report.decode_loop["integer"] / case.weights_per_step, 2)
    elif case.weights_per_thread:
        report.integer_per_weight = round(integer_operations(code) / case.weights_per_thread, 2)
    report.problems = [problem for kind, problem in _problems(case, launch, code, report) if kind not in case.accepts]
    return report


def _problems(case: Case, launch: Launch, code: list[Instruction], report: Report) -> Iterator[tuple[str, str]]:
    """(kind, what is wrong): a case may accept a kind with a reason."""
    if report.spills:
        yield "spills", f"{report.spills} bytes of registers are spilled"
    if "tt.dot" in launch.compiled.asm["ttir"] and not report.matrix:
        yield "matrix", "no matrix instructions"
    if report.serialized_wgmma:
        yield "serialized", "ptxas lets every wgmma wait for the one before (C7515)"
    for hazard in report.hazards:
        yield "hazards", f"a register of a wgmma in flight is overwritten: {hazard}"
    if launch.kernel in case.wide and report.load_bytes < _FULL_WIDTH and not report.tma_loads:
        yield "wide", f"loads are {report.load_bytes} bytes wide, not {_FULL_WIDTH}"
    if case.weights_per_step and (report.integer_per_weight or 0) > _MOST_INTEGER:
        yield "integer", f"{report.integer_per_weight} integer operations a weight, more than {_MOST_INTEGER}"
    if case.weights_per_step and report.integer_per_weight is None:
        yield "decode", "the loop that decodes weights was not found"
    if getattr(launch.compiled.metadata, "launch_pdl", False) and not waits_first(code):
        yield "dependent", "it may start before the kernel before it has ended, for which some program does not wait"
    if report.scratch_bytes and not launch.may_allocate:
        yield "scratch", f"{report.scratch_bytes} bytes of global scratch a program, and the launch sets no allocator"
    if launch.work is None:
        yield "work", "the kernel does not declare its bytes and flops"
    limit = shared_limit(_capability(report.arch))
    if report.shared_bytes > limit:
        yield "shared", f"{report.shared_bytes} bytes of shared memory exceed {limit}"


def _audit_named(name: str, arch: str, dump: Path | None) -> list[Report]:
    """For worker processes, which cannot be sent a case."""
    return audit(next(case for case in cases_of(arch) if case.name == name), arch, dump)


def cases_of(arch: str) -> list[Case]:
    """Every case, with the tiles that this architecture would launch."""
    with compile_only(_capability(arch)):
        return list(_cases())


def print_table(reports: list[Report]) -> None:
    """A line a report, and one more for each of its loops with matrix instructions."""
    width = max(len(report.name) for report in reports)
    print(f"{'kernel':<{width}} {'arch':>6} {'regs':>5} {'spill':>6} {'shared':>7} {'load':>5}  matrix")
    for r in reports:
        matrix = " ".join(f"{kind}x{count}" for kind, count in r.matrix.items()) or "-"
        loads = "tma" if r.tma_loads else f"{r.load_bytes} B"
        if r.integer_per_weight and not r.loops:
            matrix += f"; {r.integer_per_weight} integer operations a weight"
        print(f"{r.name:<{width}} {r.arch:>6} {r.registers:>5} {r.spills:>6} {r.shared_bytes:>7} {loads:>5}  {matrix}")
        for loop in r.loops:
            wgmma = f" ({loop['arrives']} arrive, {loop['waits']} wait)" if loop["arrives"] else ""
            decoding = f", {r.integer_per_weight} integer operations a weight" if loop is r.loops[-1] else ""
            print(
                f"{'':<{width}}        loop of {loop['all']}: {loop['matrix']} matrix{wgmma}, {loop['loads']} loads"
                f"{decoding if r.integer_per_weight is not None else ''}"
            )
        for kind, reason in r.accepted.items():
            print(f"{'':<{width}}        accepted: {kind}: {reason}")
        for problem in r.problems:
            print(f"{'':<{width}}        PROBLEM: {problem}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise AuditError(message)


def _run(argv: list[str] | None) -> int:
    parser = _Parser(prog="fluxmoe.kernels.audit", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="cases whose name contains a NAME")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write a list of rows there, one a kernel")
    parser.add_argument("--dump", metavar="DIR", type=Path, help="write ttgir, ptx and sass of each kernel there")
    args = parser.parse_args(argv)
    try:
        if args.dump:
            args.dump.mkdir(parents=True, exist_ok=True)
        if args.json:
            args.json.touch()
    except OSError as error:
        raise AuditError(f"{error.filename} cannot be written: {error.strerror}") from None
    work = [
        (case.name, arch, args.dump)
        for arch in args.arch
        for case in cases_of(arch)
        if any(name in case.name for name in args.only)
    ]
    if not work:
        raise AuditError(f"no case's name contains {' or '.join(map(repr, args.only))}")
    context = get_context("forkserver")
    context.set_forkserver_preload(["fluxmoe.kernels.launches"])  # torch and Triton are imported once for all
    with ProcessPoolExecutor(mp_context=context) as pool:
        reports = [report for each in pool.map(_audit_named, *zip(*work, strict=True), chunksize=4) for report in each]
    print_table(reports)
    if args.json:
        args.json.write_text(json.dumps([asdict(report) for report in reports], indent=1) + "\n")
    return 1 if any(report.problems for report in reports) else 0


def main(argv: list[str] | None = None) -> int:
    try:
        return _run(argv)
    except (AuditError, KernelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
