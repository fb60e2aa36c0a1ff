"""BlockAllocator against a set-based model; PagedKVCache: layout, bytes, and that swapping moves whole blocks."""

from typing import Any

import pytest
import torch
from fluxmoe.kernels.cpu.attention import kv_block_shape
from fluxmoe.runtime.devices import device_of
from fluxmoe.runtime.serving.kv_cache import BlockAllocator, KVLayout, PagedKVCache
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule


class PlainLayout:
    """The torch backend's layout, without its weights and workspace."""

    def kv_block_shape(self, block_size, kv_heads, head_dim):
        return (block_size, kv_heads, head_dim), (block_size, kv_heads, head_dim)


class PanelLayout:
    """The CPU backend's layout: K and V differ in shape, V is padded to whole panels."""

    def kv_block_shape(self, block_size, kv_heads, head_dim):
        return kv_block_shape(block_size, kv_heads, head_dim)


class AllocatorMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.allocator = BlockAllocator(7)
        self.runs, self.owned = [range(7)], []

    @property
    def blocks(self):
        return {block for run in self.runs for block in run}

    @rule(data=st.data())
    def allocate(self, data):
        n = data.draw(st.integers(0, len(self.blocks) - len(self.owned)))
        expected: list[int] = []
        for _ in range(n):
            free = [[b for b in run if b not in self.owned + expected] for run in self.runs]
            used = [blocks for blocks, run in zip(free, self.runs, strict=True) if 0 < len(blocks) < len(run)]
            expected.append(min(min(used or [blocks for blocks in free if blocks])))
        assert self.allocator.allocate(n) == expected
        self.owned += expected

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def free(self, data):
        blocks = data.draw(st.lists(st.sampled_from(self.owned), unique=True))
        self.allocator.free(blocks)
        self.owned = [b for b in self.owned if b not in blocks]

    @rule()
    def free_all(self):
        self.allocator.free_all()
        self.owned = []

    @precondition(lambda self: len(self.runs) < 6)
    @rule(place=st.integers(1, 6), count=st.integers(1, 4))
    def add(self, place, count):
        run = range(10 * place, 10 * place + count)
        if any(run.start == other.start for other in self.runs):
            with pytest.raises(AssertionError, match="are there already"):
                self.allocator.add(run)
            return
        self.allocator.add(run)
        self.runs = sorted([*self.runs, run], key=lambda run: run.start)

    @rule()
    def remove(self):
        """The last of those that hold nothing, if there is one."""
        whole = [run for run in self.runs if not set(run) & set(self.owned)]
        assert self.allocator.remove() == (whole[-1] if whole else None)
        if whole:
            self.runs.remove(whole[-1])

    @rule()
    def one_too_many(self):
        with pytest.raises(AssertionError, match="are free"):
            self.allocator.allocate(self.allocator.num_free + 1)

    @rule(data=st.data())
    def free_what_is_not_owned(self, data):
        block = data.draw(st.sampled_from([b for b in range(-2, 70) if b not in self.owned]))
        with pytest.raises(AssertionError, match=f"block {block} is"):
            self.allocator.free([block])

    @invariant()
    def conserved(self):
        assert self.allocator.num_blocks == len(self.blocks)
        assert self.allocator.num_used == len(self.owned)
        assert self.allocator.num_free == len(self.blocks) - len(self.owned)
        assert self.allocator.runs_used == sum(bool(set(run) & set(self.owned)) for run in self.runs)
        self.allocator.check_integrity(self.owned)


TestAllocator = AllocatorMachine.TestCase
TestAllocator.settings = settings(max_examples=60, stateful_step_count=25, deadline=None, derandomize=True)


def test_double_free_in_one_call():
    allocator = BlockAllocator(3)
    allocator.allocate(2)
    with pytest.raises(AssertionError, match="block 1 is already free"):
        allocator.free([1, 1])


@pytest.mark.parametrize("claimed", [[0], [0, 1, 2], [0, 0], [0, 2]], ids=["leak", "unowned", "twice", "other"])
def test_allocator_integrity_can_fail(claimed):
    allocator = BlockAllocator(3)
    allocator.allocate(2)
    with pytest.raises(AssertionError):
        allocator.check_integrity(claimed)


def layout_of(ops: Any, *sizes: Any) -> KVLayout:
    return KVLayout.of(ops, *sizes)


def cache_of(layout, slabs=1, blocks=6, device="cpu", **settings) -> PagedKVCache:
    """A cache that has taken all of its slabs, each with room for so many blocks."""
    size = layout.block_bytes * blocks if slabs == 1 else layout.slab_bytes(blocks * layout.block_bytes)
    cache = PagedKVCache(layout, device_of(device).make_slabs(slabs, size), **settings)
    for _ in range(slabs):
        cache.grow()
    return cache


PLAIN = layout_of(PlainLayout(), 3, 5, 2, 6, torch.bfloat16)
PADDED = layout_of(PanelLayout(), 3, 32, 2, 24, torch.float32)


def all_ids(cache) -> list[int]:
    ids = cache.blocks.allocate(cache.blocks.num_free)
    cache.blocks.free_all()
    return ids


@pytest.mark.parametrize("layout", [PLAIN, PADDED], ids=["plain", "panels with padded V"])
def test_a_cache_of_one_slab_is_contiguous_by_layer(layout):
    cache = cache_of(layout, blocks=7, host_blocks=4)
    assert all_ids(cache) == list(range(7))
    assert cache.nbytes == 7 * layout.block_bytes
    assert cache.host.nbytes == 4 * layout.block_bytes
    assert not cache.pool.memory.any()
    begin = cache.pool.memory.data_ptr()
    for layer in range(3):
        k, v = cache.layer(layer)
        assert (k.shape, v.shape) == ((7, *layout.k_shape), (7, *layout.v_shape))
        assert k.data_ptr() == begin + 2 * layer * 7 * layout.unit_bytes
        assert v.data_ptr() == begin + (2 * layer + 1) * 7 * layout.unit_bytes
        assert k.stride(0) == v.stride(0) == layout.unit_bytes // layout.dtype.itemsize


def test_triton_sees_contiguous_caches():
    """Its K and V are of one size, a multiple of what units are aligned to."""
    shape = (2, 16, 24)
    cache = cache_of(KVLayout(3, shape, shape, torch.bfloat16), slabs=3)
    for layer in range(3):
        k, v = cache.layer(layer)
        assert k.shape == v.shape
        assert len(k) > max(all_ids(cache))
        assert k.is_contiguous()
        assert v.is_contiguous()


@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("layout", [PLAIN, PADDED], ids=["plain", "panels with padded V"])
def test_blocks_are_apart_and_inside_slabs_of_the_cache(layout, blocks):
    """Filled one by one, every K and V of every layer keeps what it was given, and nothing else is written."""
    cache = cache_of(layout, slabs=5, blocks=blocks)
    others = [cache.blocks.remove() for _ in range(2)]
    ids, count = all_ids(cache), 0
    for block in ids:
        for layer in range(3):
            for part in cache.layer(layer):
                part[block] = (count := count + 1)
    seen = 0
    for block in ids:
        for layer in range(3):
            for part in cache.layer(layer):
                assert (part[block] == (seen := seen + 1)).all()
    assert seen == 3 * blocks * 3 * 2
    size = cache.pool.slab_bytes // layout.unit_bytes
    assert not cache.pool.memory[[run.start // size for run in others if run is not None]].any()


@pytest.mark.parametrize(
    ("wanted", "units", "whole"), [(0, 7, 7), (6, 7, 7), (7, 7, 13), (36, 37, 37), (37, 37, 43), (44, 45, 49)]
)
def test_slabs_hold_what_they_must_and_are_odd(wanted, units, whole):
    """Of 6 units a block."""
    assert PLAIN.slab_bytes(wanted * PLAIN.unit_bytes) == units * PLAIN.unit_bytes
    assert PLAIN.slab_bytes(wanted * PLAIN.unit_bytes - 1) == units * PLAIN.unit_bytes
    assert PLAIN.slab_bytes(wanted * PLAIN.unit_bytes, whole=True) == whole * PLAIN.unit_bytes


@pytest.mark.parametrize("slabs", [1, 3])
def test_swap_moves_every_layer_and_nothing_else(slabs):
    layout = layout_of(PanelLayout(), 3, 16, 2, 24, torch.bfloat16)
    cache = cache_of(layout, slabs, blocks=6 // slabs, host_blocks=4)
    memory, ids = cache.pool.memory, all_ids(cache)
    memory.random_()
    before = memory.clone()
    cache.swap_out([(ids[5], 0), (ids[1], 3)])
    assert torch.equal(memory, before)
    assert not cache.host[1:3].any()

    def parts(block):
        return [part[block].clone().view(torch.int16) for layer in range(3) for part in cache.layer(layer)]

    kept = {block: parts(block) for block in ids}
    for layer in range(3):
        for part in cache.layer(layer):
            part[[ids[5], ids[1]]] = float("nan")
    cache.swap_in([(0, ids[2]), (3, ids[5])])
    come_from = {0: 0, 2: 5, 3: 3, 4: 4, 5: 1}
    for now, was in come_from.items():
        assert all(map(torch.equal, parts(ids[now]), kept[ids[was]]))
    assert all(part.view(torch.bfloat16).isnan().all() for part in parts(ids[1]))


def test_a_slab_that_comes_back_holds_zeros_again():
    cache = cache_of(PLAIN, slabs=2, blocks=2)
    cache.pool.memory.fill_(3)
    assert cache.shrink()
    slab = cache.pool.take("others")
    cache.pool.memory[slab].fill_(7)
    cache.pool.give(slab)
    cache.grow()
    assert not cache.pool.memory[slab].any()
    assert (cache.pool.memory[1 - slab] == 3).all()


def test_a_slab_with_a_block_in_use_stays():
    cache = cache_of(PLAIN, slabs=2, blocks=2)
    first = cache.blocks.allocate(3)
    assert not cache.shrink()
    cache.blocks.free(first[:2])
    assert cache.shrink()
    assert not cache.shrink()
    assert (cache.num_blocks, cache.pool.num_free) == (2, 1)
    assert first[2] in cache.blocks


@pytest.mark.parametrize("pair", [(-1, 0), (6, 0), (0, -1), (0, 2)])
def test_swap_refuses_blocks_out_of_range(pair):
    cache = cache_of(layout_of(PlainLayout(), 1, 2, 1, 2, torch.float32), host_blocks=2)
    with pytest.raises(AssertionError, match=r"no (device|host) block"):
        cache.swap_out([pair])
    with pytest.raises(AssertionError, match=r"no (device|host) block"):
        cache.swap_in([pair[::-1]])


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"host_blocks": -1}, "host_blocks of at least 0, got -1"), ({"pin": True}, "needs a CUDA device, got cpu")],
)
def test_refuses_impossible_caches(settings, message):
    with pytest.raises(ValueError, match=message):
        cache_of(PLAIN, **settings)
    with pytest.raises(ValueError, match="num_layers of at least 1, got 0"):
        layout_of(PlainLayout(), 0, 2, 1, 2, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_block_may_be_used_again_as_soon_as_it_is_swapped_out(device):
    """Without a wait in between: on CUDA what reuses it is ordered behind its copy to page-locked memory by the stream
    alone."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    cache = cache_of(layout_of(PlainLayout(), 3, 4, 2, 8, torch.bfloat16), device=device, host_blocks=4,
                     pin=device == "cuda")  # fmt: skip
    for part in (part for layer in range(3) for part in cache.layer(layer)):
        part.copy_(torch.randn(part.shape))
    before = [part.clone() for layer in range(3) for part in cache.layer(layer)]
    cache.swap_out([(5, 0), (1, 3)])
    for part in (part for layer in range(3) for part in cache.layer(layer)):
        part[[5, 1]] = float("nan")
    cache.swap_in([(0, 2), (3, 5)])
    after = [part for layer in range(3) for part in cache.layer(layer)]
    assert all(torch.equal(new[[2, 5]], old[[5, 1]]) for new, old in zip(after, before, strict=True))
