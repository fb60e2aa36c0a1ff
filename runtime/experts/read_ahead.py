"""Experts of files that are read before they are asked for: how many, from expected bytes and measured rates.

While a layer runs, the disk reads what that layer asked for; then it has nothing to do until the next one asks. In this
time it reads what the next layer lacks, the likeliest experts first, as long as

    room     the disk has time for them: seconds as turns took, bytes/s as reads came
    chance   those expected to be in vain are at most `WASTE` of those expected to be used
    credit   whatever was expected, bytes read ahead and not used are at most `WASTE` of what layers have lacked so far

With one sequence that is hardly ever an expert: on demand. Where nearly all of a layer's experts are used it is all
that it lacks: whole-layer streaming, chosen layer by layer, as far as the disk has time.
"""

from __future__ import annotations

import numpy as np

# Bytes in vain for each byte that is needed: what reading ahead may cost a disk that others use too.
WASTE = 0.05


def likeliest(chances: np.ndarray, expert_bytes: int, most_bytes: float) -> np.ndarray:
    """Which of a layer's absent experts to read ahead, into `chances` float [n] of their use; the likeliest first.

    No more than `most_bytes`, and as many as are expected to be in vain for at most `WASTE` of those used.
    """
    order = np.argsort(-chances, kind="stable")
    ranked = chances[order]
    worth = np.cumsum(1 - ranked) <= WASTE * np.cumsum(ranked)
    return order[: int(min(worth.sum(), max(0, most_bytes) // expert_bytes))]


class ReadAhead:
    """What a cache of experts of `expert_bytes` knows of its disk and of its luck, by which it reads ahead."""

    def __init__(self, layers: int, expert_bytes: int) -> None:
        self._expert_bytes = expert_bytes
        # Of experts that layers used and that were not here, but for being read ahead; of those read ahead and not
        # used, as long as they are not.
        self.lacked_bytes = self.unused_bytes = 0
        self._bytes_per_s = 0.0
        # By layer, of its last two turns: bytes for which the disk had time beside those that were asked for.
        self._rooms = np.zeros((2, layers))

    def ran(self, layer: int, seconds: float, busy_s: float, read_bytes: int, asked_bytes: int) -> None:
        """The turn of `layer`, until the next one asked: it took `seconds`, in `busy_s` of which the disk read
        `read_bytes`; the layer had waited for `asked_bytes`."""
        if busy_s > 0:
            self._bytes_per_s = read_bytes / busy_s
        self._rooms[:, layer] = self._rooms[1, layer], max(0.0, seconds * self._bytes_per_s - asked_bytes)

    def used(self, lacked: int, came_ahead: int) -> None:
        """A layer used so many experts that were not here when it was last idle, of which some were read ahead."""
        self.lacked_bytes += lacked * self._expert_bytes
        self.unused_bytes -= came_ahead * self._expert_bytes

    def choose(self, layer: int, chances: np.ndarray, most: int) -> np.ndarray:
        """Which absent experts of the next layer, with their `chances` [n], to read while `layer` runs, at most `most`:
        they count as not used from now on."""
        credit = WASTE * self.lacked_bytes - self.unused_bytes
        chosen = likeliest(chances, self._expert_bytes, min(self._rooms[:, layer].min(), credit))[:most]
        self.unused_bytes += len(chosen) * self._expert_bytes
        return chosen
