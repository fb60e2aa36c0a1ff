"""Lossless formats: every bit comes back, whatever the weight; sizes and files keep their promises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fluxmoe.kernels.packing import Huffman, Packed, PackingError, Planar8, Planar12, Tiered
from fluxmoe.kernels.packing.huffman import MAX_LENGTH, canonical_codes, code_lengths
from fluxmoe.kernels.packing.mantissa import zero_low_bits
from fluxmoe.kernels.packing.planar import Planar, window_base
from hypothesis import given, settings
from hypothesis import strategies as st

GPU = torch.cuda.is_available()
pytestmark = pytest.mark.gpu
CODECS = {codec.name: codec for codec in (Planar12(), Planar8(), Tiered(), Huffman())}
every_format = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS.keys())
ALL_PATTERNS = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)


def gaussian(*shape: int, scale: float = 0.02) -> torch.Tensor:
    return (torch.randn(shape) * scale).bfloat16()


def assert_same_bits(got: torch.Tensor, weight: torch.Tensor) -> None:
    wrong = got.cpu().view(torch.int16) != weight.view(torch.int16)
    assert not wrong.any(), f"first wrong at {wrong.nonzero()[0].tolist()} of {tuple(weight.shape)}"


def round_trip(codec, weight: torch.Tensor, triton: bool = True) -> Packed:
    """Encode, decode by numba and by Triton into dirty buffers, bound the size."""
    packed = codec.encode(weight)
    dirty = torch.full(weight.shape, float("nan"), dtype=torch.bfloat16)
    assert codec.decode(packed, dirty) is dirty
    assert_same_bits(dirty, weight)
    if triton:
        on_device = packed.to("cuda" if GPU else "cpu")
        assert_same_bits(codec.decode_triton(on_device, torch.full_like(weight, 7.0, device=on_device.device)), weight)
    assert packed.nbytes <= weight.nbytes
    return packed


def with_exponents(exponents: torch.Tensor) -> torch.Tensor:
    """Random signs and mantissas under the given biased exponents."""
    rest = torch.randint(0, 256, exponents.shape)
    bits = (rest & 0x80) << 8 | rest & 0x7F | exponents << 7
    return bits.to(torch.int16).view(torch.bfloat16)


@every_format
@pytest.mark.parametrize("order", ["ascending", "shuffled"])
def test_all_patterns_alone(codec, order):
    patterns = ALL_PATTERNS if order == "ascending" else ALL_PATTERNS[torch.randperm(65536)]
    round_trip(codec, patterns.view(torch.bfloat16).view(64, 1024))


@every_format
def test_all_patterns_among_common_weights(codec):
    """Few enough that nothing is stored raw: each pattern goes through the code for rare exponents."""
    if isinstance(codec, Planar):
        # 4 in each of 256 tiles at a time: a tile with more than 8 would be stored raw.
        for patterns in ALL_PATTERNS[torch.randperm(65536)].view(torch.bfloat16).view(64, 16, 16, 4):
            weight = gaussian(1024, 2048)
            weight[weight.abs() < 1e-4] = 0.01
            weight = codec.fitting(weight)
            columns = torch.stack([torch.randperm(128)[:4] for _ in range(256)]).view(16, 1, 16, 4)
            weight.view(16, 64, 16, 128)[:, 17:18].scatter_(3, columns, patterns[:, None])
            packed = round_trip(codec, weight, triton=False)
            assert not packed.is_raw
            assert packed.planes["raw_tiles"].numel() == 0
        return
    weight = gaussian(3300, 1024)
    places = torch.randperm(weight.numel())[:65536]
    weight.view(-1)[places] = ALL_PATTERNS.view(torch.bfloat16)
    assert not round_trip(codec, weight, triton=GPU).is_raw


@every_format
def test_rare_patterns_by_triton(codec):
    """Every exponent and every NaN payload class, in a weight small enough for the interpreter."""
    weight = codec.fitting(gaussian(97, 512))
    patterns = torch.cat([ALL_PATTERNS[::128], ALL_PATTERNS[-128:], ALL_PATTERNS[:64]]).view(torch.bfloat16)
    patterns = patterns[torch.randperm(len(patterns))]
    # Formats of a fixed rate store this tile as it is, and code what is in the next ones.
    weight[:7, :100] = patterns[:700].view(7, 100)
    weight[70:73, 130::128] = patterns[-9:].view(3, 3)
    assert not round_trip(codec, weight).is_raw


@every_format
@pytest.mark.parametrize(
    "shape", [(0, 8), (8, 0), (0, 8, 8), (1, 1), (1, 300), (300, 1), (64, 128), (65, 129), (2, 63, 128), (3, 100, 250)]
)
def test_shapes(codec, shape):
    round_trip(codec, gaussian(*shape))


@every_format
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.integers(1, 3), st.integers(1, 70), st.integers(1, 260), st.integers(0, 255), st.integers(0, 12),
    st.floats(0, 0.05), st.integers(0, 2**31),
)  # fmt: skip
def test_any_distribution(codec, experts, rows, cols, centre, spread, outliers, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (experts, rows, cols) if experts > 1 else (rows, cols)
    near = centre + torch.randint(-spread, spread + 1, shape, generator=generator)
    far = torch.randint(0, 256, shape, generator=generator)
    exponents = torch.where(torch.rand(shape, generator=generator) < outliers, far, near.clamp(0, 255))
    round_trip(codec, with_exponents(exponents))


@every_format
@pytest.mark.parametrize(
    ("name", "bits"),
    [("zero", 0), ("minus zero", 0x8000), ("one", 0x3F80), ("infinity", 0x7F80), ("NaN", 0x7FC1), ("largest", 0xFF7F)],
)
def test_constants_shrink(codec, name, bits):
    weight = torch.full((128, 256), bits - 65536 if bits > 32767 else bits, dtype=torch.int16).view(torch.bfloat16)
    weight = codec.fitting(weight)
    assert codec.bits_per_weight(round_trip(codec, weight, triton=GPU or name in ("minus zero", "NaN"))) < 12.1


@every_format
@pytest.mark.parametrize("low", [0, 1, 240, 255], ids=lambda e: f"exponents from {e}")
def test_window_does_not_wrap_at_the_ends_of_the_range(codec, low):
    """Subnormals and zeros at 0, infinities and NaNs at 255."""
    exponents = torch.randint(low, min(low + 8, 255) + 1, (66, 256))
    # The interpreter takes a second for huffman, which has no window.
    weight = codec.fitting(with_exponents(exponents))
    assert not round_trip(codec, weight, triton=GPU or codec.name != "huffman").is_raw


def test_window_base_stays_in_range():
    histogram = np.zeros((3, 256), dtype=np.int64)
    histogram[0, 0], histogram[1, 255], histogram[2, 100:116] = 5, 5, 1
    assert window_base(histogram).tolist() == [0, 240, 100]


@every_format
def test_outliers_only_cost_no_more_than_raw(codec):
    assert round_trip(codec, with_exponents(torch.randint(0, 256, (100, 256)))).is_raw


@every_format
def test_one_tile_of_outliers(codec):
    """All the escapes in one place: more than a program patches at a time."""
    weight = codec.fitting(gaussian(120, 512))
    weight[70:90, 128:178] = with_exponents(torch.randint(0, 256, (20, 50)))
    assert not round_trip(codec, weight).is_raw


@every_format
def test_experts_of_different_scale(codec):
    weight = torch.stack([gaussian(70, 256, scale=scale) for scale in (1e-30, 1.0, 1e30)])
    packed = round_trip(codec, codec.fitting(weight))
    if isinstance(codec, Planar):  # whose window is each expert's own
        assert codec.bits_per_weight(packed) < codec.bits + 0.1


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("planar12", 12, 12.05), ("planar8", 8, 8.05), ("tiered", 10.6, 10.9), ("huffman", 10.5, 10.8)],
)
def test_bits_of_a_gaussian(name, low, high):
    weight = CODECS[name].fitting(gaussian(2048, 2048))
    assert low <= CODECS[name].bits_per_weight(round_trip(CODECS[name], weight, triton=GPU)) <= high


FP8 = {
    "e4m3": (torch.float8_e4m3fn, 4, 8.01),
    "e5m2": (torch.float8_e5m2, 5, 8.01),
}


@pytest.mark.parametrize(("dtype", "zero_bits", "bits"), FP8.values(), ids=FP8)
def test_weights_that_were_fp8_take_as_many_bits_as_they_did(dtype, zero_bits, bits):
    weight = (torch.randn(512, 1024) * 90).to(dtype).bfloat16() * 2.0**-12
    assert zero_low_bits(weight) == zero_bits
    assert CODECS["planar8"].bits_per_weight(round_trip(CODECS["planar8"], weight, triton=GPU)) < bits
    # With a scale that is no power of two all bits are in use again.
    assert CODECS["planar8"].encode(weight * 0.7).is_raw


@pytest.mark.parametrize(
    ("bits", "zero_bits"), [([0], 7), ([0x80, -32768], 7), ([1], 0), ([0x3FC0, 0x40], 6), ([0x3F80, 2], 1), ([], 7)]
)
def test_zero_low_bits_are_those_of_all_weights(bits, zero_bits):
    weight = torch.tensor(bits, dtype=torch.int16).view(torch.bfloat16)
    assert zero_low_bits(weight) == zero_bits
    assert zero_low_bits(weight.view(1, -1).t()) == zero_bits


@every_format
def test_views_of_a_larger_weight(codec):
    whole = gaussian(256, 512)
    for weight in (whole.t(), whole[:, 3:200], whole[::2]):
        assert_same_bits(codec.decode(codec.encode(weight)), weight.contiguous())


@every_format
def test_one_block_of_bytes(codec):
    weight = codec.fitting(gaussian(128, 512))
    packed = codec.encode(weight)
    block = torch.full((packed.block_bytes + 64,), 0xAB, dtype=torch.uint8)
    placed = packed.pack_into(block)
    assert (block[packed.block_bytes :] == 0xAB).all()
    moved = block.clone()
    block.zero_()
    assert_same_bits(codec.decode(packed.at(moved)), weight)
    begin = moved.data_ptr()
    assert all(begin <= p.data_ptr() < begin + moved.numel() for p in packed.at(moved).planes.values() if p.numel())
    assert placed.nbytes == packed.nbytes <= packed.block_bytes < packed.nbytes + 256 * len(packed.planes)
    with pytest.raises(PackingError, match=str(packed.block_bytes)):
        packed.at(block[: packed.block_bytes - 1])


def test_says_what_it_expected():
    codec = CODECS["planar12"]
    packed = codec.encode(gaussian(64, 128))
    for call, message in (
        (lambda: codec.encode(torch.randn(4, 4)), "float32"),
        (lambda: codec.encode(gaussian(4)), r"\(4,\)"),
        (lambda: codec.decode(packed, torch.empty(64, 127, dtype=torch.bfloat16)), r"\(64, 127\)"),
        (lambda: codec.decode(packed, torch.empty(64, 128)), "float32"),
        (lambda: CODECS["tiered"].decode(packed), "tiered cannot decode planar12"),
        (lambda: codec.decode(Packed("planar12", (64, 256), packed.planes)), "'bytes'.*16384.*8192"),
        (lambda: codec.decode(Packed("planar12", (64, 128), {})), "'bytes'"),
        (lambda: Packed("planar12", (2, 2), {"raw": torch.zeros(2, 2)}), "'raw'.*1-D"),
    ):
        with pytest.raises(PackingError, match=message):
            call()


@pytest.mark.parametrize("counts", ["one", "two", "skewed", "uniform", "gaussian"])
def test_code_lengths_make_a_complete_code(counts):
    histogram = np.zeros(256, dtype=np.int64)
    if counts == "gaussian":
        exponents = (gaussian(256, 256).view(torch.int16).int() >> 7 & 255).view(-1)
        histogram += np.bincount(exponents.numpy(), minlength=256)
    elif counts == "skewed":
        # Unlimited, these Fibonacci-like counts would give codes of 39 bits.
        histogram[:40] = [2**i for i in range(40)]
    else:
        histogram[: {"one": 1, "two": 2, "uniform": 256}[counts]] = 3
    lengths = code_lengths(histogram)
    assert ((lengths > 0) == (histogram > 0)).all()
    assert lengths.max() <= MAX_LENGTH
    kraft = sum(2.0 ** -int(length) for length in lengths if length)
    assert kraft == (0.5 if counts == "one" else 1.0)
    codes, table = canonical_codes(lengths)
    for symbol in np.flatnonzero(lengths):
        assert table[codes[symbol]] == symbol | int(lengths[symbol]) << 8
    if counts == "gaussian":
        share = histogram / histogram.sum()
        entropy = -(share[share > 0] * np.log2(share[share > 0])).sum()
        assert entropy <= (share * lengths).sum() < entropy + 0.1


def run_ptx(source: str, registers: dict[str, Any]) -> dict[str, Any]:
    """The few instructions of `unpack_planar12`, on uint32 arrays: what a GPU would do, where there is none."""

    def value(name):
        return registers[name] if name in registers else np.uint32(int(name, 0))

    def prmt(a, b, selector):
        source_bytes = [(word >> np.uint32(8 * i)) & np.uint32(0xFF) for word in (a, b) for i in range(4)]
        picked = [source_bytes[int(selector) >> 4 * i & 7] << np.uint32(8 * i) for i in range(4)]
        return picked[0] | picked[1] | picked[2] | picked[3]

    def lop3(a, b, c, table):
        result = np.uint32(0)
        for i in range(8):
            if int(table) >> i & 1:
                result = result | (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        return result

    operations: dict[str, Callable[..., int]] = {
        "mov.b32": lambda a: a,
        "shr.u32": lambda a, n: a >> n,
        "and.b32": lambda a, b: a & b,
        "prmt.b32": prmt,
        "mad.lo.u32": lambda a, b, c: a * b + c,
        "lop3.b32": lop3,
    }
    for line in source.strip("{} \n").split(";"):
        name, _, operands = line.strip().partition(" ")
        if name and not name.startswith("."):
            target, *arguments = (operand.strip() for operand in operands.split(","))
            registers[target] = operations[name](*map(value, arguments))
    return registers


def four_weights(done: dict[str, np.ndarray]) -> np.ndarray:
    """Of the two registers that unpacking fills, in order."""
    halves = [done["$0"] & 0xFFFF, done["$0"] >> 16, done["$1"] & 0xFFFF, done["$1"] >> 16]
    return np.stack(halves, axis=1).reshape(-1)


@pytest.mark.parametrize("base", [0, 1, 112, 240])
def test_machine_code_of_unpack_8_equals_the_definition(base):
    pytest.importorskip("triton")
    from fluxmoe.kernels.packing._planar import UNPACK_8

    byte = np.random.default_rng(0).permutation(256).astype(np.uint8)
    done = run_ptx(UNPACK_8.value, {"$2": byte.view(np.uint32), "$3": np.uint32(base * 0x00800080)})
    wide = byte.astype(np.uint32)
    assert (four_weights(done) == ((wide & 0x80) << 8 | wide & 0x70 | (base + (wide & 15)) << 7)).all()


def test_machine_code_of_unpack_equals_the_definition():
    pytest.importorskip("triton")
    from fluxmoe.kernels.packing._planar import UNPACK_HIGH, UNPACK_LOW

    # Every byte with every nibble; neighbours differ so that a wrong selector shows.
    byte, code = (x.reshape(-1) for x in np.meshgrid(np.arange(256), np.arange(16)))
    order = np.random.default_rng(0).permutation(4096)
    byte, code = byte[order], code[order]
    weights = (np.array([1, 256, 65536, 2**24]), np.uint32)
    for base in (0, 1, 112, 240):
        expected = (byte & 0x80) << 8 | byte & 0x7F | (base + code) << 7
        for source, shift in ((UNPACK_LOW, 0), (UNPACK_HIGH, 4)):
            # The other nibble is noise.
            packed = code << shift | byte % 16 << (4 - shift)
            registers = {
                "$2": (byte.reshape(-1, 4) @ weights[0]).astype(weights[1]),
                "$3": (packed.reshape(-1, 4) @ weights[0]).astype(weights[1]),
                "$4": np.uint32(base * 0x00800080),
            }
            done = run_ptx(source.value, registers)
            assert (four_weights(done) == expected).all()
