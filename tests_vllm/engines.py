"""Engines of vLLM, one after the other in this process, and what they answer.

    python engines.py TASKS RESULTS

TASKS, JSON: a list of {"llm": arguments of vllm.LLM, "prompts": lists of token ids, "new_tokens": N}. RESULTS: for
each, the tokens generated, for each prompt the likeliest token after each of its prefixes, and how many tokens of KV
cache there were; of an engine that refuses, what it says.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

# One process is started for many engines, which takes seconds each instead of half a minute.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
ALIKE = {
    "max_model_len": 256,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 256,
    "kv_cache_memory_bytes": 64 << 20,
    "enable_prefix_caching": False,
    "disable_log_stats": True,
    "distributed_executor_backend": "uni",
}


def answer(task: dict) -> dict:
    from vllm import LLM, SamplingParams

    try:
        llm = LLM(**ALIKE | task["llm"])
    except ValueError as error:
        return {"refused": str(error)}
    greedy = SamplingParams(temperature=0, max_tokens=task["new_tokens"], ignore_eos=True, prompt_logprobs=1)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in task["prompts"]], greedy, use_tqdm=False)
    cache = llm.llm_engine.vllm_config.cache_config
    return {
        "kv_tokens": cache.num_gpu_blocks * cache.block_size,
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "likeliest": [
            [min(choices, key=lambda token: choices[token].rank) for choices in output.prompt_logprobs[1:]]
            for output in outputs
        ],
    }


def main(tasks: str, results: str) -> None:
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
    from vllm.platforms import current_platform

    answers = []
    for task in json.loads(Path(tasks).read_text()):
        answers.append(answer(task))
        cleanup_dist_env_and_memory()
        # What an engine replaces at start is replaced; a second search of all modules stumbles over llvmlite's.
        type(current_platform).register_triton_kernel_overrides = classmethod(lambda cls: None)
    Path(results).write_text(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
