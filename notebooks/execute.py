"""Execute the notebooks in place, with their outputs: python notebooks/execute.py [NAME …]"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent


def execute(path: Path) -> nbformat.NotebookNode:
    """The notebook with its outputs, from top to bottom in a process of its own. CellExecutionError."""
    book = nbformat.read(path, as_version=4)
    # Neither times nor versions: what changes without a reason is not kept.
    NotebookClient(book, timeout=300, record_timing=False, resources={"metadata": {"path": str(HERE.parent)}}).execute()
    book.metadata.language_info = {"name": "python"}
    return book


if __name__ == "__main__":
    names = sys.argv[1:]
    for path in sorted(HERE.glob("*.ipynb")):
        if not names or path.stem in names:
            nbformat.write(execute(path), path)
            print(path.name)
