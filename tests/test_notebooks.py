"""Every notebook runs from top to bottom, and is committed with what that shows: readable where code is hosted."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# What a cell says that draws.
PLOTS = re.compile(r"\bplt\.show\(|\bdraw_\w+\(|\.(plot|hist|barh?|loglog)[.(]")
# Of machines: absolute paths, and who is where.
PLACES = re.compile(r"(?<![\w.:/])/(?:[\w.-]+/)+[\w.-]+|\w@[\w-]+:|site-packages")

spec = importlib.util.spec_from_file_location("execute", ROOT / "notebooks" / "execute.py")
assert spec is not None
assert spec.loader is not None
execute = importlib.util.module_from_spec(spec)
spec.loader.exec_module(execute)


def code_cells(book):
    return [cell for cell in book.cells if cell.cell_type == "code"]


def shown(cell) -> set[tuple[str, ...]]:
    """Kinds of what a cell shows."""
    return {(output.output_type, *sorted(output.get("data", {}))) for output in cell.outputs}


def text_of(cell) -> str:
    parts = [output.get("text", "") for output in cell.outputs]
    parts += [
        value if isinstance(value, str) else str(value)
        for output in cell.outputs
        for kind, value in output.get("data", {}).items()
        if kind.startswith("text/")
    ]
    return "\n".join(parts)


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


def test_notebook_runs_and_shows_what_is_committed(path, monkeypatch):
    # A backend of its own choice, and a kernel without the interpreter of the kernel tests.
    monkeypatch.delenv("MPLBACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    executed, committed = execute.execute(path), nbformat.read(path, as_version=4)
    assert [shown(cell) for cell in code_cells(executed)] == [shown(cell) for cell in code_cells(committed)]


def test_outputs_are_committed_whole_and_in_order(path):
    cells = code_cells(nbformat.read(path, as_version=4))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [o for cell in cells for o in cell.outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert path.stat().st_size < 500_000


def test_every_cell_that_draws_has_an_image(path):
    drawing = [cell for cell in code_cells(nbformat.read(path, as_version=4)) if PLOTS.search(cell.source)]
    assert drawing
    for cell in drawing:
        assert any("image/png" in output.get("data", {}) for output in cell.outputs), cell.source


def test_outputs_name_no_machine(path):
    for cell in code_cells(nbformat.read(path, as_version=4)):
        assert not PLACES.search(text_of(cell)), cell.source


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("saved /home/me/x", True),
        ("'/tmp/a'", True),
        ("me@host:~", True),
        ("GB/s, a/tmp", False),
        ("1/2 and w/o", False),
    ],
)
def test_places_are_seen(text, found):
    assert bool(PLACES.search(text)) == found


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 4
