"""PagedTensor: kernels that know of no table give the results of ordinary tensors while pages move under them."""

from __future__ import annotations

import random
import threading
import time
from contextlib import suppress

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fluxmoe.runtime.experts.tensor_pager import TensorPager
from fluxmoe.runtime.memory.paged_tensor import PagedTensor, PageState
from fluxmoe.runtime.memory.region import RegionError
from hypothesis import given, settings
from hypothesis import strategies as st

CPU = torch.device("cpu")
LAYERS, EXPERTS, HIDDEN, INTERMEDIATE = 5, 4, 64, 48


@pytest.fixture
def weights():
    torch.manual_seed(0)
    gate_up = torch.randn(LAYERS, EXPERTS, 2 * INTERMEDIATE, HIDDEN).mul_(0.1).bfloat16()
    return gate_up, torch.randn(LAYERS, EXPERTS, HIDDEN, INTERMEDIATE).mul_(0.1).bfloat16()


def paged(weights, slots=2) -> list[PagedTensor]:
    return [PagedTensor(LAYERS, EXPERTS, w.shape[2:], w.dtype, CPU, slots) for w in weights]


def copies(weights, delay=lambda: None):
    def load(source):
        def fill(layer, view):
            delay()
            view.copy_(source[layer])

        return fill

    return [load(w) for w in weights]


def moe(x, expert_of_row, gate_up, down):
    """A plain reference: every expert on its rows, by matmul on whatever memory the weights lie in."""
    out = torch.zeros_like(x)
    for expert in range(len(gate_up)):
        rows = x[expert_of_row == expert]
        gate, up = F.linear(rows, gate_up[expert]).chunk(2, -1)
        out[expert_of_row == expert] = F.linear(F.silu(gate) * up, down[expert])
    return out


def grouped(x, offsets, gate_up, down):
    """torch's grouped_mm, which asks for rows sorted by expert."""
    gate, up = F.grouped_mm(x, gate_up.transpose(-2, -1), offs=offsets).chunk(2, -1)
    return F.grouped_mm(F.silu(gate) * up, down.transpose(-2, -1), offs=offsets)


@pytest.mark.parametrize("slots", [2, 3, 5])
def test_unchanged_kernels_see_no_difference(weights, slots):
    rng = random.Random(0)
    tensors = paged(weights, slots)
    pager = TensorPager(tensors, copies(weights, lambda: time.sleep(rng.choice([0, 0, 0.002]))), poison=True)
    expert_of_row = torch.tensor([0, 0, 1, 3, 3, 3, 3, 3])
    offsets = torch.tensor([2, 3, 3, 8], dtype=torch.int32)
    for _ in range(4):
        x = y = torch.randn(8, HIDDEN).bfloat16()
        for layer in range(LAYERS):
            expected = weights[0][layer], weights[1][layer]
            with pager.layer(layer) as views:
                for view, weight in zip(views, expected, strict=True):
                    assert torch.equal(view.view(torch.int16), weight.view(torch.int16))
                ours, theirs = moe(x, expert_of_row, *views), moe(x, expert_of_row, *expected)
                assert torch.equal(ours, theirs)
                assert torch.equal(grouped(y, offsets, *views), grouped(y, offsets, *expected))
            x = ours
    pager.close()
    for tensor in tensors:
        resident = (tensor.states == PageState.RESIDENT).all(axis=1).sum()
        assert resident <= min(slots, LAYERS)
        assert tensor.pool.used_bytes <= slots * EXPERTS * tensor.stride
        tensor.close()


def test_addresses_never_change_and_a_pass_recycles_the_pool(weights):
    tensor = paged(weights)[0]
    pager = TensorPager([tensor], copies(weights[:1]))
    seen = set()
    for _ in range(3):
        for layer in range(LAYERS):
            with pager.layer(layer) as (view,):
                assert view.data_ptr() == tensor.address(layer, 0)
                assert view[1].data_ptr() - view[0].data_ptr() == tensor.stride
                seen.add((layer, view.data_ptr()))
    pager.close()
    assert len(seen) == LAYERS
    assert tensor.padding_bytes == tensor.stride - 2 * INTERMEDIATE * HIDDEN * 2
    tensor.close()


def test_blocks_are_not_taken_while_they_are_read(weights):
    tensors, began = paged(weights), threading.Semaphore(0)
    pager = TensorPager(tensors, copies(weights, began.release), poison=True)
    with pager.layer(0) as views:
        for _ in range(4):
            assert began.acquire(timeout=5)  # two types, layers 0 and 1
        time.sleep(0.03)
        assert not began.acquire(blocking=False)
        assert torch.equal(views[0], weights[0][0])
    assert began.acquire(timeout=5)
    pager.close()


def test_a_load_that_fails_is_an_error_of_the_visit(weights):
    def broken(layer, view):
        if layer == 2:
            raise OSError("the disk is gone")
        view.copy_(weights[0][layer])

    pager = TensorPager([paged(weights)[0]], [broken])
    for layer in (0, 1):
        with pager.layer(layer):
            pass
    with pytest.raises(RegionError, match="loading layer 2 failed: the disk is gone"), pager.layer(2):
        pass
    pager.close()
    pager.close()


def test_reading_what_is_not_resident_is_caught(weights):
    tensor = paged(weights)[0]
    with pytest.raises(RegionError, match="expert 0 of layer 1 is read while UNMAPPED"):
        tensor.check(1)
    tensor.begin_load(1)
    with pytest.raises(RegionError, match="while LOADING"):
        tensor.check(1)
    with pytest.raises(RegionError, match="is LOADING, and cannot become"):
        tensor.begin_load(0, instead_of=1)
    with pytest.raises(RegionError, match="at least 2 layers"):
        PagedTensor(2, 2, (4, 4), torch.float32, CPU, slots=1)
    tensor.close()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=30))
def test_no_order_of_loads_leaks_or_shares_a_block(order):
    tensor = PagedTensor(4, 2, (3, 5), torch.float32, CPU)
    resident: list[int] = []
    for layer in order:
        if layer in resident:
            with pytest.raises(RegionError):
                tensor.begin_load(layer)
            continue
        victim = resident.pop(0) if len(resident) == 2 else None
        tensor.begin_load(layer, victim)
        tensor.end_load(layer)
        tensor.view(layer).fill_(layer + 1)
        resident.append(layer)
        for each in resident:
            tensor.check(each)
            assert (tensor.view(each) == each + 1).all()
        assert tensor.pool.used_bytes == len(resident) * 2 * tensor.stride
    assert np.isin(tensor.states, (PageState.UNMAPPED, PageState.RESIDENT)).all()
    tensor.close()


@pytest.mark.parametrize("slots", [2, 3, 5])
def test_a_pass_after_one_that_was_given_up(weights, slots):
    tensors = paged(weights, slots)
    pager = TensorPager(tensors, copies(weights), poison=True)
    for stop in range(LAYERS):
        with suppress(KeyboardInterrupt):
            for layer in range(LAYERS):
                with pager.layer(layer):
                    if layer == stop:
                        raise KeyboardInterrupt
        for layer in range(LAYERS):
            with pager.layer(layer) as views:
                assert all(torch.equal(view, weight[layer]) for view, weight in zip(views, weights, strict=True))
    pager.close()
    for tensor in tensors:
        tensor.close()
