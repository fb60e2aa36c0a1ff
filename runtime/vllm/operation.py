"""`torch.ops.fluxmoe.experts`: a layer of a model as one operation, which dynamo, inductor and graphs take as it is.

Which layer is a tensor, as weights would be: a number in its place would be a constant of the compiled code, which
vLLM keeps from run to run, and which it makes once for all layers if they do not differ.
"""

from __future__ import annotations

from itertools import count
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .paged_model import PagedModel

_numbers = count()
# Weak: they go when vLLM's model goes.
_models: WeakValueDictionary[int, PagedModel] = WeakValueDictionary()


def handle_of(model: PagedModel, layer: int) -> Tensor:
    """What `torch.ops.fluxmoe.experts` knows a layer by: int64 [2], in host memory on any device."""
    number = next(_numbers)
    _models[number] = model
    return torch.tensor([number, layer], dtype=torch.int64, device="cpu")


def _experts(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, handle: Tensor) -> Tensor:
    model, layer = handle.tolist()
    return _models[model].experts(layer, x, topk_ids, topk_weights)


def _experts_meta(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, handle: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_library = torch.library.Library("fluxmoe", "FRAGMENT")
_library.define("experts(Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor handle) -> Tensor")
for _device in ("CPU", "CUDA"):
    _library.impl("experts", _experts, _device)
torch.library.register_fake("fluxmoe::experts", _experts_meta, lib=_library)
