"""vLLM's server in a process of its own, spoken to over HTTP, and vLLM's own load on it; under vLLM's Python."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

SECONDS, SECONDS_TO_STOP = 300, 60


class ServerError(RuntimeError):
    """A server that did not come up; the message ends with what it said last."""


class Server:
    """`python -m vllm.entrypoints.openai.api_server --model MODEL arguments…`, up within the context. log: a file for
    what it says. ServerError."""

    def __init__(self, model: str, log: Path, *arguments: str, **environment: str) -> None:
        self.log = log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = ["-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", "model"]
        # At once, workers are killed before they have said what they did.
        command += ["--host", "127.0.0.1", "--port", str(port), "--shutdown-timeout", "30", *arguments]
        with log.open("w") as file:
            self._process = subprocess.Popen(
                [sys.executable, *command], stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **environment}
            )  # fmt: skip

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def __enter__(self) -> Server:
        until = time.monotonic() + SECONDS
        try:
            while self._process.poll() is None and time.monotonic() < until:
                try:
                    self.get("/health")
                    return self
                except (urllib.error.URLError, OSError):
                    time.sleep(0.5)
            raise ServerError(self.said[-8000:])
        except BaseException:
            self.stop()
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """As a user would, with Ctrl-C; what does not heed it is killed, the engine's process too."""
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            for process in [*self._below(), self._process]:
                process.kill()
            self._process.wait()

    def _below(self) -> list:
        """Its processes but the first."""
        import psutil

        return psutil.Process(self._process.pid).children(recursive=True)

    @property
    def kv_tokens(self) -> int:
        """That its KV cache holds."""
        said = dict(re.findall(r'(num_gpu_blocks|block_size)="(\d+)"', self.get("/metrics")))
        return int(said["num_gpu_blocks"]) * int(said["block_size"])

    @property
    def peak_bytes(self) -> int:
        """The most that one of its processes has held so far: the engine's."""
        said = [Path(f"/proc/{process.pid}/status").read_text() for process in self._below()]
        return max(int(kib) << 10 for each in said for kib in re.findall(r"VmHWM:\s*(\d+) kB", each))

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=5) as response:
            return response.read().decode()

    def post(self, path: str, body: dict) -> dict:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.load(response)


def load(
    url: str, tokenizer: str, clients: int, requests: int, prompt_tokens: int, output_tokens: int
) -> dict[str, Any]:
    """What `vllm bench serve` says of so many requests in all: random tokens, the same in every run, each client's next
    as soon as its last is answered. Its command asks for a distribution that the CPU's is not."""
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    arguments = {
        "backend": "openai", "base-url": url, "model": "model", "tokenizer": tokenizer, "dataset-name": "random",
        "random-input-len": prompt_tokens, "random-output-len": output_tokens, "num-prompts": requests,
        "max-concurrency": clients, "seed": 0,
    }  # fmt: skip
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    given = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    return main(parser.parse_args([*given, "--ignore-eos", "--disable-tqdm"]))
