"""vLLM's server as a side of `versus vllm-plugin --served`: under vLLM's own Python; speaks as vllm_worker does.

A job's answer is what `vllm bench serve` says of as many clients as it has prompts and settings["requests"] requests in
all. Of the prompts it takes their length alone: that load draws its own.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

from fluxmoe.experiments.serving.vllm_server import Server, ServerError, load
from fluxmoe.experiments.serving.vllm_worker import total_memory


def main() -> None:
    settings = json.loads(sys.argv[1])
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    llm = {**settings["llm"], "gpu_memory_utilization": settings["total_bytes"] / total_memory()}
    model = llm.pop("model")
    with tempfile.TemporaryDirectory() as folder:
        server = Server(model, Path(folder, "log"), *flags(llm), "--no-enable-prefix-caching")
        try:
            with server:
                print("RESULT " + json.dumps({"kv_tokens": server.kv_tokens}), flush=True)
                for line in sys.stdin:
                    job = json.loads(line)
                    answer = serve(server, model, settings["requests"], **job)
                    print("RESULT " + json.dumps(answer), flush=True)
        except (ServerError, RuntimeError) as error:
            sys.exit(f"{server.said}\n{error}")


def flags(llm):
    """Arguments of vllm.LLM as the server takes them."""
    for name, value in llm.items():
        if value is not False:
            yield "--" + name.replace("_", "-")
            if value is not True:
                yield json.dumps(value) if isinstance(value, dict) else str(value)


def serve(server, model, requests, prompts, output_tokens):
    said = load(server.url, model, len(prompts), requests, len(prompts[0]), output_tokens)
    if said["completed"] != requests or said["total_output_tokens"] != requests * output_tokens:
        raise RuntimeError(f"of {requests} requests {said['completed']} were served whole")
    times = {f"{time}{part}_s": said[f"{word}_{time}_ms"] / 1000
             for time in ("ttft", "tpot") for part, word in (("", "median"), ("_p99", "p99"))}  # fmt: skip
    return {
        "seconds": said["duration"],
        "requests_per_s": said["request_throughput"],
        "peak_bytes": server.peak_bytes,
        **times,
    }


if __name__ == "__main__":
    main()
