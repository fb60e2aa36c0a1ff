"""vLLM's server in a process of its own, spoken to over HTTP."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType

SECONDS = 300


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
        """As a user would, with Ctrl-C."""
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=5) as response:
            return response.read().decode()

    def post(self, path: str, body: dict) -> dict:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.load(response)
