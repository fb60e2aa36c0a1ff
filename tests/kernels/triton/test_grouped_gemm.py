"""Grouped GEMM over a table: right for every expert whatever the tile, the sizes and where the weights lie."""

from __future__ import annotations

import pytest
import torch
from fluxmoe.kernels.expert_table import ExpertTable
from fluxmoe.kernels.formats import DENSE, FORMATS, fitting, fused_formats, weight_tile
from fluxmoe.kernels.ops import ExpertDims, KernelError
from fluxmoe.kernels.packing.codec import align
from fluxmoe.kernels.reference.experts import add_mixture
from fluxmoe.kernels.triton.decoded import DecodedExperts
from fluxmoe.kernels.triton.grouped_gemm import combine, deinterleave, down, gate_up, interleave, linear
from fluxmoe.kernels.triton.routing import Router
from fluxmoe.kernels.triton.tiles import Tile, capability_of, default_tile, fused_tile, invariant_tile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu
# Relative to the largest output: half an ulp of the dtype for each of the two roundings, and the sums'.
TOLERANCES = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2e-6}
COMPRESSED = sorted(fused_formats("triton"))
TILES = {
    "swap": Tile(16, 32, 16, 4, 2, swap_ab=True),
    "plain": Tile(16, 32, 32, 4, 2, group_m=2),
    "persistent": Tile(32, 16, 16, 4, 2, group_m=3, persistent=True),
}


class Layer:
    """Random experts; each block in an allocation of its own."""

    def __init__(self, experts: int, hidden: int, intermediate: int, dtype: torch.dtype) -> None:
        self.hidden, self.intermediate, self.dtype, self.num_experts = hidden, intermediate, dtype, experts
        self.weights = [
            (
                (torch.randn(2 * intermediate, hidden) / hidden**0.5).to(dtype),
                (torch.randn(hidden, intermediate) / intermediate**0.5).to(dtype),
            )
            for _ in range(experts)
        ]
        self.table = self.make_table()

    def make_table(self) -> ExpertTable:
        as_bytes = lambda t: t.reshape(-1).view(torch.uint8)  # noqa: E731
        pairs = [(interleave(a).to(DEVICE), b.to(DEVICE)) for a, b in self.weights]
        return ExpertTable.from_blocks([(as_bytes(a), as_bytes(b)) for a, b in pairs], DEVICE)

    def run(self, x, logits, top_k, tile, num_tokens=None, num_sms=5, decoded=None):
        """(output without residual, routing)"""
        tokens = len(x)
        routing = Router(max(tokens, 1), self.num_experts, top_k, True, DEVICE)(
            logits.to(DEVICE), tile.block_m, num_tokens
        )
        h = torch.full((tokens * top_k, self.intermediate), float("nan"), dtype=self.dtype, device=DEVICE)
        y = torch.full((tokens * top_k, self.hidden), float("nan"), dtype=self.dtype, device=DEVICE)
        gate_up(x.to(DEVICE), self.table, routing, h, self.dtype, tile, num_sms, decoded)
        down(h, self.table, routing, y, self.dtype, tile, num_sms, decoded)
        out = torch.zeros(tokens, self.hidden, dtype=torch.float32, device=DEVICE)
        return combine(y, routing, out), routing

    def check(self, tokens, top_k, tile, logits=None):
        x = torch.randn(tokens, self.hidden).to(self.dtype)
        logits = torch.randn(tokens, self.num_experts) if logits is None else logits
        out, routing = self.run(x, logits, top_k, tile)
        chosen = routing.experts.cpu(), routing.weights.cpu()
        expected = add_mixture(torch.zeros_like(x).double(), x.double(), self.weights.__getitem__, *chosen)
        error = (out.cpu().double() - expected).abs().max() if tokens else 0.0
        assert error <= TOLERANCES[self.dtype] * max(1.0, expected.abs().max() if tokens else 0.0), f"{error=}"


@pytest.mark.parametrize(
    ("tile", "dtype"),
    [("swap", torch.bfloat16), ("swap", torch.float16), ("plain", torch.float32), ("persistent", torch.bfloat16)],
    ids=lambda value: str(value),
)
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "hidden", "intermediate"),
    [
        pytest.param(0, 4, 2, 32, 32, id="no-tokens"),
        pytest.param(1, 1, 1, 16, 16, id="one-expert"),
        pytest.param(1, 8, 2, 32, 16, id="one-token"),
        pytest.param(3, 5, 5, 40, 24, id="all-experts-ragged-sizes"),
        pytest.param(37, 7, 3, 72, 40, id="odd-sizes"),
        pytest.param(20, 64, 4, 32, 16, id="experts-without-tokens"),
    ],
)
def test_equals_float64(tokens, experts, top_k, hidden, intermediate, tile, dtype):
    Layer(experts, hidden, intermediate, dtype).check(tokens, top_k, TILES[tile])


@pytest.mark.parametrize("rows", [1, 20, 60, 100, 600])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_default_tile_is_right(rows, dtype):
    """The real tiles, larger than the sizes: everything is edge."""
    Layer(2, 136, 72, dtype).check(9, 2, default_tile(rows, 90, dtype.itemsize))


def test_one_hot_expert_spans_blocks():
    logits = torch.zeros(50, 4)
    logits[:, 2] = 5.0
    Layer(4, 32, 32, torch.bfloat16).check(50, 1, TILES["plain"], logits)


def test_tma_gives_the_same_bits_as_pointers():
    layer = Layer(3, 64, 32, torch.bfloat16)
    x, logits = torch.randn(20, 64).bfloat16(), torch.randn(20, 3)
    tile = Tile(16, 32, 32, 4, 2)
    plain, _ = layer.run(x, logits, 2, tile)
    described, _ = layer.run(x, logits, 2, Tile(16, 32, 32, 4, 2, tma=True))
    assert torch.equal(plain, described)


@pytest.mark.parametrize("num_sms", [1, 3, 1000])
def test_persistent_programs_give_the_same_bits(num_sms):
    layer = Layer(5, 48, 32, torch.bfloat16)
    x, logits = torch.randn(40, 48).bfloat16(), torch.randn(40, 5)
    one_each, _ = layer.run(x, logits, 2, Tile(16, 16, 16, 4, 2))
    looped, _ = layer.run(x, logits, 2, Tile(16, 16, 16, 4, 2, persistent=True), num_sms=num_sms)
    assert torch.equal(one_each, looped)


def test_unrouted_experts_are_never_read():
    """Poison in place of the weights of an expert that no token chose, as in a slot that is not loaded."""
    layer = Layer(4, 32, 32, torch.bfloat16)
    for weight in layer.weights[1]:
        weight.fill_(float("nan"))
    layer.table = layer.make_table()
    logits = torch.randn(12, 4)
    logits[:, 1] = -1e9
    out, _ = layer.run(torch.randn(12, 32).bfloat16(), logits, 3, TILES["swap"])
    assert out.isfinite().all()


def test_moving_experts_changes_no_bit():
    layer = Layer(6, 64, 48, torch.bfloat16)
    x, logits = torch.randn(9, 64).bfloat16(), torch.randn(9, 6)
    before, _ = layer.run(x, logits, 2, TILES["swap"])
    keep, layer.table = layer.table, layer.make_table()
    assert not torch.equal(keep.addresses, layer.table.addresses)
    after, _ = layer.run(x, logits, 2, TILES["swap"])
    assert torch.equal(before, after)


# fp32 only on a GPU: numpy's matmul, which interprets tl.dot, rounds a row by its place in the tile.
@pytest.mark.parametrize("dtype", [torch.bfloat16] + [torch.float32] * (DEVICE == "cuda"), ids=str)
def test_invariant_tile_makes_tokens_independent_of_their_batch(dtype):
    layer, tile = Layer(4, 64, 48, dtype), invariant_tile(90, dtype.itemsize)
    x, logits = torch.randn(70, 64).to(dtype), torch.randn(70, 4)
    together, _ = layer.run(x, logits, 2, tile)
    for first, count in [(0, 1), (69, 1), (3, 20)]:
        part = slice(first, first + count)
        alone, _ = layer.run(x[part], logits[part], 2, tile)
        assert torch.equal(alone, together[part])


@pytest.mark.parametrize("real", [0, 1, 7])
def test_padding_tokens_keep_their_residual(real):
    layer = Layer(4, 32, 32, torch.bfloat16)
    x, logits = torch.randn(9, 32).bfloat16(), torch.randn(9, 4)
    count = torch.tensor([real], dtype=torch.int32, device=DEVICE)
    padded, _ = layer.run(x, logits, 2, TILES["swap"], count)
    assert (padded[real:] == 0).all()
    alone, _ = layer.run(x[:real], logits[:real], 2, TILES["swap"])
    assert torch.equal(padded[:real], alone)


@pytest.mark.parametrize("tokens", [0, 1, 13])
def test_combine_adds_rows_to_the_residual(tokens):
    y, residual = torch.randn(tokens * 3, 40), torch.randn(tokens, 40)
    routing = Router(max(tokens, 1), 4, 3, True, DEVICE)(torch.randn(tokens, 4, device=DEVICE), 16)
    got = combine(y.to(DEVICE), routing, residual.clone().to(DEVICE))
    torch.testing.assert_close(got.cpu(), residual + y.view(tokens, 3, 40).sum(1))


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("tokens", "n", "k"), [(0, 8, 8), (1, 1, 16), (37, 50, 40), (16, 64, 128)])
def test_linear_equals_float64(tokens, n, k, add):
    x, w, y = torch.randn(tokens, k).bfloat16(), torch.randn(n, k).bfloat16(), torch.randn(tokens, n)
    expected = x.double() @ w.double().T + (y if add else 0.0)
    got = linear(x.to(DEVICE), w.to(DEVICE), y.clone().to(DEVICE), invariant_tile(90, 2), add)
    torch.testing.assert_close(got.cpu().double(), expected.double(), rtol=1e-5, atol=1e-5)


def test_interleaving_is_undone():
    weight = torch.randn(10, 3)
    mixed = interleave(weight)
    assert torch.equal(mixed[0], weight[0])
    assert torch.equal(mixed[1], weight[5])
    assert torch.equal(deinterleave(mixed), weight)


def test_what_does_not_fit_is_refused():
    layer = Layer(2, 32, 32, torch.bfloat16)
    routing = Router(4, 2, 1, True, DEVICE)(torch.zeros(4, 2, device=DEVICE), 16)
    x = torch.zeros(4, 32, dtype=torch.bfloat16, device=DEVICE)
    h = torch.zeros(4, 32, dtype=torch.bfloat16, device=DEVICE)
    with pytest.raises(KernelError, match="both must be the same"):
        gate_up(x.float(), layer.table, routing, h, torch.bfloat16, TILES["swap"])
    with pytest.raises(KernelError, match="blocks of 16 rows"):
        gate_up(x, layer.table, routing, h, torch.bfloat16, TILES["persistent"])
    with pytest.raises(KernelError, match="contiguous rows"):
        down(h.t(), layer.table, routing, x, torch.bfloat16, TILES["swap"])
    huge = torch.empty(1 << 16, 1 << 15, dtype=torch.bfloat16, device="meta")
    with pytest.raises(KernelError, match=r"65536 x 32768 elements exceeds the 2\^31"):
        linear(huge[:1], huge, huge[:1], TILES["swap"])
    with pytest.raises(KernelError, match="TMA"):
        gate_up(x, layer.table, routing, h, torch.bfloat16, Tile(16, 128, 32, 4, 2, tma=True))


def mixed_layer(name: str, hidden: int, intermediate: int, crowded: bool = False) -> tuple[Layer, ExpertTable]:
    """A layer, and a table of its experts of which every second one is in a compressed format."""
    layer, format_blocks = Layer(4, hidden, intermediate, torch.bfloat16), FORMATS[name].blocks("triton")
    layer.weights = [(fitting(name, a), fitting(name, b)) for a, b in layer.weights]
    rare = torch.tensor([3e-30, -0.0, 9.05, 1e-38, -2e-20]).bfloat16()
    for expert, pair in enumerate(layer.weights):
        for weight in pair:
            weight[torch.randperm(len(weight))[:expert], 0] = rare[:expert]
            if crowded:
                weight[:16, 100] = 1e-30
    layer.table = layer.make_table()
    blocks = []
    for expert, (pair, (gate_up_weight, down_weight)) in enumerate(zip(layer.table.blocks, layer.weights, strict=True)):
        if expert % 2:
            weights = (interleave(gate_up_weight), down_weight)
            first, second = (torch.zeros(format_blocks.nbytes(*w.shape), dtype=torch.uint8) for w in weights)
            for weight, block in zip(weights, (first, second), strict=True):
                recipe, decoded = format_blocks.encode(weight, block), torch.empty_like(weight)
                format_blocks.decode(block, recipe, decoded)
                assert torch.equal(decoded.view(torch.int16), weight.view(torch.int16))
                assert recipe is not None
                assert recipe.planes["raw_tiles"].numel() == (8192 if crowded else 0)
            pair = first.to(DEVICE), second.to(DEVICE)
        blocks.append(pair)
    return layer, ExpertTable.from_blocks(blocks, DEVICE, [DENSE, name] * 2)


FUSED = Tile(16, 64, 64, 4, 2, swap_ab=True)


@pytest.mark.parametrize("name", COMPRESSED)
@pytest.mark.parametrize("crowded", [False, True], ids=["few escapes", "raw tiles"])
def test_compressed_and_dense_experts_of_one_launch_give_the_same_bits(crowded, name):
    layer, mixed = mixed_layer(name, 256, 256, crowded)
    x, logits = torch.randn(9, 256).bfloat16(), torch.randn(9, 4)
    dense, _ = layer.run(x, logits, 2, FUSED)
    layer.table = mixed
    assert mixed.compressed == {name}
    compressed, _ = layer.run(x, logits, 2, FUSED)
    assert torch.equal(compressed, dense)


@pytest.mark.parametrize("name", COMPRESSED)
@pytest.mark.parametrize("rows", [16, 32, 64])
def test_every_launch_gives_the_same_bits(rows, name):
    """A thousand launches in turns, of dense and of mixed experts of Qwen3-30B-A3B's sizes; interpreted, few of small
    ones. Nothing is read back before the end."""
    hidden, intermediate, launches = (2048, 768, 1000) if DEVICE == "cuda" else (128, 128, 2)
    layer, mixed = mixed_layer(name, hidden, intermediate)
    x, logits, tables = torch.randn(rows, hidden).bfloat16(), torch.randn(rows, 4), (layer.table, mixed)
    tile = fused_tile(weight_tile(name), rows, capability_of(torch.device(DEVICE)))
    first, _ = layer.run(x, logits, 2, tile)
    differing = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for launch in range(launches):
        layer.table = tables[launch % 2]
        differing += (layer.run(x, logits, 2, tile)[0].view(torch.int32) != first.view(torch.int32)).any()
    assert first.isfinite().all()
    assert differing == 0


@pytest.mark.parametrize("name", COMPRESSED)
@pytest.mark.parametrize(
    ("hidden", "intermediate"), [(200, 112), pytest.param(312, 120, id="rows of the format's tiles are odd")]
)
def test_compressed_experts_with_sizes_of_no_tile_are_right(hidden, intermediate, name):
    layer, mixed = mixed_layer(name, hidden, intermediate)
    layer.table = mixed
    layer.check(11, 2, FUSED)


NO_TILE, ODD_ROWS, RAW = (200, 112, False), (312, 120, False), (256, 256, True)


@pytest.mark.parametrize(
    ("sizes", "experts_at_once", "name"),
    [
        pytest.param(NO_TILE, 1, "planar12", id="sizes of no tile-1-planar12"),
        pytest.param(NO_TILE, 3, "planar8", id="sizes of no tile-3-planar8"),
        pytest.param(NO_TILE, 4, "planar12", id="sizes of no tile-4-planar12"),
        pytest.param(ODD_ROWS, 1, "planar8", id="rows of the format's tiles are odd-1-planar8"),
        pytest.param(ODD_ROWS, 3, "planar12", id="rows of the format's tiles are odd-3-planar12"),
        pytest.param(ODD_ROWS, 4, "planar8", id="rows of the format's tiles are odd-4-planar8"),
        pytest.param(RAW, 1, "planar12", id="raw tiles-1-planar12"),
        pytest.param(RAW, 3, "planar12", id="raw tiles-3-planar12"),
        pytest.param(RAW, 4, "planar8", id="raw tiles-4-planar8"),
    ],
)
def test_experts_decoded_first_give_the_dense_bits(sizes, experts_at_once, name):
    """The dense tile's, in whole groups and a part of one; the last expert has no rows."""
    hidden, intermediate, crowded = sizes
    layer, mixed = mixed_layer(name, hidden, intermediate, crowded)
    x, logits = torch.randn(40, hidden).bfloat16(), torch.randn(40, 4)
    logits[:, 3] = -9.0
    tile = Tile(16, 64, 64, 4, 2, group_m=2)
    dense, _ = layer.run(x, logits, 2, tile)
    layer.table = mixed
    decoded = decoded_experts(hidden, intermediate, experts_at_once)
    assert torch.equal(layer.run(x, logits, 2, tile, decoded=decoded)[0], dense)


def decoded_experts(hidden: int, intermediate: int, experts_at_once: int) -> DecodedExperts:
    """With room for so many gate_up weights."""
    dims = ExpertDims(hidden, intermediate, 4, 2, torch.bfloat16)
    return DecodedExperts(dims, DEVICE, experts_at_once * align(4 * hidden * intermediate))


@pytest.mark.parametrize("name", COMPRESSED)
def test_only_experts_with_rows_are_decoded(name):
    """A slot that is not loaded holds anything, offsets of escapes that lead nowhere among it."""
    layer, mixed = mixed_layer(name, 128, 128)
    for block in mixed.blocks[1]:
        block.fill_(0xFF)
    layer.table, decoded = mixed, decoded_experts(128, 128, 2)
    logits = torch.randn(20, 4)
    logits[:, 1] = -1e9
    decoded._buffer.fill_(0xFF)  # NaN
    out, _ = layer.run(torch.randn(20, 128).bfloat16(), logits, 2, TILES["plain"], decoded=decoded)
    assert out.isfinite().all()


def test_experts_elsewhere_have_no_block_in_a_group():
    layer, mixed = mixed_layer("planar12", 128, 128)
    x, weights = torch.randn(40, 128).bfloat16().to(DEVICE), torch.rand(40, 2, device=DEVICE)
    ids = torch.stack([torch.randperm(8)[:2] for _ in range(40)]).to(DEVICE)
    ids[ids >= 4] = -1
    routing = Router(40, 4, 2, True, DEVICE).given(ids, weights, 16)
    outputs = []
    for table, decoded in ((layer.table, None), (mixed, decoded_experts(128, 128, 3))):
        h = torch.full((80, 128), float("nan"), dtype=torch.bfloat16, device=DEVICE)
        y = torch.full((80, 128), float("nan"), dtype=torch.bfloat16, device=DEVICE)
        gate_up(x, table, routing, h, torch.bfloat16, TILES["plain"], 5, decoded)
        down(h, table, routing, y, torch.bfloat16, TILES["plain"], 5, decoded)
        outputs.append(combine(y, routing, torch.zeros(40, 128, device=DEVICE)))
    assert torch.equal(*outputs)
    assert outputs[0].isfinite().all()


def test_compressed_experts_of_two_formats_do_not_meet_in_a_launch():
    layer, mixed = mixed_layer("planar12", 128, 128)
    layer.table = ExpertTable.from_blocks(mixed.blocks, DEVICE, [DENSE, "planar12", DENSE, "planar8"])
    with pytest.raises(KernelError, match="those of one other format, got planar12 and planar8"):
        layer.run(torch.randn(2, 128).bfloat16(), torch.randn(2, 4), 1, FUSED)


def test_compressed_experts_need_their_tile():
    layer, mixed = mixed_layer("planar12", 128, 128)
    layer.table = mixed
    with pytest.raises(KernelError, match="a tile of 64 weight rows"):
        layer.run(torch.randn(2, 128).bfloat16(), torch.randn(2, 4), 1, TILES["plain"])


@pytest.mark.parametrize("name", COMPRESSED)
def test_incompressible_experts_are_refused(name):
    weight, blocks = torch.randint(-(2**15), 2**15, (64, 128), dtype=torch.int16), FORMATS[name].blocks("triton")
    with pytest.raises(KernelError, match="use the dense format"):
        blocks.encode(weight.view(torch.bfloat16), torch.zeros(blocks.nbytes(64, 128), dtype=torch.uint8))
