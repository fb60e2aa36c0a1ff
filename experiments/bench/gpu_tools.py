"""What NVIDIA's and torch's tools say of our kernels, as rows: Nsight Compute, compute-sanitizer, torch's profiler.

    fluxmoe bench tools --tool ncu --out results/measured/<gpu>/ncu
    fluxmoe bench tools --tool sanitizer --out results/measured/<gpu>/sanitizer
    fluxmoe bench tools --tool trace --out results/measured/<gpu>/trace --preset gpu-short

ncu: memory and compute throughput, registers and occupancy of kernels at points of serving. sanitizer: memory errors
and races of all of them on small shapes, a process a tool. trace: experts stream while layers compute; how much of the
copies from the host lies under kernels, from a trace that is kept (trace.json.gz, for ui.perfetto.dev). A tool that is
not there is a row that says so. `kernels` runs the kernels once, for the tools.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from fluxmoe.kernels.formats import DEFAULT_COMPRESSED, DENSE, fused_formats
from fluxmoe.kernels.triton.gate import GateWeights, norm_and_route
from fluxmoe.kernels.triton.routing import Router
from fluxmoe.runtime.memory.budget import parse_bytes

from ..lib.args import option
from ..lib.models import PRESETS, checkpoint_source, preset_source
from ..lib.serve import placement_names
from ..lib.sweep import AbsentError, WrongError, say
from .attention import SHAPES as ATTENTION_SHAPES
from .attention import make_case
from .delta_net import DIMS, Case
from .engine import Load, OpenEngine
from .moe import Layer, Ours, decode_room, format_of, router_logits
from .shapes import SHAPES
from .timing import GpuBench, require_gpu

_FORMATS = (DENSE, *sorted(fused_formats("triton")))
DECODED = f"{DEFAULT_COMPRESSED} decoded first"
KERNELS = (*_FORMATS, DECODED, "gate", "attention", "delta_net")
METRICS = {
    "gpu__time_duration.sum": "duration",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "sm_percent",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
    "launch__registers_per_thread": "registers",
}
# Which of the launches of each is meant.
_NAMES = {**dict.fromkeys(_FORMATS, "_grouped_gemm_kernel"), DECODED: "_decode_experts_kernel",
          "gate": "_gate_kernel", "attention": "_decode_kernel", "delta_net": "_recurrent_kernel"}  # fmt: skip
_FOLDERS = ("/usr/local/cuda/bin", "/opt/nvidia/nsight-compute", "/usr/local/cuda/compute-sanitizer")


def run_kernel(name: str, device: torch.device, small: bool) -> None:
    """Launch one of KERNELS once, as serving does, or on the smallest shape."""
    shape, tokens = (SHAPES["tiny"], 3) if small else (SHAPES["qwen3_30b"], 32)
    if name in (*_FORMATS, DECODED):
        layer = Layer(shape, device)
        ours = Ours(shape, tokens, device, format_of(name), room=decode_room(name) or 0)
        x = torch.randn(tokens, shape.hidden, dtype=torch.bfloat16, device=device)
        ours.run(layer, x, router_logits(shape, tokens, "uniform", 0, device))
    elif name == "gate":
        hidden = torch.randn(tokens, shape.hidden, dtype=torch.bfloat16, device=device)
        norm, matrix = torch.ones(shape.hidden, device=device), hidden.new_ones(shape.experts, shape.hidden)
        router = Router(tokens, shape.experts, shape.top_k, True, device)
        norm_and_route(hidden, GateWeights(norm, matrix, None), 1e-6, router, torch.empty_like(hidden), 16)
    elif name == "attention":
        sizes = ("tiny", 2, 1, 40) if small else ("qwen3_30b", 32, 1, 4096)
        make_case(ATTENTION_SHAPES[sizes[0]], *sizes[1:], device).ours()
    else:
        Case(DIMS, *((1, 3) if small else (32, 1)), device).ours()
    if device.type == "cuda":
        torch.cuda.synchronize()


def find_tool(name: str) -> str:
    """Path of a tool; AbsentError if it is not installed."""
    found = shutil.which(name) or next(
        (str(path) for folder in _FOLDERS for path in sorted(Path(folder).rglob(name)) if path.is_file()), None
    )
    if found is None:
        raise AbsentError(f"{name} is not installed")
    return found


def _ours(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "fluxmoe", "bench", "tools", "--tool", "kernels", *arguments]


def ncu(name: str) -> dict[str, object]:
    """Columns: what Nsight Compute says of the kernel's first launch."""
    command = [find_tool("ncu"), "--csv", "--metrics", ",".join(METRICS), "--kernel-name", _NAMES[name]]
    done = subprocess.run(
        [*command, "--launch-count", "1", *_ours("--only", name)], capture_output=True, text=True, timeout=120
    )
    columns = parse_ncu(done.stdout)
    if not columns:
        raise RuntimeError(f"ncu gave no metrics: {(done.stdout + done.stderr)[-300:]}")
    return columns


def parse_ncu(output: str) -> dict[str, object]:
    """ncu's CSV, a metric a line, → columns by our names, values with their units."""
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    rows = csv.DictReader(io.StringIO("\n".join(lines[start:])))
    return {
        METRICS[row["Metric Name"]]: f"{row['Metric Value']} {row['Metric Unit']}".strip()
        for row in rows
        if row.get("Metric Name") in METRICS
    }


def sanitizer(tool: str) -> dict[str, object]:
    """Columns of one of compute-sanitizer's tools on small shapes; WrongError if it finds anything."""
    command = [find_tool("compute-sanitizer"), "--tool", tool, *_ours("--small")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", done.stdout + done.stderr)
    if not found:
        raise RuntimeError(f"compute-sanitizer said nothing of errors: {(done.stdout + done.stderr)[-300:]}")
    if int(found[1]):
        raise WrongError(f"{found[1]} errors: {done.stdout[:300]}")
    return {"errors": 0}


Spans = list[tuple[float, float]]


def covered(spans: Spans) -> float:
    """How long any of spans (begin, end) runs."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def overlap(one: Spans, other: Spans) -> float:
    """How long both kinds of spans run at once."""
    return covered(one) + covered(other) - covered(one + other)


def overlap_columns(events: list[dict]) -> dict[str, object]:
    """Of a Chrome trace: µs of copies from the host, of kernels, and of both at once."""
    spans = [(e["cat"], e["name"], (e["ts"], e["ts"] + e["dur"])) for e in events if e.get("ph") == "X" and "cat" in e]
    copies = [span for cat, name, span in spans if cat == "gpu_memcpy" and "HtoD" in name]
    kernels = [span for cat, _, span in spans if cat == "kernel"]
    copied, both = covered(copies), overlap(copies, kernels)
    return {
        "copy_us": copied, "compute_us": covered(kernels), "both_us": both,
        "share_of_copies_under_compute": both / copied if copied else "", "copies": len(copies),
        "kernels": len(kernels),
    }  # fmt: skip


def trace(args: Arguments, placement: str, device: torch.device) -> dict[str, object]:
    """Columns of a few decode steps of an engine whose experts stream."""
    from torch.profiler import ProfilerActivity, profile

    load = Load(sequences=(4,), prompt_tokens=16, output_tokens=8, max_batched_tokens=256, budget=args.budget)
    source = checkpoint_source(args.model) if args.model else preset_source(args.preset, args.checkpoints)
    served = OpenEngine(load, source, device)
    served.engine(placement, False)
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        served.columns(placement, False, 4)
    served.close()
    path = args.out / f"trace-{placement.replace(':', '-')}.json.gz"  # which the profiler compresses, as it is called
    profiler.export_chrome_trace(str(path))
    return overlap_columns(json.loads(gzip.decompress(path.read_bytes()))["traceEvents"])


def points(args: Arguments, device: torch.device) -> Iterable[tuple[dict, Callable[[], dict]]]:
    """(point, work) of each row."""
    if args.tool == "ncu":
        for name in KERNELS:
            yield {"kernel": name}, partial(ncu, name)
    elif args.tool == "sanitizer":
        for tool in ("memcheck", "racecheck"):
            yield {"tool": tool}, partial(sanitizer, tool)
    else:
        for placement in args.placements:
            yield {"placement": placement}, partial(trace, args, placement, device)


_STREAMED = tuple(f"{where}+{DEFAULT_COMPRESSED}" for where in ("balanced:0.5", "host"))


@dataclass(frozen=True, kw_only=True)
class Arguments:
    tool: str = option("kernels: run them once, for the others", choices=("ncu", "sanitizer", "trace", "kernels"))
    only: tuple[str, ...] = option("kernels: which", KERNELS, choices=KERNELS)
    small: bool = option("kernels: the smallest shapes", False)
    model: str | None = option("trace: checkpoint (default: the preset)", None, metavar="DIR")
    preset: str = option("trace: a model that is made if needed", "gpu-short", choices=tuple(sorted(PRESETS)))
    checkpoints: Path = option("where presets keep their model", Path("checkpoints"))
    placements: tuple[str, ...] = placement_names("trace: which", _STREAMED)
    budget: int | None = option("trace: device bytes for everything (default: 4GiB)", 4 << 30, parse=parse_bytes)
    rehearse: bool = option("no GPU: interpreted on the CPU", False)
    out: Path = option("folder of the results; kernels has none", Path("results/measured/tools"), metavar="DIR")


def run(args: Arguments) -> None:
    device = require_gpu(args.rehearse)
    if args.tool == "kernels":
        for name in args.only:
            run_kernel(name, device, args.small)
        return
    with GpuBench(rehearse=args.rehearse, out=args.out).rows(f"bench tools --tool {args.tool}") as results:
        for point, work in points(args, device):
            say(results.measure(work, **point))
        results.finish()
