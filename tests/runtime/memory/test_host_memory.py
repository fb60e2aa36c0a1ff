"""Page-locked host memory is as large as what it holds, and is given back whatever happens."""

from __future__ import annotations

import mmap
from typing import Any

import pytest
import torch
from fluxmoe.kernels.host_memory import PAGE
from fluxmoe.runtime.experts import store
from fluxmoe.runtime.experts.disk import StoreError
from fluxmoe.runtime.experts.placement import Tier, place
from fluxmoe.runtime.memory.host_memory import HostMemory, HostMemoryError
from fluxmoe.runtime.serving import kv_cache

from ..experts.test_moving_store import moving_store as filled_moving
from ..experts.test_store import block_of, filled
from ..serving.test_kv_cache import PlainLayout, cache_of, layout_of


class FakeCuda:
    """torch.cuda as far as host memory goes: what is registered, and whether the device may still use it."""

    def __init__(self, refuse_after: int | None = None):
        self.registered: dict[int, int] = {}
        self.refuse_after, self.busy = refuse_after, True

    def cudart(self):
        return self

    def synchronize(self):
        self.busy = False

    def cudaHostRegister(self, address, size, flags):
        if len(self.registered) == self.refuse_after:
            return 2
        assert address % mmap.PAGESIZE == 0
        assert size % mmap.PAGESIZE == 0
        assert flags == 3
        assert not any(a < address + size and address < a + n for a, n in self.registered.items())
        self.registered[address] = size
        return 0

    def cudaHostUnregister(self, address):
        assert not self.busy, "memory is given back under a copy"
        del self.registered[address]
        return 0

    @staticmethod
    def cudaGetErrorString(status):
        return f"error {status}"


@pytest.fixture
def fake(monkeypatch):
    cuda = FakeCuda()
    for module in (store, kv_cache):
        monkeypatch.setattr(module, "HostMemory", lambda pin: HostMemory(True, cuda))
    return cuda


def mapped_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * mmap.PAGESIZE


@pytest.mark.parametrize("nbytes", [1, PAGE, PAGE + 1, (64 << 20) + 5])
def test_memory_is_as_large_as_what_it_holds(nbytes):
    cuda = FakeCuda()
    memory = HostMemory(True, cuda)
    tensor = memory.empty(nbytes)
    assert tensor.shape == (nbytes,)
    assert cuda.registered == {tensor.data_ptr(): -(-nbytes // PAGE) * PAGE}
    tensor.fill_(7)
    memory.close()
    assert cuda.registered == {}
    memory.close()


def test_closing_unmaps():
    memory, size, before = HostMemory(True, FakeCuda()), 1 << 30, mapped_bytes()
    memory.empty(size)
    assert mapped_bytes() - before >= size
    memory.close()
    assert mapped_bytes() - before < size // 2


@pytest.mark.parametrize("pin", [False, True])
def test_nothing_takes_nothing(pin):
    cuda = FakeCuda()
    memory = HostMemory(pin, cuda)
    assert memory.empty(0).numel() == 0
    assert cuda.registered == {}
    assert memory.empty(5).data_ptr() % PAGE == 0
    memory.close()


def test_what_the_driver_refuses_is_one_sentence_and_leaves_nothing():
    cuda, before = FakeCuda(refuse_after=1), mapped_bytes()
    memory = HostMemory(True, cuda)
    first = memory.empty(10)
    with pytest.raises(HostMemoryError, match="cannot page-lock 1 GiB of host memory: error 2; ulimit"):
        memory.empty(1 << 30)
    assert list(cuda.registered) == [first.data_ptr()]
    assert mapped_bytes() - before < 1 << 29
    memory.close()
    assert cuda.registered == {}


@pytest.mark.parametrize("pin", [False, True])
def test_memory_that_no_machine_has_is_one_sentence(pin):
    with pytest.raises(HostMemoryError, match="cannot allocate 1024 TiB of host memory"):
        HostMemory(pin, FakeCuda()).empty(1 << 50)


def test_a_store_locks_its_host_tier_and_gives_it_back(fake):
    placement = place("host", 3, 5)
    with filled(placement) as store:
        held: Any = store  # with host memory
        sizes = sorted(fake.registered.values())
        assert sum(sizes) - held.tier_bytes(Tier.HOST) < len(sizes) * PAGE
        assert len(sizes) == 2 * 3
        for expert, block in enumerate(held._blocks(Tier.HOST, 0, held._arenas[Tier.HOST][1][0], 5)):
            assert torch.equal(block, block_of(1, expert, 0))
    assert fake.registered == {}


def test_a_store_that_cannot_lock_all_gives_back_the_rest(fake):
    fake.refuse_after = 3
    with pytest.raises(StoreError, match=r"page-lock .* for the experts of a layer; another placement"):
        filled(place("host", 3, 5))
    assert fake.registered == {}


def test_experts_that_move_have_locked_copies(fake):
    held = filled_moving(place("packed", 5, 6))
    assert sum(fake.registered.values()) - held.tier_bytes(Tier.HOST) < len(fake.registered) * PAGE
    assert len(fake.registered) == 2 * 5
    held.close()
    assert fake.registered == {}
    fake.refuse_after, fake.busy = 2, True
    with pytest.raises(HostMemoryError):
        filled_moving(place("packed", 5, 6))
    assert fake.registered == {}


def test_the_swap_pool_is_locked(fake):
    cache = cache_of(layout_of(PlainLayout(), 3, 4, 2, 8, torch.bfloat16), host_blocks=4)
    assert sum(fake.registered.values()) - cache.host.nbytes < 2 * PAGE
    k, _ = cache.layer(1)
    k[1] = 3
    cache.swap_out([(1, 2)])
    cache.swap_in([(2, 5)])
    assert (k[5] == 3).all()
    cache.close()
    cache.close()
    assert fake.registered == {}


def test_the_real_runtime_locks_memory():
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    memory = HostMemory(True)
    tensor = memory.empty(3 * PAGE + 1)
    assert tensor.is_pinned()
    tensor.fill_(5)
    assert (tensor.cuda() == 5).all()
    memory.close()
