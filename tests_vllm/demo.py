"""`make vllm-demo`: a server that fits its experts into memory in which vLLM alone does not start.

Makes a checkpoint with 1.2 GB of experts, lets vLLM have less memory than its weights take, and asks for a completion:
first of vLLM as it is, which refuses, then with `--quantization fluxmoe` and the experts in a file.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from fluxmoe.experiments.serving.vllm_server import Server, ServerError
from vllm.utils.cpu_resource_utils import get_allowed_cpu_list, get_memory_node_info

SIZES = ["--layers", "8", "--experts", "32", "--top-k", "4", "--hidden", "1024", "--moe-intermediate", "768"]
SIZES += ["--heads", "8", "--kv-heads", "2"]
# Without KV cache vLLM takes 1.8 GiB for this model, and 1.0 with the experts in a file.
LIMIT_BYTES = 3 << 29
PROMPT = "Once upon a time"


def limit() -> list[str]:
    """vLLM's share of the memory that it sees, as an argument: on a CPU too it is called so."""
    total = get_memory_node_info(get_allowed_cpu_list()[0].numa_node).total_memory
    return ["--gpu-memory-utilization", f"{LIMIT_BYTES / total:.4f}"]


def spoken(server: Server, word: str) -> list[str]:
    """What it said of something, without what loggers put before."""
    return [line.split("] ", 1)[-1] for line in server.said.splitlines() if word in line]


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        model, arguments = f"{scratch}/model", ["--max-model-len", "512", "--max-num-seqs", "8", *limit()]
        arguments += ["--max-num-batched-tokens", "512", "--enforce-eager"]
        command = [sys.executable, "-m", "fluxmoe", "make-checkpoint", "--arch", "qwen3_moe", "--out", model]
        subprocess.run([*command, *SIZES], check=True)

        print(f"\nvLLM as it is, {LIMIT_BYTES / 2**30:.2f} GiB:", flush=True)
        server = Server(model, Path(scratch, "vllm.log"), *arguments)
        try:
            with server:
                sys.exit("it started: this machine gives it more memory than the demo counts on")
        except ServerError:
            print(next(iter(spoken(server, "ValueError: ")), server.said[-2000:]))

        print("\nwith --quantization fluxmoe and the experts in a file:", flush=True)
        settings = '{"fluxmoe": {"placement": "disk", "host_format": "planar12"}}'
        ours = ["--quantization", "fluxmoe", "--additional-config", settings]
        with Server(model, Path(scratch, "fluxmoe.log"), *arguments, *ours, FLUXMOE_DISK_DIR=scratch) as server:
            print("\n".join([*spoken(server, "[paged_model.py"), *spoken(server, "KV cache of")]))
            body = {"model": "model", "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
            print(f"\n{PROMPT} …{server.post('/v1/completions', body)['choices'][0]['text']}")
        print("\n".join(spoken(server, "loads brought")))


if __name__ == "__main__":
    main()
