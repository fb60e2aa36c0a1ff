"""Every notebook runs from a clean checkout, from top to bottom."""

from __future__ import annotations

from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, monkeypatch):
    # Plots are drawn, but not shown; a kernel of its own, without the interpreter of the kernel tests.
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    book = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(book, timeout=120, resources={"metadata": {"path": str(ROOT)}}).execute()
    assert all(not cell.get("outputs") for cell in nbformat.read(path, as_version=4).cells), "commit without outputs"


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 4
