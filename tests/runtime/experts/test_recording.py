"""Recordings of routing: what was chosen and no more, in files that say when they are damaged."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from fluxmoe.kernels.ops import ExpertDims
from fluxmoe.runtime.experts.config import PagingConfig
from fluxmoe.runtime.experts.pager import ExpertPager
from fluxmoe.runtime.experts.recording import Recording, RecordingError, RoutingRecorder, visits_of

LAYERS, DIMS = 3, ExpertDims(hidden=32, intermediate=32, experts=6, top_k=2, dtype=torch.bfloat16)


@pytest.fixture
def pager():
    with ExpertPager(DIMS, LAYERS, PagingConfig(threads=1, record_routing=True), "cpu", 5) as made:
        made.open()
        for layer in range(LAYERS):
            for expert in range(DIMS.experts):
                made.put(layer, expert, *(torch.randn(shape).bfloat16() for shape in DIMS.shapes))
        made.seal()
        yield made


def choices(recording: Recording) -> list[list[int]]:
    return np.sort(recording.experts, axis=2).tolist()


def test_what_the_router_chose_is_recorded_and_passes_that_are_given_up_are_not(pager):
    expected, logits = [], [torch.randn(tokens, LAYERS, DIMS.experts) for tokens in (3, 1, 5)]
    pager.add(0, torch.randn(4, 32), torch.randn(4, 6), torch.randn(4, 32))  # given up after a layer
    for each in logits:
        for layer in range(LAYERS):
            pager.add(layer, torch.randn(len(each), 32), each[:, layer], torch.randn(len(each), 32))
        expected += each.topk(2).indices.sort(dim=2).values.tolist()
    recording = pager.recorder.recording(model="none")
    assert choices(recording) == expected
    assert recording.step.tolist() == [0] * 3 + [1] + [2] * 5
    assert set(recording.sequence.tolist()) == {-1}
    assert recording.about == {"model": "none"}
    visits = recording.visits()
    assert [layer for layer, _ in visits] == [0, 1, 2] * 3
    assert visits[0][1].tolist() == sorted({expert for token in expected[:3] for expert in token[0]})


def test_a_pass_in_several_parts_and_experts_elsewhere(pager):
    ids = torch.stack([torch.stack([torch.randperm(8)[:2] for _ in range(LAYERS)]) for _ in range(12)])
    for layer in range(LAYERS):
        pager.experts(layer, torch.randn(12, 32), ids[:, layer], torch.rand(12, 2))
    recording = pager.recorder.recording()
    assert (recording.experts == torch.where(ids < 6, ids, -1).numpy()).all()
    assert recording.step.tolist() == [0] * 12


def test_no_pass_is_no_recording():
    with pytest.raises(RecordingError, match="no pass was recorded"):
        RoutingRecorder(2, 4).recording()


def recorded(lengths=(3, 1, 2, 4), prompt=2) -> Recording:
    """Sequences that ran one beside the other; token p of sequence s chose expert 10 s + p."""
    rows = [(p + prompt, s, p, 10 * s + p) for s, length in enumerate(lengths) for p in range(-prompt, length)]
    step, sequence, position, chosen = np.array(sorted(rows), np.int32).T
    experts = np.abs(chosen).astype(np.int16)[:, None, None]
    return Recording(experts, step, sequence, position, 64, {})


def test_batches_are_lanes_of_sequences_one_after_another():
    assert recorded().batches(1)[:, 0, 0, 0].tolist() == [0, 1, 2, 10, 20, 21, 30, 31, 32, 33]
    two = recorded().batches(2)[:, :, 0, 0]  # sequences 0 and 2, 1 and 3
    assert two.tolist() == [[0, 10], [1, 30], [2, 31], [20, 32], [21, 33]]
    assert len(recorded().batches(4)) == 1
    with pytest.raises(RecordingError, match=r"a batch of 5 .* the recording has 4"):
        recorded().batches(5)


def test_tokens_that_were_computed_again_count_once():
    once = recorded()
    arrays = ("experts", "step", "sequence", "position")
    both: dict[str, Any] = {name: np.concatenate([getattr(once, name)] * 2) for name in arrays}
    twice = replace(once, **both)
    assert (twice.batches(2) == once.batches(2)).all()


def test_visits_leave_out_what_is_elsewhere():
    layers = visits_of(np.array([[[3, -1], [1, 0]], [[3, 2], [-1, -1]]], np.int16))
    assert [(layer, experts.tolist()) for layer, experts in layers] == [(0, [2, 3]), (1, [0, 1])]


def test_files_round_trip_and_others_are_refused(tmp_path):
    path = tmp_path / "routing.npz"
    path.write_bytes(replace(recorded(), about={"model": "small"}).to_bytes())
    loaded = Recording.load(path)
    assert (loaded.experts == recorded().experts).all()
    assert (loaded.shape, loaded.about) == ((1, 64), {"model": "small"})
    whole = path.read_bytes()
    for broken in (b"", b"no archive", whole[: len(whole) // 2]):
        path.write_bytes(broken)
        with pytest.raises(RecordingError, match="no recording of routing"):
            Recording.load(path)
    with pytest.raises(RecordingError, match="no recording of routing"):
        Recording.load(tmp_path / "missing.npz")
    other = io.BytesIO()
    np.savez(other, experts=np.zeros(3))
    path.write_bytes(other.getvalue())
    with pytest.raises(RecordingError, match="no recording of routing"):
        Recording.load(path)
    for damage in ({"step": np.zeros(1, np.int32)}, {"num_experts": 3}, {"experts": np.zeros((0, 1, 1), np.int16)}):
        path.write_bytes(replace(recorded(), **damage).to_bytes())
        with pytest.raises(RecordingError, match="damaged"):
            Recording.load(path)


def test_popularity_counts_tokens_and_not_what_is_elsewhere():
    experts = np.array([[[0, 2], [1, -1]], [[2, 3], [-1, -1]]], np.int16)
    zeros = np.zeros(2, np.int32)
    recording = Recording(experts, zeros, zeros, zeros, 4, {})
    assert recording.popularity().tolist() == [[1, 0, 2, 1], [0, 1, 0, 0]]
