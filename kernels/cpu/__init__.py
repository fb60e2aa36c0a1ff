"""CPU twins of the kernels: numba-compiled, memory-bound at decode sizes, batch-invariant."""

import os

# Before the first parallel kernel starts the OpenMP runtime. An idle thread of libgomp spins for milliseconds by
# default and so takes the copy thread's core; without spinning every kernel launch pays a wake-up. Measured on two
# cores, all experts streamed, 4 sequences: 37 ms an iteration by default, 28 never spinning (but 20 instead of 11
# with everything resident), 29 at this count (10 resident).
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
