"""Engines side by side: ours in this process, others as workers in processes of their own, one interface for all."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

from fluxmoe.kernels.cpu import ENVIRONMENT
from fluxmoe.models.config import ModelConfig
from fluxmoe.runtime.serving.config import EngineConfig
from fluxmoe.runtime.serving.request import Request, SamplingParams

from ..lib.machines import Machine
from ..lib.models import Source
from ..lib.results import UsageError
from ..lib.serve import placed
from ..lib.wall import Fence

ITEM_BYTES = {"bfloat16": 2, "float32": 4}
_LOOK_S = 0.05
# More than a server below it has, see vllm_server.
_CLOSE_S = 90


class Timing(NamedTuple):
    """Of one call: seconds in all; medians over its requests of the time to the first token and of that between tokens,
    None where an engine does not tell; the most memory that its process has held so far. Of a server too: 99th
    percentiles, and requests a second."""

    seconds: float
    ttft_s: float | None = None
    tpot_s: float | None = None
    peak_bytes: int | None = None
    ttft_p99_s: float | None = None
    tpot_p99_s: float | None = None
    requests_per_s: float | None = None


class RefusedError(Exception):
    """An engine that does not start; the message says why, as the engine says it."""


class WorkerPeer:
    """An engine in a process of its own that serves batches on request; RefusedError if it does not start.

    All start with the CPU kernels' `ENVIRONMENT`, with which vLLM is faster too (LOG.md, 2026-11-29), unless
    `environment` says otherwise. wall: it runs behind. patience_s: it is ended where it is silent for longer. ready:
    what it says once it is up; kv_tokens: that its KV cache holds, None where it does not tell.
    """

    def __init__(
        self, name: str, python: str, script: str, settings: dict, environment: dict[str, str] | None = None,
        wall: Fence | None = None, patience_s: float | None = None,
    ) -> None:  # fmt: skip
        self.name, self._wall, self._patience_s = name, wall, patience_s
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by close)
        command = [python, str(Path(__file__).with_name(script)), json.dumps(settings)]
        try:
            self._process = subprocess.Popen(
                wall.command(command) if wall else command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                env={**os.environ, **ENVIRONMENT, **(environment or {})},
            )
        except OSError as error:
            raise UsageError(f"cannot start {python}: {error.strerror}") from None
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None, "a pipe"
        assert stdout is not None, "a pipe"
        self._stdin, self._stdout = stdin, stdout
        self._said: list[str] = []
        try:
            self.ready = self.answer()
        except BaseException:
            self.close()
            raise
        self.kv_tokens: int | None = self.ready.get("kv_tokens")

    def answer(self) -> dict:
        """The next answer. RefusedError where there is none: the engine stopped, was killed or is ended for silence."""
        silent = threading.Event()
        with _watched(self._process, self._wall, self._patience_s, silent):
            for line in self._stdout:
                if line.startswith("RESULT "):
                    return json.loads(line.removeprefix("RESULT "))
                self._said.append(line)
            status = self._process.wait()
        if silent.is_set():
            raise RefusedError(f"no answer within {self._patience_s:g} s")
        self._log.seek(0)
        reason = reason_in([*self._said, *self._log.readlines()])
        if status and self._wall and (self._wall.killed or not reason):
            reason = self._wall.why(status)
        raise RefusedError(reason or f"{self.name} stopped without a word")

    def ask(self, job: dict) -> None:
        """Send a job, whose answers are to be fetched."""
        with suppress(BrokenPipeError):  # it has stopped; its log says why
            self._stdin.write(json.dumps(job) + "\n")
            self._stdin.flush()

    def run(self, prompts: list[list[int]], output_tokens: int) -> Timing:
        """One call that generates `output_tokens` for each of `prompts`."""
        self.ask({"prompts": prompts, "output_tokens": output_tokens})
        return Timing(**self.answer())

    def close(self) -> None:
        with suppress(BrokenPipeError):
            self._stdin.close()
        try:
            self._process.wait(timeout=_CLOSE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


@contextmanager
def _watched(
    process: subprocess.Popen, wall: Fence | None, patience_s: float | None, silent: threading.Event
) -> Iterator[None]:
    """Meanwhile the peak behind the wall is looked for, and the process is killed, and `silent` set, after a while."""
    done, until = threading.Event(), time.monotonic() + (patience_s or 0)

    def watch() -> None:
        while not done.wait(_LOOK_S):
            if wall:
                wall.look()
            if patience_s and time.monotonic() > until:
                silent.set()
                process.kill()
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def reason_in(log: list[str]) -> str:
    """The first error that a log names, but for what it only warns of: what came after it followed from it."""
    for line in log:
        if re.search(r"\bWARNING\b", line):
            continue
        if found := re.search(r"\b((?:[A-Z]\w*)?(?:Error|Exception): .+)", line):
            return found[1].strip()
    return ""


class OurPeer:
    """Our engine with one placement under one budget. BudgetError if that is too small."""

    def __init__(self, machine: Machine, source: Source, placement: str, settings: EngineConfig) -> None:
        self.name = f"fluxmoe {placement}"
        self._engine = machine.engine(source, replace(settings, **placed(placement)))
        self.kv_tokens: int | None = self._engine.scheduler.most_blocks * settings.block_size

    def run(self, prompts: list[list[int]], output_tokens: int) -> Timing:
        params = SamplingParams(max_new_tokens=output_tokens, ignore_eos=True)
        requests = [Request(tuple(ids), params) for ids in prompts]
        begin = time.perf_counter()
        outputs = self._engine.generate(requests)
        seconds = time.perf_counter() - begin
        assert all(len(output.token_ids) == output_tokens for output in outputs)
        times = [(output.first_token_s or 0.0, output.finish_s or 0.0) for output in outputs]
        between = [(last - first) / max(1, output_tokens - 1) for first, last in times]
        return Timing(seconds, median(first for first, _ in times), median(between))

    def close(self) -> None:
        self._engine.close()


def kv_bytes(model: ModelConfig, dtype: str, budget: int | None) -> int | None:
    """What a budget for weights and KV leaves for KV where all weights are resident in `dtype`; None without one."""
    if budget is None:
        return None
    weights = (model.expert_bytes_total + model.non_expert_bytes) * ITEM_BYTES[dtype] // model.dtype.itemsize
    return budget - weights


def vllm(python: str, dtype: str, settings: dict, environment: dict[str, str], kv: int | None, offload_gib: float = 0):
    """vLLM; kv: bytes of its KV cache, to which what is offloaded is added (None: 2 GiB on a CPU, its own choice on a
    GPU)."""
    if kv is not None and kv + int(offload_gib * 2**30) <= 0:
        raise RefusedError(f"its weights in {dtype} alone are {-kv >> 20} MiB more than the budget")
    if kv is not None:
        kv += int(offload_gib * 2**30)
    elif settings["device"] == "cpu":
        kv = 2 << 30
    llm = {**_llm(settings), "dtype": dtype, "kv_cache_memory_bytes": kv}
    if offload_gib:
        llm["cpu_offload_gb"] = offload_gib
    name = f"vllm {dtype}" + (f", {offload_gib:g} GiB offloaded" if offload_gib else "")
    return WorkerPeer(name, python, "vllm_worker.py", {"llm": llm}, environment)


def _llm(settings: dict) -> dict:
    """Arguments of vllm.LLM."""
    return {
        "model": settings["model"],
        "max_model_len": settings["max_model_len"],
        "max_num_seqs": settings["max_batch"],
        "enforce_eager": settings["eager"],
    }


def vllm_within(
    python: str, total: int, settings: dict, environment: dict[str, str], placement: str | None = None,
    served: int | None = None,
):  # fmt: skip
    """vLLM in one process that takes `total` bytes in all, its code too: KV gets what the rest leaves. placement: of
    our plug-in's; None: vLLM as it is. served: behind its own server, of which that process is the engine's; a call is
    so many requests over HTTP."""
    llm = {**_llm(settings), "distributed_executor_backend": "uni"}
    if placement is not None:
        chosen = {name: value for name, value in placed(placement).items() if value is not None}
        llm |= {"quantization": "fluxmoe", "additional_config": {"fluxmoe": chosen}}
    # In one process it can neither bind threads nor set how many there are.
    alike = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1" if served else "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    alike |= {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    name = "vllm" if placement is None else f"vllm + fluxmoe {placement}"
    script = "vllm_served_worker.py" if served else "vllm_worker.py"
    asked = {"llm": llm, "total_bytes": total, "requests": served}
    return WorkerPeer(name, python, script, asked, alike | environment)


def fluxmoe_within(placement: str, total: int, settings: dict):
    """Our engine in one process that takes `total` bytes in all."""
    return WorkerPeer(
        f"fluxmoe {placement}", sys.executable, "fluxmoe_worker.py",
        {**settings, "placement": placement, "total_bytes": total},
    )  # fmt: skip


def transformers(dtype: str, settings: dict, model: ModelConfig, kv: int | None):
    """transformers' generate, with as many sequences at a time as have room for their KV at full length."""
    each = settings["max_model_len"] * model.kv_bytes_per_token * ITEM_BYTES[dtype] // model.dtype.itemsize
    at_once = settings["max_batch"] if kv is None else min(settings["max_batch"], kv // each)
    if at_once < 1:
        raise RefusedError(f"no room for the KV of one sequence beside its weights in {dtype}")
    return WorkerPeer(
        f"transformers {dtype}", sys.executable, "transformers_worker.py",
        {**settings, "dtype": dtype, "max_batch": int(at_once)},
    )  # fmt: skip
