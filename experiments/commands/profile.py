"""Measure what a machine can move and compute, as placements, planner and simulator need it.

    fluxmoe profile --out my-machine.json

Everything is measured in under a minute: reads of device memory, dense products, copies from host memory by size and
by number of streams, decoders of each lossless format to a buffer, reads of a file past the page cache, launches. What
one device cannot tell (links between devices) is left at 0, and `sources` says how each number came about.
"""

from __future__ import annotations

import tempfile
import threading
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from fluxmoe.kernels.cpu import gemm
from fluxmoe.kernels.cpu.copy import stream_copy
from fluxmoe.kernels.cpu.gemm import default_threads
from fluxmoe.kernels.cpu.tile import kind_of
from fluxmoe.kernels.formats import codec_of, compressed_formats
from fluxmoe.runtime.devices import HOST, resolve_device
from fluxmoe.runtime.disk_rate import BEYOND_CACHES, read_rate
from fluxmoe.runtime.experts.placement import Tier
from fluxmoe.runtime.hardware import HardwareProfile, best_seconds, measure_bandwidths, measure_links

from ..bench.cpu_moe import peak_flops
from ..lib.args import option
from ..lib.page_cache import drop_cached
from ..lib.results import output_file, provenance, write_json

_SIZES = (64 << 10, 1 << 20, 16 << 20, 128 << 20)


@dataclass(frozen=True)
class Effort:
    """How much is moved and decoded. host_bytes: more than caches hold, for experts come from all over host memory;
    weight: rows and columns of what is decoded."""

    host_bytes: int = 512 << 20
    file_bytes: int = 256 << 20
    weight: int = 4096


FULL, REHEARSAL = Effort(), Effort(128 << 20, 32 << 20, 256)


def matmul_flops(device: torch.device) -> float:
    """Dense bf16 products on a GPU, our fp32-accumulating bf16 kernel on the CPU, FLOP/s."""
    if device.type == "cpu":
        return peak_flops(default_threads())
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=device) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * 8192**3 / best_seconds(lambda: torch.mm(a, b, out=out), device, 10)


def host_copies(device: torch.device, host_bytes: int) -> dict[str, float]:
    """Bytes/s of copies from (pinned) host memory to one place, by size, and of the largest on two streams at once."""
    rates = {}
    host = torch.ones(host_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for size in _SIZES:
        target = torch.empty(size, dtype=torch.uint8, device=device)
        pieces = host.split(size)

        def copy_all() -> None:
            for piece in pieces:  # noqa: B023
                if device.type == "cpu":
                    stream_copy(target, piece)  # noqa: B023
                else:
                    target.copy_(piece, non_blocking=True)  # noqa: B023

        rates[str(size)] = host_bytes / best_seconds(copy_all, device)
    if device.type == "cuda":
        half, streams = _SIZES[-1] // 2, [torch.cuda.Stream() for _ in range(2)]

        def both() -> None:
            for i, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    target[i * half : (i + 1) * half].copy_(host[i * half : (i + 1) * half], non_blocking=True)

        rates[f"{_SIZES[-1]} on 2 streams"] = _SIZES[-1] / best_seconds(both, device, 10)
    return rates


def copy_overlap(device: torch.device, host_bytes: int) -> float:
    """Of a copy from the host, the share that hides under compute of the same length: (compute + copy - both) / copy.

    Compute is an expert GEMM at a few rows, bound by memory as in decode. A GPU copies by an engine of its own, and is
    taken at 1.
    """
    if device.type == "cuda":
        return 1.0
    rows, n, k = 4, 2048, 2048
    scratch = gemm.Scratch(rows, default_threads(), k)
    weights = [torch.empty(gemm.arranged_bytes(n, k, torch.bfloat16), dtype=torch.uint8) for _ in range(24)]
    for block in weights:
        gemm.arrange(torch.randn(n, k).bfloat16(), block)
    x, y = torch.randn(rows, k), torch.empty(rows, n)

    def compute() -> None:
        for block in weights:
            gemm.linear(x, block, n, kind_of(torch.bfloat16), y, scratch)

    host, target = torch.ones(host_bytes, dtype=torch.uint8), torch.empty(1 << 20, dtype=torch.uint8)
    pieces = host.split(target.numel())

    def copy(count: int) -> None:
        for piece in pieces[:count]:
            stream_copy(target, piece)

    compute_s = best_seconds(compute, device)
    count = max(1, int(len(pieces) * min(1.0, compute_s / best_seconds(lambda: copy(len(pieces)), device))))
    copy_s = best_seconds(lambda: copy(count), device)

    def both() -> None:
        thread = threading.Thread(target=copy, args=(count,))
        thread.start()
        compute()
        thread.join()

    both_s = float(np.median([best_seconds(both, device) for _ in range(5)]))
    return min(1.0, max(0.0, (compute_s + copy_s - both_s) / min(compute_s, copy_s)))


def decode_seconds(device: torch.device, rows: int, columns: int, calls: int = 1) -> dict[str, float]:
    """Format → seconds of decoding a tensor, the mean of `calls`; on a CPU by one thread, as loads decode."""
    weight = (torch.randn(rows, columns) * 0.02).bfloat16()
    out, seconds = torch.empty(rows, columns, dtype=torch.bfloat16, device=device), {}
    for name, codec in ((name, codec_of(name)) for name in compressed_formats()):
        packed = codec.encode(codec.fitting(weight)).to(device)

        def decode() -> None:
            for _ in range(calls):
                codec.decode(packed, out, parallel=False)  # noqa: B023

        seconds[name] = best_seconds(decode, device) / calls
    return seconds


def decoders(device: torch.device, size: int) -> dict[str, float]:
    """Format → bytes/s of bf16 put out."""
    return {name: 2 * size**2 / seconds for name, seconds in decode_seconds(device, size, size).items()}


def disk_reads(directory: Path, file_bytes: int) -> float:
    """Bytes/s of a file, read as the disk tier reads: past the page cache, where the file system allows that."""
    with tempfile.NamedTemporaryFile(dir=directory, prefix="fluxmoe-profile-") as file:
        chunk = HOST.empty(32 << 20).random_()
        for _ in range(file_bytes // chunk.numel()):
            file.write(chunk.numpy().data)
        file.flush()
        paths = [Path(file.name)]
        drop_cached(paths)
        read = partial(read_rate, paths, memory=BEYOND_CACHES)
        return read() or read(direct=False) or 0.0


def launch_seconds(device: torch.device) -> float:
    """One tiny operation after another: in a CUDA graph, or a numba kernel over all threads."""
    if device.type == "cpu":
        from fluxmoe.kernels.cpu.ops import _add

        row = torch.zeros(1, 16)
        at = row.data_ptr()
        return best_seconds(lambda: [_add(at, at, 16, *row.shape) for _ in range(200)], device) / 200
    x = torch.zeros(16, device=device)
    x.add_(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(200):
            x.add_(1)
    return best_seconds(graph.replay, device, 10) / 200


def measure(device: torch.device, disk_dir: Path, effort: Effort = FULL) -> HardwareProfile:
    """The profile of this machine."""
    made_by, memory = provenance(device.type), HOST.total_bytes()
    copies = host_copies(device, effort.host_bytes)
    return HardwareProfile(
        name=made_by["hardware"],
        device=device.type,
        num_devices=1,
        memory_bytes=memory if device.type == "cpu" else torch.cuda.get_device_properties(device).total_memory,
        host_memory_bytes=memory,
        memory_bandwidth=measure_bandwidths(device)[Tier.RESIDENT],
        matmul_flops=matmul_flops(device),
        host_bandwidth=max(copies.values()),
        host_latency_s=_SIZES[0] / copies[str(_SIZES[0])],
        copy_overlap=copy_overlap(device, effort.host_bytes),
        kernel_host_bandwidth=measure_links(device).read,
        decode_bandwidth=decoders(device, effort.weight),
        decode_latency_s=max(decode_seconds(device, 32, 64, 50).values()),
        disk_bandwidth=disk_reads(disk_dir, effort.file_bytes),
        launch_s=launch_seconds(device),
        measured=effort == FULL,
        sources={"host_copies_bytes_per_s": ", ".join(f"{size}: {rate:.3g}" for size, rate in copies.items())},
        provenance=made_by,
    )


@dataclass(frozen=True, kw_only=True)
class Arguments:
    device: str = option("what is measured", "auto", choices=("auto", "cpu", "cuda"))
    disk_dir: Path = option("where the disk tier would spill", Path(tempfile.gettempdir()), metavar="DIR")
    rehearse: bool = option("move next to nothing: rates mean nothing", False)
    out: Path = option("the profile", parse=output_file, metavar="FILE")


def run(args: Arguments) -> None:
    profile = measure(resolve_device(args.device), args.disk_dir, REHEARSAL if args.rehearse else FULL)
    write_json(args.out, asdict(profile))
    rates = {"reads": profile.memory_bandwidth, "host copies": profile.host_bandwidth, "disk": profile.disk_bandwidth}
    listed = ", ".join(f"{name} {rate / 1e9:.2f} GB/s" for name, rate in rates.items())
    products = f"products {profile.matmul_flops / 1e9:.0f} GFLOP/s"
    print(f"{profile.name}: {listed}, {products}, launch {profile.launch_s * 1e6:.1f} µs")
    for name, rate in profile.decode_bandwidth.items():
        print(f"  decodes {name:>9} at {rate / 1e9:.1f} GB/s of output")
