"""What launches must move and compute: each kernel declares it (`triton.jit`'s launch_metadata), and profilers
(Proton), predictions and rooflines read it there.

    @triton.jit(launch_metadata=declares(work_of_args))

Bytes are those of global memory that any schedule must move, once each; of experts' weights only those of experts with
tokens. Padding counts as tokens. That is a floor: what a kernel reads again from L2 is not in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Work(NamedTuple):
    """Of one launch. flops: two a multiply-add, of matrix products alone."""

    nbytes: float
    flops: float = 0.0


def declares(work: Callable[[Mapping[str, Any]], Work]) -> Callable[..., dict[str, Any]]:
    """For `launch_metadata`: `work` of a launch's arguments, by name. Called where a profiler listens; may then wait
    for the device."""

    def metadata(grid: tuple, compiled: Any, args: Mapping[str, Any]) -> dict[str, Any]:
        nbytes, flops = work(args)
        return {"name": compiled.name, "bytes": int(nbytes), "flops": int(flops)}

    return metadata


def touched_experts(expert_start: Tensor, tokens: int, top_k: int) -> float:
    """Experts that have tokens; on the meta device, where nobody knows, those that uniform routing touches in the
    mean."""
    experts = len(expert_start) - 1
    if expert_start.device.type == "meta":
        return experts * (1.0 - (1.0 - top_k / experts) ** tokens)
    return int((torch.diff(expert_start) > 0).sum())
