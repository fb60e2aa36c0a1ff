"""Files of a checkpoint, mutated: a model, or one of the project's own errors; never anything else, and soon.

What runs is all that loading does: configuration, rotary tables, headers, every tensor, every expert, the tokenizer.
"""

from __future__ import annotations

import json
import shutil
import struct
import time
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

import pytest
import xxhash
from fluxmoe.experiments.commands.pack_checkpoint import pack_checkpoint
from fluxmoe.experiments.lib.checkpoints import make_checkpoint
from fluxmoe.experiments.lib.results import UsageError
from fluxmoe.experiments.lib.tokenizer import Tokenizer
from fluxmoe.kernels.packing.expert_file import PAGE
from fluxmoe.models.checkpoint import Checkpoint, CheckpointError
from fluxmoe.models.config import ConfigError
from fluxmoe.models.packed import INDEX
from fluxmoe.models.rope import rope_tables
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SIZES = dict[str, Any](
    layers=4, experts=4, top_k=2, hidden=128, moe_intermediate=128, heads=2, vocab=512, max_positions=128
)
ODD = [
    0, 1, -1, 2, 3, 1.5, -0.0, 1e308, float("nan"), float("inf"), 10**6, 300_000, 30_000, 2**31, 2**53, 2**63, 2**64,
    10**400, -(10**400),
    "", "4", "a", "\ud800", "x" * 300, "../config.json", "..", None, True, False, [], {}, [[]], [{}],
    [1, 2], {"a": 1}, [None] * 1000, list(range(1000)), {"factor": 10**400}, {"type": []},
    {"rope_type": "yarn", "factor": 4, "beta_fast": 1e-300, "original_max_position_embeddings": 1e-300},
    {"rope_type": "linear", "factor": 10**400}, {"rope_type": "llama3", "factor": 1e-320, "low_freq_factor": 1,
    "high_freq_factor": 10**400}, {"rope_theta": 10**400, "rope_type": "default"},
]  # fmt: skip
FILES = {
    "config.json": "plain", "qwen3_next config.json": "next", "mixtral config.json": "mixtral",
    "generation_config.json": "plain", "model.safetensors.index.json": "plain", "header": "plain",
    "tokenizer.json": "plain", INDEX: "packed", "expert header": "packed", "expert record": "packed",
}  # fmt: skip
SHARED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    plain = make_checkpoint("qwen3_moe", folder / "plain", shard_bytes=1_500_000, **SIZES)
    (plain / "generation_config.json").write_text('{"eos_token_id": 2}')
    pack_checkpoint(plain, "huffman", folder / "packed")
    make_checkpoint("qwen3_next", folder / "next", **SIZES, head_dim=32)
    make_checkpoint("mixtral", folder / "mixtral", **SIZES)
    for path in folder.iterdir():
        use(path)
    return {path.name: path for path in folder.iterdir()}


def use(directory: Path) -> None:
    """All that loading a model reads."""
    checkpoint = Checkpoint(directory)
    rope_tables(checkpoint.config, 16)
    for _ in checkpoint.dense_tensors():
        pass
    for _ in checkpoint.experts():
        pass


def use_tokenizer(directory: Path) -> None:
    tokenizer = Tokenizer(str(directory))
    tokenizer.decode(tuple(tokenizer.encode("Once upon a time\n \0 ü")))


def one(models: dict[str, Path], file: str, random: Random) -> None:
    directory = models[FILES[file]]
    path, change = victim(directory, file)
    whole = path.read_bytes()
    try:
        path.write_bytes(change(random, whole))
        # The machine may be busy: what counts is work.
        begin = time.process_time()
        with suppress(ConfigError, CheckpointError, UsageError):
            (use_tokenizer if file == "tokenizer.json" else use)(directory)
        assert time.process_time() - begin < 2, "an absurd size was believed"
    finally:
        path.write_bytes(whole)


def victim(directory: Path, file: str):
    match file:
        case "header":
            return min(directory.glob("*.safetensors")), with_header
        case "expert header":
            return directory / "experts-0001.flux", with_expert_header
        case "expert record":
            return directory / "experts-0001.flux", with_record
    return directory / file.split()[-1], mutated


def with_header(random: Random, whole: bytes) -> bytes:
    length = struct.unpack("<Q", whole[:8])[0]
    header = mutated(random, whole[8 : 8 + length])
    claimed = len(header) if random.random() < 0.8 else random.choice([0, 7, 2**31, 2**63, 2**64 - 1, len(whole)])
    return struct.pack("<Q", claimed) + header + whole[8 + length :]


def with_expert_header(random: Random, whole: bytes) -> bytes:
    """With the sum that belongs to it, mostly."""
    version, length = struct.unpack_from("<II", whole, 8)
    header = mutated(random, whole[24 : 24 + length])[: PAGE - 24]
    total = xxhash.xxh3_64_intdigest(header)
    prefix = whole[:8] + struct.pack("<IIQ", version, len(header), total)
    changed = bytearray((prefix + header).ljust(PAGE, b"\0"))
    if random.random() < 0.3:
        changed[random.randrange(24)] = random.randrange(256)
    return bytes(changed) + whole[PAGE:]


def with_record(random: Random, whole: bytes) -> bytes:
    """The recipe of an expert, with the sum that belongs to block and recipe, mostly."""
    at = PAGE
    _, length = struct.unpack_from("<QI", whole, at)
    text = mutated(random, whole[at + 12 : at + 12 + length])[:500]
    header = json.loads(whole[24 : 24 + struct.unpack_from("<I", whole, 12)[0]])
    block = whole[2 * PAGE : 2 * PAGE + header["sizes"][0]]
    record = bytearray((struct.pack("<QI", xxhash.xxh3_64_intdigest(block + text), len(text)) + text).ljust(512, b"\0"))
    if random.random() < 0.2:
        record[random.randrange(12)] = random.randrange(256)
    return whole[:at] + bytes(record) + whole[at + 512 :]


def mutated(random: Random, raw: bytes) -> bytes:
    """A JSON document with one to three values changed, dropped or renamed; or with other bytes."""
    kind = random.random()
    if kind < 0.1:
        changed = bytearray(raw)
        for _ in range(random.randint(1, 4)):
            changed[random.randrange(len(raw))] = random.randrange(256)
        return bytes(changed)
    if kind < 0.15:
        return raw[: random.randrange(len(raw))]
    if kind < 0.2:
        return random.choice(
            [b"", b"[" * 10**5, b'{"a":' * 10**5, b"null", b"1" * 5000, b"\xff\xfe", b'"', b"{}", b"[]"]
        )
    document = json.loads(raw)
    for _ in range(random.randint(1, 3)):
        place = document
        while True:
            key = random.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if not isinstance(place[key], dict | list) or not place[key] or random.random() < 0.3:
                break
            place = place[key]
        if random.random() < 0.75:
            place[key] = deepcopy(random.choice(ODD))
        elif random.random() < 0.5 and isinstance(place, dict):
            place[random.choice(["", "a", "__metadata__", "\ud800", *place])] = place.pop(key)
        else:
            place.pop(key)
        if not document:
            break
    return json.dumps(document).encode()


@pytest.mark.parametrize("file", FILES)
@settings(max_examples=50, suppress_health_check=SHARED)
@given(seed=st.integers(0, 2**32))
def test_a_mutated_file_is_one_error_or_none(models, file, seed):
    one(models, file, Random(seed))


@pytest.mark.thorough
@pytest.mark.parametrize("file", FILES)
@settings(max_examples=2200, suppress_health_check=SHARED)
@given(seed=st.integers(0, 2**32))
def test_many_mutated_files_are_one_error_or_none(models, file, seed):
    one(models, file, Random(seed))


@pytest.fixture
def copied(models, tmp_path):
    return {name: shutil.copytree(path, tmp_path / name) for name, path in models.items()}


@pytest.mark.parametrize(
    ("arch", "changes", "match"),
    [
        ("plain", {"num_experts": 10**6}, "num_experts must be a positive integer up to 4096"),
        ("plain", {"num_hidden_layers": 30_000}, r"num_layers \(num_hidden_layers\) must be .* up to 512"),
        ("plain", {"num_hidden_layers": 10**30}, "num_hidden_layers"),
        ("next", {"num_hidden_layers": 10**9, "layer_types": None}, "num_hidden_layers"),
        ("next", {"full_attention_interval": 0}, "full_attention_interval"),
        ("plain", {"num_hidden_layers": 512, "num_experts": 4096}, "num_experts 4096 in each of 512 layers are over"),
        ("plain", {"hidden_size": 300_000}, "hidden_size must be .* up to 65536"),
        ("plain", {"vocab_size": 10**9}, "vocab_size"),
        ("plain", {"head_dim": 10**5}, "head_dim"),
        ("plain", {"moe_intermediate_size": 10**9}, "moe_intermediate_size"),
        ("plain", {"max_position_embeddings": 10**12}, "max_position_embeddings"),
        ("plain", {"use_sliding_window": True, "sliding_window": 2**40}, "sliding_window"),
        ("plain", {"rms_norm_eps": 10**400}, "rms_norm_eps"),
        ("next", {"shared_expert_intermediate_size": 10**9}, "shared_expert_intermediate_size"),
        ("next", {"linear_num_key_heads": 10**9, "linear_num_value_heads": 10**9}, "key_heads of the linear attention"),
        ("plain", {"mlp_only_layers": [0], "intermediate_size": 10**9}, "intermediate_size of the layers"),
        ("plain", {"num_hidden_layers": "4"}, "num_hidden_layers"),
    ],
)
def test_absurd_sizes_are_refused_by_name(copied, arch, changes, match):
    path = copied[arch] / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ConfigError, match=match):
        Checkpoint(copied[arch])


@pytest.mark.parametrize("changes", [{"rope_theta": 2**64}, {"rope_scaling": {"type": "linear", "factor": 2**64}}])
def test_integers_may_be_larger_than_a_tensor_takes(copied, changes):
    path = copied["mixtral"] / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rope_parameters": None, **changes}))
    use(copied["mixtral"])


def test_a_header_of_85_megabytes_is_refused_unread(copied):
    path = min(copied["plain"].glob("*.safetensors"))
    path.write_bytes(struct.pack("<Q", 85_000_000) + b"[" * 85_000_000)
    with pytest.raises(CheckpointError, match="header claims 85000000 bytes"):
        Checkpoint(copied["plain"])


@pytest.mark.parametrize("unit", [b"[],", b"{},", b'{"":[0]},'])
def test_millions_of_objects_are_refused_before_they_are_made(copied, unit):
    path = copied["plain"] / "model.safetensors.index.json"
    path.write_bytes(b"[" + unit * 1_100_000 + b"0]")
    with pytest.raises(CheckpointError, match="is damaged"):
        Checkpoint(copied["plain"])


@pytest.mark.parametrize(
    "changes",
    [
        {
            "padding": {
                "strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                "pad_type_id": 0, "pad_token": "a",
            }
        },
        {"truncation": {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}},
    ],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_prompts_are_neither_padded_nor_cut(copied, changes):
    expected = Tokenizer(str(copied["plain"])).encode("Once upon a time")
    path = copied["plain"] / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    assert Tokenizer(str(copied["plain"])).encode("Once upon a time") == expected


def test_a_panic_of_the_tokenizers_library_is_one_sentence(monkeypatch, models):
    import tokenizers

    class PanicException(BaseException):
        """As pyo3_runtime's, which cannot be imported."""

    class Panics:
        @staticmethod
        def from_file(path):
            raise PanicException("called `Option::unwrap()` on a `None` value")

    monkeypatch.setattr(tokenizers, "Tokenizer", Panics)
    with pytest.raises(UsageError, match=r"tokenizer.json cannot be read as a tokenizer: called"):
        Tokenizer(str(models["plain"]))
