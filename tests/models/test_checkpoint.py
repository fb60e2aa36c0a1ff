"""Checkpoints: both ways to store experts, shards in any order, and one clear error for everything broken."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from fluxmoe.models.checkpoint import Checkpoint, CheckpointError
from fluxmoe.models.config import ConfigError, RopeScaling
from safetensors.torch import load_file, save_file

from .hf import save_random_model

E, H = 5, 48
NAME = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
FINAL = "model.norm.weight"


def hub_model(directory: Path, arch="mixtral", **overrides):
    return save_random_model(arch, directory, **overrides)


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in directory.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def rewrite(directory: Path, change) -> None:
    """Apply `change` to the dict of tensors of a single-file checkpoint."""
    tensors = tensors_of(directory)
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def experts_by_key(checkpoint: Checkpoint):
    return {(layer, expert): (gate_up, down) for layer, expert, gate_up, down in checkpoint.experts()}


@pytest.mark.parametrize(
    ("arch", "overrides"),
    [("mixtral", {}), ("qwen3_moe", {}), ("olmoe", {}), ("qwen3_moe", {"mlp_only_layers": [1]})],
    ids=["mixtral", "qwen3_moe", "olmoe", "qwen3_moe with a dense layer"],
)
@pytest.mark.parametrize("max_shard", ["1GB", "60KB"])
def test_reads_what_transformers_wrote(arch, overrides, max_shard, tmp_path):
    model = hub_model(tmp_path, arch, max_shard=max_shard, **overrides)
    state = dict(model.named_parameters())
    checkpoint = Checkpoint(tmp_path)
    config = checkpoint.config
    experts = experts_by_key(checkpoint)
    assert {layer for layer, _ in experts} == set(config.moe_layers)
    assert len(experts) == len(config.moe_layers) * config.num_experts
    for (layer, expert), (gate_up, down) in experts.items():
        prefix = f"model.layers.{layer}.mlp.experts"
        assert torch.equal(gate_up, state[f"{prefix}.gate_up_proj"][expert])
        assert torch.equal(down, state[f"{prefix}.down_proj"][expert])
    roles = {(role, layer) for role, layer, _ in checkpoint.dense_tensors()}
    assert {("embed_tokens", None), ("lm_head", None), ("final_norm", None), ("router", 0), ("q_proj", 2)} <= roles
    assert {layer for role, layer in roles if role == "mlp_down"} == set(config.dense_layers)
    assert checkpoint.pending == 0


def test_a_dense_layer_with_experts_or_without_its_mlp_is_refused(tmp_path):
    hub_model(tmp_path, "qwen3_moe", mlp_only_layers=[1])
    for only, match in (([], r"layers.1.mlp.*is missing"), ([1, 2], "layers.2.mlp.down_proj.weight is missing")):
        edit_config(tmp_path, mlp_only_layers=only)
        with pytest.raises(CheckpointError, match=match):
            Checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["model.layers.1.block_sparse_moe.gate.weight", FINAL, NAME])
def test_content_changes_with_the_last_value_of_a_router_and_with_any_tensor(name, tmp_path):
    hub_model(tmp_path)
    rewrite(tmp_path, lambda tensors: None)
    before = Checkpoint(tmp_path).content
    rewrite(tmp_path, lambda tensors: None)
    assert Checkpoint(tmp_path).content == before
    # An expert's is known by its samples.
    place = 0 if name == NAME else -1
    rewrite(tmp_path, lambda tensors: tensors[name].view(-1)[place].add_(1))
    assert Checkpoint(tmp_path).content != before


def fuse(tensors: dict[str, torch.Tensor], layers=3) -> None:
    """From the Hub's per-expert tensors to the fused ones of newer transformers."""
    for layer in range(layers):
        old, new = f"model.layers.{layer}.block_sparse_moe", f"model.layers.{layer}.mlp"
        parts = {w: [tensors.pop(f"{old}.experts.{e}.{w}.weight") for e in range(E)] for w in ("w1", "w2", "w3")}
        gate_up = [torch.cat(pair) for pair in zip(parts["w1"], parts["w3"], strict=True)]
        tensors[f"{new}.experts.gate_up_proj"] = torch.stack(gate_up)
        tensors[f"{new}.experts.down_proj"] = torch.stack(parts["w2"])
        tensors[f"{new}.gate.weight"] = tensors.pop(f"{old}.gate.weight")


def test_fused_and_per_expert_are_the_same(tmp_path):
    hub_model(tmp_path)
    assert any("experts.0.w1" in name for name in tensors_of(tmp_path)), "transformers no longer writes the Hub's names"
    before = experts_by_key(Checkpoint(tmp_path))
    rewrite(tmp_path, fuse)
    after = experts_by_key(Checkpoint(tmp_path))
    assert before.keys() == after.keys()
    for key, pair in before.items():
        assert all(torch.equal(a, b) for a, b in zip(pair, after[key], strict=True))


def test_partners_in_different_shards_are_all_that_waits(tmp_path):
    """gate, up and down of every expert in three shards: the worst order there is."""
    hub_model(tmp_path)
    expected = experts_by_key(Checkpoint(tmp_path))
    tensors = tensors_of(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for number, part in enumerate(("w2", "w1", "w3")):
        chosen = {n: t for n, t in tensors.items() if f".{part}." in n or (number == 0 and ".experts." not in n)}
        save_file(chosen, tmp_path / f"model-{number}.safetensors")
        weight_map |= dict.fromkeys(chosen, f"model-{number}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = Checkpoint(tmp_path)
    seen, peak = {}, 0
    for layer, expert, gate_up, down in checkpoint.experts():
        peak = max(peak, checkpoint.pending)
        seen[layer, expert] = (gate_up, down)
    assert peak <= 2 * 3 * E
    assert all(torch.equal(a, b) for key in expected for a, b in zip(expected[key], seen[key], strict=True))


def test_one_expert_waits_at_most_when_partners_are_together(tmp_path):
    hub_model(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    assert max(checkpoint.pending for _ in checkpoint.experts()) == 0


def shard(directory: Path) -> Path:
    return directory / "model.safetensors"


def damage_bytes(change):
    def apply(directory: Path) -> None:
        path = shard(directory)
        path.write_bytes(change(path.read_bytes()))

    return apply


def damage_tensors(change):
    return lambda directory: rewrite(directory, change)


def header_not_json(data: bytes) -> bytes:
    length = struct.unpack("<Q", data[:8])[0]
    return data[:8] + b"x" * length + data[8 + length :]


def overlap_header(data: bytes) -> bytes:
    """A tensor that claims bytes past the end."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header["model.norm.weight"]["data_offsets"][1] += 10**9
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data[8 + length :]


def reheader(change):
    """Damage that only changes the header: `change` gets and returns the parsed header, or returns raw bytes."""

    def apply(data: bytes) -> bytes:
        length = struct.unpack("<Q", data[:8])[0]
        raw = change(json.loads(data[8 : 8 + length]))
        raw = raw if isinstance(raw, bytes) else json.dumps(raw).encode()
        return struct.pack("<Q", len(raw)) + raw + data[8 + length :]

    return damage_bytes(apply)


def norm(**changes):
    """A header whose entry of the final norm is changed."""
    return reheader(lambda header: {**header, FINAL: {**header[FINAL], **changes}})


def short_span(header: dict) -> dict:
    header[FINAL]["data_offsets"][1] -= 4
    return header


def same_place(header: dict) -> dict:
    header[FINAL]["data_offsets"] = header["model.layers.0.input_layernorm.weight"]["data_offsets"]
    return header


def twice(header: dict) -> bytes:
    return json.dumps(header)[:-1].encode() + f', "{FINAL}": {json.dumps(header[FINAL])}}}'.encode()


def index_names(file):
    def apply(directory: Path) -> None:
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))

    return apply


def in_two_shards(directory: Path) -> None:
    save_file({FINAL: torch.ones(H)}, directory / "other.safetensors")
    index = {"weight_map": {FINAL: "other.safetensors", NAME: "model.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def drop_index(directory: Path) -> None:
    shard(directory).unlink()


def bad_index(directory: Path) -> None:
    shard(directory).unlink()
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')


def no_map(directory: Path) -> None:
    (directory / "model.safetensors.index.json").write_text("[]")


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (damage_bytes(lambda d: d[:-50]), r"model\.safetensors is truncated"),
        (damage_bytes(lambda d: d[:5]), "holds? no header|hold no header"),
        (damage_bytes(lambda d: b""), "hold no header"),
        (damage_bytes(lambda d: struct.pack("<d", float("nan")) + d[8:]), "header claims"),
        (damage_bytes(lambda d: struct.pack("<Q", len(d)) + d[8:]), "header claims"),
        (damage_bytes(header_not_json), "not JSON"),
        (damage_bytes(overlap_header), f"{FINAL} has 1000000192 bytes"),
        (damage_tensors(lambda t: t.pop(NAME)), NAME + " is missing"),
        (damage_tensors(lambda t: t.pop("model.norm.weight")), "model.norm.weight is missing"),
        (damage_tensors(lambda t: t.update({NAME: t[NAME][:-1].clone()})), f"{NAME} has shape"),
        (damage_tensors(lambda t: t.update({NAME: t[NAME].half()})), f"{NAME} is F16"),
        (damage_tensors(lambda t: t.update(surprise=torch.zeros(1))), "surprise is not part of a mixtral"),
        (drop_index, "neither"),
        (bad_index, "gone.safetensors, which does not exist"),
        (no_map, "no weight_map"),
        (reheader(lambda h: b"[1]"), "not a table of tensors"),
        (reheader(lambda h: b"NaN"), "not a table of tensors"),
        (reheader(lambda h: b"[" * 100_000), "not JSON"),
        (reheader(lambda h: {**h, "__metadata__": 5}), "not a table of tensors"),
        (reheader(lambda h: {**h, FINAL: [1]}), f"entry of {FINAL} is not valid"),
        (norm(data_offsets=[-4, 4]), f"entry of {FINAL} is not valid"),
        (norm(data_offsets=[False, True]), f"entry of {FINAL} is not valid"),
        (norm(shape=[float("nan")]), f"entry of {FINAL} is not valid"),
        (norm(shape=[H, 2]), f"{FINAL} has 192 bytes, F32 of shape .* has 384"),
        (reheader(short_span), f"{FINAL} has 188 bytes"),
        (reheader(same_place), f"{FINAL} begins at byte"),
        (reheader(twice), f"holds {FINAL} twice"),
        (damage_bytes(lambda d: d + bytes(64)), "64 bytes at its end belong to no tensor"),
        (index_names("../model.safetensors"), "not the name of a file beside it"),
        (index_names(5), "not the name of a file beside it"),
        (in_two_shards, f"tensor {FINAL} is both in"),
    ],
)
def test_damage_is_one_clear_error(damage, match, tmp_path):
    hub_model(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=match):
        Checkpoint(tmp_path)


def test_harmless_extras_are_ignored(tmp_path):
    hub_model(tmp_path)
    rewrite(tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(6)}))
    Checkpoint(tmp_path)


def edit_config(directory: Path, **changes) -> None:
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "DROP"}))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "llama"}, "'llama' is not supported; these are: mixtral"),
        ({"model_type": "DROP"}, "None is not supported"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"dtype": "float16", "torch_dtype": "float16"}, "float16"),
        ({"num_experts_per_tok": 6}, "cannot choose 6 of 5"),
        ({"num_key_value_heads": 3}, "cannot share"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"hidden_size": "DROP"}, "'hidden_size' is missing"),
        ({"num_attention_heads": "four"}, "config.json"),
        ({"sliding_window": -4}, "sliding_window"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_bad_configs(changes, match, tmp_path):
    hub_model(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(ConfigError, match=match):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(("content", "match"), [("{", "not valid JSON"), ("[]", "JSON object")])
def test_config_that_is_no_object(content, match, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=match):
        Checkpoint(tmp_path)


def test_both_spellings_of_rope_and_dtype(tmp_path):
    hub_model(tmp_path)
    new = Checkpoint(tmp_path).config
    edit_config(
        tmp_path,
        rope_parameters="DROP",
        dtype="DROP",
        torch_dtype="float32",
        rope_theta=new.rope_theta,
        rope_scaling={"type": "linear", "factor": 2.0},
    )
    old = Checkpoint(tmp_path).config
    assert old.rope_theta == new.rope_theta
    assert old.dtype == new.dtype == torch.float32
    assert old.rope_scaling == RopeScaling("linear", {"factor": 2.0})


def test_generation_config_names_the_end_tokens(tmp_path):
    hub_model(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert Checkpoint(tmp_path).config.eos_token_ids == (7, 9)


def test_vectors_do_not_keep_the_file_mapped(tmp_path):
    hub_model(tmp_path)
    vectors = [tensor for _, _, tensor in Checkpoint(tmp_path).dense_tensors() if tensor.dim() == 1]
    assert vectors
    assert not any(str(tmp_path) in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_a_pass_that_is_given_up_leaves_nothing_pending(tmp_path):
    hub_model(tmp_path)
    rewrite(tmp_path, fuse)
    checkpoint = Checkpoint(tmp_path)
    given_up: Any = checkpoint.experts()
    next(given_up)
    assert checkpoint.pending > 0
    given_up.close()
    assert len(experts_by_key(checkpoint)) == 3 * E
    assert checkpoint.pending == 0


def test_tied_embeddings_need_no_head(tmp_path):
    hub_model(tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in tensors_of(tmp_path)
    roles = {role for role, _, _ in Checkpoint(tmp_path).dense_tensors()}
    assert "embed_tokens" in roles
    assert "lm_head" not in roles
