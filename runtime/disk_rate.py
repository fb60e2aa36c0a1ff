"""How fast a disk gives files."""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import xxhash
from fluxmoe.kernels.host_memory import PAGE
from fluxmoe.kernels.packing.expert_file import pages

from .devices import HOST
from .experts.disk import READERS

_BLOCKS = (8 << 20,)
# Memory beyond caches. Read to the same 8 MiB over and over a disk seems faster: 2.95 GB/s of one read in flight, 2.6
# of four, 2.3 of eight, where to memory as a cache of experts has it they are 2.1, 2.3 and 2.2: LOG.md.
BEYOND_CACHES = 512 << 20


def read_rate(
    paths: Sequence[Path], seconds: float = 1.5, direct: bool = True, sizes: Sequence[int] = _BLOCKS,
    busy: bool = False, memory: int = 0,
) -> float | None:  # fmt: skip
    """Bytes/s of READERS reads at a time, of `sizes` by chance, at random places of files. direct: past the page cache;
    None where there are no such reads. busy: what is read is summed up, as experts are, while products keep all cores
    busy. memory: bytes that reads fill in turn, or a little more: one block a reader at least."""
    try:
        files = [os.open(path, os.O_RDONLY | (getattr(os, "O_DIRECT", 0) if direct else 0)) for path in paths]
    except OSError:
        return None
    block = pages(max(sizes))
    places = range(0, max(memory, READERS * block), block)
    room = HOST.empty(len(places) * block).fill_(0).numpy()  # filled: pages are taken before the clock starts
    until, begin = time.perf_counter() + seconds, time.perf_counter()

    def read(seed: int) -> int:
        rng, mine, got = random.Random(seed), itertools.cycle(places[seed::READERS]), 0
        while not got or time.perf_counter() < until:
            file, part = rng.choice(files), room[next(mine) :][: rng.choice(sizes)].data
            at = rng.randrange(max(1, os.fstat(file).st_size - len(part))) // PAGE * PAGE
            got += os.preadv(file, [part], at)
            if busy:
                xxhash.xxh3_64_intdigest(part)
        return got

    factor = torch.ones(512, 512, device="cpu")
    product = torch.empty_like(factor)
    try:
        with ThreadPoolExecutor(READERS) as readers:
            reads = [readers.submit(read, seed) for seed in range(READERS)]
            while busy and time.perf_counter() < until:
                torch.mm(factor, factor, out=product)
            total = sum(each.result() for each in reads)
    except OSError:
        return None
    finally:
        for file in files:
            os.close(file)
    return total / (time.perf_counter() - begin)
