"""What the paper states (arXiv 2604.02715), figure by figure; all of it, once.

What others publish stands at the end, with its source. Throughputs are output tokens/s; a loss is a share, negative.
"""

from __future__ import annotations

# Qwen3-Next-80B-A3B, 4 x L40, all experts on the device; context 4096 where none is named, batch 256 where none is.
FIG7 = {
    "vllm-o at batch 32, tokens/s": 54.6,
    "vllm / vllm-o at batch 32": 6.0,
    "fluxmoe / vllm at batch 32": 0.639,
    "vllm, batch 128 to 256": -0.322,
    "fluxmoe / vllm at batch 256": 3.0,
    "fluxmoe / vllm-o at batch 256": 3.7,
    "vllm / vllm-o at batch 256": 1.22,
    "vllm, context 1024 to 4096": -0.453,
    "fluxmoe, context 1024 to 4096": -0.205,
}
# Those of them that the simulator's three parameters are fitted to.
CALIBRATED = ("vllm-o at batch 32, tokens/s", "vllm / vllm-o at batch 32", "fluxmoe / vllm at batch 32")
# Mixtral-8x7B, 2 x L40, an eighth of the experts in the host; batch 256.
FIG8 = {
    "vllm-o at batch 256, context 4096, tokens/s": 3.7,
    "fluxmoe / fluxmoe-h, context 1024": 1.285,
    "fluxmoe / fluxmoe-h, context 4096": 1.229,
}
# Mixtral-8x7B, 4 x L40, weights resident; batch 128.
FIG2 = {
    "KV 20 to 60 GiB, context 4096": 0.588,
    "context 1024 to 4096 with 20 GiB of KV": -0.667,
    "context 1024 to 4096 with 60 GiB of KV": -0.132,
}
# The largest overhead of paging with everything resident, per cent.
FIG10_PERCENT = 3.0
# Entropy of the exponents of trained models' bf16 weights, bits: ZipServ, arXiv 2603.17435.
TRAINED_EXPONENT_BITS = (2.57, 2.74)
