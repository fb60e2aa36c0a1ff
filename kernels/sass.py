"""Reading SASS, the machine code of NVIDIA's GPUs, as `nvdisasm -c` prints it.

What matters of a kernel that feeds matrix units: how wide it loads, what its innermost loops hold, and whether wgmma
(HGMMA), which runs asynchronously, is waited for where it must be and nowhere else. WARPGROUP.ARRIVE opens a group of
them, WARPGROUP.DEPBAR waits for groups. ptxas places both, and has placed them wrongly (triton issues 9433, 11781).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple, TypedDict

MATRIX = {"HGMMA": "wgmma", "HMMA": "mma", "UTCHMMA": "tcgen05"}
# Of ptxas's advisory C7515: "Potential Performance Loss: wgmma.mma_async instructions are serialized …".
SERIALIZED = "wgmma.mma_async instructions are serialized"
_INTEGER = ("IMAD", "IADD3", "LOP3", "SHF", "PRMT", "LEA", "ISETP", "VIADD", "IADD", "SEL")
# What has a register first and does not write it.
_NO_RESULT = ("ST", "BRA", "BAR", "LDGSTS", "HGMMA", "ISETP", "FSETP", "RED", "ATOM", "UTMA", "SYNCS", "WARPSYNC")

# Global memory, by whatever path, and ends of a program.
_BEHIND_THE_WAIT = ("LDG", "LD.", "STG", "ST.", "ATOM.", "ATOMG", "RED", "UTMA", "UBLKCP", "EXIT")


class Instruction(NamedTuple):
    """One line; a label has the opcode "label" and its name as target. target: where a branch goes."""

    opcode: str
    operands: str = ""
    target: str | None = None
    predicated: bool = False
    address: str = ""


class Loop(TypedDict):
    """Instructions of a loop, counted along the shortest way round."""

    all: int
    matrix: int
    loads: int
    integer: int
    arrives: int
    waits: int


def instructions(sass: str) -> list[Instruction]:
    """In order of the code."""
    code = []
    for line in sass.splitlines():
        if label := re.match(r"^(\.L_x_\d+):", line):
            code.append(Instruction("label", target=label[1]))
        elif found := re.match(r"^\s+/\*([0-9a-f]+)\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;", line):
            target = re.search(r"`\((\.L_x_\d+)\)", found[4]) if found[3].startswith("BRA") else None
            code.append(Instruction(found[3], found[4], target and target[1], bool(found[2]), found[1]))
    return code


def load_bytes(opcode: str) -> int:
    """Bytes a thread of a load: LDG.E.128 → 16, LDG.E.U16 → 2, LDG.E → 4."""
    bits = re.search(r"\.[US]?(8|16|32|64|128|256)(?:\.|$)", opcode)
    return int(bits[1]) // 8 if bits else 4


def _base(line: Instruction) -> str:
    return line.opcode.split(".")[0]


def matrix_loops(code: list[Instruction]) -> list[Loop]:
    """Innermost loops that hold a matrix instruction, the shortest first.

    What is behind a branch that can be skipped (escapes of compressed weights, masked edges) is not on the way round.
    """
    place = {line.target: i for i, line in enumerate(code) if line.opcode == "label"}
    ways = {}
    for i, line in enumerate(code):
        begin = place.get(line.target, i + 1) if line.opcode.startswith("BRA") else i + 1
        holds_matrix = any(_base(other) in MATRIX for other in code[begin : i + 1])
        # A jump back from code that was moved out of line has no way round: it is no loop.
        if begin <= i and holds_matrix and (way := _shortest_way(code, place, begin, i)):
            ways[begin, i] = [code[at] for at in way if code[at].opcode != "label"]
    inner = [(a, b) for a, b in ways if not any((a, b) != (c, d) and a <= c and d <= b for c, d in ways)]
    loops = [_count(ways[span]) for span in inner]
    return sorted(loops, key=lambda loop: loop["all"])


def waits_first(code: list[Instruction]) -> bool:
    """Whether all ways through a kernel wait for the one before it (ACQBULK), ahead of all memory and of their end.

    Calls are not followed: they are traps and divisions.
    """
    place = {line.target: i for i, line in enumerate(code) if line.opcode == "label"}
    seen, frontier = set[int](), [0]
    while frontier:
        i = frontier.pop()
        if i in seen or (code[i].opcode == "ACQBULK" and not code[i].predicated):
            continue
        if code[i].opcode.startswith(_BEHIND_THE_WAIT):
            return False
        seen.add(i)
        frontier += _next(code, place, i)
    return True


def integer_operations(code: list[Instruction]) -> int:
    """How many there are, the moves that set up a kernel counted."""
    return sum(_base(line) in _INTEGER for line in code)


def _count(lines: list[Instruction]) -> Loop:
    bases = [_base(line) for line in lines]
    return Loop(
        all=len(lines),
        matrix=sum(base in MATRIX for base in bases),
        loads=sum(base in ("LDG", "LDGSTS", "UTMALDG") for base in bases),
        integer=integer_operations(lines),
        arrives=sum(line.opcode.startswith("WARPGROUP.ARRIVE") for line in lines),
        waits=sum(line.opcode.startswith("WARPGROUP.DEPBAR") for line in lines),
    )


def _shortest_way(code: list[Instruction], place: dict[str | None, int], begin: int, end: int) -> list[int]:
    """Indices of the instructions on the way from `begin` to `end` with the fewest of them; [] if there is none."""
    came, frontier = {begin: begin}, [begin]
    while end not in came:
        following = []
        for i in frontier:
            for target in _next(code, place, i):
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


def _next(code: list[Instruction], place: dict[str | None, int], i: int) -> Iterator[int]:
    """Where control may go after instruction i."""
    line = code[i]
    branch = line.opcode.startswith("BRA")
    if branch and line.target in place:
        yield place[line.target]
    ends = (branch or line.opcode.startswith("EXIT")) and not line.predicated
    if not ends and i + 1 < len(code):
        yield i + 1


def _written(line: Instruction) -> set[int]:
    """Numbers of the registers that an instruction writes."""
    register = re.match(r"R(\d+)\b", line.operands)
    if not register or line.opcode.startswith(_NO_RESULT):
        return set()
    width = 1
    if ".128" in line.opcode:
        width = 4
    elif ".64" in line.opcode or "WIDE" in line.opcode:
        width = 2
    elif line.opcode.startswith("LDSM"):
        width = {"4": 4, "2": 2}.get(line.opcode[-1], 1)
    elif line.opcode.startswith("CS2R"):
        width = 1 if ".32" in line.opcode else 2
    first = int(register[1])
    return set(range(first, first + width))


def overwritten_in_flight(code: list[Instruction]) -> list[str]:
    """Registers of a wgmma's A operand that some way through the code writes before it waits; "HGMMA … by …" each.

    From each wgmma whose A is in registers (four of them a thread, m64k16 of bf16), along all ways to the wait that
    covers it: its operand gsb0 closes a group, and DEPBAR.LE gsb0, n waits until at most the n newest groups run.
    """
    place = {line.target: i for i, line in enumerate(code) if line.opcode == "label"}
    found = []
    for i, line in enumerate(code):
        operands = [part.strip() for part in line.operands.split(",")]
        first = re.match(r"R(\d+)\b", operands[1]) if _base(line) == "HGMMA" and len(operands) > 1 else None
        if not first:
            continue
        held = set(range(int(first[1]), int(first[1]) + 4))
        closed = int("gsb0" in operands)
        seen, frontier = set(), [(at, closed) for at in _next(code, place, i)]
        while frontier:
            at, closed = frontier.pop()
            if (at, closed) in seen:
                continue
            seen.add((at, closed))
            other = code[at]
            if other.opcode.startswith("WARPGROUP.DEPBAR") and closed > int(other.operands.split(",")[1], 16):
                continue
            if _written(other) & held:
                found.append(f"HGMMA at {line.address}, R{min(held)}: by {other.opcode} at {other.address}")
                break
            # More groups than any wait lets run need not be told apart.
            closed = min(closed + (_base(other) == "HGMMA" and other.operands.endswith("gsb0")), 8)
            frontier += [(following, closed) for following in _next(code, place, at)]
    return found
