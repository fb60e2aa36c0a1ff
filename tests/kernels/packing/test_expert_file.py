"""Files of experts: whole experts or none, whatever happens to writer, file and disk."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from fluxmoe.kernels.packing import Packed, PackingError
from fluxmoe.kernels.packing.expert_file import PAGE, ExpertFile, ExpertFileHeader, pages
from hypothesis import given
from hypothesis import strategies as st

HEADER = ExpertFileHeader("cpu", "dense", "bfloat16", 64, 32, 5, (5000, 4096), "a digest")
RECIPE = Packed("huffman", (64, 64), {"bits": torch.empty(7, dtype=torch.int32, device="meta")}, {"longest": 9})


def blocks_of(expert: int, header=HEADER) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(expert)
    gate_up, down = (torch.randint(0, 256, (n,), dtype=torch.uint8, generator=generator) for n in header.sizes)
    return gate_up, down


def aligned(nbytes: int) -> torch.Tensor:
    buffer = torch.zeros(pages(nbytes) + PAGE, dtype=torch.uint8)
    begin = -buffer.data_ptr() % PAGE
    return buffer[begin : begin + pages(nbytes)]


def written(path, experts=range(5), recipes=(None, RECIPE)):
    with ExpertFile.create(path, HEADER) as file:
        for expert in experts:
            file.put(expert, blocks_of(expert), recipes)
        file.commit()
    return path


@pytest.mark.parametrize("target", ["pages", "bytes", "mapped"])
def test_experts_come_back(tmp_path, target):
    path = written(tmp_path / "layer", experts=(3, 0))
    with ExpertFile(path, HEADER) as file:
        assert [file.has(e) for e in range(5)] == [True, False, False, True, False]
        assert not file.is_whole
        for expert in (0, 3):
            for d, block in enumerate(blocks_of(expert)):
                into = aligned(len(block)) if target == "pages" else torch.zeros(len(block), dtype=torch.uint8)
                into = file.mapped(expert)[d] if target == "mapped" else into
                file.read(expert, d, into)
                assert torch.equal(into[: len(block)], block)
            assert file.recipe(expert, 0) is None
            recipe = file.recipe(expert, 1)
            assert recipe is not None
            assert (recipe.format, recipe.shape, recipe.metadata) == (RECIPE.format, RECIPE.shape, RECIPE.metadata)
            assert [(p.dtype, p.numel()) for p in recipe.planes.values()] == [(torch.int32, 7)]
        with pytest.raises(PackingError, match="gate_up of expert 1 is not there"):
            file.read(1, 0, aligned(5000))


def test_what_is_mapped_outlives_the_file_and_is_not_the_file(tmp_path):
    path = written(tmp_path / "layer")
    before = path.read_bytes()
    with ExpertFile(path, HEADER) as file:
        gate_up, down = file.mapped(3)
        file.read(3, 0, gate_up)
        file.read(3, 1, down)
    down.zero_()
    assert path.read_bytes() == before
    path.unlink()
    assert torch.equal(gate_up, blocks_of(3)[0])


def test_a_mapped_file_that_gives_no_bytes_is_an_error(tmp_path):
    """Touching what is not there would be SIGBUS, as where the disk fails."""
    path = written(tmp_path / "layer")
    with ExpertFile(path, HEADER) as file:
        gate_up, _ = file.mapped(4)
        os.truncate(path, file.place(4, 0))
        with pytest.raises(PackingError, match=r"reading gate_up of expert 4 .* failed"):
            file.read(4, 0, gate_up)


def test_more_experts_may_come_later_and_holes_take_no_room(tmp_path):
    big = replace(HEADER, sizes=(8 << 20, 4 << 20))
    path = tmp_path / "layer"
    with ExpertFile.create(path, big) as file:
        file.put(1, blocks_of(1, big), (None, None))
        file.commit()
    assert path.stat().st_blocks * 512 < (14 << 20) < path.stat().st_size
    with ExpertFile.create(path, big) as file:
        assert file.has(1)
        file.put(0, blocks_of(0, big), (None, None))
        file.commit()
    with ExpertFile(path, big) as file:
        assert file.has(0)
        assert file.has(1)


def test_what_was_not_committed_is_not_there(tmp_path):
    with ExpertFile.create(tmp_path / "layer", HEADER) as file:
        file.put(0, blocks_of(0), (None, None))
    with ExpertFile(tmp_path / "layer", HEADER) as file:
        assert not any(map(file.has, range(5)))
    assert [path.name for path in tmp_path.iterdir()] == ["layer"]


@pytest.mark.parametrize("change", [{"content": "other"}, {"format": "planar12"}, {"sizes": (4999, 4096)}])
def test_another_models_file_is_refused(tmp_path, change):
    path = written(tmp_path / "layer")
    (name,) = change
    for opened in (ExpertFile, ExpertFile.create):
        with pytest.raises(PackingError, match=f"holds other experts: {name} is"):
            opened(path, replace(HEADER, **change))


def test_one_writer_at_a_time(tmp_path):
    with ExpertFile.create(tmp_path / "layer", HEADER), pytest.raises(PackingError, match="by another process"):
        ExpertFile.create(tmp_path / "layer", HEADER)


@given(st.data())
def test_a_flipped_bit_is_found(tmp_path_factory, data):
    path = written(tmp_path_factory.mktemp("flipped") / "layer")
    size = path.stat().st_size
    raw = bytearray(path.read_bytes())
    with ExpertFile(path, HEADER) as file:
        places = [(e, d, file.place(e, d), n) for e in range(5) for d, n in enumerate(HEADER.sizes)]
    expert, d, begin, count = data.draw(st.sampled_from(places))
    at = begin + data.draw(st.integers(0, count - 1))
    raw[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(raw)
    assert path.stat().st_size == size
    with ExpertFile(path, HEADER) as file, pytest.raises(PackingError, match=f"of expert {expert} is corrupt"):
        file.read(expert, d, aligned(count))


@given(st.integers(0, 2 * PAGE - 1), st.integers(0, 255))
def test_a_damaged_front_is_one_error_or_none(tmp_path_factory, at, value):
    """Header or records: never another experts' bytes, never a traceback of another kind."""
    path = written(tmp_path_factory.mktemp("front") / "layer")
    raw = bytearray(path.read_bytes())
    raw[at] = value
    path.write_bytes(raw)
    with suppress(PackingError), ExpertFile(path, HEADER) as file:
        for expert in range(5):
            for d, block in enumerate(blocks_of(expert)):
                into = aligned(len(block))
                file.read(expert, d, into)
                file.recipe(expert, d)
                assert torch.equal(into[: len(block)], block)


def test_files_cut_short_or_of_another_kind_are_refused(tmp_path):
    path = written(tmp_path / "layer")
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(PackingError, match="truncated"):
        ExpertFile(path, HEADER)
    for content in (b"", b"FLUXEXPT", b"x" * 5000):
        path.write_bytes(content)
        with pytest.raises(PackingError, match="no file of experts"):
            ExpertFile(path, HEADER)
    with pytest.raises(PackingError, match="cannot be read"):
        ExpertFile(tmp_path / "missing", HEADER)


def test_a_killed_writer_leaves_whole_experts_and_no_other_file(tmp_path):
    """It commits one expert after the other; killed at any moment, those that count are right."""
    script = tmp_path / "writer.py"
    script.write_text(
        "import sys; from pathlib import Path\n"
        "from tests.kernels.packing.test_expert_file import *\n"
        "with ExpertFile.create(Path(sys.argv[1]), HEADER) as file:\n"
        "    for i in range(10**9):\n"
        "        file.put(i % 5, blocks_of(i % 5), (None, RECIPE)); file.commit(); print(i, flush=True)\n"
    )
    out = tmp_path / "out"
    out.mkdir()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    for after in (0, 7):
        process = subprocess.Popen([sys.executable, script, out / "layer"], stdout=subprocess.PIPE, env=environment)
        assert process.stdout is not None
        for _ in range(after + 1):
            process.stdout.readline()
        process.kill()
        process.wait()
        process.stdout.close()
        assert [path.name for path in out.iterdir()] == ["layer"]
        with ExpertFile(out / "layer", HEADER) as file:
            assert sum(map(file.has, range(5))) >= min(5, after + 1)
            for expert in filter(file.has, range(5)):
                for d, block in enumerate(blocks_of(expert)):
                    into = aligned(len(block))
                    file.read(expert, d, into)
                    assert torch.equal(into[: len(block)], block)
