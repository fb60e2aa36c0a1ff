"""The other side of versus_vllm: runs under vLLM's own Python, which knows nothing of this project.

Answers on standard output in lines that begin with RESULT (vLLM logs there too): first {} once the engine is up, then
{"seconds": …} for each JSON object a line of standard input, {"prompts": [[ids]], "output_tokens": n}.
"""

import json
import os
import sys
import time


def main() -> None:
    settings = json.loads(sys.argv[1])
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # By itself vLLM keeps a core for its scheduler and computes on the others: on two cores, half the machine.
    cores = sorted(os.sched_getaffinity(0))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=settings["model"],
        dtype=settings["dtype"],
        skip_tokenizer_init=True,
        max_model_len=settings["max_model_len"],
        max_num_seqs=settings["max_batch"],
        kv_cache_memory_bytes=settings["kv_bytes"],
        enforce_eager=settings["eager"],
        enable_prefix_caching=False,
        disable_log_stats=True,
        **settings["offload"],
    )
    print("RESULT {}", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
        sampling = SamplingParams(max_tokens=job["output_tokens"], ignore_eos=True, temperature=0, detokenize=False)
        begin = time.perf_counter()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - begin
        assert all(len(output.outputs[0].token_ids) == job["output_tokens"] for output in outputs)
        print("RESULT " + json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
