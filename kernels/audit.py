"""What the compiler made of every kernel, read from its machine code; needs no GPU.

    python -m fluxmoe.kernels.audit [--arch sm_80 sm_89 sm_90 sm_100] [--json FILE] [--only NAME]

Compiles each kernel at the tiles that real launches use (the `audit_cases` of its module) and reads from the cubin:
registers, spilled bytes, shared memory, matrix instructions, width of the widest global load, and the instructions of
the innermost loop that feeds the matrix units. Exits 1 when a case breaks a rule: spills, a matrix kernel without
matrix instructions, weights or KV loaded in less than 16 bytes a thread, more shared memory than the GPU has.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import delta_net, grouped_gemm, norm, packing, paged_attention, rope_kv, routing
from .tiles import shared_limit

ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100")
_MATRIX = {"HGMMA": "wgmma", "HMMA": "mma", "UTCHMMA": "tcgen05"}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_FULL_WIDTH = 16
# At the full rate of HBM an H100 has 6.6 integer operations for each 12-bit weight.
_MOST_INTEGER = 6.0


@dataclass(frozen=True)
class Case:
    """One kernel at one tile. signature: argument → triton type; integers are taken as multiples of 16 when named in
    `aligned`, pointers always. matrix: must use matrix instructions; wide_loads: must load 16 bytes a thread;
    weights_per_step: weights that a thread decodes in a step of the tile loop, for kernels with such a loop beside the
    dense one, which may take `_MOST_INTEGER` integer operations each.
    """

    name: str
    kernel: triton.JITFunction
    signature: dict[str, str]
    constexprs: dict[str, object]
    num_warps: int
    num_stages: int
    matrix: bool = False
    wide_loads: bool = False
    aligned: tuple[str, ...] = ()
    weights_per_step: int = 0


@dataclass
class Report:
    """What one case compiled to on one architecture."""

    name: str
    arch: str
    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    load_bytes: int = 0
    tma_loads: int = 0
    async_copies: int = 0
    matrix: dict[str, int] = field(default_factory=dict)
    instructions: int = 0
    loop: dict[str, int] = field(default_factory=dict)
    decode_loop: dict[str, int] = field(default_factory=dict)
    integer_per_weight: float | None = None
    problems: list[str] = field(default_factory=list)


def cases(tile_arch: str) -> Iterator[Case]:
    """Every case of every module, with the tiles that this architecture would launch."""
    capability = int(tile_arch.removeprefix("sm_"))
    for module in (routing, grouped_gemm, norm, rope_kv, paged_attention, delta_net, packing):
        for fields in module.audit_cases(capability):
            yield Case(**fields)


def compile_case(case: Case, arch: str) -> triton.compiler.CompiledKernel:
    """The compiled kernel; needs neither a GPU nor a driver."""
    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constexprs else case.signature[name] for name in names}
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or name in case.aligned
    }
    source = ASTSource(case.kernel, signature, dict(case.constexprs), attrs)
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    return triton.compile(source, target=target, options=options)


def audit(case: Case, arch: str) -> Report:
    """Compile one case and read its machine code."""
    compiled = compile_case(case, arch)
    report = Report(case.name, arch, shared_bytes=compiled.metadata.shared)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _instructions(_tool("nvdisasm", "-c", file.name))
    report.registers = int(re.search(r"REG:(\d+)", usage)[1])
    opcodes = [line.opcode for line in code if line.opcode != "label"]
    # Local memory is where spills go; STACK alone may be an array that the source asked for, ours ask for none.
    report.spill_bytes = int(re.search(r"STACK:(\d+)", usage)[1]) + int(re.search(r"LOCAL:(\d+)", usage)[1])
    report.instructions = len(opcodes)
    report.matrix = dict(Counter(_MATRIX[op.split(".")[0]] for op in opcodes if op.split(".")[0] in _MATRIX))
    loads = [op for op in opcodes if op.startswith(("LDG.", "LDGSTS."))]
    report.async_copies = sum(op.startswith("LDGSTS.") for op in opcodes)
    report.tma_loads = sum(op.startswith("UTMALDG") for op in opcodes)
    report.load_bytes = max((_width(op) for op in loads), default=0)
    loops = _matrix_loops(code)
    report.loop = loops[0] if loops else {}
    if case.weights_per_step:
        report.decode_loop = loops[-1] if len(loops) > 1 else {}
        report.integer_per_weight = round(loops[-1]["integer"] / case.weights_per_step, 2)
    report.problems = list(_problems(case, report))
    return report


def _audit_named(name: str, arch: str) -> Report:
    """For worker processes, which cannot be sent a kernel."""
    return audit(next(case for case in cases(arch) if case.name == name), arch)


def _problems(case: Case, report: Report) -> Iterator[str]:
    if report.spill_bytes:
        yield f"{report.spill_bytes} bytes of registers are spilled"
    if case.matrix and not report.matrix:
        yield "no matrix instructions"
    if case.wide_loads and report.load_bytes < _FULL_WIDTH and not report.tma_loads:
        yield f"loads are {report.load_bytes} bytes wide, not {_FULL_WIDTH}"
    if report.integer_per_weight is not None and report.integer_per_weight > _MOST_INTEGER:
        yield f"{report.integer_per_weight} integer operations a weight, more than {_MOST_INTEGER}"
    if case.weights_per_step and not report.decode_loop:
        yield "the loop that decodes weights was not found"
    limit = shared_limit(int(report.arch.removeprefix("sm_")))
    if report.shared_bytes > limit:
        yield f"{report.shared_bytes} bytes of shared memory exceed {limit}"


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


class Instruction(NamedTuple):
    """One line of SASS; a label has the opcode "label" and its name as target."""

    opcode: str
    target: str | None = None
    predicated: bool = False


def _instructions(sass: str) -> list[Instruction]:
    """In order of the code."""
    code = []
    for line in sass.splitlines():
        if label := re.match(r"^(\.L_x_\d+):", line):
            code.append(Instruction("label", label[1]))
        elif found := re.match(r"^\s+/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)", line):
            target = re.search(r"`\((\.L_x_\d+)\)", found[3]) if found[2].startswith("BRA") else None
            code.append(Instruction(found[2], target and target[1], bool(found[1])))
    return code


def _width(opcode: str) -> int:
    """Bytes a thread of a load: LDG.E.128 → 16, LDG.E.U16 → 2, LDG.E → 4."""
    bits = re.search(r"\.[US]?(8|16|32|64|128|256)(?:\.|$)", opcode)
    return int(bits[1]) // 8 if bits else 4


_INTEGER = ("IMAD", "IADD3", "LOP3", "SHF", "PRMT", "LEA", "ISETP", "VIADD", "IADD", "SEL")


def _matrix_loops(code: list[Instruction]) -> list[dict[str, int]]:
    """Instructions of each innermost loop that holds a matrix instruction: all, matrix, global loads, integer.

    Counted along the shortest way round: what is behind a branch that can be skipped (escapes of compressed weights,
    masked edges) is not on it.
    """
    place = {line.target: i for i, line in enumerate(code) if line.opcode == "label"}
    ways = {}
    for i, line in enumerate(code):
        begin = place.get(line.target, i + 1) if line.opcode.startswith("BRA") else i + 1
        holds_matrix = any(other.opcode.split(".")[0] in _MATRIX for other in code[begin : i + 1])
        # A jump back from code that was moved out of line has no way round: it is no loop.
        if begin <= i and holds_matrix and (way := _shortest_way(code, place, begin, i)):
            ways[begin, i] = way
    inner = [(a, b) for a, b in ways if not any((a, b) != (c, d) and a <= c and d <= b for c, d in ways)]
    loops = []
    for span in inner:
        opcodes = [code[i].opcode.split(".")[0] for i in ways[span]]
        opcodes = [opcode for opcode in opcodes if opcode != "label"]
        loops.append(
            {
                "all": len(opcodes),
                "matrix": sum(opcode in _MATRIX for opcode in opcodes),
                "loads": sum(opcode in ("LDG", "LDGSTS", "UTMALDG") for opcode in opcodes),
                "integer": sum(opcode in _INTEGER for opcode in opcodes),
            }
        )
    return sorted(loops, key=lambda loop: loop["all"])


def _shortest_way(code: list[Instruction], place: dict[str | None, int], begin: int, end: int) -> list[int]:
    """Indices of the instructions on the way from `begin` to `end` with the fewest of them; [] if there is none."""
    came, frontier = {begin: begin}, [begin]
    while end not in came:
        following = []
        for i in frontier:
            line = code[i]
            branch = line.opcode.startswith("BRA")
            targets = [place[line.target]] if branch and line.target in place else []
            if not branch or line.predicated:
                targets.append(i + 1)
            for target in targets:
                if begin < target <= end and target not in came:
                    came[target] = i
                    following.append(target)
        if not following:
            return []
        frontier = following
    way = [end]
    while way[-1] != begin:
        way.append(came[way[-1]])
    return way[::-1]


def print_table(reports: list[Report]) -> None:
    """One line a report."""
    width = max(len(report.name) for report in reports)
    print(f"{'kernel':<{width}} {'arch':>6} {'regs':>5} {'spill':>6} {'shared':>7} {'load':>5}  matrix, inner loop")
    for r in reports:
        matrix = " ".join(f"{kind}x{count}" for kind, count in r.matrix.items()) or "-"
        loads = "tma" if r.tma_loads else f"{r.load_bytes} B"
        loop = f", loop of {r.loop['all']}: {r.loop['matrix']} matrix, {r.loop['loads']} loads" if r.loop else ""
        print(
            f"{r.name:<{width}} {r.arch:>6} {r.registers:>5} {r.spill_bytes:>6} {r.shared_bytes:>7} {loads:>5}  "
            f"{matrix}{loop}"
        )
        if r.decode_loop:
            loop = f"loop of {r.decode_loop['all']}, {r.integer_per_weight} integer operations a weight"
            print(f"{'':<{width}}        decoding: {loop}")
        for problem in r.problems:
            print(f"{'':<{width}}        PROBLEM: {problem}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fluxmoe.kernels.audit", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--only", default="", metavar="NAME", help="cases whose name contains NAME")
    parser.add_argument("--json", metavar="FILE", help="write the reports there")
    args = parser.parse_args(argv)
    if triton.knobs.runtime.interpret:
        print("error: TRITON_INTERPRET is set, so that nothing is compiled; unset it", file=sys.stderr)
        return 2
    work = [(case.name, arch) for arch in args.arch for case in cases(arch) if args.only in case.name]
    if not work:
        print(f"error: no case's name contains {args.only!r}", file=sys.stderr)
        return 2
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        reports = list(pool.map(_audit_named, *zip(*work, strict=True), chunksize=4))
    print_table(reports)
    if args.json:
        Path(args.json).write_text(json.dumps([asdict(report) for report in reports], indent=1) + "\n")
    return 1 if any(report.problems for report in reports) else 0


if __name__ == "__main__":
    raise SystemExit(main())
