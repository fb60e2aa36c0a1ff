"""Reading machine code: loops, widths, and wgmma whose registers are overwritten in flight, on code written by hand."""

from __future__ import annotations

import pytest
from fluxmoe.kernels.sass import (
    instructions,
    integer_operations,
    load_bytes,
    matrix_loops,
    overwritten_in_flight,
    waits_first,
)

_WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
_GROUP = ["WARPGROUP.ARRIVE", "HGMMA.64x16x16.F32.BF16 R24, R36, gdesc[UR4], R24, gsb0"]


def sass(*lines: str) -> list:
    """Instructions 0x10 bytes apart, as nvdisasm prints them; lines that end with ":" are labels."""
    out, address = [], 0
    for line in lines:
        if line.endswith(":"):
            out.append(line)
        else:
            out.append(f"        /*{address:04x}*/                   {line} ;")
            address += 16
    return instructions("\n".join(out))


@pytest.mark.parametrize(
    ("lines", "count"),
    [
        pytest.param([*_GROUP, _WAIT, "MOV R36, R1"], 0, id="after the wait"),
        pytest.param([*_GROUP, "MOV R36, R1", _WAIT], 1, id="before the wait"),
        pytest.param([*_GROUP, "MOV R40, R1", _WAIT], 0, id="the register behind"),
        pytest.param([*_GROUP, "LDG.E.128 R32, [R2.64]", _WAIT], 0, id="a wide load that ends before"),
        pytest.param([*_GROUP, "LDG.E.128 R36, [R2.64]", _WAIT], 1, id="a wide load"),
        pytest.param([*_GROUP, "IMAD.WIDE R38, R2, 0x2, R4", _WAIT], 1, id="the upper half of a pair"),
        pytest.param([*_GROUP, "LDSM.16.M88.4 R33, [R2]", _WAIT], 1, id="matrices from shared memory"),
        pytest.param([*_GROUP, "STG.E.128 [R2.64], R36", _WAIT], 0, id="a store only reads"),
        pytest.param([*_GROUP, "@P0 PRMT R39, R1, 0x1100, R2", _WAIT], 1, id="a predicated write"),
        pytest.param([*_GROUP, "WARPGROUP.DEPBAR.LE gsb0, 0x1", "MOV R36, R1", _WAIT], 1, id="a wait for older groups"),
        pytest.param(
            [*_GROUP, "HGMMA.64x16x16.F32.BF16 R48, R60, gdesc[UR4], R48, gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x1",
             "MOV R36, R1", _WAIT], 0, id="covered by a wait that lets one group run",
        ),
        pytest.param(
            [".L_x_0:", "MOV R36, R1", *_GROUP, "@P0 BRA `(.L_x_0)", _WAIT], 1, id="by the next step of a loop"
        ),
        pytest.param([".L_x_0:", "MOV R36, R1", *_GROUP, _WAIT, "@P0 BRA `(.L_x_0)"], 0, id="a loop that waits"),
        pytest.param(
            [*_GROUP, "@P0 BRA `(.L_x_1)", "MOV R36, R1", ".L_x_1:", _WAIT], 1, id="on the way that a branch skips"
        ),
        pytest.param(
            [*_GROUP, "BRA `(.L_x_1)", "MOV R36, R1", ".L_x_1:", _WAIT], 0, id="behind a branch that is always taken"
        ),
        pytest.param(
            [*_GROUP, "@P0 BRA `(.L_x_1)", _WAIT, "EXIT", ".L_x_1:", "MOV R36, R1"], 1, id="out of line"
        ),
        pytest.param(
            ["HGMMA.64x16x16.F32.BF16 R24, gdesc[UR8], R24, gsb0", "MOV R8, R1", _WAIT], 0, id="A in shared memory"
        ),
    ],
)  # fmt: skip
def test_registers_overwritten_in_flight(lines, count):
    assert len(overwritten_in_flight(sass(*lines))) == count


def test_a_hazard_says_where():
    assert overwritten_in_flight(sass(*_GROUP, "MOV R37, R1")) == ["HGMMA at 0010, R36: by MOV at 0020"]


def test_loops_are_counted_the_short_way_round():
    code = sass(
        ".L_x_0:", "LDGSTS.E.BYPASS.128 [R2], [R4.64]", "WARPGROUP.ARRIVE", "@P1 BRA `(.L_x_1)", "IMAD R1, R2, R3, R4",
        "IMAD R1, R2, R3, R4", ".L_x_1:", "LOP3.LUT R1, R2, 0xf, RZ, 0xc0, !PT",
        "HGMMA.64x16x16.F32.BF16 R24, R36, gdesc[UR4], R24, gsb0", _WAIT, "@P0 BRA `(.L_x_0)",
        ".L_x_2:", "IADD3 R1, R1, 0x1, RZ", "@P2 BRA `(.L_x_2)", "EXIT",
    )  # fmt: skip
    assert integer_operations(code) == 4
    assert matrix_loops(code) == [dict(all=7, matrix=1, loads=1, integer=1, arrives=1, waits=1)]


@pytest.mark.parametrize(
    ("lines", "first"),
    [
        pytest.param(["LDC.64 R2, c[0x0][0x210]", "ACQBULK", "LDG.E R0, [R2.64]"], True, id="waits"),
        pytest.param(["LDG.E R0, [R2.64]", "ACQBULK"], False, id="a load before"),
        pytest.param(["RED.E.ADD [R2.64], R0", "ACQBULK"], False, id="a sum in memory before"),
        pytest.param(["@P0 EXIT", "ACQBULK", "EXIT"], False, id="some programs leave before"),
        pytest.param(["@P0 BRA `(.L_x_0)", "ACQBULK", ".L_x_0:", "EXIT"], False, id="some go round it"),
        pytest.param(["@P0 ACQBULK", "EXIT"], False, id="some wait"),
        pytest.param(["@P0 BRA `(.L_x_0)", "MOV R0, R1", ".L_x_0:", "ACQBULK", "EXIT"], True, id="ways that meet"),
        pytest.param(["PREEXIT", "LDG.E R0, [R2.64]"], False, id="nobody waits"),
        pytest.param(["ATOMS.OR RZ, [R2], R3", "ACQBULK", "EXIT"], True, id="shared memory is a program's own"),
    ],
)  # fmt: skip
def test_every_program_waits_before_it_does_anything_else(lines, first):
    assert waits_first(sass(*lines)) is first


@pytest.mark.parametrize(
    ("opcode", "nbytes"),
    [("LDG.E", 4), ("LDG.E.128", 16), ("LDG.E.U16", 2), ("LDG.E.64.CONSTANT", 8), ("LDGSTS.E.BYPASS.LTC128B.128", 16)],
)
def test_width_of_loads(opcode, nbytes):
    assert load_bytes(opcode) == nbytes
