"""CPU twins of the kernels: numba-compiled, memory-bound at decode sizes, batch-invariant."""

import os

# What a process whose copy thread needs a core is started with. An idle thread of libgomp spins for milliseconds by
# default and so takes that core; without spinning every kernel launch pays a wake-up. Measured on two cores, all
# experts streamed, 4 sequences: 37 ms an iteration by default, 28 never spinning (but 20 instead of 11 with everything
# resident), 29 at this count (10 resident). libgomp, which numba shares with torch, reads it when it is loaded: a
# process that has torch already can set it only for processes that it starts.
ENVIRONMENT = {"GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "2000")}
