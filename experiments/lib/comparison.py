"""Two folders of results side by side: rows of the same point, and the ratio of what they measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .results import read_csv

# What says which point a row is; every other column that is a number is a result.
POINT = (
    "panel", "x", "placement", "budget_bytes", "budget", "wall", "variant", "system", "batch", "context", "provider",
    "sequences", "shape", "tokens", "rows_per_expert", "kernel", "memory", "size", "kind", "host_format", "alpha",
    "model", "field", "value", "format", "tensor", "routing", "queries", "dtype", "group", "call", "graphs", "figure",
    "source", "iteration",
)  # fmt: skip
# Runs of one point, over which the median is taken; and what says how a row came about.
_REPEATS, _MADE = ("repeat", "turn", "round"), ("run", "made", "commit", "code")
# Columns that tell how fast: of these the ratios are shown first.
SPEEDS = (
    "tokens_per_s", "decode_tokens_per_s", "over_resident", "time_us", "decode_gb_per_s", "overhead_percent",
    "dense_over_planar12", "predicted_us", "compute_s", "duration_s",
)  # fmt: skip
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Difference:
    """One column of one table. ratios: second over first, one a point that both have."""

    table: str
    column: str
    ratios: np.ndarray

    @property
    def largest(self) -> float:
        """Largest relative difference of any point."""
        return float(np.abs(self.ratios - 1).max())

    def __str__(self) -> str:
        low, middle, high = np.percentile(self.ratios, [0, 50, 100])
        return f"{self.column} {middle:.3f}x ({low:.3f} … {high:.3f}, {len(self.ratios)} points)"


@dataclass(frozen=True)
class Comparison:
    """differences: a column each; missing: points that only one of the two has; words: points whose text differs."""

    differences: list[Difference]
    missing: int
    words: int

    @property
    def same(self) -> bool:
        """Something was compared, and nothing differs but by roundings."""
        return bool(self.differences) and not self.told

    @property
    def told(self) -> str:
        """What differs: the column that does most, words, points."""
        largest = self.largest
        parts = [str(largest)] if largest is not None and largest.largest >= _ROUNDING else []
        parts += [f"{self.words} values that are no numbers (status, tokens)"] if self.words else []
        parts += [f"{self.missing} points are in one alone"] if self.missing else []
        return "; ".join(parts)

    @property
    def largest(self) -> Difference | None:
        return max(self.differences, key=lambda d: d.largest, default=None)

    @property
    def speed(self) -> Difference | None:
        """The column that tells most."""
        return next((d for name in SPEEDS for d in self.differences if d.column == name), self.largest)


def compare(first: Path, second: Path) -> Comparison:
    """All tables of both folders; what only one has lacks its points in the other."""
    differences: list[Difference] = []
    missing = words = 0
    names = {path.name for folder in (first, second) for path in folder.glob("*.csv")}
    for name in sorted(name for name in names if not name.startswith("old_")):
        one, other = _points(read_csv(first / name)), _points(read_csv(second / name))
        missing += len(one.keys() ^ other.keys())
        both = [key for key in one if key in other]
        columns = dict.fromkeys(column for key in both for column in one[key] if column in other[key])
        for column in columns:
            pairs = [(one[key].get(column, ""), other[key].get(column, "")) for key in both]
            numbers = [(a, b) for a, b in pairs if isinstance(a, float) and isinstance(b, float)]
            words += sum(a != b for a, b in pairs if not (isinstance(a, float) and isinstance(b, float)))
            if numbers:
                ratios = np.array([1.0 if a == b else b / a if a else np.inf for a, b in numbers])
                differences.append(Difference(name, column, ratios))
    return Comparison(differences, missing, words)


def _points(rows: list[dict[str, str]]) -> dict[tuple, dict[str, float | str]]:
    """Point → its columns, medians over repeats."""
    by_point: dict[tuple, list[Mapping[str, str]]] = {}
    for row in rows:
        key = tuple((name, row[name]) for name in POINT if row.get(name))
        by_point.setdefault(key, []).append(row)
    found: dict[tuple, dict[str, float | str]] = {}
    for key, each in by_point.items():
        named = {name for name, _ in key}
        columns = [c for c in each[0] if c not in (*_REPEATS, *_MADE, "reason") and c not in named]
        found[key] = {column: _median([row[column] for row in each]) for column in columns}
    return found


def _median(values: list[str]) -> float | str:
    try:
        return float(np.median([float(value) for value in values]))
    except ValueError:
        return values[0]
