"""The systems of the paper's evaluation (§6.1) on the simulator, and ours beside them.

    vllm        experts resident; the KV cache swaps to the host when it is full
    vllm-o      the experts of the last 12.5 % of layers in host memory, prefetched one layer ahead
    fluxmoe     Huffman-coded exponents, 12.8 bits a weight, decoded to a buffer; the same share of each layer
                in the host, dense
    fluxmoe-h   likewise, but the last 12.5 % of layers wholly in the host
    ours        12.0 bits, decoded inside the GEMM, in host memory too; decode steps as graphs; recompute where
                KV runs out

    ours-eager  ours, with the paper's launches and swapping: what decoding in the GEMM is worth alone

Which experts are in the host where: `alpha`, the share on the device (1 in Exp#1; 0.875 in Exp#2).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fluxmoe.models.config import ModelConfig
from fluxmoe.runtime.config import EngineConfig
from fluxmoe.runtime.cost_model import FORMAT_BITS, CostParameters
from fluxmoe.runtime.hardware import HardwareProfile
from fluxmoe.runtime.metrics import summarise
from fluxmoe.runtime.simulator import SimEngine

from .workloads import Lengths, make_requests

PAPER = CostParameters(bits={**FORMAT_BITS, "huffman": 12.8}, eager=True)
OURS = CostParameters()
# Of a request's context, what it generates: a conversation whose history is most of it. The paper does not say.
OUTPUT_SHARE = 0.25
SYSTEMS = ("vllm", "vllm-o", "fluxmoe", "fluxmoe-h", "ours-eager", "ours")


@dataclass(frozen=True)
class Run:
    """One simulated run. budget: bytes of a device, None for 90 % of it."""

    system: str
    model: ModelConfig
    devices: int
    batch: int
    context: int
    alpha: float = 1.0
    budget: int | None = None


def settings_of(run: Run, theirs: CostParameters = PAPER) -> tuple[EngineConfig, CostParameters]:
    """How a system serves. theirs: costs of the paper's systems."""
    offloads = run.alpha < 1
    common = dict(
        device="cpu", max_batch=run.batch, max_batched_tokens=2048, max_context=run.context, budget_bytes=run.budget,
        min_kv_tokens=run.context,
    )  # fmt: skip
    paper = dict(common, preemption="swap")
    if run.system == "vllm":
        return EngineConfig(**paper, placement="resident"), theirs
    if run.system == "vllm-o":
        return EngineConfig(**paper, placement="offload", alpha=0.875), theirs
    if run.system in ("fluxmoe", "fluxmoe-h"):
        formats = dict(expert_format="huffman", host_format="dense" if offloads else None)
        name = "hybrid" if run.system == "fluxmoe-h" else "balanced" if offloads else "packed"
        return EngineConfig(**paper, **formats, placement=name, alpha=run.alpha if offloads else None), theirs
    if run.system in ("ours", "ours-eager"):
        name = "balanced" if offloads else "packed"
        where = dict(placement=name, alpha=run.alpha if offloads else None, expert_format="planar12")
        if run.system == "ours-eager":
            return EngineConfig(**paper, **where), theirs
        return EngineConfig(**common, **where, preemption="recompute"), OURS
    raise ValueError(f"unknown system {run.system!r}")


def requests_of(run: Run) -> list:
    output = max(1, int(run.context * OUTPUT_SHARE))
    return make_requests([Lengths(0.0, run.context - output, output)] * run.batch, run.model.vocab_size, 0)


def simulate(run: Run, profile: HardwareProfile, theirs: CostParameters = PAPER) -> dict:
    """Totals of a run, `tokens_per_s` of output; BudgetError where the system cannot start."""
    settings, parameters = settings_of(run, theirs)
    engine = SimEngine(run.model, profile, settings, parameters, run.devices)
    totals = summarise(list(engine.steps(requests_of(run))))
    generated = run.batch * max(1, int(run.context * OUTPUT_SHARE))
    lines = engine.budget.lines()
    return {
        **totals, "tokens_per_s": generated / totals["wall_s"], "kv_tokens": engine.scheduler.num_blocks * 32,
        "max_sequences": engine.deployment.max_sequences, **lines,
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

    @property
    def parameters(self) -> CostParameters:
        return replace(PAPER, eager_launch_s=self.launch_s)


# Three figures of the paper at batch 32, context 4096, Qwen3-Next on 4 x L40.
CALIBRATED_ON = {"vllm-o tokens/s": 54.6, "vllm / vllm-o": 6.0, "fluxmoe / vllm": 0.639}


def calibrate(profile: HardwareProfile, model: ModelConfig, halvings: int = 24) -> Calibration:
    """Three numbers from three figures, one after the other, each by bisection.

    launch_s: what a kernel costs the host, from vLLM's speed; host_link_shared: what all devices together get
    from the host, from vLLM-O's; huffman_bandwidth: the decoder's rate, from FluxMoE's.
    """
    vllm = CALIBRATED_ON["vllm / vllm-o"] * CALIBRATED_ON["vllm-o tokens/s"]
    found = Calibration(0.0, profile.host_bandwidth * profile.num_devices, 100e9)

    def speed(system: str, calibration: Calibration) -> float:
        run = Run(system, model, profile.num_devices, 32, 4096)
        return simulate(run, calibration.profile(profile), calibration.parameters)["tokens_per_s"]

    def solve(field: str, low: float, high: float, system: str, wanted: float, falls: bool) -> Calibration:
        for _ in range(halvings):
            middle = (low + high) / 2
            slow = speed(system, replace(found, **{field: middle})) < wanted
            low, high = (low, middle) if slow == falls else (middle, high)
        return replace(found, **{field: (low + high) / 2})

    found = solve("launch_s", 0.0, 1e-3, "vllm", vllm, falls=True)
    found = solve("host_link_shared", 1e9, 200e9, "vllm-o", CALIBRATED_ON["vllm-o tokens/s"], falls=False)
    return solve("huffman_bandwidth", 10e9, 2e12, "fluxmoe", CALIBRATED_ON["fluxmoe / vllm"] * vllm, falls=False)
