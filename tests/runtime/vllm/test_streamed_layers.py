"""vLLM's own kernels over tensors that are streamed: what they read, what was counted, what is refused."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from fluxmoe.runtime.experts.config import SettingError
from fluxmoe.runtime.memory.budget import BudgetError
from fluxmoe.runtime.memory.check import FreeMemory
from fluxmoe.runtime.vllm import hook
from fluxmoe.runtime.vllm.operation import handle_of
from fluxmoe.runtime.vllm.settings import PluginConfig, read_settings
from fluxmoe.runtime.vllm.streamed_layers import StreamedLayers

CPU = torch.device("cpu")


def weights_of(dtype: torch.dtype, layer: int) -> dict[str, torch.nn.Parameter]:
    """As a quantised method makes them: two large tensors of any type, and a scale an expert."""
    generator = torch.Generator().manual_seed(layer)

    def make(*shape: int) -> torch.nn.Parameter:
        values = torch.randint(0, 100, shape, generator=generator)
        return torch.nn.Parameter(values.to(dtype), requires_grad=False)

    scale = torch.nn.Parameter(torch.ones(4), requires_grad=False)
    return {"w13_weight": make(4, 256, 128), "w2_weight": make(4, 128, 129), "w13_scale": scale}


def streamed(layers: int, dtype: torch.dtype = torch.bfloat16, **settings):
    model = StreamedLayers(PluginConfig(placement="host", vllm_kernels=True, **settings), CPU)
    for _ in range(layers):
        model.add()
    weights = [weights_of(dtype, layer) for layer in range(layers)]
    for layer in reversed(range(layers)):  # in any order
        model.take(layer, weights[layer])
    return model, weights


@pytest.mark.parametrize(("layers", "slots"), [(1, 2), (2, 2), (3, 2), (5, 3), (4, 9)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn, torch.bfloat16], ids=str)
def test_kernels_read_the_same_bytes_under_the_same_addresses(layers, slots, dtype):
    model, weights = streamed(layers, dtype, slots=slots, poison=True)
    addresses = [{name: each.data_ptr() for name, each in layer.items()} for layer in weights]
    for _ in range(3):
        for layer, mine in enumerate(weights):
            model.begin(layer)
            for name, wanted in weights_of(dtype, layer).items():
                assert mine[name].is_contiguous()
                assert torch.equal(mine[name].view(torch.uint8), wanted.view(torch.uint8))
            model.end(layer)
    assert addresses == [{name: each.data_ptr() for name, each in layer.items()} for layer in weights]
    counters, each = model.counters(), sum(weights[0][name].nbytes for name in ("w13_weight", "w2_weight"))
    if slots >= layers:
        assert (counters.loads, counters.host_bytes) == (2 * layers, layers * each)
    else:
        assert counters.host_bytes >= 3 * layers * each


def test_a_pass_that_an_error_ended_does_not_stop_the_next():
    model, weights = streamed(3, poison=True)
    model.begin(0)
    model.end(0)
    model.begin(1)  # and its kernels raise
    for layer in range(3):
        model.begin(layer)
        assert torch.equal(weights[layer]["w2_weight"], weights_of(torch.bfloat16, layer)["w2_weight"])
        model.end(layer)


def test_operations_begin_and_end_layers_in_compiled_code_too():
    model, weights = streamed(3, torch.float32, poison=True)
    handles = [handle_of(model, layer) for layer in range(3)]

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compute(x, handle, weight):
        torch.ops.fluxmoe.begin_layer(x, handle)
        y = x @ weight[0]
        torch.ops.fluxmoe.end_layer(y, handle)
        return y

    for _ in range(2):
        for layer in range(3):
            y = compute(torch.ones(2, 256), handles[layer], weights[layer]["w13_weight"])
            assert torch.equal(y, torch.ones(2, 256) @ weights_of(torch.float32, layer)["w13_weight"][0])


def test_layers_that_differ_are_refused():
    model = StreamedLayers(PluginConfig(placement="host", vllm_kernels=True), CPU)
    model.add(), model.add()
    model.take(0, weights_of(torch.uint8, 0))
    with pytest.raises(SettingError, match="layer 1 with experts is unlike the others"):
        model.take(1, weights_of(torch.bfloat16, 1))


def test_layers_too_small_to_stream_are_refused():
    model = StreamedLayers(PluginConfig(placement="host", vllm_kernels=True), CPU)
    model.add()
    with pytest.raises(SettingError, match="serve this model without fluxmoe"):
        model.take(0, {"w": torch.nn.Parameter(torch.zeros(4, 8), requires_grad=False)})


def test_slots_that_do_not_fit_are_refused(monkeypatch):
    free = FreeMemory.now
    monkeypatch.setattr(FreeMemory, "now", lambda device: free(device)._replace(device_bytes=1 << 10))
    with pytest.raises(BudgetError, match="only 1 KiB are free; choose fewer slots"):
        streamed(3)


def test_settings_that_would_do_nothing_are_refused():
    assert read_settings({"vllm_kernels": True, "slots": 3}, {}).slots == 3
    with pytest.raises(SettingError, match="leave out placement, alpha"):
        read_settings({"vllm_kernels": True, "placement": "host", "alpha": 0.5}, {})


# The hook.


@pytest.fixture
def layers(vllm, monkeypatch) -> SimpleNamespace:
    """vLLM's module of layers, hooked; `unchanged.class_for` stands in for what a layer becomes."""

    class PluggableLayer:
        def __new__(cls):
            return super().__new__(cls)

    class Layer(PluggableLayer):
        pass

    class Ours(Layer):
        pass

    asked = []

    def class_for(cls, config):
        asked.append(cls)
        return Ours

    unchanged, module = ModuleType("unchanged"), ModuleType(hook._MODULE)
    vars(unchanged)["class_for"] = class_for
    monkeypatch.setitem(sys.modules, "fluxmoe.runtime.vllm.unchanged", unchanged)
    vars(sys.modules["vllm.config"])["get_current_vllm_config_or_none"] = lambda: vllm.config
    vars(module)["PluggableLayer"] = PluggableLayer
    monkeypatch.setitem(sys.modules, hook._MODULE, module)
    hook.hook_layers()
    hook.hook_layers()
    vllm.config.quant_config = None
    return SimpleNamespace(Layer=Layer, Ours=Ours, asked=asked, config=vllm.config)


def test_layers_are_ours_where_settings_are_given(layers):
    assert type(layers.Layer()) is layers.Ours
    assert layers.asked == [layers.Layer]


@pytest.mark.parametrize("changes", [dict(additional_config={}), dict(additional_config=None)], ids=str)
def test_layers_are_vllm_s_own_without(layers, changes):
    vars(layers.config).update(changes)
    assert type(layers.Layer()) is layers.Layer
    assert not layers.asked


def test_layers_are_vllm_s_own_with_our_method(layers):
    layers.config.quant_config = SimpleNamespace(get_name=lambda: "fluxmoe")
    assert type(layers.Layer()) is layers.Layer


def test_what_vllm_imports_later_is_hooked_when_it_does(tmp_path):
    package = tmp_path / "vllm/model_executor"
    package.mkdir(parents=True)
    for name in (tmp_path / "vllm/__init__.py", package / "__init__.py"):
        name.touch()
    (package / "custom_op.py").write_text("class PluggableLayer: pass\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from fluxmoe.runtime.vllm.hook import hook_layers\n"
        "before = len(sys.meta_path); hook_layers(); hook_layers(); print(len(sys.meta_path) - before)\n"
        "from vllm.model_executor.custom_op import PluggableLayer\n"
        "print(len(sys.meta_path) - before, hasattr(PluggableLayer, 'fluxmoe_looks'))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["1", "0", "True"]
