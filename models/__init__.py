"""One file an architecture, shared decoder layers, safetensors loader. Knows kernels only."""
