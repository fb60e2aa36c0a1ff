"""What every iteration is measured by, and the totals of a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepMetrics:
    """One iteration. Times in seconds, `time_s` since the run began; blocks as they stood during the pass."""

    iteration: int
    time_s: float
    duration_s: float
    batch: int
    prefill_tokens: int
    decode_tokens: int
    kv_blocks_used: int
    kv_blocks: int
    waiting: int
    streamed_bytes: int
    stall_s: float
    transfer_s: float
    preemptions: int
    swapped_blocks: int
    finished: int
    device_experts: int


def summarise(steps: list[StepMetrics]) -> dict[str, float | int]:
    """Totals of a run: tokens per second over wall time, stalls, preemptions (keys of `generate --json`)."""
    wall = steps[-1].time_s if steps else 0.0
    decode_only = [s for s in steps if s.prefill_tokens == 0]
    decode_s = sum(s.duration_s for s in decode_only)
    generated = sum(s.decode_tokens for s in steps)
    return {
        "wall_s": wall,
        "iterations": len(steps),
        "prefill_tokens": sum(s.prefill_tokens for s in steps),
        "decode_tokens_per_s": sum(s.decode_tokens for s in decode_only) / decode_s if decode_s else 0.0,
        "generated_by_decode": generated,
        "peak_batch": max((s.batch for s in steps), default=0),
        "peak_kv_blocks": max((s.kv_blocks_used for s in steps), default=0),
        "preemptions": sum(s.preemptions for s in steps),
        "swapped_blocks": sum(s.swapped_blocks for s in steps),
        "streamed_bytes": sum(s.streamed_bytes for s in steps),
        "stall_s": sum(s.stall_s for s in steps),
        "transfer_s": sum(s.transfer_s for s in steps),
    }
