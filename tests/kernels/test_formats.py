"""The registry of formats: what each record says is so, and a record is all that a new format needs."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from fluxmoe.experiments.commands.main import arguments
from fluxmoe.experiments.lib.checkpoints import make_checkpoint
from fluxmoe.kernels.cpu.experts import CpuExperts
from fluxmoe.kernels.expert_table import ExpertTable
from fluxmoe.kernels.formats import (
    DEFAULT_COMPRESSED,
    DENSE,
    FORMATS,
    Format,
    codec_of,
    compressed_formats,
    fitting,
    formats_help,
    fused_formats,
)
from fluxmoe.kernels.ops import ExpertDims, KernelError
from fluxmoe.kernels.packing import Planar12
from fluxmoe.kernels.packing.blocks import PlaneBlocks
from fluxmoe.kernels.reference.experts import TorchExperts
from fluxmoe.kernels.triton.experts import TritonExperts
from fluxmoe.runtime.experts.layout import ExpertFormats
from fluxmoe.runtime.serving.config import EngineConfig
from fluxmoe.runtime.sim.cost_model import CostParameters, SimExperts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu
# No multiples of a panel's 16 lanes or of a tile's 64 rows and 128 columns.
DIMS = ExpertDims(hidden=248, intermediate=120, experts=2, top_k=1, dtype=torch.bfloat16)
BACKENDS = {
    "cpu": lambda: CpuExperts(DIMS, 4),
    "torch": lambda: TorchExperts(DIMS, 4),
    "triton": lambda: TritonExperts(DIMS, 4, DEVICE),
}


class Another(Planar12):
    """A made-up format: planar12's planes under another name."""

    name = "another"


@pytest.fixture
def another(monkeypatch) -> Format:
    record = Format("another", 13.0, "made up", Another())
    monkeypatch.setitem(FORMATS, "another", record)
    return record


def gaussian_expert(expert_format: str) -> list[torch.Tensor]:
    return [fitting(expert_format, (torch.randn(shape) * 0.02).bfloat16()) for shape in DIMS.shapes]


def round_trip(ops, expert_format: str, weights: list[torch.Tensor]) -> None:
    blocks = tuple(torch.full((n,), 0xAB, dtype=torch.uint8) for n in ops.expert_bytes(expert_format))
    recipes = ops.encode_expert(*weights, blocks, expert_format)
    dense = tuple(torch.full((n,), 0xCD, dtype=torch.uint8) for n in ops.expert_bytes())
    arranged = tuple(torch.empty_like(block) for block in dense)
    assert ops.encode_expert(*weights, arranged) == (None, None)
    for d, block in enumerate(blocks):
        out = dense[d].to(ops.device)
        ops.decode_expert(expert_format, d, block.to(ops.device), out, recipes[d])
        assert torch.equal(out.cpu(), arranged[d]), "a decoded block is not the dense one, byte for byte"
    for got, expected in zip(ops.restore_expert(arranged), weights, strict=True):
        assert torch.equal(got.view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("expert_format", compressed_formats())
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_format_on_every_backend_decodes_to_the_dense_block(backend, expert_format):
    round_trip(BACKENDS[backend](), expert_format, gaussian_expert(expert_format))


def test_records_agree_with_themselves():
    assert all(name == each.name for name, each in FORMATS.items())
    assert all(name == codec_of(name).name for name in compressed_formats())
    numbers = [each.number for each in FORMATS.values() if each.number is not None]
    assert len(set(numbers)) == len(numbers)
    # On disk and in captured graphs nothing says what a number meant.
    assert {name: each.number for name, each in FORMATS.items() if each.number is not None} == {
        DENSE: 0,
        "planar12": 1,
        "planar8": 2,
    }
    for name, each in compressed_formats().items():
        assert (each.number is not None) == bool(each.fused), name
        assert (each.tile is not None) == ("triton" in each.fused), name
    assert FORMATS[DENSE].codec is None
    assert {DEFAULT_COMPRESSED} <= fused_formats("cpu") & fused_formats("triton")
    assert fused_formats("torch") == frozenset()


@pytest.mark.parametrize("name", compressed_formats())
def test_bits_are_those_of_gaussian_weights(name):
    """Within 1 %, on a matrix as large as an expert's: a ledger is filled and a deployment simulated by them."""
    weight = fitting(name, (torch.randn(1024, 2048) * 0.02).bfloat16())
    codec = codec_of(name)
    assert codec.bits_per_weight(codec.encode(weight)) == pytest.approx(FORMATS[name].bits, rel=0.01)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_record_is_all_that_a_format_needs_which_is_decoded_first(backend, another, tmp_path):
    ops = BACKENDS[backend]()
    assert "another" not in ops.fused_formats
    round_trip(ops, "another", gaussian_expert("another"))
    config = EngineConfig(placement="packed", expert_format="another")
    assert config.formats == ExpertFormats("another", "another")
    assert "another: 13.0 bits a weight, made up" in formats_help()
    model = make_checkpoint("mixtral", tmp_path / "model", layers=1, hidden=32, moe_intermediate=16, heads=2, vocab=300)
    command = f"generate --model {model} --prompt x --max-new-tokens 1 --placement packed --expert-format another"
    assert arguments(command.split())[1].engine.expert_format == "another"
    parameters = CostParameters()
    dims = replace(DIMS, hidden=1024, intermediate=512)
    assert sum(SimExperts(dims, 1, 1, parameters).expert_bytes("another")) == 3 * 1024 * 512 * 13 // 8
    with pytest.raises(ValueError, match="no GEMM reads format 'another'"):
        ExpertTable.from_blocks([(torch.zeros(64, dtype=torch.uint8),) * 2], "cpu", "another")


def test_a_format_that_claims_a_tile_loop_needs_one(monkeypatch, another):
    """Triton's GEMM refuses what it cannot decode, whatever a record says of it."""
    fused = replace(another, number=7, fused={"triton": PlaneBlocks(another.codec)}, tile=(64, 128))
    monkeypatch.setitem(FORMATS, "another", fused)
    ops = TritonExperts(DIMS, 4, DEVICE, formats=("another", "planar12", "huffman", DENSE))
    assert ops.fused_formats == {"another", "planar12", "planar8"}
    assert CpuExperts(DIMS, 4).fused_formats == {"planar12"}
    block = torch.zeros(64, dtype=torch.uint8, device=DEVICE)
    experts = SimpleNamespace(table=ExpertTable.from_blocks([(block, block)] * 2, DEVICE, "another"), wait=lambda d: d)
    x = torch.zeros(4, DIMS.hidden, dtype=torch.bfloat16, device=DEVICE)
    with pytest.raises(KernelError, match="no tile loop for format another; it has planar12, planar8 and dense"):
        ops.moe_add(x, ops.route(torch.zeros(4, 2, device=DEVICE)), experts, x)


def test_fused_formats_with_different_tiles_do_not_meet_in_a_launch(monkeypatch, another):
    wide = replace(another, number=7, fused={"triton": PlaneBlocks(another.codec)}, tile=(128, 64))
    monkeypatch.setitem(FORMATS, "another", wide)
    with pytest.raises(KernelError, match="formats another and planar12 need different tiles; choose one"):
        TritonExperts(DIMS, 4, DEVICE, formats=("planar12", "another"))
    TritonExperts(DIMS, 4, DEVICE, formats=("another",))
