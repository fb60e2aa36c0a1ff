"""The other side of `versus` and its kin: runs under vLLM's own Python, and imports nothing of ours but `phases`.

Answers on standard output in lines that begin with RESULT (vLLM logs there too): first {"kv_tokens": n} once the engine
is up, then {"seconds", "ttft_s", "tpot_s", "peak_bytes"} for each JSON object a line of standard input,
{"prompts": [[ids]], "output_tokens": n}. Times to the first token and between tokens are medians over the requests.
With settings["phases"] it answers as `phases` says instead.
"""

import json
import os
import resource
import sys
import time
from statistics import median

import phases


def main() -> None:
    settings = json.loads(sys.argv[1])
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # By itself vLLM keeps a core for its scheduler and computes on the others: on two cores, half the machine.
    cores = sorted(os.sched_getaffinity(0))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    from vllm import LLM

    arguments = settings["llm"]
    if settings.get("total_bytes"):
        arguments["gpu_memory_utilization"] = settings["total_bytes"] / total_memory()
    engine = LLM(skip_tokenizer_init=True, enable_prefix_caching=False, disable_log_stats=True, **arguments).llm_engine
    cache = engine.vllm_config.cache_config
    if settings.get("phases"):
        phases.serve(Phases(engine))
        return
    print("RESULT " + json.dumps({"kv_tokens": cache.num_gpu_blocks * cache.block_size}), flush=True)
    for line in sys.stdin:
        print("RESULT " + json.dumps(serve(engine, **json.loads(line))), flush=True)


class Phases:
    """Prefill and decode apart, see `phases`."""

    def __init__(self, engine):
        self._engine, self._made, self._first, self._named = engine, {}, {}, 0

    def prefill(self, prompts, most):
        from vllm import SamplingParams

        self.keep(0)
        # vLLM begins while requests are still added, so the first may be some tokens ahead of the last.
        sampling = SamplingParams(max_tokens=most + phases.AHEAD, ignore_eos=True, temperature=0, detokenize=False)
        names = [str(self._named + number) for number in range(len(prompts))]
        self._named += len(names)
        self._made, self._first = dict.fromkeys(names, 0), {}
        for name, ids in zip(names, prompts, strict=True):
            self._engine.add_request(name, {"prompt_token_ids": ids}, sampling)
        while len(self._first) < len(names):
            self._step()
        return [self._first[name] for name in names]

    def decode(self):
        while not (made := self._step()):
            pass
        return made

    def keep(self, count):
        names = list(self._made)
        if names[count:]:
            self._engine.abort_request(names[count:])
        self._made = {name: self._made[name] for name in names[:count]}

    def counted(self):
        return {}

    held = counted

    def _step(self):
        """One step; tokens that came, of which some may be of the step before."""
        before = sum(self._made.values())
        for output in self._engine.step():
            if output.request_id in self._made:
                tokens = output.outputs[0].token_ids
                self._made[output.request_id] = len(tokens)
                self._first[output.request_id] = tokens[0]
        return sum(self._made.values()) - before


def serve(engine, prompts, output_tokens):
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=output_tokens, ignore_eos=True, temperature=0, detokenize=False)
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    begin = time.perf_counter()
    for number, ids in enumerate(prompts):
        engine.add_request(str(number), {"prompt_token_ids": ids}, sampling)
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter() - begin
        for output in outputs:
            first.setdefault(output.request_id, now)
            if output.finished:
                assert len(output.outputs[0].token_ids) == output_tokens
                last[output.request_id] = now
    seconds = time.perf_counter() - begin
    assert len(last) == len(prompts)
    return {
        "seconds": seconds,
        "ttft_s": median(first.values()),
        "tpot_s": median((last[each] - first[each]) / max(1, output_tokens - 1) for each in last),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def total_memory():
    """What vLLM takes its share of."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return current_platform.get_device_total_memory()
    from vllm.utils.cpu_resource_utils import get_allowed_cpu_list, get_memory_node_info

    return get_memory_node_info(get_allowed_cpu_list()[0].numa_node).total_memory


if __name__ == "__main__":
    main()
