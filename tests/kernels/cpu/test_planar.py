"""Compressed panels: every bf16 pattern comes back, and the GEMM reads them with the bits of the uncompressed path."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fluxmoe.kernels.cpu import planar, planar_rows, planar_tile, tile
from fluxmoe.kernels.cpu.tile import gemm_panel
from fluxmoe.kernels.cpu.wide_tile import gemm_panels
from fluxmoe.kernels.ops import KernelError
from hypothesis import given, settings
from hypothesis import strategies as st

# How panels of bf16 are multiplied: on every machine, and on this one.
KINDS = [tile.BF16, tile.BF16_DOT] if tile.HAS_DOT else [tile.BF16]


def encoded(panels: torch.Tensor) -> torch.Tensor:
    block = torch.full((planar.block_bytes(*panels.shape[:2]),), 0xAB, dtype=torch.uint8)
    planar.encode(panels, block)
    return block


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int16)


def gaussian(count: int, depth: int, scale: float = 0.02) -> torch.Tensor:
    return (torch.randn(count, depth, 16) * scale).bfloat16()


@pytest.mark.parametrize(("count", "depth"), [(1, 2), (1, 64), (3, 30), (8, 512)])
def test_gaussian_weights_come_back(count, depth):
    panels = gaussian(count, depth)
    assert torch.equal(bits_of(planar.decode(encoded(panels))), bits_of(panels))


def test_blocks_of_trained_statistics_take_12_bits():
    panels = gaussian(64, 512)
    assert 8 * len(encoded(panels)) / panels.numel() < 12.1
    assert encoded(panels)[24:32].view(torch.int64).item() < 0.001 * panels.numel()


@pytest.mark.parametrize("shuffled", [False, True])
def test_every_pattern_comes_back(shuffled):
    """All 65,536, NaN payloads, subnormals and zeros of both signs among them, a few to each block as escapes."""
    patterns = torch.arange(65536, dtype=torch.int32)
    patterns = patterns[torch.randperm(65536)] if shuffled else patterns
    for part in patterns.to(torch.int16).view(torch.bfloat16).split(512):
        panels = gaussian(64, 1024)
        places = torch.randperm(panels.numel())[: len(part)]
        panels.view(-1)[places] = part
        assert torch.equal(bits_of(planar.decode(encoded(panels))), bits_of(panels))


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, float("inf"), float("nan"), 1e-40, -3e38])
def test_constant_panels_come_back(value):
    panels = torch.full((2, 8, 16), value, dtype=torch.bfloat16)
    assert torch.equal(bits_of(planar.decode(encoded(panels))), bits_of(panels))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31), depth=st.integers(1, 40), count=st.integers(1, 5), escapes=st.integers(0, 40),
    exponent=st.integers(0, 255),
)  # fmt: skip
def test_any_window_and_any_escapes_come_back(seed, depth, count, escapes, exponent):
    """Windows at both ends of the exponent's range, several escapes in one pair of rows."""
    rng = np.random.default_rng(seed)
    words = (rng.integers(0, 2, (count, 2 * depth, 16)) << 15) | rng.integers(0, 128, (count, 2 * depth, 16))
    words |= np.clip(exponent + rng.integers(-6, 7, words.shape), 0, 255) << 7
    flat = words.reshape(-1)
    flat[rng.choice(flat.size, min(escapes, flat.size), replace=False)] = rng.integers(
        0, 65536, min(escapes, flat.size)
    )
    panels = torch.from_numpy(words.astype(np.uint16).view(np.int16)).view(torch.bfloat16)
    assert torch.equal(bits_of(planar.decode(encoded(panels))), bits_of(panels))


def test_weights_without_a_window_are_refused():
    panels = torch.randint(-(2**15), 2**15, (4, 64, 16), dtype=torch.int16).view(torch.bfloat16)
    with pytest.raises(KernelError, match="use the dense format"):
        encoded(panels)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 17, 32])
@pytest.mark.parametrize("escapes", [0, 1, 30])
@pytest.mark.parametrize("depth", [2, 4, 94, 96])
@pytest.mark.parametrize("kind", KINDS, ids=["fma", "dot"][: len(KINDS)])
def test_the_gemm_has_the_bits_of_the_uncompressed_one(kind, depth, rows, escapes):
    panels = gaussian(3, depth)
    places = torch.randperm(panels.numel())[:escapes]
    # The first and last pairs of a panel, and two escapes in one pair.
    places = torch.cat([places, torch.tensor([0, 1, 17, depth * 16 - 1, depth * 16])]) if escapes else places
    panels.view(-1)[places] = torch.tensor(1e-30).bfloat16()
    block, x = encoded(panels), torch.randn(rows, depth).to(tile.x_dtype(kind))
    table, room = np.array([x[r].data_ptr() for r in range(rows)], dtype=np.int64), torch.empty(depth, 16).bfloat16()
    for p in range(3):
        expected, got = torch.empty(rows, 16), torch.full((rows, 16), float("nan"))
        gemm_panel(panels[p].data_ptr(), kind, table.ctypes.data, rows, depth, 0, expected.data_ptr(), 64)
        planar_tile.planar_panel(
            block.data_ptr(), p, 3, kind, table.ctypes.data, rows, depth, room.data_ptr(), got.data_ptr(), 64
        )
        assert torch.equal(got, expected)


@pytest.mark.parametrize("rows", [9, 11, 13, 32])
@pytest.mark.parametrize("depth", [2, 128, 130, 300])
@pytest.mark.parametrize("kind", KINDS, ids=["fma", "dot"][: len(KINDS)])
def test_panels_abreast_have_the_bits_of_each_alone(kind, depth, rows):
    """Dense and compressed, escapes on both sides of where a block of K ends, a panel that has no other beside it."""
    panels = gaussian(3, depth)
    for place in {0, depth - 1, min(127, depth - 1), min(128, depth - 1)}:
        panels[:, place, 3:5] = torch.tensor(1e-30).bfloat16()
    blocks, x = (panels, encoded(panels)), torch.randn(rows, depth).to(tile.x_dtype(kind))
    table, room = np.array([x[r].data_ptr() for r in range(rows)], dtype=np.int64), torch.empty(depth, 16).bfloat16()
    expected = torch.empty(3, rows, 16)
    for p in range(3):
        for r in range(rows):
            gemm_panel(panels[p].data_ptr(), kind, table[r:].ctypes.data, 1, depth, 0, expected[p, r].data_ptr(), 64)
    for planar_block, block in enumerate(blocks):
        got = torch.full((3, rows, 16), float("nan"))
        for first, count in ((0, 2), (2, 1)):
            gemm_panels(
                block.data_ptr(), planar_block, first, count, 3, kind, table.ctypes.data, rows, depth, room.data_ptr(),
                got[first].data_ptr(), rows * 64, 64,
            )  # fmt: skip
        assert torch.equal(got, expected)


@pytest.mark.parametrize("avx2", [False, True], ids=["portable", "avx2"])
def test_what_other_machines_run_has_the_same_bits(monkeypatch, avx2):
    """Without byte shuffles of AVX-512; without AVX2 it is the same IR but for one lookup."""
    from numba import njit

    monkeypatch.setattr(planar_rows, "_HAS_VBMI", False)
    monkeypatch.setattr(planar_rows, "_HAS_AVX2", avx2)
    tile_there = planar_tile._make_tile(planar_tile.BF16, [2], keep=True)
    panels = gaussian(1, 64)
    panels[0, 3, 5] = 1e-30
    block, out = encoded(panels), torch.empty(64, 16, dtype=torch.bfloat16)
    x, expected, got = torch.randn(2, 64), torch.empty(2, 16), torch.empty(2, 16)
    table = np.array([x[0].data_ptr(), x[1].data_ptr()], dtype=np.int64)

    @njit
    def multiply(data, base, escapes, x_rows, room, y):
        tile_there(2, data, base, escapes, x_rows, 64, 0, room, y, 64)

    base = block[:8].view(torch.int64).item()
    index = planar_tile.HEADER_BYTES + 32 * planar_rows.PAIR_BYTES
    escapes = block.data_ptr() + block[index : index + 8].view(torch.int64).item()
    data = block.data_ptr() + planar_tile.HEADER_BYTES
    multiply(data, base, escapes, table.ctypes.data, out.data_ptr(), got.data_ptr())
    gemm_panel(panels.data_ptr(), tile.BF16, table.ctypes.data, 2, 64, 0, expected.data_ptr(), 64)
    assert torch.equal(bits_of(out), bits_of(panels[0]))
    assert torch.equal(got, expected)
