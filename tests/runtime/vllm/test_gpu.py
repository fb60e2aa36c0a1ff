"""A model loaded onto a GPU, which host memory stands in for: slots that streams fill, and who hears of graphs."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fluxmoe.runtime.devices import CpuDevice
from fluxmoe.runtime.experts.config import SettingError
from fluxmoe.runtime.experts.streamer import Counters
from fluxmoe.runtime.experts.streamer_cuda import CudaStreamer
from fluxmoe.runtime.vllm.graph_passes import GraphError
from fluxmoe.runtime.vllm.settings import PluginConfig
from fluxmoe.runtime.vllm.streamed_layers import StreamedLayers

from ..gpu import Gpu
from .conftest import CUDAGraphMode, NoopOffloader, RoutedExperts
from .test_method import ALL, MOE, Model, inputs, loaded

pytestmark = pytest.mark.usefixtures("exact_bf16")
CPU = torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch) -> Any:
    """Streams run at once; `allocated`: bytes that were taken of the device, one by one."""
    gpu: Any = Gpu()
    gpu.allocated = []

    def make_streamer(self, store, config, timeline):
        return CudaStreamer(store, config.slots, config.poison, timeline, gpu)

    def counted(make):
        def allocate(self, nbytes):
            gpu.allocated.append(nbytes)
            return make(self, nbytes)

        return allocate

    monkeypatch.setattr(CpuDevice, "graphs", True)
    monkeypatch.setattr(CpuDevice, "reads_disk", False)
    monkeypatch.setattr(CpuDevice, "streamer", CudaStreamer)
    monkeypatch.setattr(CpuDevice, "make_streamer", make_streamer)
    for name in ("empty", "zeros"):
        monkeypatch.setattr(CpuDevice, name, counted(getattr(CpuDevice, name)))
    return gpu


STREAMED = {
    "host": dict(placement="host"),
    "host, planar12, 3 slots": dict(placement="host", host_format="planar12", slots=3),
    "host, huffman": dict(placement="host", host_format="huffman"),
    "balanced": dict(placement="balanced", alpha=0.5),
    "packed, huffman": dict(expert_format="huffman"),
}
IN_PLACE = {
    "packed": {},
    "resident": dict(placement="resident"),
    "host, in place": dict(placement="host", transfer="on_demand", kernels="triton"),
}


@pytest.mark.parametrize("settings", STREAMED.values(), ids=STREAMED)
def test_slots_give_the_same_bits_and_vllm_captures_whole_passes_only(vllm, gpu, settings):
    expected = loaded(vllm, fluxmoe=dict(placement="resident")).run(*inputs())
    model = loaded(vllm, fluxmoe=dict(settings, poison=True))
    for _ in range(3):
        assert all(torch.equal(got, same) for got, same in zip(model.run(*inputs()), expected, strict=True))
    assert vllm.config.compilation_config.cudagraph_mode is CUDAGraphMode.FULL_DECODE_ONLY
    (passes,) = vllm.offloader.models
    assert passes.streamer is model.paged.pager.streamer


def test_triton_kernels_read_slots_as_they_read_resident_experts(vllm, gpu):
    x, weights, ids = inputs()
    expected, got = (
        loaded(vllm, fluxmoe=dict(placement=where, kernels="triton", poison=True)).run(x.bfloat16(), weights, ids)
        for where in ("resident", "host")
    )
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize("settings", IN_PLACE.values(), ids=IN_PLACE)
def test_experts_that_do_not_stream_leave_vllms_graphs_as_they_are(vllm, gpu, settings):
    loaded(vllm, fluxmoe=settings)
    assert vllm.config.compilation_config.cudagraph_mode is CUDAGraphMode.FULL_AND_PIECEWISE
    assert type(vllm.offloader) is NoopOffloader


def test_all_memory_is_taken_before_vllm_measures_what_is_left_for_kv(vllm, gpu):
    """It does once weights are loaded; passes after that take workspace of ours that is there."""
    model = loaded(vllm, fluxmoe=dict(placement="balanced", alpha=0.5))
    pager, taken = model.paged.pager, len(gpu.allocated)
    assert pager.held_bytes() == pager.lines()
    assert pager.lines()["slots"] > 0
    for _ in range(3):
        model.run(*inputs())
        vllm.offloader.sync_prev_onload()
    assert len(gpu.allocated) == taken


def test_hooks_reach_the_streamer_but_inside_a_pass_of_pieces(vllm, gpu, monkeypatch):
    model = loaded(vllm, fluxmoe=dict(placement="host"))
    settled: list[str] = []
    monkeypatch.setattr(CudaStreamer, "settle", lambda self: settled.append("settled"))
    vllm.offloader.sync_prev_onload()
    vllm.forward = SimpleNamespace(cudagraph_runtime_mode=CUDAGraphMode.NONE)
    vllm.offloader.sync_prev_onload()
    assert len(settled) == 2
    vllm.forward = SimpleNamespace(cudagraph_runtime_mode=CUDAGraphMode.PIECEWISE)
    vllm.offloader.sync_prev_onload()
    assert len(settled) == 2
    with pytest.raises(GraphError, match="PIECEWISE"), gpu.graph(Gpu.CUDAGraph()):
        model.run(*inputs())


def test_a_draft_model_hears_of_graphs_too_and_models_that_are_gone_do_not(vllm, gpu):
    model = loaded(vllm, fluxmoe=dict(placement="host"))
    draft = [RoutedExperts(model.quant_config, f"mtp.{i}", MOE) for i in range(3)]
    assert draft[0].quant_method.model is not model.paged
    first, model.layers = model.layers, draft
    model.bring(ALL)
    model.finish()
    assert len(vllm.offloader.models) == 2
    vllm.offloader.sync_prev_onload()
    vllm.offloader.join_after_forward()
    del model, draft, first
    gc.collect()
    assert not vllm.offloader.models


@pytest.mark.parametrize(
    "settings", [dict(placement="disk"), dict(placement="three_tiers", alpha=0.4, disk_share=0.4)], ids=str
)
def test_experts_in_files_are_refused(vllm, gpu, settings):
    model = Model(vllm, fluxmoe=settings)
    with pytest.raises(SettingError, match=r"keeps experts in files, .* on the CPU only: choose packed, balanced or"):
        model.bring(ALL)
    assert not model.paged.opened


# vLLM's own kernels.


def test_tensors_of_any_stride_have_the_slot_of_their_layer(gpu):
    followed: list[CudaStreamer] = []

    class Passes:
        begun = 0

        def begin(self) -> None:
            self.begun += 1

        def counters(self) -> Counters:
            return Counters()

    passes: Any = Passes()

    def follow(streamer: CudaStreamer) -> Any:
        followed.append(streamer)
        return passes

    model = StreamedLayers(PluginConfig(placement="host", vllm_kernels=True, poison=True), CPU, follow)
    for _ in range(5):
        model.add()

    def make(layer: int) -> dict[str, torch.nn.Parameter]:
        whole = torch.arange(layer, layer + 4 * 96 * 512, dtype=torch.int32)
        tensors = {
            "w13": whole.view(4, 96, 512).to(torch.float8_e4m3fn),
            "w2": whole.view(torch.uint8)[: 4 * 96 * 512].view(4, 512, 96).transpose(1, 2),
            "scale": whole.view(96, 512, 4).permute(2, 1, 0).float(),
            "small": torch.ones(4),
        }
        return {name: torch.nn.Parameter(each, requires_grad=False) for name, each in tensors.items()}

    layers = [make(layer) for layer in range(5)]
    for layer in (3, 0, 4, 1, 2):
        model.take(layer, layers[layer])
    (streamer,) = followed
    for name, tensor in layers[0].items():
        assert (tensor.data_ptr() == layers[2][name].data_ptr()) == (name != "small")
        assert tensor.data_ptr() != layers[1][name].data_ptr()
    taken = len(gpu.allocated)
    for _ in range(3):
        for layer in range(5):
            model.begin(layer)
            for name, wanted in make(layer).items():
                mine = layers[layer][name]
                assert mine.stride() == wanted.stride()
                assert torch.equal(mine.contiguous().view(torch.uint8), wanted.contiguous().view(torch.uint8))
            model.end(layer)
    assert passes.begun == 15
    assert len(gpu.allocated) == taken
    assert streamer.num_slots == 2


def test_tensors_with_gaps_are_refused(gpu):
    model = StreamedLayers(PluginConfig(placement="host", vllm_kernels=True), CPU)
    model.add()
    with pytest.raises(SettingError, match="experts with gaps"):
        model.take(0, {"w": torch.nn.Parameter(torch.zeros(4, 256, 512)[:, :, ::2], requires_grad=False)})
