"""`make vllm-matrix`: the same tests with several versions of vLLM, and a newer one's signatures, which is only read.

    python matrix.py            each version in an environment of its own, removed after: 3 GB and some minutes each

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
PYTEST = ("-m", "pytest", "--override-ini", "addopts=-q")


def run(python: Path | str, *arguments: str, **environment: str) -> bool:
    return subprocess.run([python, *arguments], cwd=HERE.parent, env={**os.environ, **environment}).returncode == 0


def passes(version: str) -> dict[str, bool]:
    """By version: what runs, and with the last one what is read."""
    with tempfile.TemporaryDirectory(prefix=".venv-vllm-", dir=HERE.parent) as folder:
        python = Path(folder, "bin", "python")
        if not (run(sys.executable, "-m", "venv", folder) and run(python, str(HERE / "install.py"), version)):
            return {version: False}
        found = {version: run(python, *PYTEST, HERE.name)}
        if version == VERSIONS[-1]:
            fetched = run(python, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, READ)
            wheels = [str(path) for path in Path(folder).glob("*.whl")]
            signatures = (*PYTEST, f"{HERE.name}/test_signatures.py")
            found[f"{READ}, read"] = fetched and run(python, *signatures, VLLM_WHEEL=wheels[0])
        return found


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
