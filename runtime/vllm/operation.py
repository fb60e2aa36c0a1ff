"""`torch.ops.fluxmoe.experts`: a layer of a model as one operation, which dynamo, inductor and graphs take as it is;
`begin_layer` and `end_layer`, the same for what must happen before and after kernels of another's.

Which layer is a tensor, as weights would be: a number in its place would be a constant of the compiled code, which
vLLM keeps from run to run, and which it makes once for all layers if they do not differ.
"""

from __future__ import annotations

from itertools import count
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .paged_model import PagedModel
from .streamed_layers import StreamedLayers

_numbers = count()
# Weak: they go when vLLM's model goes.
_models: WeakValueDictionary[int, PagedModel | StreamedLayers] = WeakValueDictionary()


def handle_of(model: PagedModel | StreamedLayers, layer: int) -> Tensor:
    """What our operations know a layer by: int64 [2], in host memory on any device."""
    number = next(_numbers)
    _models[number] = model
    return torch.tensor([number, layer], dtype=torch.int64, device="cpu")


def _experts(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, handle: Tensor) -> Tensor:
    model, layer = handle.tolist()
    paged = _models[model]
    assert isinstance(paged, PagedModel)
    return paged.experts(layer, x, topk_ids, topk_weights)


def _experts_meta(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, handle: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _begin_layer(x: Tensor, handle: Tensor) -> None:
    model, layer = handle.tolist()
    streamed = _models[model]
    assert isinstance(streamed, StreamedLayers)
    streamed.begin(layer)


def _end_layer(y: Tensor, handle: Tensor) -> None:
    model, layer = handle.tolist()
    streamed = _models[model]
    assert isinstance(streamed, StreamedLayers)
    streamed.end(layer)


def _nothing(x: Tensor, handle: Tensor) -> None:
    pass


_library = torch.library.Library("fluxmoe", "FRAGMENT")
_library.define("experts(Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor handle) -> Tensor")
# Said to write what they leave as it is: a compiler must not move the kernels, which read it or have written it, past
# them.
_library.define("begin_layer(Tensor(a!) x, Tensor handle) -> ()")
_library.define("end_layer(Tensor(a!) y, Tensor handle) -> ()")
for _name, _run, _fake in (
    ("experts", _experts, _experts_meta),
    ("begin_layer", _begin_layer, _nothing),
    ("end_layer", _end_layer, _nothing),
):
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _run, _device)
    torch.library.register_fake(f"fluxmoe::{_name}", _fake, lib=_library)
