"""Our engine as a side of `versus walls`, in a process of its own; answers as `phases` says.

Its budget is `all`: what is free of memory or, behind a wall, of what the wall leaves. Like the peers it has written to
all of its KV cache before it is asked anything.
"""

from __future__ import annotations

import json
import sys

from fluxmoe.experiments.lib.serve import held, placed
from fluxmoe.experiments.serving import phases
from fluxmoe.runtime.devices import HOST
from fluxmoe.runtime.serving.config import EngineConfig
from fluxmoe.runtime.serving.engine import Engine
from fluxmoe.runtime.serving.request import Request, SamplingParams, Sequence


class Phases:
    """Prefill and decode apart, see `phases`. base: bytes that the process held before it had an engine."""

    def __init__(self, engine: Engine, base: int) -> None:
        self._engine, self._base = engine, base
        self._live: list[Sequence] = []

    def prefill(self, prompts: list[list[int]], most: int) -> list[int]:
        self.keep(0)
        params = SamplingParams(max_new_tokens=most, ignore_eos=True)
        self._live = [self._engine.add(Request(tuple(ids), params)) for ids in prompts]
        while any(sequence.first_token_s is None for sequence in self._live):
            assert self._engine.step() is not None, "a prompt was refused"
        return [sequence.token_ids[sequence.prompt_len] for sequence in self._live]

    def decode(self) -> int:
        step = self._engine.step()
        assert step is not None, "sequences wait for tokens"
        return step.decode_tokens

    def keep(self, count: int) -> None:
        self._engine.abort(*self._live[count:])
        self._live = self._live[:count]

    def counted(self) -> dict[str, int]:
        counters = self._engine.pager.counters()
        return {
            "cache_hits": counters.cache_hits, "cache_misses": counters.cache_misses,
            "load_ns": counters.transfer_ns, "loaded_bytes": counters.disk_bytes,
        }  # fmt: skip

    def held(self) -> dict[str, int]:
        return held(self._engine, self._base)


def main() -> None:
    settings = json.loads(sys.argv[1])
    config = EngineConfig(**placed(settings["placement"]), **settings["engine"], touch_kv=True)
    base = HOST.taken_bytes() or 0
    with Engine(settings["model"], config) as engine:
        ledger = {line: engine.budget.lines().get(line, 0) for line in ("expert_cache", "kv_cache")}
        phases.serve(Phases(engine, base), **ledger)


if __name__ == "__main__":
    main()
