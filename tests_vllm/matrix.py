"""`make vllm-matrix`: `make vllm-test` with several versions of vLLM, and a newer one's signatures, which is only read.

    python matrix.py [VERSION …]    each in an environment of its own, removed after: 4 GB and some minutes each

Ends with a line a version.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# With builds for the CPU; the last one's environment reads the newer one's files.
VERSIONS = ("0.30.0", "0.31.0", "0.32.0")
READ = "vllm==0.33.0"
HERE = Path(__file__).parent


def run(*command: str, **environment: str) -> bool:
    return subprocess.run(command, cwd=HERE.parent, env={**os.environ, **environment}).returncode == 0


def passes(version: str) -> dict[str, bool]:
    """By version: what runs, and with the last one what is read."""
    with tempfile.TemporaryDirectory(prefix="vllm-") as folder:
        found = {version: run("make", "vllm-test", f"VLLM={folder}", f"VLLM_VERSION={version}")}
        if version == VERSIONS[-1]:
            found[f"{READ}, read"] = reads(str(Path(folder, "bin", "python")), folder)
        return found


def reads(python: str, folder: str) -> bool:
    """Whether the signatures in READ's wheel, which goes to `folder`, are those that we know."""
    run(python, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, READ)
    wheels = [str(path) for path in Path(folder).glob("*.whl")]
    tests = ("-m", "pytest", "--override-ini", "addopts=-q", f"{HERE.name}/test_signatures.py")
    return bool(wheels) and run(python, *tests, VLLM_WHEEL=wheels[0])


def main(*versions: str) -> None:
    rows: dict[str, bool] = {}
    for version in versions or VERSIONS:
        begin = time.monotonic()
        rows |= passes(version)
        print(f"{version}: {(time.monotonic() - begin) / 60:.1f} minutes", flush=True)
    print("\n".join(f"{name}: {'passed' if passed else 'FAILED'}" for name, passed in rows.items()))
    sys.exit(not all(rows.values()))


if __name__ == "__main__":
    main(*sys.argv[1:])
