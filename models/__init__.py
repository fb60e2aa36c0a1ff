"""One file an architecture, shared decoder layers, safetensors loader. Knows kernels only."""

from . import mixtral, olmoe, qwen3_moe

# By `model_type` of config.json. An architecture is a module with `config_from_hf` and `tensor_roles`.
ARCHITECTURES = {"mixtral": mixtral, "qwen3_moe": qwen3_moe, "olmoe": olmoe}
