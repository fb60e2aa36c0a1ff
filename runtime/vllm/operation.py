"""`torch.ops.fluxmoe.experts`: a layer of a host as one operation, which dynamo, inductor and graphs take as it is.

A compiled model keeps numbers, not objects: hosts and layers have them.
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


def number_of(host: Host) -> int:
    """A number for a host, for `torch.ops.fluxmoe.experts`; a new one at each call."""
    number = next(_numbers)
    _hosts[number] = host
    return number


def _experts(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, host: int, layer: int) -> Tensor:
    return _hosts[host].experts(layer, x, topk_ids, topk_weights)


def _experts_meta(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, host: int, layer: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_library = torch.library.Library("fluxmoe", "FRAGMENT")
_library.define("experts(Tensor x, Tensor topk_ids, Tensor topk_weights, int host, int layer) -> Tensor")
for _device in ("CPU", "CUDA"):
    _library.impl("experts", _experts, _device)
torch.library.register_fake("fluxmoe::experts", _experts_meta, lib=_library)
