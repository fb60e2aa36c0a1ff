"""What this machine has, what will work here, what is missing and how to get it."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from fluxmoe.runtime.devices import HOST
from fluxmoe.runtime.hardware import HardwareProfile
from fluxmoe.runtime.memory.budget import format_bytes

from ..lib.args import option
from ..lib.models import PRESETS, preset_config
from ..lib.results import code_digest, cores, device_name, output_file, version_of, write_json
from .reproduce import hardware_folder

# Package → what does not work without it, and how to get it.
_PEERS = {
    "transformers": ("versus --transformers", "pip install transformers"),
    "matplotlib": ("commands that draw a figure", "pip install matplotlib"),
    "pandas": ("commands that draw a figure", "pip install pandas"),
    "tokenizers": ("text as prompts, chat", "pip install tokenizers"),
    "pytest": ("make test, bench tests", "pip install pytest"),
    "liger_kernel": ("bench moe --providers liger", "pip install liger-kernel"),
    "triton_kernels": ("bench moe --providers triton_kernels", "it is in Triton's repository, python/triton_kernels"),
    "fla": ("bench delta-net beside FLA", "pip install flash-linear-attention"),
    "cuda": ("experts that move on a GPU", "pip install cuda-python"),
}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    json: Path | None = option("save the answer", None, parse=output_file, metavar="FILE")


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, whether it will work (None: it says only what there is), and what to do."""

    what: str
    found: str
    works: bool | None = None
    remedy: str = ""


def machine() -> list[Finding]:
    here, spill = Path.cwd(), tempfile.gettempdir()
    found = [
        Finding("processor", f"{device_name('cpu')}, {cores()} cores for this process"),
        Finding("memory", format_bytes(HOST.total_bytes())),
        Finding("disk", f"{format_bytes(shutil.disk_usage(here).free)} free in {here}"),
        Finding("spilling", f"{format_bytes(shutil.disk_usage(spill).free)} free in {spill} (--disk-dir for another)"),
        Finding("code", f"{code_digest()}, Python {platform.python_version()}"),
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            name = torch.cuda.get_device_name(index)
            found.append(Finding("GPU", f"{name}, {format_bytes(free)} of {format_bytes(total)} free", True))
    else:
        why = "torch was built without CUDA" if torch.version.cuda is None else "no driver or device answers"
        found.append(Finding("GPU", f"none: {why}", False, "the CPU serves; plan and --device sim simulate GPUs"))
    return found


def packages() -> list[Finding]:
    found = []
    for name in ("torch", "triton", "numba", "numpy"):
        version, remedy = version_of(name), "pip install -r requirements.txt"
        found.append(Finding(name, version or "not installed", bool(version), "" if version else remedy))
    for name, (what, remedy) in _PEERS.items():
        if importlib.util.find_spec(name):
            found.append(Finding(name, "installed", True))
        else:
            found.append(Finding(name, f"not installed: no {what}", False, remedy))
    return found


def profile() -> Finding:
    path = Path("results/measured") / hardware_folder(Path("results")) / "profile.json"
    if not path.exists():
        remedy = f"fluxmoe profile --out {path}"
        return Finding("profile", "this machine was not measured: balanced placements measure roughly", False, remedy)
    rates = HardwareProfile.load(path)
    copies = f"{rates.host_bandwidth / 1e9:.1f} GB/s of host copies"
    return Finding("profile", f"{path}: {rates.memory_bandwidth / 1e9:.1f} GB/s of memory, {copies}", True)


def presets() -> Finding:
    """Which made models fit in memory here."""
    free = HOST.free_bytes()
    fit = [name for name in PRESETS if preset_config(name).expert_bytes_total < free]
    return Finding("presets", f"{', '.join(fit)} fit in the memory that is free", bool(fit))


def run(args: Arguments) -> None:
    findings = [*machine(), *packages(), profile(), presets()]
    for each in findings:
        mark = {True: "ok", False: "--", None: ""}[each.works]
        print(f"{mark:>2} {each.what:<16} {each.found}" + (f"\n{'':20}→ {each.remedy}" if each.remedy else ""))
    if args.json:
        write_json(args.json, [asdict(each) for each in findings])
