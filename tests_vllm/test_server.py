"""The server, over HTTP: a packed checkpoint by its directory alone, settings from the environment."""

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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from .conftest import ENVIRONMENT, fluxmoe, prompts, run

QUESTION = {"prompts": prompts(6, 40), "new_tokens": 16}


@pytest.fixture(scope="module")
def packed(checkpoint, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "model"
    command = ("--model", checkpoint("qwen3_moe"), "--format", "planar12", "--out", str(out))
    run(sys.executable, "-m", "fluxmoe.experiments.pack_checkpoint", *command)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fluxmoe"}}))
    return out


def post(url: str, body: dict) -> dict:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


def wait_for(url: str, server: subprocess.Popen, log: Path, seconds: float = 300) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        assert server.poll() is None, log.read_text()[-8000:]
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(f"no answer from {url}\n{log.read_text()[-8000:]}")


def test_a_packed_checkpoint_is_served_by_its_directory(checkpoint, engines, packed, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(packed), "--served-model-name", "m",
        "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "256", "--max-num-seqs", "8",
        "--kv-cache-memory-bytes", str(64 << 20), "--enforce-eager",
    ]  # fmt: skip
    environment = {**os.environ, **ENVIRONMENT, "FLUXMOE_PLACEMENT": "host", "FLUXMOE_SLOTS": "2"}
    log, url = tmp_path / "log", f"http://127.0.0.1:{port}"
    with log.open("w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        wait_for(f"{url}/health", server, log)

        def complete(ids: list[int]) -> list[int]:
            body = {"model": "m", "prompt": ids, "max_tokens": QUESTION["new_tokens"], "temperature": 0}
            answer = post(f"{url}/v1/completions", body | {"ignore_eos": True, "return_token_ids": True})
            return answer["choices"][0]["token_ids"]

        served = complete(QUESTION["prompts"][0])
        with ThreadPoolExecutor(len(QUESTION["prompts"])) as clients:
            together = list(clients.map(complete, QUESTION["prompts"]))
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)
    assert all(len(tokens) == QUESTION["new_tokens"] for tokens in together)
    said = log.read_text()
    assert "host memory" in said
    assert "loads brought" in said

    llm = {"model": checkpoint("qwen3_moe"), "enforce_eager": True} | fluxmoe()
    task = {"llm": llm, "prompts": QUESTION["prompts"][:1], "new_tokens": QUESTION["new_tokens"]}
    assert engines([task])[0]["tokens"] == [served]
