"""What launches must move and compute: each kernel declares it (`triton.jit`'s launch_metadata), and profilers
(Proton), predictions and rooflines read it there.

    @triton.jit(launch_metadata=declares(work_of_args))

Bytes are those of global memory that any schedule must move, once each; of experts' weights only those of experts with
tokens. Padding counts as tokens; tables of indices and vectors of weights are left out. That is a floor: what a kernel
reads again from L2 is not in it.
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


def every_tensor_once(args: Mapping[str, Any]) -> Work:
    """Of kernels that read all that they are given and fill what they write."""
    return Work(sum(value.nbytes for value in args.values() if isinstance(value, Tensor)))


def lengths(query_start: Tensor, tokens: int) -> list[float]:
    """Tokens of each sequence; on the meta device, where nobody knows, the mean."""
    if query_start.device.type == "meta":
        sequences = len(query_start) - 1
        return [tokens / sequences] * sequences
    return torch.diff(query_start).tolist()


def contexts(context_lens: Tensor, most: int) -> list[int]:
    """Positions of each sequence; on the meta device `most`."""
    return [most] * len(context_lens) if context_lens.device.type == "meta" else context_lens.tolist()


def touched_experts(expert_start: Tensor, tokens: int, top_k: int) -> float:
    """Experts that have tokens; on the meta device, where nobody knows, those that uniform routing touches in the
    mean."""
    experts = len(expert_start) - 1
    if expert_start.device.type == "meta":
        return experts * (1.0 - (1.0 - top_k / experts) ** tokens)
    return int((torch.diff(expert_start) > 0).sum())
