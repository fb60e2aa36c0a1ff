"""Algorithm 1 on a virtual clock: when each load would be done, by the schedule that drives the real streamers.

Loads are issued in order over one link and one decoder, neither of which idles while a slot is free:

    load v begins   once the link (the decoder) is free and visit `schedule.follows(v)` was computed
    load v is done  after the longer of link and decode

Loads run ahead as far as the slots allow, over the end of a pass too, as in the engine.
"""

from __future__ import annotations

from typing import NamedTuple

from ..experts.footprint import slot_schedule
from ..experts.layout import ExpertLayout
from ..timeline import COPY, DECODE, Timeline


class Load(NamedTuple):
    """What bringing a layer's experts takes: seconds on the link and of decoding, bytes that cross; how many."""

    link_s: float
    decode_s: float
    nbytes: int
    experts: int = 0


class Arrived(NamedTuple):
    """A layer's experts: when they are there, and the load that brought them (None: they came in an earlier pass)."""

    at_s: float
    load: Load | None


class VirtualStreamer:
    """Loads of a layout's streamed layers on `slots` slots; moves: every layer has its turn, as experts come and go.

    loads: by layer, read when a load is issued, so it may be replaced between passes.
    """

    def __init__(
        self, layout: ExpertLayout, slots: int, moves: bool, loads: list[Load], timeline: Timeline | None = None
    ) -> None:
        self._timeline = timeline or Timeline(enabled=False)
        self.order, self.schedule = slot_schedule(layout, slots, moves)
        self.loads = loads
        self._rank = {layer: rank for rank, layer in enumerate(self.order)}
        self._visit = self._issued = 0
        self._link_free = self._decoder_free = 0.0
        self._computed: dict[int, float] = {}
        self._arrived: dict[int, Arrived] = {}

    def __contains__(self, layer: int) -> bool:
        return layer in self._rank

    def begin(self, layer: int) -> Arrived:
        """The next visit, which is of `layer`: all loads that may have begun by now are issued."""
        visit = self._rank[layer] if self.schedule.keeps_all else self._visit
        assert self.order[self.schedule.rank(visit)] == layer, f"layer {layer} visited out of order"
        upto = self.schedule.loads_by(visit)
        while self._issued < upto:
            self._issue(self._issued)
            self._issued += 1
        return self._arrived.pop(visit, Arrived(0.0, None))

    def finish(self, layer: int, now_s: float) -> None:
        """The visit is computed at `now_s`: its slot may be overwritten."""
        if not self.schedule.keeps_all:
            self._computed[self._visit] = now_s
            self._visit += 1

    def _issue(self, visit: int) -> None:
        layer = self.order[self.schedule.rank(visit)]
        load = self.loads[layer]
        # Each visit is followed by one load, so nobody asks again.
        free_s = self._computed.pop(self.schedule.follows(visit), 0.0)
        self._link_free = self._use(COPY, layer, self._link_free, free_s, load.link_s, load)
        self._decoder_free = self._use(DECODE, layer, self._decoder_free, free_s, load.decode_s, load)
        done_s = max(self._link_free if load.link_s else free_s, self._decoder_free if load.decode_s else free_s)
        self._arrived[visit] = Arrived(done_s, load)

    def _use(self, track: str, layer: int, idle_s: float, free_s: float, takes_s: float, load: Load) -> float:
        """Link or decoder, idle since `idle_s`, is used once the slot is free; until when."""
        begin_s = max(idle_s, free_s)
        if takes_s and self._timeline.enabled:
            idle, begin, end = (round(s * 1e9) for s in (idle_s, begin_s, begin_s + takes_s))
            nbytes = load.nbytes if track == COPY else 0
            self._timeline.add(track, f"wait slot {layer}", "wait", idle, begin, layer=layer)
            self._timeline.add(
                track, f"{track} {layer}", "load", begin, end, layer=layer, experts=load.experts, bytes=nbytes
            )
        return begin_s + takes_s
