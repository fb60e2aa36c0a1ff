"""BlockAllocator against a set-based model; PagedKVCache: layout, bytes, and that swapping moves whole blocks."""

import pytest
import torch
from fluxmoe.kernels.cpu.attention import kv_block_shape
from fluxmoe.runtime.serving.kv_cache import BlockAllocator, PagedKVCache
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
        self.total, self.owned = 7, []

    @rule(data=st.data())
    def allocate(self, data):
        n = data.draw(st.integers(0, self.total - len(self.owned)))
        lowest = sorted(set(range(self.total)) - set(self.owned))[:n]
        assert self.allocator.allocate(n) == lowest
        self.owned += lowest

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def free(self, data):
        blocks = data.draw(st.lists(st.sampled_from(self.owned), unique=True))
        self.allocator.free(blocks)
        self.owned = [b for b in self.owned if b not in blocks]

    @precondition(lambda self: self.total < 20)
    @rule(n=st.integers(0, 3))
    def grow(self, n):
        self.allocator.grow(n)
        self.total += n

    @rule()
    def one_too_many(self):
        with pytest.raises(AssertionError, match="are free"):
            self.allocator.allocate(self.allocator.num_free + 1)

    @rule(data=st.data())
    def free_what_is_not_owned(self, data):
        block = data.draw(st.sampled_from([b for b in range(-2, self.total + 2) if b not in self.owned]))
        with pytest.raises(AssertionError, match=f"block {block} is"):
            self.allocator.free([block])

    @invariant()
    def conserved(self):
        assert self.allocator.num_blocks == self.total
        assert self.allocator.num_used == len(self.owned)
        assert self.allocator.num_free == self.total - len(self.owned)
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


@pytest.mark.parametrize(
    ("layout", "block_size", "head_dim"),
    [(PlainLayout(), 5, 6), (PanelLayout(), 32, 24)],
    ids=["plain", "panels with padded V"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_shapes_bytes_and_zeros(layout, block_size, head_dim, dtype):
    cache = PagedKVCache(layout, 3, 7, block_size, 2, head_dim, dtype, "cpu", host_blocks=4)
    k_shape, v_shape = layout.kv_block_shape(block_size, 2, head_dim)
    k, v = cache.layer(2)
    assert (k.shape, v.shape) == ((7, *k_shape), (7, *v_shape))
    assert k.is_contiguous()
    assert v.is_contiguous()
    assert k.data_ptr() == cache.k[2].data_ptr()
    block_bytes = PagedKVCache.bytes_per_block(layout, 3, block_size, 2, head_dim, dtype)
    assert cache.nbytes == 7 * block_bytes
    assert cache.host_nbytes == 4 * block_bytes
    assert all(not t.any() for t in (cache.k, cache.v, cache.host_k, cache.host_v))


def test_swap_moves_every_layer_and_nothing_else():
    cache = PagedKVCache(PanelLayout(), 3, 6, 16, 2, 24, torch.bfloat16, "cpu", host_blocks=4)
    cache.k.copy_(torch.randn(cache.k.shape))
    cache.v.copy_(torch.randn(cache.v.shape))
    k, v = cache.k.clone(), cache.v.clone()
    cache.swap_out([(5, 0), (1, 3)])
    assert torch.equal(cache.k, k)
    assert not cache.host_k[1:3].any()
    cache.k[:, [5, 1]] = float("nan")
    cache.v[:, [5, 1]] = float("nan")
    cache.swap_in([(0, 2), (3, 5)])
    for now, before in ((cache.k, k), (cache.v, v)):
        assert torch.equal(now[:, 2], before[:, 5])
        assert torch.equal(now[:, 5], before[:, 1])
        assert torch.equal(now[:, [0, 3, 4]], before[:, [0, 3, 4]])
        assert now[:, 1].isnan().all()


@pytest.mark.parametrize("pair", [(-1, 0), (6, 0), (0, -1), (0, 2)])
def test_swap_refuses_blocks_out_of_range(pair):
    cache = PagedKVCache(PlainLayout(), 1, 6, 2, 1, 2, torch.float32, "cpu", host_blocks=2)
    with pytest.raises(AssertionError, match=r"no (device|host) block"):
        cache.swap_out([pair])
    with pytest.raises(AssertionError, match=r"no (device|host) block"):
        cache.swap_in([pair[::-1]])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_layers": 0}, "num_layers of at least 1, got 0"),
        ({"num_blocks": 0}, "num_blocks of at least 1, got 0"),
        ({"host_blocks": -1}, "host_blocks of at least 0, got -1"),
        ({"pin": True}, "needs a CUDA device, got cpu"),
    ],
)
def test_refuses_impossible_caches(sizes, message):
    arguments = {"num_layers": 1, "num_blocks": 1, "host_blocks": 0, "pin": False} | sizes
    with pytest.raises(ValueError, match=message):
        PagedKVCache(
            PlainLayout(), block_size=2, kv_heads=1, head_dim=2, dtype=torch.float32, device="cpu", **arguments
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_swap_through_pinned_memory():
    cache = PagedKVCache(PlainLayout(), 3, 6, 4, 2, 8, torch.bfloat16, "cuda", host_blocks=4, pin=True)
    cache.k.copy_(torch.randn(cache.k.shape))
    cache.v.copy_(torch.randn(cache.v.shape))
    k, v = cache.k.clone(), cache.v.clone()
    cache.swap_out([(5, 0), (1, 3)])
    # Without a wait in between: reuse of a block is ordered behind its copy out by the stream alone.
    cache.k[:, [5, 1]] = float("nan")
    cache.v[:, [5, 1]] = float("nan")
    cache.swap_in([(0, 2), (3, 5)])
    assert torch.equal(cache.k[:, [2, 5]], k[:, [5, 1]])
    assert torch.equal(cache.v[:, [2, 5]], v[:, [5, 1]])
