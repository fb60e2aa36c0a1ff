"""Requests for experiments: lengths drawn, fixed, ShareGPT-like or from a trace; all at once, as a Poisson process, or
as a trace has them. Prompts are random token ids.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from fluxmoe.models.config import ModelConfig
from fluxmoe.runtime.serving.request import Request, SamplingParams

from .args import option
from .models import Preset, check_context
from .results import UsageError

TRACE_COLUMNS = ("arrived_at", "num_prefill_tokens", "num_decode_tokens")


@dataclass(frozen=True)
class Lengths:
    """One request's shape: arrival (s), prompt tokens, output tokens."""

    arrived_at: float
    prompt: int
    output: int


def drawn_lengths(requests: int, context: int, output_tokens: int, seed: int) -> list[Lengths]:
    """All arrive at once; output fixed, so that every run does equal work; prompt + output is uniform in
    [context/2, context], as in a conversation service whose histories are cut at `context`."""
    if context < output_tokens + 1:
        raise UsageError(f"--context {context} leaves no room for a prompt before {output_tokens} output tokens")
    low = max(output_tokens + 1, context // 2)
    totals = np.random.default_rng(seed).integers(low, context + 1, size=requests)
    return [Lengths(0.0, int(total) - output_tokens, output_tokens) for total in totals]


def fixed_lengths(requests: int, context: int, output_tokens: int) -> list[Lengths]:
    """All alike: `output_tokens` after a prompt that fills the rest of `context`; all arrive at once."""
    longest = drawn_lengths(requests, context, output_tokens, 0)[0]
    return [replace(longest, prompt=context - output_tokens)] * requests


# Mean prompt and output of ShareGPT conversations as the vLLM paper has them (arXiv 2309.06180, Fig. 11), and a spread
# at which a tenth of them is thrice as long.
_SHAREGPT_PROMPT, _SHAREGPT_OUTPUT, _SHAREGPT_SIGMA = 161.31, 337.99, 1.1


def sharegpt_lengths(requests: int, context: int, seed: int) -> list[Lengths]:
    """ShareGPT-like: prompts and outputs log-normal about the means of its conversations, cut to `context`."""
    if context < 2:
        raise UsageError(f"a workload needs a context of at least 2 tokens, got {context}")
    rng = np.random.default_rng(seed)

    def drawn(mean: float) -> np.ndarray:
        return rng.lognormal(np.log(mean) - _SHAREGPT_SIGMA**2 / 2, _SHAREGPT_SIGMA, requests)

    prompts = np.clip(drawn(_SHAREGPT_PROMPT), 1, context - 1).astype(int)
    outputs = np.clip(drawn(_SHAREGPT_OUTPUT), 1, context - prompts).astype(int)
    return [Lengths(0.0, int(prompt), int(output)) for prompt, output in zip(prompts, outputs, strict=True)]


def poisson_arrivals(lengths: list[Lengths], rate: float, seed: int) -> list[Lengths]:
    """The same requests, arriving one by one at `rate` a second on average, independently of each other."""
    if not rate > 0:
        raise UsageError(f"an arrival rate must be positive requests a second, got {rate}")
    times = np.random.default_rng(seed).exponential(1 / rate, len(lengths)).cumsum()
    return [replace(shape, arrived_at=float(at)) for shape, at in zip(lengths, times, strict=True)]


def trace_lengths(path: Path | str, requests: int | None, context: int, at_once: bool = True) -> list[Lengths]:
    """The first `requests` rows of a trace CSV (columns of TRACE_COLUMNS), cut so that prompt + output ≤ context.

    `at_once` ignores the arrival times (an offline batch, for throughput).
    """
    path = Path(path)
    lengths: list[Lengths] = []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in TRACE_COLUMNS if name not in (reader.fieldnames or [])]
        if missing:
            raise UsageError(f"{path}: a trace needs the columns {', '.join(TRACE_COLUMNS)}; missing {missing}")
        for number, row in enumerate(reader, start=2):
            if requests is not None and len(lengths) == requests:
                break
            try:
                arrived, prompt, output = (float(row[name]) for name in TRACE_COLUMNS)
            except (TypeError, ValueError):
                raise UsageError(f"{path}, line {number}: {row} is no row of three numbers") from None
            if prompt < 1 or output < 1:
                raise UsageError(f"{path}, line {number}: a request needs at least one prompt and output token")
            output = min(int(output), context - 1)
            prompt = min(int(prompt), context - output)
            lengths.append(Lengths(0.0 if at_once else arrived, prompt, output))
    if not lengths:
        raise UsageError(f"{path} holds no request")
    return lengths


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Which requests are served."""

    requests: int | None = option("number of requests (default: the preset's, or 64)", None, least=1)
    context: int | None = option("longest prompt + output (default: the preset's, or 1024)", None, least=2)
    output_tokens: int | None = option(
        "of every request, drawn and fixed (default: the preset's, or 64)", None, least=1
    )
    workload: str = option(
        "drawn: prompt + output uniform in [context/2, context]; fixed: all of context; sharegpt: lengths like "
        f"ShareGPT's conversations; or a trace with columns {', '.join(TRACE_COLUMNS)}", "drawn",
        metavar="drawn|fixed|sharegpt|CSV",
    )  # fmt: skip
    arrivals: str = option(
        "trace: as the trace has them; a number: as many a second, a Poisson process", "at_once",
        metavar="at_once|trace|RATE",
    )  # fmt: skip
    seed: int = option("of lengths, prompts and arrivals", 0)

    def lengths(self, preset: Preset | None, model: ModelConfig) -> list[Lengths]:
        """Lengths and arrivals; what is not given is as the preset says. UsageError if they are invalid."""
        requests = self.requests or (preset.requests if preset else 64)
        output = self.output_tokens or (preset.output_tokens if preset else 64)
        context = self.context or (preset.context if preset else min(1024, model.max_position_embeddings))
        check_context(context, model)
        from_trace = self.workload not in ("drawn", "fixed", "sharegpt")
        if self.output_tokens and (from_trace or self.workload == "sharegpt"):
            raise UsageError(f"--output-tokens has no effect: --workload {self.workload} says how long answers are")
        if self.arrivals == "trace" and not from_trace:
            raise UsageError("--arrivals trace needs a trace: give its file to --workload")
        if from_trace:
            lengths = trace_lengths(self.workload, self.requests, context, at_once=self.arrivals != "trace")
        elif self.workload == "sharegpt":
            lengths = sharegpt_lengths(requests, context, self.seed)
        elif self.workload == "fixed":
            lengths = fixed_lengths(requests, context, output)
        else:
            lengths = drawn_lengths(requests, context, output, self.seed)
        if self.arrivals in ("at_once", "trace"):
            return lengths
        try:
            rate = float(self.arrivals)
        except ValueError:
            raise UsageError(f"--arrivals takes at_once, trace or a number a second, got {self.arrivals!r}") from None
        return poisson_arrivals(lengths, rate, self.seed)


def make_requests(lengths: list[Lengths], vocab_size: int, seed: int) -> list[Request]:
    """Greedy requests with random prompts that never stop early: the same work whatever the model answers."""
    rng = np.random.default_rng(seed)
    return [
        Request(
            prompt_ids=tuple(rng.integers(0, vocab_size, size=shape.prompt).tolist()),
            params=SamplingParams(max_new_tokens=shape.output, ignore_eos=True),
            arrival_s=shape.arrived_at,
        )
        for shape in lengths
    ]
