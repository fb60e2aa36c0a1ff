"""`torch.ops.fluxmoe.experts`: a layer of a host as one operation, which dynamo, inductor and graphs take as it is.

Which layer is a tensor, as weights would be: a number in its place would be a constant of the compiled code, which
vLLM keeps from run to run, and which it makes once for all layers if they do not differ.
"""

from __future__ import annotations

from itertools import count
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .host import Host

_numbers = count()
# Weak: a host lives as long as its model.
_hosts: WeakValueDictionary[int, Host] = WeakValueDictionary()


def handle_of(host: Host, layer: int) -> Tensor:
    """What `torch.ops.fluxmoe.experts` knows a layer by: int64 [2], in host memory on any device."""
    number = next(_numbers)
    _hosts[number] = host
    return torch.tensor([number, layer], dtype=torch.int64, device="cpu")


def _experts(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, handle: Tensor) -> Tensor:
    host, layer = handle.tolist()
    return _hosts[host].experts(layer, x, topk_ids, topk_weights)


def _experts_meta(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, handle: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_library = torch.library.Library("fluxmoe", "FRAGMENT")
_library.define("experts(Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor handle) -> Tensor")
for _device in ("CPU", "CUDA"):
    _library.impl("experts", _experts, _device)
torch.library.register_fake("fluxmoe::experts", _experts_meta, lib=_library)
