"""One file an architecture, shared decoder layers, safetensors loader. Knows kernels only."""

from . import mixtral, olmoe, qwen3_moe, qwen3_next

# By `model_type` of config.json. An architecture is a module with `config_from_hf` and `tensor_roles`; with `place` and
# ZERO_CENTRED, where its checkpoints hold weights in another order or form than the decoder.
ARCHITECTURES = {"mixtral": mixtral, "qwen3_moe": qwen3_moe, "olmoe": olmoe, "qwen3_next": qwen3_next}
