"""How fast a disk gives files."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fluxmoe.kernels.host_memory import PAGE
from fluxmoe.runtime.devices import HOST
from fluxmoe.runtime.experts.disk import READERS

_BLOCK = 8 << 20


def read_rate(paths: Sequence[Path], seconds: float = 1.5, direct: bool = True) -> float | None:
    """Bytes/s of READERS reads of 8 MiB at a time, at random places of files. direct: past the page cache; None where
    there are no such reads."""
    try:
        files = [os.open(path, os.O_RDONLY | (getattr(os, "O_DIRECT", 0) if direct else 0)) for path in paths]
    except OSError:
        return None
    until, begin = time.perf_counter() + seconds, time.perf_counter()

    def read(seed: int) -> int:
        rng, buffer, got = random.Random(seed), HOST.empty(_BLOCK).numpy(), 0
        while not got or time.perf_counter() < until:
            file = rng.choice(files)
            at = rng.randrange(max(1, os.fstat(file).st_size - _BLOCK)) // PAGE * PAGE
            got += os.preadv(file, [buffer.data], at)
        return got

    try:
        with ThreadPoolExecutor(READERS) as readers:
            total = sum(readers.map(read, range(READERS)))
    except OSError:
        return None
    finally:
        for file in files:
            os.close(file)
    return total / (time.perf_counter() - begin)
