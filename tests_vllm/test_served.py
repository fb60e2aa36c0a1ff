"""vLLM's server with `--quantization fluxmoe` under vLLM's own load, as `versus vllm-plugin --served` asks it."""

from __future__ import annotations

import sys

import pytest
from fluxmoe.experiments.serving.engines import vllm_within

REQUESTS, TOTAL_BYTES = 32, 2 << 30


def test_vllms_own_load(checkpoint):
    settings = {"model": checkpoint("qwen3_moe"), "max_model_len": 64, "max_batch": 32, "eager": True}
    one_thread = {"OMP_NUM_THREADS": "1"}
    peer = vllm_within(sys.executable, TOTAL_BYTES, settings, one_thread, "packed", served=REQUESTS)
    try:
        assert peer.kv_tokens > 32 * 64
        for clients in (1, 8, 32):
            timing = peer.run([[0] * 16] * clients, 8)  # raises unless all are served whole
            assert timing.requests_per_s == pytest.approx(REQUESTS / timing.seconds)
            assert 0 < timing.ttft_s <= timing.ttft_p99_s < timing.seconds
            assert 0 < timing.tpot_s <= timing.tpot_p99_s < timing.seconds
            assert timing.peak_bytes == pytest.approx(TOTAL_BYTES, rel=0.1)
    finally:
        peer.close()
