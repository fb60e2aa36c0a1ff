"""Engines of vLLM in this process, one after the other: seconds each, where a process takes half a minute."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable
from functools import cache
from unittest.mock import patch

ALIKE = {
    "max_model_len": 256,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 256,
    "kv_cache_memory_bytes": 64 << 20,
    "enable_prefix_caching": False,
    "disable_log_stats": True,
    "distributed_executor_backend": "uni",
}


def ask(tasks: Iterable[dict]) -> list[dict]:
    """What an engine answers to each of `tasks`, {"llm": arguments of vllm.LLM, "prompts": lists of token ids,
    "new_tokens": N}: the tokens generated, for each prompt the likeliest token after each of its prefixes, and how many
    tokens of KV cache there were; of an engine that refuses, what it says.

    "room_bytes" in a task: the memory of weights and KV cache, beside what this process holds by then.
    """
    _replace_kernels()
    # vLLM collects garbage eight times a start, most of its time: what has been imported is none.
    gc.collect()
    gc.freeze()
    with patch.object(gc, "freeze"), patch.object(gc, "unfreeze"):
        return [_answer(**task) for task in tasks]


def _answer(llm: dict, prompts: list[list[int]], new_tokens: int, room_bytes: int | None = None) -> dict:
    from vllm import LLM, SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    if room_bytes is not None:
        llm = {"kv_cache_memory_bytes": None, "gpu_memory_utilization": share(room_bytes)} | llm
    engine = None
    try:
        engine = LLM(**ALIKE | llm)
        greedy = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, prompt_logprobs=1)
        outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], greedy, use_tqdm=False)
        cache = engine.llm_engine.vllm_config.cache_config
        return {
            "kv_tokens": cache.num_gpu_blocks * cache.block_size,
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
            "likeliest": [
                [min(choices, key=lambda token: choices[token].rank) for choices in output.prompt_logprobs[1:]]
                for output in outputs
            ],
        }
    except ValueError as error:
        return {"refused": str(error)}
    finally:
        del engine
        cleanup_dist_env_and_memory()


@cache
def _replace_kernels() -> None:
    """Once for all engines: each would search all modules for kernels to replace, and stumble over llvmlite's."""
    from vllm.platforms import current_platform

    platform, stumbles = type(current_platform), "llvmlite.binding.ffi"
    hidden = sys.modules.pop(stumbles, None)
    getattr(platform, "register_triton_kernel_overrides", lambda: None)()
    if hidden is not None:
        sys.modules[stumbles] = hidden
    platform.register_triton_kernel_overrides = classmethod(lambda cls: None)


def share(room_bytes: int) -> float:
    """That of vLLM's memory that is `room_bytes` more than what this process holds."""
    import psutil
    from vllm.utils.cpu_resource_utils import get_allowed_cpu_list, get_memory_node_info

    total = get_memory_node_info(get_allowed_cpu_list()[0].numa_node).total_memory
    return (psutil.Process().memory_info().rss + room_bytes) / total
