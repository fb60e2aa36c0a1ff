"""JSON that comes from elsewhere, bounded before anything is made of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# A table of 70,000 tensors, as 48 layers of 512 experts have, takes 11 MB and 3 brackets a tensor.
MOST_BYTES = 16 << 20
_MOST_BRACKETS = 1 << 20


def parse_json(raw: bytes, **options: Any) -> Any:
    """`json.loads` of at most MOST_BYTES. ValueError with the reason, also where it nests too deep, or holds so many
    lists and objects that making them would take seconds."""
    if len(raw) > MOST_BYTES or raw.count(b"[") + raw.count(b"{") > _MOST_BRACKETS:
        raise ValueError("it is larger than that of any model")
    try:
        return json.loads(raw, **options)
    except RecursionError:
        raise ValueError("it nests too deep") from None


def read_json(path: Path) -> Any:
    """OSError; ValueError as `parse_json`."""
    with path.open("rb") as file:
        return parse_json(file.read(MOST_BYTES + 1))
