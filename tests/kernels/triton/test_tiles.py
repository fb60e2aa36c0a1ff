"""Tile choice: a pure function that always fits the GPU, and a tuned table that overrides the rule."""

from __future__ import annotations

import json
import math

import pytest
from fluxmoe.kernels.triton import tiles
from fluxmoe.kernels.triton.tiles import ROW_BOUNDS, Tile, choose_tiles, default_tile, fit, invariant_tile, shared_limit


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_every_tile_fits_shared_memory(capability, itemsize):
    for rows in (0, 1, 16, 17, 64, 100, 129, 1e6):
        assert default_tile(rows, capability, itemsize).shared_bytes(itemsize) <= shared_limit(capability)
    assert invariant_tile(capability, itemsize).shared_bytes(itemsize) <= shared_limit(capability)


def test_tiles_grow_with_rows():
    sizes = [default_tile(min(bound, 1e6), 90, 2).block_m for bound in ROW_BOUNDS]
    assert sizes == sorted(sizes)
    assert sizes[0] == 16


def test_the_rule_changes_at_its_bounds():
    for bound in ROW_BOUNDS[:-1]:
        assert default_tile(bound, 90, 2) != default_tile(bound + 0.1, 90, 2)


def test_fit_takes_stages_away_until_a_tile_fits():
    assert fit(Tile(128, 256, 64, 8, 9), 90, 2).num_stages == 4
    assert fit(Tile(128, 256, 64, 8, 4), 89, 2).num_stages == 2


def test_unknown_capabilities_count_as_the_next_lower():
    assert shared_limit(87) == shared_limit(86)
    assert shared_limit(70) == shared_limit(80)


def test_a_tuned_table_is_used_for_its_gpu_and_shape(tmp_path, monkeypatch):
    small, large = Tile(16, 32, 256, 4, 5, swap_ab=True), Tile(128, 128, 64, 8, 4)
    pair = {
        name: {"gate_up": tiles.tile_fields(tile), "down": tiles.tile_fields(tile)}
        for name, tile in (("8", small), ("max", large))
    }
    (tmp_path / "nvidia-x1.json").write_text(json.dumps({"tiles": {"2048,768": pair}}))
    monkeypatch.setattr(tiles, "TUNED_DIR", tmp_path)
    tiles._tuned.cache_clear()
    assert choose_tiles(2048, 768, 8, 90, 2, "NVIDIA X1").gate_up == small
    assert choose_tiles(2048, 768, 8.5, 90, 2, "NVIDIA X1").down == large
    for other in [(2048, 512, 8, 90, 2, "NVIDIA X1"), (2048, 768, 8, 90, 2, "NVIDIA X2"), (2048, 768, 8, 90, 2, None)]:
        assert choose_tiles(*other).gate_up == default_tile(8, 90, 2)
    tiles._tuned.cache_clear()


def test_packed_experts_are_decoded_first_beyond_a_bound_that_a_table_may_change(tmp_path, monkeypatch):
    (tmp_path / "nvidia-x1.json").write_text(json.dumps({"tiles": {}, "decode_rows": 80}))
    monkeypatch.setattr(tiles, "TUNED_DIR", tmp_path)
    tiles._decode_rows.cache_clear()
    assert [tiles.decodes_first(rows, "NVIDIA X1") for rows in (80, 81)] == [False, True]
    assert [tiles.decodes_first(tiles.DECODE_ROWS + more, "NVIDIA X2") for more in (0, 1)] == [False, True]
    tiles._decode_rows.cache_clear()


def test_committed_tables_are_valid():
    for path in tiles.TUNED_DIR.glob("*.json"):
        table = json.loads(path.read_text())
        assert table["provenance"]["device"]
        for by_rows in table["tiles"].values():
            assert "max" in by_rows
            for pair in by_rows.values():
                gate_up, down = Tile(**pair["gate_up"]), Tile(**pair["down"])
                assert gate_up.block_m == down.block_m
                assert math.log2(gate_up.block_n) % 1 == 0
