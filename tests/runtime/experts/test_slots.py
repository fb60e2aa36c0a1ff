"""The slot schedule keeps both dependencies for any layers, slots and passes that were given up."""

from __future__ import annotations

from typing import Any

import pytest
from fluxmoe.runtime.experts.slots import SlotSchedule
from hypothesis import given
from hypothesis import strategies as st


def test_follows_by_hand():
    # Slots by rank: 0 1 0 1 0 | 0 1 0 1 0
    schedule = SlotSchedule(5, 2)
    assert [schedule.slot(v) for v in range(10)] == [0, 1, 0, 1, 0] * 2
    assert [schedule.follows(v) for v in range(10)] == [-1, -1, 0, 1, 2, 4, 3, 5, 6, 7]
    # While visit 4 runs, load 5 must wait for it; while visit 5 runs, load 6 has begun.
    assert [schedule.loads_by(v) for v in range(10)] == [2, 3, 4, 5, 5, 7, 8, 9, 10, 10]


@pytest.mark.parametrize(("layers", "slots"), [(4, 2), (6, 3), (6, 2), (48, 2), (3, 3)])
def test_where_slots_divide_the_layers_loads_run_ahead_by_all_slots_but_one(layers, slots):
    schedule = SlotSchedule(layers, slots)
    for visit in range(3 * layers):
        assert schedule.loads_by(visit) == visit + slots
        assert schedule.follows(visit + slots) == visit


@given(st.integers(1, 12), st.integers(1, 6))
def test_follows_is_the_last_earlier_visit_of_the_slot(layers, slots):
    schedule = SlotSchedule(layers, slots)
    for visit in range(4 * layers):
        before = [v for v in range(visit) if v % layers % slots == visit % layers % slots]
        assert schedule.follows(visit) == max(before, default=-1)


@given(st.integers(1, 9), st.integers(1, 5), st.data())
def test_any_passes_read_what_was_loaded_and_overwrite_nothing_that_is_read(layers, slots, data):
    """A machine of slots that does what the schedule allows as early, or as late, as it may."""
    schedule = SlotSchedule(layers, slots)
    holds: dict[int, Any] = {}
    reading, loaded, visit = None, 0, 0

    def load_to(count):
        nonlocal loaded
        while loaded < count:
            # Write after read: neither the visit that runs nor one that is still to come has its bytes overwritten.
            victim = holds.get(schedule.slot(loaded))
            assert victim is None or victim < visit, (victim, visit)
            assert reading is None or schedule.slot(reading) != schedule.slot(loaded)
            holds[schedule.slot(loaded)] = loaded
            loaded += 1

    for _ in range(4):
        visit = schedule.next_pass(visit)
        stop = data.draw(st.integers(0, layers), label="visits before the pass is given up")
        for _ in range(stop):
            # What a visit needs must be allowed by then; what is allowed beyond may be done before or during it.
            load_to(visit + 1)
            reading = visit
            if data.draw(st.booleans(), label="loads run ahead"):
                load_to(schedule.loads_by(visit))
            assert holds[schedule.slot(visit)] == visit  # read after write
            reading = None
            visit += 1
        if stop == layers:
            assert visit == schedule.next_pass(visit)
            assert loaded <= schedule.loads_after_pass(visit)


@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 40))
def test_no_load_that_is_allowed_is_held_back(layers, slots, visit):
    schedule = SlotSchedule(layers, slots)
    begun = schedule.loads_by(visit)
    assert begun > visit
    assert all(schedule.follows(load) < visit for load in range(visit + 1, begun))
    assert schedule.follows(begun) >= visit


def test_layers_with_a_slot_each_are_loaded_once():
    schedule = SlotSchedule(3, 4, keeps_all=True)
    assert [schedule.slot(v) for v in range(3)] == [0, 1, 2]
    assert [schedule.loads_by(v) for v in range(9)] == [3] * 9
    # Where experts move, all layers are loaded in each pass, whatever the slots: the next pass's once its own was read.
    moving = SlotSchedule(3, 4)
    assert [moving.follows(v) for v in range(6)] == [-1, -1, -1, 0, 1, 2]


def test_no_streamed_layers_is_a_schedule_too():
    assert SlotSchedule(0, 2, keeps_all=True).loads_by(0) == 0
    assert SlotSchedule(0, 2).next_pass(0) == 0
    with pytest.raises(AssertionError, match="slot each"):
        SlotSchedule(3, 2, keeps_all=True)
