"""Slabs: every one is free or has one holder, whatever experts and KV take and give, and keeps what it was given."""

from __future__ import annotations

import pytest
import torch
from fluxmoe.kernels.host_memory import PAGE
from fluxmoe.runtime.devices import HOST, CpuDevice
from fluxmoe.runtime.memory.slabs import FREE, SlabError
from fluxmoe.runtime.serving.kv_cache import KV_LINE, KVLayout, PagedKVCache
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

# A unit of 64 bytes, a block of 4, slabs of 3 blocks and a unit that is left over.
LAYOUT = KVLayout(2, (4, 1, 8), (2, 1, 16), torch.bfloat16)
SLABS, SLAB_BYTES = 7, LAYOUT.slab_bytes(3 * LAYOUT.block_bytes)


class Sharers(RuleBasedStateMachine):
    """Experts that take slabs, and KV that takes slabs for its blocks, all of them marked."""

    def __init__(self):
        super().__init__()
        self.pool = HOST.make_slabs(SLABS, SLAB_BYTES, poison=True)
        self.kv = PagedKVCache(LAYOUT, self.pool)
        self.experts, self.blocks, self.marks = {}, {}, 0

    def _mark(self) -> int:
        self.marks = self.marks % 100 + 1
        return self.marks

    @rule()
    def expert_comes(self):
        if not self.pool.num_free:
            with pytest.raises(SlabError, match="none of the 7 slabs"):
                self.pool.take("experts")
            return
        slab = self.pool.take("experts")
        self.experts[slab] = self._mark()
        self.pool.memory[slab] = self.experts[slab]

    @precondition(lambda self: self.experts)
    @rule(data=st.data())
    def expert_leaves(self, data):
        slab = data.draw(st.sampled_from(sorted(self.experts)))
        del self.experts[slab]
        self.pool.give(slab)
        assert (self.pool.memory[slab] == 0xFF).all()

    @precondition(lambda self: self.pool.num_free)
    @rule()
    def kv_grows(self):
        before = self.kv.num_blocks
        self.kv.grow()
        assert self.kv.num_blocks == before + 3

    @rule()
    def kv_shrinks(self):
        slabs, free = len(self.pool.held(KV_LINE)), self.kv.blocks.num_free
        assert self.kv.shrink() == (len(self.pool.held(KV_LINE)) < slabs)
        assert self.kv.blocks.num_free <= free

    @precondition(lambda self: self.kv.blocks.num_free)
    @rule(data=st.data())
    def requests_come(self, data):
        for block in self.kv.blocks.allocate(data.draw(st.integers(1, self.kv.blocks.num_free))):
            self.blocks[block] = self._mark()
            for layer in range(LAYOUT.num_layers):
                k, v = self.kv.layer(layer)
                assert k[block].isfinite().all(), "a kernel may read what was never written"
                assert v[block].isfinite().all()
                k[block], v[block] = self.blocks[block], -self.blocks[block]

    @precondition(lambda self: self.blocks)
    @rule(data=st.data())
    def requests_end(self, data):
        done = data.draw(st.lists(st.sampled_from(sorted(self.blocks)), unique=True))
        self.kv.blocks.free(done)
        self.blocks = {block: mark for block, mark in self.blocks.items() if block not in done}

    @invariant()
    def conserved(self):
        self.pool.check_integrity()
        self.kv.blocks.check_integrity(self.blocks)
        lines = {line: self.pool.bytes_of(line) for line in ("experts", KV_LINE, FREE)}
        assert sum(lines.values()) == self.pool.memory.nbytes == SLABS * SLAB_BYTES
        assert lines["experts"] == len(self.experts) * SLAB_BYTES
        assert lines[KV_LINE] == self.kv.nbytes == self.kv.num_blocks // 3 * SLAB_BYTES

    @invariant()
    def kept(self):
        for slab, mark in self.experts.items():
            assert (self.pool.memory[slab] == mark).all()
        for block, mark in self.blocks.items():
            for layer in range(LAYOUT.num_layers):
                k, v = self.kv.layer(layer)
                assert (k[block] == mark).all()
                assert (v[block] == -mark).all()


TestSharers = Sharers.TestCase
TestSharers.settings = settings(max_examples=40, stateful_step_count=30, deadline=None, derandomize=True)


def test_the_lowest_slab_first():
    pool = HOST.make_slabs(3, 64)
    assert [pool.take("a") for _ in range(3)] == [0, 1, 2]
    pool.give(2)
    pool.give(0)
    assert [pool.take("b") for _ in range(2)] == [0, 2]
    assert (pool.held("a"), sorted(pool.held("b"))) == ([1], [0, 2])
    with pytest.raises(AssertionError, match="nobody holds it"):
        HOST.make_slabs(3, 64).give(1)


@pytest.mark.parametrize("damage", ["lost", "twice", "miscounted"])
def test_integrity_can_fail(damage):
    pool = HOST.make_slabs(3, 64)
    pool.take("a")
    if damage == "lost":
        pool._free.pop()
    elif damage == "twice":
        pool._free.append(0)
    else:
        pool._holders[0] = "b"
    with pytest.raises(AssertionError):
        pool.check_integrity()


def test_host_slabs_begin_at_a_page_and_take_no_memory_before_they_are_used():
    pool = HOST.make_slabs(4, 1 << 28)
    assert pool.memory.data_ptr() % PAGE == 0
    before = HOST.taken_bytes()
    pool.take(KV_LINE, zeroed=True)
    assert before is None or (HOST.taken_bytes() or 0) - before < 1 << 26


def test_memory_that_cannot_be_had_is_one_sentence(monkeypatch):
    def refuse(device, nbytes):
        raise MemoryError

    monkeypatch.setattr(CpuDevice, "zeros", refuse)
    with pytest.raises(SlabError, match=r"cannot allocate 3 slabs of 64 bytes of cpu memory .*; lower the budget"):
        HOST.make_slabs(3, 64)
