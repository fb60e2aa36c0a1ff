"""The server, over HTTP: a packed checkpoint by its directory alone, settings from the environment."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from .conftest import ENVIRONMENT, fluxmoe, prompts, run
from .server import Server

QUESTION = {"prompts": prompts(6, 40), "new_tokens": 16}
ARGUMENTS = ("--max-model-len", "256", "--max-num-seqs", "8", "--kv-cache-memory-bytes", "67108864", "--enforce-eager")


@pytest.fixture(scope="module")
def packed(checkpoint, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "model"
    command = ("--model", checkpoint("qwen3_moe"), "--format", "planar12", "--out", str(out))
    run(sys.executable, "-m", "fluxmoe", "pack-checkpoint", *command)
    return out


def test_a_packed_checkpoint_is_served_by_its_directory(checkpoint, engines, packed, tmp_path):
    settings = {"FLUXMOE_PLACEMENT": "host", "FLUXMOE_SLOTS": "2", "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    with Server(str(packed), tmp_path / "log", *ARGUMENTS, **ENVIRONMENT, **settings) as server:

        def complete(ids: list[int]) -> list[int]:
            body = {"model": "model", "prompt": ids, "max_tokens": QUESTION["new_tokens"], "temperature": 0}
            answer = server.post("/v1/completions", body | {"ignore_eos": True, "return_token_ids": True})
            return answer["choices"][0]["token_ids"]

        served = complete(QUESTION["prompts"][0])
        with ThreadPoolExecutor(len(QUESTION["prompts"])) as clients:
            together = list(clients.map(complete, QUESTION["prompts"]))
        metrics = dict(line.split() for line in server.get("/metrics").splitlines() if line.startswith("fluxmoe"))
    assert all(len(tokens) == QUESTION["new_tokens"] for tokens in together)
    assert float(metrics["fluxmoe_host_bytes_total"]) > 0
    assert float(metrics["fluxmoe_disk_bytes_total"]) == 0
    assert "host memory" in server.said
    assert "loads brought" in server.said

    llm = {"model": checkpoint("qwen3_moe"), "enforce_eager": True} | fluxmoe()
    task = {"llm": llm, "prompts": QUESTION["prompts"][:1], "new_tokens": QUESTION["new_tokens"]}
    assert engines([task])[0]["tokens"] == [served]
