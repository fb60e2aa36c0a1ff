"""Algorithm 1 of the paper (arXiv 2604.02715 §4.1) as a schedule: which load waits for which visit. No torch, no state.

L streamed layers are visited cyclically, pass after pass. Visit v, counted on for ever, is of the layer of rank
v mod L, and load v brings that layer's experts. A layer has one slot for ever, its rank mod S, so that what was
recorded with its addresses (a table, a captured CUDA graph) stays right in every pass. Two dependencies make that safe:

    write after read    load v may begin once visit `follows(v)`, the last one before v in the same slot, was computed
    read after write    visit v is computed once load v is done

Loads are issued in the order of visits, and run ahead of them by S - 1 layers, across the end of a pass too where S
divides L. Where it does not, the layers at the end of a pass have the slots of those at the beginning of the next, and
the loads of these begin later. The worst case: with 2 slots and an odd L the last and the first layer share a slot, and
nothing runs ahead across the end of the pass. Example: L = 5, S = 2, slots by rank 0 1 0 1 0; load 4 follows visit 2,
load 5 follows visit 4.

A pass may be given up at any visit. Its other visits then count as computed: the next pass begins at the next multiple
of L.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SlotSchedule:
    """L = `layers` ≥ 0 streamed layers on S = `slots` ≥ 1 slots.

    keeps_all: the layers' experts never change and each layer has a slot of its own, so load v < L is the only one of
    its layer, and serves that layer in every pass.
    """

    layers: int
    slots: int
    keeps_all: bool = False

    def __post_init__(self) -> None:
        assert self.slots >= 1, "loads need a slot"
        assert not self.keeps_all or self.layers <= self.slots, "kept layers need a slot each"

    def rank(self, visit: int) -> int:
        """Which of the streamed layers the visit is of."""
        return visit % self.layers

    def slot(self, visit: int) -> int:
        return self.rank(visit) % self.slots

    def follows(self, visit: int) -> int:
        """The visit that must have been computed before load `visit` may overwrite its slot; -1 for none."""
        rank = self.rank(visit)
        if rank >= self.slots:
            return visit - self.slots
        last_in_slot = rank + (self.layers - 1 - rank) // self.slots * self.slots
        return max(-1, visit - rank - self.layers + last_in_slot)

    def next_pass(self, visit: int) -> int:
        """The first visit of the pass that begins when the next visit in order would be `visit`."""
        return -(-visit // self.layers) * self.layers if self.layers else 0

    def loads_by(self, visit: int) -> int:
        """How many loads may have begun, hence should have, when `visit` begins, all before it computed or given up."""
        if self.keeps_all:
            return self.layers
        load = visit + 1
        while self.follows(load) < visit:
            load += 1
        return load

    def loads_after_pass(self, begin: int) -> int:
        """How many loads a whole pass leaves begun, when the next one begins with visit `begin` > 0."""
        return self.loads_by(begin - 1)
