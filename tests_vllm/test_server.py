"""The server, over HTTP: a packed checkpoint by its directory alone, settings from the environment, many clients."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from fluxmoe.experiments.serving.vllm_server import Server

from .conftest import fluxmoe, fluxmoe_command, prompts
from .engines import ask

QUESTION: dict[str, Any] = {"prompts": prompts(6, 40), "new_tokens": 16}
CLIENTS = (1, 8, 32)
ARGUMENTS = ("--max-model-len", "256", "--max-num-seqs", "32", "--kv-cache-memory-bytes", "67108864", "--enforce-eager")


@pytest.fixture(scope="module")
def packed(checkpoint, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "model"
    fluxmoe_command("pack-checkpoint", "--model", checkpoint("qwen3_moe"), "--format", "planar12", "--out", str(out))
    return out


@pytest.fixture(scope="module")
def server(packed, tmp_path_factory) -> Iterator[Server]:
    """With half of each layer's experts in files."""
    shared = tmp_path_factory.mktemp("server")
    settings = {"FLUXMOE_PLACEMENT": "disk", "FLUXMOE_ALPHA": "0.5", "PROMETHEUS_MULTIPROC_DIR": str(shared)}
    alone = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "OMP_NUM_THREADS": "2", "NUMBA_NUM_THREADS": "2"}
    with Server(str(packed), shared / "log", *ARGUMENTS, **settings, **alone) as server:
        yield server


def complete(server: Server, ids: list[int]) -> list[int]:
    body = {"model": "model", "prompt": ids, "max_tokens": QUESTION["new_tokens"], "temperature": 0}
    answer = server.post("/v1/completions", body | {"ignore_eos": True, "return_token_ids": True})
    return answer["choices"][0]["token_ids"]


def test_a_packed_checkpoint_is_served_by_its_directory(checkpoint, server):
    served = complete(server, QUESTION["prompts"][0])
    with ThreadPoolExecutor(len(QUESTION["prompts"])) as clients:
        together = list(clients.map(lambda ids: complete(server, ids), QUESTION["prompts"]))
    assert all(len(tokens) == QUESTION["new_tokens"] for tokens in together)

    llm = {"model": checkpoint("qwen3_moe"), "enforce_eager": True} | fluxmoe()
    task = {"llm": llm, "prompts": QUESTION["prompts"][:1], "new_tokens": QUESTION["new_tokens"]}
    assert ask([task])[0]["tokens"] == [served]


@pytest.mark.parametrize("clients", CLIENTS)
def test_the_openai_client_streams(server, clients):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    ask = {"model": "model", "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
    whole = client.completions.create(**ask).choices[0].text

    def stream(_: int) -> str:
        return "".join(part.choices[0].text for part in client.completions.create(**ask, stream=True))

    with ThreadPoolExecutor(clients) as pool:
        streamed = list(pool.map(stream, range(clients)))
    assert streamed == [whole] * clients


def test_what_it_did_is_at_metrics_and_in_its_log(server):
    """Last: stops it."""
    metrics = dict(line.split() for line in server.get("/metrics").splitlines() if line.startswith("fluxmoe"))
    counted = {name: float(value) for name, value in metrics.items()}
    assert counted["fluxmoe_cache_hits_total"] > 0
    assert counted["fluxmoe_disk_bytes_total"] > 0
    assert counted["fluxmoe_host_bytes_total"] == 0
    assert "cache of" in server.said
    server.stop()
    assert "loads brought" in server.said
    assert "routed experts of files" in server.said
