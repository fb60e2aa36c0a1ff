"""Experts for benchmarks: random weights, and their blocks as a backend's kernels read them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from fluxmoe.kernels.expert_blocks import ExpertBlocks
from fluxmoe.kernels.expert_table import ExpertTable, Pair
from fluxmoe.kernels.formats import DENSE, FORMATS
from fluxmoe.kernels.ops import ExpertDims, ExpertOps
from fluxmoe.runtime.experts.streamer import LayerPage


def random_expert(dims: ExpertDims, device: torch.device | str = "cpu") -> Pair:
    """gate_up [2I, H] and down [H, I], bf16, with the variance that keeps activations of order one."""
    gate_up, down = ((torch.randn(n, k) * k**-0.5).bfloat16().to(device) for n, k in dims.shapes)
    return gate_up, down


def encoded(encoder: ExpertBlocks | ExpertOps, weights: Pair, expert_format: str = DENSE) -> tuple[Pair, float]:
    """An expert's (gate/up, down) blocks, on the device of its weights, and the bits that a weight takes there.

    On the meta device blocks have no values, and bits are the format's. What is compressed is compressed on the host.
    """
    device = weights[0].device
    where = torch.device("cpu") if expert_format != DENSE and device.type != "meta" else device
    gate_up, down = (torch.empty(n, dtype=torch.uint8, device=where) for n in encoder.expert_bytes(expert_format))
    if device.type == "meta":
        return (gate_up, down), FORMATS[expert_format].bits
    recipes = encoder.encode_expert(weights[0].to(where), weights[1].to(where), (gate_up, down), expert_format)
    pairs = zip(recipes, (gate_up, down), strict=True)
    used = sum(recipe.nbytes if recipe else block.numel() for recipe, block in pairs)
    return (gate_up.to(device), down.to(device)), 8 * used / sum(weight.numel() for weight in weights)


def table_of(blocks: Iterable[Pair], device: torch.device, formats: str | Sequence[str] = DENSE) -> ExpertTable:
    """Where launches are only compiled, on the meta device, the table itself must have values."""
    return ExpertTable.from_blocks(list(blocks), "cpu" if device.type == "meta" else device, formats)


def page_of(table: ExpertTable) -> LayerPage:
    """A layer whose experts are all there."""
    return LayerPage(table, None)
