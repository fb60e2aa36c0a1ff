"""The systems of the paper's evaluation (§6.1), and ours beside them, on the simulator or for real.

    vllm        experts resident; the KV cache swaps to the host when it is full; recurrent states for a full batch
    vllm-o      the experts of the last 12.5 % of layers in host memory, prefetched one layer ahead
    fluxmoe     Huffman-coded exponents, decoded to a buffer; the same share of each layer in the host, dense
    fluxmoe-h   likewise, but the last 12.5 % of layers wholly in the host
    ours        12.0 bits, decoded inside the GEMM, in host memory too; decode steps as graphs; recompute where KV runs
                out; no more sequences at a time than have room for states and half of their context

    ours-eager  ours, with the paper's launches and swapping: what decoding in the GEMM is worth alone (simulated)
    NAME-best   vllm and vllm-o as well as they can be set up, the fastest of: preemption by swap, by recompute; as many
                sequences as the batch has, or as have room

Which experts are in the host where: `alpha`, the share on the device (1 in Exp#1; 0.875 in Exp#2).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from fluxmoe.kernels.formats import DEFAULT_COMPRESSED, DENSE
from fluxmoe.runtime.hardware import HardwareProfile
from fluxmoe.runtime.memory.budget import BudgetError
from fluxmoe.runtime.serving.config import EngineConfig
from fluxmoe.runtime.serving.metrics import summarise
from fluxmoe.runtime.sim.cost_model import CostParameters

from ..lib.machines import SIMULATED, Machine
from ..lib.presets import Source
from ..lib.workloads import Lengths, make_requests

PAPER = CostParameters(bits={**CostParameters().bits, "huffman": 12.8}, eager=True)
OURS = CostParameters()
# Of a request's context, what it generates: a conversation whose history is most of it. The paper does not say.
OUTPUT_SHARE = 0.25
SYSTEMS = ("vllm", "vllm-best", "vllm-o", "vllm-o-best", "fluxmoe", "fluxmoe-h", "ours-eager", "ours")


@dataclass(frozen=True)
class Run:
    """One system serving `batch` requests of `context` tokens, prompt and output.

    budget: bytes of a device, None for all. buffer_format: in which fluxmoe and fluxmoe-h compress. max_batched_tokens:
    of a pass. link_bandwidth: hold the host's link to this, CPU.
    """

    system: str
    batch: int
    context: int
    alpha: float = 1.0
    budget: int | None = None
    buffer_format: str = "huffman"
    max_batched_tokens: int = 2048
    link_bandwidth: float | None = None

    @property
    def output(self) -> int:
        return max(1, int(self.context * OUTPUT_SHARE))


@dataclass(frozen=True)
class Bench:
    """Where runs are served: a model on a machine. theirs, ours: what the simulator takes the paper's systems and ours
    to cost; None where they run for real."""

    machine: Machine
    source: Source
    theirs: CostParameters | None = PAPER
    ours: CostParameters | None = OURS


def settings_of(run: Run) -> Iterator[EngineConfig]:
    """How a system may serve; of several ways, it is as fast as the fastest."""
    offloads = run.alpha < 1
    common = EngineConfig(
        max_batch=run.batch, max_batched_tokens=run.max_batched_tokens, max_context=run.context,
        budget_bytes=run.budget, min_kv_tokens=run.context, link_bandwidth=run.link_bandwidth,
    )  # fmt: skip
    paper = replace(common, preemption="swap", fit_batch=False)
    system, best = run.system.removesuffix("-best"), run.system.endswith("-best")
    if system in ("vllm", "vllm-o"):
        placement, share = ("resident", None) if system == "vllm" else ("offload", 0.875)
        yield replace(paper, placement=placement, alpha=share)
        if best:
            for preemption in ("swap", "recompute"):
                yield replace(common, placement=placement, alpha=share, preemption=preemption)
    elif system in ("fluxmoe", "fluxmoe-h"):
        yield replace(
            paper,
            placement="hybrid" if system == "fluxmoe-h" else "balanced" if offloads else "packed",
            alpha=run.alpha if offloads else None,
            expert_format=run.buffer_format,
            host_format=DENSE if offloads else None,
        )
    elif system in ("ours", "ours-eager"):
        yield replace(
            replace(common, preemption="recompute") if system == "ours" else paper,
            placement="balanced" if offloads else "packed",
            alpha=run.alpha if offloads else None,
            expert_format=DEFAULT_COMPRESSED,
        )
    else:
        raise ValueError(f"unknown system {run.system!r}")


def serve(run: Run, bench: Bench) -> dict:
    """Totals of a run, `tokens_per_s` of output; BudgetError where the system cannot start."""
    rows: list[dict] = []
    refused: BudgetError | None = None
    for settings in settings_of(run):
        try:
            rows.append(_serve(run, bench, settings))
        except BudgetError as error:
            refused = error
    if refused is not None and not rows:
        raise refused
    return max(rows, key=lambda row: row["tokens_per_s"])


def _serve(run: Run, bench: Bench, settings: EngineConfig) -> dict:
    costs = bench.ours if run.system == "ours" else bench.theirs
    lengths = [Lengths(0.0, run.context - run.output, run.output)] * run.batch
    with bench.machine.open(bench.source, settings, costs) as engine:
        for request in make_requests(lengths, bench.source.config.vocab_size, 0):
            engine.add(request)
        totals = summarise(list(engine.steps()))
        return {
            **totals, "tokens_per_s": run.batch * run.output / totals["wall_s"], "preemption": settings.preemption,
            "max_sequences": engine.deployment.max_sequences,
            "kv_tokens": engine.scheduler.num_blocks * settings.block_size, **engine.budget.lines(),
        }  # fmt: skip


@dataclass(frozen=True)
class Calibration:
    """What the paper's machine did that no datasheet says; see `calibrate`."""

    launch_s: float
    host_link_shared: float
    huffman_bandwidth: float

    def profile(self, base: HardwareProfile) -> HardwareProfile:
        decode = {**base.decode_bandwidth, "huffman": self.huffman_bandwidth}
        return replace(base, host_link_shared=self.host_link_shared, decode_bandwidth=decode)

    def bench(self, base: HardwareProfile, source: Source, devices: int) -> Bench:
        """`source` on as many devices of the machine."""
        machine = Machine(SIMULATED, self.profile(base), devices)
        return Bench(machine, source, theirs=replace(PAPER, eager_launch_s=self.launch_s))


# Three figures of the paper at batch 32, context 4096, Qwen3-Next on 4 x L40.
CALIBRATED_ON = {"vllm-o tokens/s": 54.6, "vllm / vllm-o": 6.0, "fluxmoe / vllm": 0.639}


def calibrate(profile: HardwareProfile, source: Source, halvings: int = 24) -> Calibration:
    """Three numbers from three figures, one after the other, each by bisection.

    launch_s: what a kernel costs the host, from vLLM's speed; host_link_shared: what all devices together get
    from the host, from vLLM-O's; huffman_bandwidth: the decoder's rate, from FluxMoE's.
    """
    vllm = CALIBRATED_ON["vllm / vllm-o"] * CALIBRATED_ON["vllm-o tokens/s"]
    found = Calibration(0.0, profile.host_bandwidth * profile.num_devices, 100e9)

    def speed(system: str, calibration: Calibration) -> float:
        return serve(Run(system, 32, 4096), calibration.bench(profile, source, profile.num_devices))["tokens_per_s"]

    def solve(field: str, low: float, high: float, system: str, wanted: float, falls: bool) -> Calibration:
        for _ in range(halvings):
            middle = (low + high) / 2
            slow = speed(system, replace(found, **{field: middle})) < wanted
            low, high = (low, middle) if slow == falls else (middle, high)
        return replace(found, **{field: (low + high) / 2})

    found = solve("launch_s", 0.0, 1e-3, "vllm", vllm, falls=True)
    found = solve("host_link_shared", 1e9, 200e9, "vllm-o", CALIBRATED_ON["vllm-o tokens/s"], falls=False)
    return solve("huffman_bandwidth", 10e9, 2e12, "fluxmoe", CALIBRATED_ON["fluxmoe / vllm"] * vllm, falls=False)
