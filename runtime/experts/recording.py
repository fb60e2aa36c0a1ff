"""Which experts each token chose: recorded while a model is served, kept in a file, read by replays.

A recording is an .npz (numpy.load, no pickles) of R tokens, L layers with experts, k choices a token:

    experts      int16  [R, L, k]   experts chosen, best first; -1: elsewhere
    step         int32  [R]         the pass that computed the token, from 0
    sequence     int32  [R]         whose token it is, by arrival; -1: the host did not say
    position     int32  [R]         in its sequence, from the prompt's end on: negative in the prompt
    num_experts  int32  []
    about        str    []          JSON: where it comes from (model, settings, provenance)

What a sequence's tokens choose does not depend on who shares their batch, so one recording gives batches of any size.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor

_ARRAYS = ("experts", "step", "sequence", "position")
# A visit of a replay: a layer, and the experts that the pass uses there, ascending.
Visit = tuple[int, np.ndarray]


class RecordingError(ValueError):
    """A recording that cannot be read, or does not have what is asked of it."""


@dataclass(frozen=True, eq=False)
class Recording:
    """See the module. Rows are in the order in which they were computed."""

    experts: np.ndarray
    step: np.ndarray
    sequence: np.ndarray
    position: np.ndarray
    num_experts: int
    about: Mapping[str, Any]

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and experts."""
        return self.experts.shape[1], self.num_experts

    def popularity(self) -> np.ndarray:
        """int64 [L, E]: by how many tokens each expert was chosen."""
        layers, experts = self.shape
        chosen = np.where(self.experts < 0, experts, self.experts)
        return np.stack([np.bincount(chosen[:, i].ravel(), minlength=experts + 1)[:experts] for i in range(layers)])

    def visits(self) -> list[Visit]:
        """The passes as they were made, layer by layer."""
        cuts = np.flatnonzero(np.diff(self.step)) + 1
        return [visit for rows in np.split(self.experts, cuts) for visit in visits_of(rows)]

    def batches(self, size: int) -> np.ndarray:
        """Experts int16 [passes, size, L, k] of decode alone: `size` lanes, each one sequence after another, a token of
        every lane in each pass. RecordingError for fewer sequences than lanes."""
        generated = np.flatnonzero((self.position >= 0) & (self.sequence >= 0))
        # What was computed again after a preemption counts once.
        keys = np.stack([self.sequence[generated], self.position[generated]])
        keys, first = np.unique(keys, axis=1, return_index=True)
        rows, starts = generated[first], np.flatnonzero(np.diff(keys[0], prepend=-1))
        if len(starts) < size:
            raise RecordingError(
                f"a batch of {size} needs as many sequences that generated tokens; the recording has {len(starts)}"
            )
        sequences = np.split(rows, starts[1:])
        lanes = [np.concatenate(sequences[lane::size]) for lane in range(size)]
        passes = min(map(len, lanes))
        return self.experts[np.stack([lane[:passes] for lane in lanes], axis=1)]

    def save(self, file: BinaryIO) -> None:
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        about = np.array(json.dumps(self.about))
        np.savez_compressed(file, num_experts=np.int32(self.num_experts), about=about, **arrays)

    def to_bytes(self) -> bytes:
        with io.BytesIO() as file:
            self.save(file)
            return file.getvalue()

    @classmethod
    def load(cls, path: Any) -> Recording:
        """RecordingError for a file that is none."""
        try:
            with np.load(path) as found:
                arrays = {name: found[name] for name in _ARRAYS}
                recording = cls(**arrays, num_experts=int(found["num_experts"]), about=json.loads(str(found["about"])))
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
            raise RecordingError(f"{path} is no recording of routing (generate --record-routing makes one)") from None
        recording._check(path)
        return recording

    def _check(self, path: Any) -> None:
        rows, experts = len(self.experts), self.experts
        whole = experts.ndim == 3 and all(getattr(self, name).shape == (rows,) for name in _ARRAYS[1:])
        kinds = all(getattr(self, name).dtype.kind == "i" for name in _ARRAYS)
        if not (whole and kinds and experts.size) or experts.max() >= self.num_experts or experts.min() < -1:
            raise RecordingError(f"{path} is damaged: its arrays do not fit one another")


def visits_of(tokens: np.ndarray) -> list[Visit]:
    """One pass over tokens [T, L, k], layer by layer."""
    used = [np.unique(tokens[:, layer]) for layer in range(tokens.shape[1])]
    return [(layer, experts[experts >= 0]) for layer, experts in enumerate(used)]


class RoutingRecorder:
    """Notes what the layers of a pass choose, in order; a pass that is given up is not kept."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._layers, self._num_experts = num_layers, num_experts
        self._running: list[list[np.ndarray]] = []
        self._labels: tuple[np.ndarray, np.ndarray] | None = None
        # By pass: experts [T, L, k], sequences [T], positions [T].
        self._passes: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def label(self, sequences: np.ndarray, positions: np.ndarray) -> None:
        """Whose tokens the next pass computes, and where in their sequences; see the module."""
        self._keep()
        self._labels = sequences, positions

    def note(self, layer: int, chosen: Tensor, part: int = 0) -> None:
        """Integers [T, k]: what tokens of the running pass choose in `layer`; part: of a pass that takes several."""
        ids = chosen.cpu().numpy().astype(np.int16)
        ids[(ids < 0) | (ids >= self._num_experts)] = -1
        if part == 0:
            if layer == 0:
                self._keep()
            assert layer == len(self._running), "a pass calls every layer, in order"
            self._running.append([])
        self._running[layer].append(ids)

    def _keep(self) -> None:
        """The pass that ran is over."""
        running, self._running = self._running, []
        if len(running) < self._layers:
            return
        experts = np.stack([np.concatenate(parts) for parts in running], axis=1)
        nobody = np.full(len(experts), -1), np.zeros(len(experts), int)
        labels, self._labels = self._labels or nobody, None
        self._passes.append((experts, *labels))

    def recording(self, **about: Any) -> Recording:
        """All passes so far. about: where they come from. RecordingError where there is none."""
        self._keep()
        if not self._passes:
            raise RecordingError("no pass was recorded")
        experts, sequences, positions = (np.concatenate(arrays) for arrays in zip(*self._passes, strict=True))
        steps = np.repeat(np.arange(len(self._passes)), [len(experts) for experts, *_ in self._passes])
        step, sequence, position = (array.astype(np.int32) for array in (steps, sequences, positions))
        return Recording(experts, step, sequence, position, self._num_experts, about)
