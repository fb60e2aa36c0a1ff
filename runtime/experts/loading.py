"""Experts that come from files of blocks into a store: read to where they stay, summed up on the way, copied nowhere.

One pool of threads has all layers' experts: no layer waits for the one before. Where the files are in the page cache,
that takes what a copy of them takes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from fluxmoe.kernels.expert_table import DOWN, GATE_UP
from fluxmoe.kernels.packing import PackingError
from fluxmoe.kernels.packing.expert_file import Check, ExpertFile
from torch import Tensor

from .disk import READERS, StoreError
from .store import ExpertStore

# (layer, expert, file): stores an expert whose blocks cannot be read to where it will lie.
PutThrough = Callable[[int, int, ExpertFile], None]


@contextmanager
def loading(
    store: ExpertStore, files: Mapping[int, ExpertFile], check: Check, put_through: PutThrough,
    done: Callable[[], object] = lambda: None,
) -> Iterator[None]:  # fmt: skip
    """All experts of the layers in `files` that `store` wants: they come while the context's body runs, which must
    leave the store alone, and are there at its end.

    put_through is called in this thread, after the body. done: called after each expert, by one thread at a time.
    StoreError naming layer, file and expert where a file cannot be read or is damaged.
    """
    straight: list[tuple[int, int, tuple[Tensor, Tensor]]] = []
    others: list[tuple[int, int]] = []
    for layer, file in files.items():
        for expert in range(file.header.experts):
            if not store.wants(layer, expert):
                continue
            as_stored = store.stored(layer, expert) == file.header.format
            target = store.target(layer, expert) if as_stored else None
            if target is None:
                others.append((layer, expert))
            else:
                straight.append((layer, expert, target))
    one_at_a_time = threading.Lock()

    def read(layer: int, expert: int, target: tuple[Tensor, Tensor]) -> None:
        file = files[layer]
        with _named(layer):
            for d in (GATE_UP, DOWN):
                file.read(expert, d, target[d], check, cached=True)
            recipes = file.recipes(expert)
        with one_at_a_time:
            store.arrived(layer, expert, recipes)
            done()

    with ThreadPoolExecutor(max(READERS, os.cpu_count() or 1), "expert-read") as readers:
        reads = [readers.submit(read, *each) for each in straight]
        try:
            yield
            for each in reads:
                each.result()
            for layer, expert in others:
                with _named(layer):
                    put_through(layer, expert, files[layer])
                done()
        except BaseException:
            readers.shutdown(cancel_futures=True)
            raise


@contextmanager
def _named(layer: int) -> Iterator[None]:
    """Errors of a file are the store's, and say which layer."""
    try:
        yield
    except PackingError as error:
        raise StoreError(f"layer {layer}: {error}") from None
