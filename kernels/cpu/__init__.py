"""CPU twins of the kernels: numba-compiled, memory-bound at decode sizes, batch-invariant."""
