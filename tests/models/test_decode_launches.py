"""What a layer of a decode step launches on a GPU, counted on the meta device: Triton's launches and torch's. Ours are
launched dependently, all of them (the audit says that such kernels wait first)."""

from __future__ import annotations

import pytest

from ..compiling import run_script

pytest.importorskip("triton.backends.nvidia")

COUNT = """
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fluxmoe.kernels.expert_table import ExpertTable
from fluxmoe.kernels.launches import record_only
from fluxmoe.kernels.ops import AttentionMetadata, Limits, Linear
from fluxmoe.kernels.triton.experts import TritonExperts
from fluxmoe.kernels.triton.ops import TritonOps
from fluxmoe.models.decoder import Decoder, expert_dims, layer_dims
from fluxmoe.models.published import published_config

BATCH, CONTEXT = 4, 4096

class TorchLaunches(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view and "empty" not in str(function):
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))

def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")

def launches_of(config, expert_format):
    dims = layer_dims(config)
    with record_only(90) as launches:
        ops = TritonOps(dims, Limits(BATCH, BATCH, CONTEXT, 32), "meta")
        expert_ops = TritonExperts(expert_dims(config), BATCH, "meta", formats=(expert_format,))
        with torch.device("meta"):
            decoder = Decoder(config, ops, CONTEXT)
        decoder.final_norm = empty(config.hidden_size, dtype=torch.float32)
        def linear(n, k):
            return Linear(empty(n * k * 2, dtype=torch.uint8), n, k, torch.bfloat16)
        hidden, heads = config.hidden_size, config.num_heads * config.head_dim
        decoder.embed_tokens = decoder.lm_head = linear(config.vocab_size, hidden)
        for index, layer in enumerate(decoder.layers):
            vector = lambda *shape: empty(*shape, dtype=torch.float32)
            layer.vectors |= {"input_norm": vector(hidden), "post_attn_norm": vector(hidden),
                              "q_norm": vector(config.head_dim), "k_norm": vector(config.head_dim)}
            layer.matrices |= {"router": linear(config.num_experts, hidden), "o_proj": linear(hidden, heads)}
            if shared := config.shared_intermediate_size:
                layer.matrices |= {"mlp_gate_up": linear(2 * shared, hidden), "mlp_down": linear(hidden, shared),
                                   "mlp_score": linear(1, hidden)}
            if index in config.delta_layers:
                d = config.delta
                layer.matrices |= {"in_proj": linear(d.projected, hidden), "o_proj": linear(hidden, d.value_size)}
                layer.vectors |= {"conv": vector(d.channels, d.taps), "rate": vector(d.value_heads),
                                  "dt_bias": vector(d.value_heads), "delta_norm": vector(d.value_dim)}
                continue
            layer.matrices["qkv"] = linear(dims.qkv_size, hidden)
            if config.attention_gate:
                layer.matrices["attn_gate"] = linear(heads, hidden)
        block = torch.zeros(16, dtype=torch.uint8)
        table = ExpertTable.from_blocks([(block, block)] * config.num_experts, "cpu", expert_format)
        page = SimpleNamespace(table=table, wait=lambda d: None)
        class Experts:
            def mixture(self, layer, hidden, moe_block, num_tokens=None):
                return expert_ops.mix(expert_ops.gate(hidden, moe_block, num_tokens), moe_block, page)
        cache = empty(512, config.num_kv_heads, 32, config.head_dim)
        ids = lambda *shape: empty(*shape, dtype=torch.int32)
        metadata = AttentionMetadata(ids(BATCH + 1), ids(BATCH), ids(BATCH, CONTEXT // 32), ids(BATCH),
                                     empty(BATCH, dtype=torch.int64), 32, ids(1), ids(BATCH))
        states = config.delta and SimpleNamespace(
            conv=empty(9, 5, config.delta.taps - 1, config.delta.channels),
            recurrent=empty(9, 5, config.delta.value_heads, config.delta.key_dim, config.delta.value_dim,
                            dtype=torch.float32))
        tokens = empty(BATCH, dtype=torch.int64)
        with TorchLaunches() as torchs:
            decoder.forward(tokens, metadata, SimpleNamespace(layer=lambda i: (cache, cache)), Experts(), tokens,
                            SimpleNamespace(span=lambda *a, **k: nullcontext()), states)
        hasty = {launch.kernel.__name__ for launch in launches if not launch.compiled.metadata.launch_pdl}
        assert not hasty, f"not launched while the kernel before runs: {hasty}"
        return len(launches) + len(torchs.names)

config = published_config(MODEL)
kinds = {"attention": (), "delta": (0, 1)} if config.delta else {"attention": ()}
for expert_format in ("dense", "planar12"):
    one = launches_of(replace(config, num_layers=1, delta_layers=()), expert_format)
    for kind, delta_layers in kinds.items():
        three = launches_of(replace(config, num_layers=3, delta_layers=delta_layers), expert_format)
        print(kind, (three - one) / 2)
"""


@pytest.mark.parametrize(
    ("model", "most"),
    [
        # At this context attention has parts, and a kernel that merges them.
        ("qwen3-30b-a3b", {"attention": 9}),
        ("qwen3-next-80b-a3b", {"attention": 11, "delta": 8}),
    ],
)
def test_a_layer_of_a_decode_step_launches_no_more_than(model, most, tmp_path):
    rows = [line.split() for line in run_script(f"MODEL = {model!r}\n{COUNT}", tmp_path)]
    assert len(rows) == 2 * len(most)
    assert {(kind, float(count)) for kind, count in rows} == {(kind, float(n)) for kind, n in most.items()}
