"""What the engines of `versus walls` are asked, each in a process of its own: prefill and decode, timed apart.

Standard library alone, since it runs under the peers' own Pythons. A job is a JSON object a line of standard input:

    prompts    lists of token ids, all of one length
    batches    how many of the sequences are decoded together: largest first, each a part of the one before
    tokens     that a batch decodes for each of its sequences at most
    seconds    after which a batch decodes no further step

Answers are lines of standard output that begin with RESULT: one once the engine is up, then one a batch. The first of a
job also tells of its prefill: all prompts, to the first token of each. What an engine counts, and the bytes that the
kernel read from disks for the process, are differences over the phase; what it holds is of the phase's end.
"""

import json
import sys
import time
from collections.abc import Iterator
from typing import Any, Protocol

# Tokens for which a sequence has room beside those that are asked for: vLLM's first may be so many ahead of its last.
AHEAD = 8


class Runner(Protocol):
    """An engine with some sequences, greedy."""

    def prefill(self, prompts: list[list[int]], most: int) -> list[int]:
        """Forget all sequences and begin new ones, which get at most `most` tokens each; the first of each."""

    def decode(self) -> int:
        """One step of all sequences; tokens that came."""

    def keep(self, count: int) -> None:
        """End all but the first `count` sequences."""

    def counted(self) -> dict[str, int]:
        """Totals of what the engine counts, if it does."""

    def held(self) -> dict[str, int]:
        """Bytes that it holds now, by its ledgers and in truth, if it says."""


def serve(runner: Runner, **about: object) -> None:
    """Answer jobs until there are no more, after a short one that is not counted; about: the first answer."""
    runner.prefill([[1, 2, 3, 4]], 2)
    runner.decode()
    runner.keep(0)
    say(about)
    for line in sys.stdin:
        for answer in phases(runner, **json.loads(line)):
            say(answer)


def phases(
    runner: Runner, prompts: list[list[int]], batches: list[int], tokens: int, seconds: float
) -> Iterator[dict[str, Any]]:
    """The answers of a job."""
    before, begin = _totals(runner), time.perf_counter()
    first = runner.prefill(prompts, 1 + len(batches) * tokens)
    answer: dict[str, Any] = {"prefill_s": time.perf_counter() - begin, "first_tokens": first}
    answer |= {f"prefill_{name}": value for name, value in _since(before, runner).items()}
    for batch in batches:
        runner.keep(batch)
        before, begin, steps, made = _totals(runner), time.perf_counter(), 0, 0
        while steps < tokens and (not steps or time.perf_counter() - begin < seconds):
            made += runner.decode()
            steps += 1
        decode_s = time.perf_counter() - begin
        found = {"batch": batch, "decode_s": decode_s, "decode_tokens": made, **_since(before, runner), **runner.held()}
        yield answer | found
        answer = {}
    runner.keep(0)


def say(answer: dict[str, object]) -> None:
    print("RESULT " + json.dumps(answer), flush=True)


def _totals(runner: Runner) -> dict[str, int]:
    return {**runner.counted(), "read_bytes": _read_bytes()}


def _since(before: dict[str, int], runner: Runner) -> dict[str, int]:
    return {name: value - before[name] for name, value in _totals(runner).items()}


def _read_bytes() -> int:
    """That this process had read from disks, by mapped pages too; 0 where the system does not say."""
    try:
        with open("/proc/self/io") as file:
            return int(dict(line.split(": ") for line in file.read().splitlines())["read_bytes"])
    except (OSError, KeyError, ValueError):
        return 0
